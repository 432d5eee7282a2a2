import csv
import math

import pytest
import torch
from torch import nn

from scanlib import SCAN, GradCAM, LayerCAM, SmallResNet
from scanlib.metrics import (
    Comparison,
    build_class_score,
    compute_auc,
    compute_coherency,
    compute_energy_inside,
    compute_max_sensitivity,
    compute_removal_curves,
    draw_absent_classes,
    make_box_masks,
    make_random_maps,
    randomise_parameters,
)
from scanlib.metrics.compare import METRICS, compare
from scanlib.metrics.definitions import NEEDED
from scanlib.metrics.removal import score_dimmed_images
from scanlib.metrics.road import compute_road
from scanlib.metrics.stability import compute_infidelity

OF_ONE_CLASS = [name for name in METRICS if NEEDED.get(name, ("masks",)) == ("masks",)]


@pytest.fixture
def scene():
    torch.manual_seed(0)
    model = SmallResNet().eval()
    images = torch.rand(5, 3, 32, 32) * 255
    masks = make_box_masks(torch.tensor([[4.0, 4, 20, 20]]).expand(5, -1), (32, 32))
    return model, images, masks


def test_values_equal_those_of_the_metric_functions(scene):
    model, images, masks = scene
    explainer = GradCAM(model, "layer3")
    found = compare(model, images, {"Grad-CAM": explainer}, OF_ONE_CLASS, masks=masks, batch_size=2, progress=False)
    classes = model(images).argmax(1)
    maps = explainer(images, classes)
    score = build_class_score(model, lambda x: x, classes)
    assert list(found.values) == ["Grad-CAM", "random", "centre prior"] and list(found.values["random"]) == OF_ONE_CLASS
    torch.testing.assert_close(found.maps["Grad-CAM"], maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.values["Grad-CAM"]["energy"], compute_energy_inside(maps, masks), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.values["random"]["energy"], compute_energy_inside(make_random_maps(5, (32, 32)), masks))
    deletion, insertion = (compute_auc(curves) for curves in compute_removal_curves(score, images, found.maps["Grad-CAM"]))
    torch.testing.assert_close(found.values["Grad-CAM"]["deletion"], deletion, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.values["Grad-CAM"]["insertion"], insertion, atol=1e-4, rtol=0)
    lerf, morf, both = (found.values["random"][name] for name in ("ROAD LeRF", "ROAD MoRF", "ROAD"))
    torch.testing.assert_close(both, (lerf - morf) / 2)
    assert found.curves["Grad-CAM"]["deletion"].shape == (5, 11) and found.curves["random"]["ROAD MoRF"].shape == (5, 9)
    assert found.values["centre prior"]["sensitivity"].tolist() == [0] * 5  # the same map for every image
    assert found.values["random"]["sensitivity"].min() > 0.5
    assert found.milliseconds["Grad-CAM"] > 0 and "random" not in found.milliseconds
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert "ROAD keeps 10, 20" in found.note
    few = compare(model, images, {"Grad-CAM": explainer}, ["deletion"], progress=False)
    assert "ROAD" not in few.note and "patches of" in few.note


def test_intervals_wins_and_leaders_known_values(scene):
    model, images, _ = scene

    def build_constant(value):
        return lambda x, target: torch.full((len(x), 32, 32), value)

    def measure(inputs):
        return inputs.maps.mean((1, 2)) + torch.tensor([0.0, 0, 0, 0, 1]) * (inputs.maps.mean() < 0.2)

    found = compare(model, images, {"a": build_constant(0.1), "b": build_constant(0.25)}, {"own": (-1, measure)}, progress=False)
    assert found.mean("a", "own") == pytest.approx(0.3) and found.mean("b", "own") == pytest.approx(0.25)
    assert found.win("own")["a"]["b"] == pytest.approx(80) and found.win("own")["b"]["a"] == pytest.approx(20)
    assert found.leader("own") == "b"
    low, high = found.interval("a", "own")
    assert low == pytest.approx(0.1) and high == pytest.approx(0.7)  # one image of five has 1.1; it is drawn up to three times
    assert found.interval("b", "own") == pytest.approx((0.25, 0.25))


def test_interval_covers_the_mean_as_often_as_promised():
    generator, inside = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        values = torch.randn(60, generator=generator)
        low, high = Comparison({"a": {"x": values}}, {"x": 1}, {}, {}, seed=trial).interval("a", "x", draws=500)
        inside += low <= 0 <= high
    assert 180 <= inside <= 199


def test_markdown_and_csv(scene, tmp_path):
    model, images, masks = scene
    explainers = {"Grad-CAM": GradCAM(model, "layer3"), "Layer-CAM": LayerCAM(model, "layer3")}
    found = compare(model, images, explainers, ("energy", "drop %"), masks=masks, progress=False, patch=4)
    text = found.to_markdown(tmp_path / "table.md")
    assert text == (tmp_path / "table.md").read_text("utf-8") == found._repr_markdown_() == str(found)
    lines = text.splitlines()
    assert lines[0] == "| map | energy (high) | drop % (low) | ms per image |" and len(lines) == 8
    assert [sum(line.split(" | ")[column].count("**") for line in lines[2:6]) for column in (1, 2)] == [
        2 * len(found.leaders(metric)) for metric in ("energy", "drop %")
    ]
    assert "centre prior" in lines[5] and lines[5].endswith("| - |")
    assert "5 images" in lines[7] and "seed 0" in lines[7] and "patches of 4 px in 10 steps, fill mean" in lines[7]
    of_places = compare(model, images, explainers, ("energy", "peak"), masks=masks, progress=False)
    assert "removed" not in of_places.note and "5 images, predicted class; seed 0" in of_places.note
    found.to_csv(tmp_path / "table.csv")
    rows = list(csv.DictReader(open(tmp_path / "table.csv", encoding="utf-8")))
    assert [row["explainer"] for row in rows] == ["Grad-CAM", "Layer-CAM", "random", "centre prior"]
    assert float(rows[0]["energy"]) == pytest.approx(found.mean("Grad-CAM", "energy"))
    assert float(rows[0]["energy low"]) <= float(rows[0]["energy"]) <= float(rows[0]["energy high"])


def test_target_is_one_class_or_one_per_image(scene):
    model, images, _ = scene
    explainers = {"own": lambda images, target: target[:, None, None].expand(-1, 32, 32) / 10.0}
    metrics = {"class": (1, lambda inputs: inputs.maps.mean((1, 2)))}
    for target, mean in ((3, 0.3), (torch.arange(5), 0.2)):
        found = compare(model, images, explainers, metrics, target=target, progress=False)
        assert found.mean("own", "class") == pytest.approx(mean)


def test_one_image_without_masks(scene):
    model, images, _ = scene
    one = compare(model, images[:1], {"Grad-CAM": GradCAM(model, "layer3")}, progress=False)
    assert list(one.better) == ["deletion", "insertion", "ROAD", "drop %", "increase %"]  # without masks, no localisation
    assert "Grad-CAM" in str(one)
    assert " ± " not in str(one).splitlines()[2]  # one image has no interval
    assert torch.isnan(torch.tensor(one.interval("Grad-CAM", "deletion"))).all()


def test_scan_explainer_and_its_scanner(tiny, images):
    loader = [(images, torch.arange(4))]
    scanner = SCAN(tiny, "back", image_size=(32, 32), device="cpu").set_preprocess(lambda x: x / 255)
    scanner.set_dataset(loader).generate_decoder().compile().fit(1, verbose=False)
    explainer, classes = scanner.as_explainer(percentile=80), torch.tensor([0, 1, 2, 3])
    maps = explainer(images, classes)
    coherency = compute_coherency(explainer, images, maps, classes)
    sensitivity = compute_max_sensitivity(explainer, images, classes, samples=2)
    assert coherency.shape == (4,) and ((coherency >= 0) & (coherency <= 1)).all()
    assert sensitivity.shape == (4,) and sensitivity.isfinite().all() and sensitivity.max() > 0
    options = {"preprocess": scanner.encoder.preprocess, "target": classes, "batch_size": 2, "progress": False}
    found = compare(tiny, images, {"SCAN": explainer}, ["deletion", "coherency", "sensitivity"], **options)
    torch.testing.assert_close(found.maps["SCAN"], maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.values["SCAN"]["coherency"], coherency, atol=1e-4, rtol=0)
    for call in (
        lambda: compute_coherency(scanner, images, maps, classes),
        lambda: compute_max_sensitivity(scanner, images, classes),
        lambda: randomise_parameters(lambda model: scanner, tiny, images, classes),
        lambda: compare(tiny, images, {"SCAN": scanner}, ["deletion"], **options),
    ):
        with pytest.raises(
            TypeError, match=r"explainer must return maps \(N, H, W\), got tuple from SCAN; .* scanner.as_explainer\(\)"
        ):
            call()
    with pytest.raises(TypeError, match="explainer must return maps .*, got Tensor"):
        compare(tiny, images, {"maps": maps}, ["deletion"], **options)


def test_compare_raises_for_wrong_arguments(scene):
    model, images, masks = scene
    explainers = {"Grad-CAM": GradCAM(model, "layer3")}
    for arguments, message in (
        ({"metrics": ["energie"], "masks": masks}, r"metrics must be among energy, .*, got \['energie'\]"),
        ({"metrics": ["energy"]}, r"masks must be .* for the metrics \['energy'\], got None"),
        (
            {"explainers": {"random": explainers["Grad-CAM"]}},
            r"names of the baselines, which are always included, got \['random'\]",
        ),
        ({"images": images[:0]}, r"images must be a tensor \(N, 3, H, W\) with N >= 1, got \(0, 3, 32, 32\)"),
        ({"target": [1, 2]}, "got 2 classes for 5 images"),
        ({"target": [3]}, "got 1 classes for 5 images"),
        ({"target": 10}, "target class 10 is out of range"),
        ({"target": lambda output: output[0]}, "target must be a class or one per image, got a callable"),
        ({"masks": masks[:4]}, r"masks must have shape \(5, 32, 32\) for these images, got \(4, 32, 32\)"),
        ({"masks": masks & False}, r"masks must not be empty, got no pixel in masks \[0, 1, 2, 3, 4\] of 5"),
        ({"patch": 33}, "patch must be an integer from 1 to 32, got 33"),
        ({"explainers": {"broken": lambda x, target: x[:, 0] / 0 * 0}}, "broken: maps must be finite, got NaN"),
        ({"explainers": {"raw": lambda x, target: x[:, 0]}}, "raw: maps must be in .*, got .* to .*"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(**{"model": model, "images": images, "explainers": explainers, "progress": False} | arguments)
    for arguments, message in (
        ({"images": images[0]}, r"images must be a tensor \(N, 3, H, W\) with N >= 1, got \(3, 32, 32\)"),
        ({"images": images.numpy()}, "images must be a tensor .*, got ndarray"),
        ({"images": images[..., 0]}, "signals and volumes cannot be compared"),
        ({"explainers": [GradCAM(model)]}, "explainers must be a dictionary such as"),
        ({"explainers": {"Grad-CAM": GradCAM}}, "explainers must be a dictionary such as"),
        ({"steps": True}, "steps must be an integer from 1 to 10000, got True"),
        ({"batch_size": 1.5}, "batch_size must be an integer from 1 to inf, got 1.5"),
        ({"ceiling": 0}, "ceiling must be an integer from 1 to inf, got 0"),
        ({"percentiles": []}, r"percentiles must be a list of numbers in \[0, 100\], got \[\]"),
        ({"percentiles": ["a"]}, "percentile must be a number in"),
        ({"steps": 0}, "steps must be an integer from 1 to 10000, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(**{"model": model, "images": images, "explainers": explainers, "progress": False} | arguments)
    model.train()
    with pytest.raises(ZeroDivisionError):
        compare(model, images, {"broken": lambda x, target: 1 / 0}, progress=False)
    assert model.training  # restored after the exception


def test_maps_of_another_size_and_constant_maps(scene):
    model, images, masks = scene
    odd = {"coarse": lambda x, target: x[:, 0, ::4, ::4] / 255, "constant": lambda x, target: torch.ones(len(x), 32, 32)}
    with pytest.warns(UserWarning, match=r"maps of \(8, 8\) are resized"):
        found = compare(model, images, odd, OF_ONE_CLASS, masks=masks, progress=False, steps=2, percentiles=(50,))
    assert found.maps["coarse"].shape == (5, 32, 32)
    assert all(found.values[name][metric].isfinite().all() for name in odd for metric in OF_ONE_CLASS)
    assert found.values["constant"]["energy"].tolist() == pytest.approx([256 / 1024] * 5)


def test_plot_intervals_draws_means_and_intervals(scene):
    import matplotlib.pyplot as plt

    from scanlib.plots import plot_intervals

    model, images, masks = scene
    found = compare(model, images, {"Grad-CAM": GradCAM(model, "layer3")}, ("energy", "drop %"), masks=masks, progress=False)
    figure = plot_intervals(found)
    assert [axis.get_title() for axis in figure.axes] == ["energy (high)", "drop % (low)"]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["Grad-CAM", "random", "centre prior"]
    interval, mean = figure.axes[0].lines[:2]
    assert tuple(interval.get_xdata()) == found.interval("Grad-CAM", "energy")
    assert float(mean.get_xdata()[0]) == found.mean("Grad-CAM", "energy")
    plt.close(figure)


def test_rows_of_nan_neither_lead_nor_win():
    nan = torch.nan
    values = {"broken": [nan, nan, nan], "partly": [1.0, nan, 3.0], "whole": [2.0, 2.0, 5.0]}
    table = Comparison({name: {"deletion": torch.tensor(row)} for name, row in values.items()}, {"deletion": -1}, {}, {})
    assert table.leader("deletion") == "partly" and table.mean("partly", "deletion") == 2
    assert table.win("deletion")["partly"]["whole"] == 100  # on the two images where both have a value
    assert math.isnan(table.win("deletion")["partly"]["broken"])
    low, high = table.interval("partly", "deletion")  # a draw of nan alone is impossible
    assert 1 <= low <= 2 <= high <= 3
    assert all(map(math.isnan, table.interval("broken", "deletion")))
    assert "**2.000 ± 1.000**" in table.to_markdown()
    assert "ms per image" not in table.to_markdown()  # no time was measured
    only = Comparison({"broken": {"deletion": torch.tensor([nan])}}, {"deletion": -1}, {}, {})
    assert only.leader("deletion") == "" and "**" not in only.to_markdown()


@pytest.mark.parametrize("channels", [1, 2, 4, 11])
def test_images_of_any_number_of_channels(channels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images, masks = 255 * torch.rand(3, channels, 24, 40), torch.rand(3, 24, 40) > 0.7
    table = compare(model, images, {"Grad-CAM": GradCAM(model, "0")}, OF_ONE_CLASS, masks=masks, progress=False)
    assert all(value.isfinite().all() for value in table.values["Grad-CAM"].values())


def test_nan_of_a_metric_names_the_explainer(scene):
    model, images, _ = scene
    calls = iter(range(99))
    breaks = lambda images, target: torch.full((len(images), 32, 32), 0.5 if next(calls) < 2 else math.nan)  # noqa: E731
    with pytest.raises(ValueError, match="breaks: maps must be finite"):
        compare(model, images, {"breaks": breaks}, ["sensitivity"], progress=False)


@pytest.mark.parametrize("measure", [compute_removal_curves, score_dimmed_images, compute_infidelity, compute_road])
def test_nan_scores_raise(measure):
    with pytest.raises(ValueError, match="score must return finite"):
        measure(lambda images, index: torch.full((len(images),), math.nan), torch.rand(2, 3, 8, 8), torch.rand(2, 8, 8))


@pytest.mark.parametrize("first", [0, 1])
def test_maps_of_nan_have_no_sensitivity(first):
    calls = iter(range(99))
    explain = lambda images, target: torch.full((len(images), 8, 8), 0.5 if next(calls) < first else math.nan)  # noqa: E731
    with pytest.raises(ValueError, match="maps must be finite"):
        compute_max_sensitivity(explain, torch.rand(2, 3, 8, 8), [0, 1])


@pytest.fixture
def pairs():
    """Five images with two objects, and an explainer that knows what it is asked."""
    torch.manual_seed(0)
    masks, others = torch.zeros(5, 16, 16, dtype=torch.bool), torch.zeros(5, 16, 16, dtype=torch.bool)
    masks[:, 2:6, 2:6], others[:, 9:15, 9:15] = True, True
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval()

    def explain(images, target):
        fitting = {0: masks[0].float(), 1: others[0].float(), 2: torch.zeros(16, 16), 3: 0.5 + 0 * masks[0].float()}
        return torch.stack([fitting[k] for k in target.tolist()])

    return model, torch.rand(5, 3, 16, 16) * 255, masks, others, explain


def test_class_specificity_known_values(pairs):
    model, images, masks, others, explain = pairs
    options = {"masks": masks, "other_masks": others, "other_classes": [1] * 5, "absent_classes": [1, 1, 2, 3, 1]}
    found = compare(model, images, {"fitting": explain}, target=0, progress=False, **options)
    names = ("energy", "energy in other", "asked denser", "absent energy")
    assert [found.values["fitting"][name].tolist() for name in names[:3]] == [[1] * 5, [0] * 5, [1] * 5]
    assert found.values["fitting"]["absent energy"].tolist() == [0, 0, 0, 16 / 256, 0]
    p, q = 16 / 256, 36 / 256  # two disjoint rectangles: -sqrt(p q / ((1 - p) (1 - q)))
    apart = -((p * q / (1 - p) / (1 - q)) ** 0.5)
    assert found.values["fitting"]["other correlation"].tolist() == pytest.approx([apart] * 5)
    absent = found.values["fitting"]["absent correlation"]
    assert absent[[0, 1, 4]].tolist() == pytest.approx([apart] * 3) and absent[2:4].isnan().all()
    assert found.mean("fitting", "absent correlation") == pytest.approx(apart)
    assert found.values["centre prior"]["other correlation"].tolist() == pytest.approx([1] * 5)
    assert abs(found.mean("random", "other correlation")) < 0.1
    swapped = options | {"other_classes": [0] * 5, "absent_classes": [2] * 5}
    reverse = compare(model, images, {"fitting": explain}, target=1, progress=False, **swapped)
    assert reverse.values["fitting"]["asked denser"].tolist() == [0] * 5 and reverse.mean("fitting", "energy in other") == 1
    flat = compare(model, images, {"fitting": explain}, ["asked denser"], target=3, progress=False, **swapped)
    assert flat.values["fitting"]["asked denser"].tolist() == [0.5] * 5


def test_class_specificity_needs_its_arguments(pairs):
    model, images, masks, others, explain = pairs
    for name, arguments, message in (
        ("asked denser", {"masks": masks}, r"other_masks must be \(N, H, W\) bool for the metrics \['asked denser'\], got None"),
        ("other correlation", {}, "other_classes must be one class per image for the metrics"),
        ("absent energy", {"masks": masks}, "absent_classes must be one class per image for the metrics"),
        ("absent correlation", {"absent_classes": [1]}, "got 1 classes for 5 images"),
        ("absent correlation", {"absent_classes": [7] * 5}, "absent_classes: target class 7 is out of range"),
        ("absent correlation", {"absent_classes": [1] * 5, "target": 1}, "absent_classes must differ from .*, got 1 for image 0"),
        ("asked denser", {"masks": masks, "other_masks": others[:4]}, "other_masks must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(model, images, {"fitting": explain}, [name], progress=False, **arguments)


def test_absent_classes_are_absent():
    labels = torch.tensor([[0, 1], [2, 3], [3, 3]] * 50)
    drawn = draw_absent_classes(labels, 4, seed=1)
    assert not (drawn[:, None] == labels).any() and set(drawn[2::3].tolist()) == {0, 1, 2}
    assert draw_absent_classes(labels[:, 0], 4).shape == (150,)
    assert torch.equal(drawn, draw_absent_classes(labels, 4, seed=1))
    for wrong, message in (
        (torch.tensor([[0, 1]]), "all 2 classes for image 0"),
        (torch.tensor([5]), "labels must be from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_absent_classes(wrong, 2)


def test_ceiling_is_a_row_that_does_not_lead(scene):
    model, images, _ = scene
    explainers = {"Grad-CAM": GradCAM(model, "layer3")}
    found = compare(model, images, explainers, ["deletion", "absent correlation"], absent_classes=[1] * 5, ceiling=4, patch=8)
    assert list(found.values) == ["Grad-CAM", "random", "centre prior", "ceiling"] and "runs of the model per image" in found.note
    lowest = found.mean("ceiling", "deletion")
    assert all(lowest < found.mean(name, "deletion") for name in ("Grad-CAM", "random", "centre prior"))
    assert found.leader("deletion") != "ceiling" and "ceiling" not in found.leaders("deletion")
    assert found.values["ceiling"]["absent correlation"].isnan().all()
    with pytest.raises(ValueError, match="names of the baselines"):
        compare(model, images, {"ceiling": explainers["Grad-CAM"]}, progress=False)


def test_leaders_are_all_that_tie_with_the_best():
    torch.manual_seed(0)
    base = torch.rand(200)
    noise = torch.randn(200) * 0.01
    values = {"best": base, "tie": base + noise - noise.mean() - 0.0001, "worse": base - 0.05, "all nan": base * torch.nan}
    table = Comparison({name: {"own": value} for name, value in values.items()}, {"own": 1}, {}, {})
    assert table.leaders("own") == ["best", "tie"]  # "worse" is within the interval of the mean, but lower on every image
    assert abs(table.interval("best", "own")[0] - table.mean("best", "own")) < 0.05
