import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scanlib import SCAN, GradCAM, Signs, load_classifier
from scanlib.explorer.view import FILM_PERCENTILES, MapRenderer, View
from scanlib.explorer.widgets import Explorer, TrainingCarousel, encode_png
from scanlib.masking import compute_threshold
from scanlib.models.zoo import CHECKPOINTS


@pytest.fixture(scope="module")
def parts():
    """The Signs CNN, four images, SCAN at two layers (one trained for a single epoch), Grad-CAM at three, and a constant map."""
    classifier = load_classifier("signs_cnn")
    images = torch.stack([image for image, _ in Signs(4, seed=3)])
    trained = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    trained.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    other = SCAN(classifier.model, "layer2", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    other.set_dataset([(images, torch.zeros(4).long())]).generate_decoder(ch_per_lv=[8, 8, 8, 8]).compile().fit(1, verbose=False)
    diagonal = lambda images, target: torch.eye(64).expand(len(images), -1, -1)  # noqa: E731
    scans = {"layer4": trained.as_explainer(), "layer2": other.as_explainer()}
    grad_cams = {layer: GradCAM(classifier.model, layer, classifier.preprocess) for layer in ("layer4", "layer2", "layer3")}
    return classifier, images, {"SCAN": scans, "Grad-CAM": grad_cams, "diagonal": diagonal}


def build_scanner(classifier, images, batches=1):
    scanner = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    scanner.set_dataset([(images, torch.zeros(4).long())] * batches).generate_decoder(ch_per_lv=[8, 8, 8, 8])
    return scanner.compile()


@pytest.fixture
def renderer(parts):
    classifier, images, explainers = parts
    return MapRenderer(classifier.model, images, explainers, preprocess=classifier.preprocess, classes=classifier.classes)


def test_maps_are_those_of_the_explainers(renderer, parts):
    _, images, explainers = parts
    view = View(image=1, layer="layer2", target=4, percentile=80)
    scanner = explainers["SCAN"]["layer2"].scanner
    torch.testing.assert_close(renderer.compute_map(view, "SCAN"), scanner(images[1], 4, 80)[0])
    torch.testing.assert_close(renderer.compute_map(view, "Grad-CAM"), explainers["Grad-CAM"]["layer2"](images[1:2], 4)[0])
    assert torch.equal(renderer.compute_map(view, "diagonal"), torch.eye(64))
    assert renderer.compute_map(replace(view, layer="layer3"), "SCAN") is None
    features, scores = scanner.extract(images[1:2], 4)
    _, reconstruction, kept_share = renderer._decode(view, explainers["SCAN"]["layer2"])
    assert kept_share == pytest.approx(float((scores >= compute_threshold(scores, 80)).float().mean()))
    assert features.shape == scores.shape and np.array_equal(reconstruction, scanner(images[1], 4, 80)[1].numpy())


def test_evidence_is_weighted_at_the_percentile_of_the_view(parts):
    classifier, images, explainers = parts
    scanner, runs = explainers["SCAN"]["layer4"].scanner, []

    def evidence(images, target):
        runs.append(target)
        return explainers["Grad-CAM"]["layer3"](images, target)

    weighted = {"SCAN": scanner.as_explainer(95, evidence)}
    renderer = MapRenderer(classifier.model, images, weighted, preprocess=classifier.preprocess)
    for percentile in (60.0, 90.0):
        expected = scanner.as_explainer(percentile, explainers["Grad-CAM"]["layer3"])(images[:1], 3)[0]
        for _ in range(2):
            torch.testing.assert_close(renderer.compute_map(View(target=3, percentile=percentile), "SCAN"), expected)
    assert runs == [3, 3]  # once for each percentile


def test_an_explainer_outside_a_dictionary_has_no_choice_of_layer(parts):
    classifier, images, explainers = parts
    both = {"SCAN": explainers["SCAN"]["layer4"], "Grad-CAM": explainers["Grad-CAM"]}
    renderer = MapRenderer(classifier.model, images, both, preprocess=classifier.preprocess)
    maps = [renderer.compute_map(View(layer=layer), "SCAN") for layer in renderer.layers]
    assert renderer.layers == ["layer4", "layer2", "layer3"] and all(torch.equal(each, maps[0]) for each in maps)
    alone = MapRenderer(classifier.model, images, {"SCAN": both["SCAN"]}, preprocess=classifier.preprocess)
    assert alone.layers == [""] and torch.equal(alone.compute_map(View(), "SCAN"), maps[0])


def test_score_without_the_top_pixels(renderer, parts):
    classifier, images, _ = parts
    view = View(target=2, methods=("diagonal",), top=100 * 64 / 64**2)  # exactly the diagonal
    is_top = torch.eye(64, dtype=torch.bool)
    mean = images[0].mean((1, 2))[:, None, None]
    for keep in (False, True):
        changed = torch.where(is_top != keep, mean, images[0])
        with torch.no_grad():
            expected = classifier.model(classifier.preprocess(changed[None])).softmax(1)[0, 2]
        assert renderer.score_removed(replace(view, keep=keep))["diagonal"] == pytest.approx(float(expected), abs=1e-5)


def test_render(renderer):
    wide = renderer.render(View(methods=("SCAN", "Grad-CAM")))
    assert wide.dtype == np.uint8 and wide.shape == (wide.shape[0], 4 * 182, 3)  # image, SCAN, reconstruction, Grad-CAM
    assert renderer.render(View(methods=("Grad-CAM",))).shape[1] == 2 * 182
    for strip, count in (("layers", 3), ("percentiles", len(FILM_PERCENTILES))):
        tall = renderer.render(View(strip=strip))
        assert tall.shape[0] > wide.shape[0] and len(renderer._draw_strip(renderer.validate(View(strip=strip)))) == count
    assert not np.array_equal(wide, renderer.render(View(methods=("SCAN", "Grad-CAM"), colormap="viridis")))
    assert not np.array_equal(wide, renderer.render(View(methods=("SCAN", "Grad-CAM"), shared=True)))
    assert renderer.render(View(layer="layer3")).shape[1] == 4 * 182  # an empty panel instead of SCAN's two
    alone = renderer.render(View(methods=("Grad-CAM",), strip="percentiles"))
    assert alone.shape[1] == 2 * 182  # a strip without SCAN is one empty panel


def test_the_model_runs_once_per_image_layer_and_class(renderer, parts):
    runs = []
    handle = parts[0].model.register_forward_hook(lambda *_: runs.append(1))
    try:
        view = View(image=2, methods=("SCAN", "Grad-CAM"))
        renderer.render(view)
        first = len(runs)
        for changed in ({"opacity": 0.1}, {"colormap": "viridis"}, {"shared": True}):
            renderer.render(replace(view, **changed))
        assert len(runs) == first
        renderer.render(replace(view, percentile=70))
        assert len(runs) == first + 1  # only to score the new map
        renderer.render(view)
        assert len(runs) == first + 1
        renderer.render(replace(view, layer="layer2"))
        assert len(runs) > first + 1
    finally:
        handle.remove()


def test_code_of_a_view_creates_it_again(renderer):
    view = View(image=3, layer="layer2", methods=("SCAN",), percentile=60.0, strip="layers", keep=True)
    again = eval(view.to_code(), {"View": View})
    assert again == view and View().to_code() == "View()"
    resolved = renderer.validate(view)
    assert resolved.target is not None and eval(resolved.to_code(), {"View": View}) == replace(view, target=resolved.target)
    assert np.array_equal(renderer.render(again), renderer.render(view))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": 9}, r"image must be in 0\.\.3, got 9"),
        ({"layer": "layer1"}, "layer must be one of layer4, layer2, layer3, got 'layer1'"),
        ({"target": 10}, "target class 10 is out of range"),
        ({"methods": ("CAM",)}, r"methods must be among SCAN, Grad-CAM, diagonal, got \['CAM'\]"),
        ({"percentile": 101}, r"percentile must be in 0\.\.100, got 101"),
        ({"opacity": -1}, r"opacity must be in 0\.\.1, got -1"),
        ({"top": 101}, r"top must be in 0\.\.100, got 101"),
        ({"strip": "both"}, "strip must be one of none, layers, percentiles, got 'both'"),
        ({"colormap": "jett"}, "colormap must be one of matplotlib's, .* got 'jett'"),
    ],
)
def test_render_raises_for_views_out_of_range(renderer, changes, message):
    with pytest.raises(ValueError, match=message):
        renderer.render(View(**changes))


def test_renderer_raises_for_images_and_explainers_of_another_kind(parts):
    classifier, images, explainers = parts
    grad_cam, scanner = explainers["Grad-CAM"], explainers["SCAN"]["layer4"].scanner
    with pytest.raises(ValueError, match=r"images must be a tensor \(N, 3, H, W\) with N >= 1, got \(3, 64, 64\)"):
        MapRenderer(classifier.model, images[0], {"Grad-CAM": grad_cam})
    for wrong in (3, GradCAM, scanner, {}, {"layer4": scanner}, {"layer4": GradCAM}):
        with pytest.raises(ValueError, match=r"explainers must be explainers, .* got {'x': .*}"):
            MapRenderer(classifier.model, images, {"Grad-CAM": grad_cam, "x": wrong})
    with pytest.raises(ValueError, match="explainers must be explainers, .* got {}"):
        MapRenderer(classifier.model, images, {})


def test_further_training_of_a_decoder_is_noticed(parts):
    classifier, images, _ = parts
    scanner = build_scanner(classifier, images)
    scanner.fit(1, verbose=False)
    renderer = MapRenderer(classifier.model, images, {"SCAN": scanner.as_explainer()}, preprocess=classifier.preprocess)
    before = renderer.compute_map(View(), "SCAN")
    scanner.fit(1, verbose=False)
    after = renderer.compute_map(View(), "SCAN")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, scanner(images[0])[0])


def test_maps_of_another_size_and_images_that_are_not_square(parts):
    classifier, _, explainers = parts
    images = torch.rand(2, 3, 96, 64) * 255
    coarse = lambda images, target: torch.rand(len(images), 6, 4)  # noqa: E731
    both = {"coarse": coarse, "Grad-CAM": explainers["Grad-CAM"]}
    renderer = MapRenderer(classifier.model, images, both, preprocess=classifier.preprocess, layers=["layer4"])
    assert renderer.compute_map(View(), "coarse").shape == (96, 64) and renderer.render(View()).ndim == 3
    index = renderer.add_image(torch.rand(3, 30, 50) * 255)
    assert renderer.images[index].shape == (3, 96, 64)
    flat = lambda images, target: torch.rand(len(images), 1, 6, 4)  # noqa: E731
    with pytest.raises(ValueError, match=r"must return maps \(1, h, w\) for one image, got \(1, 1, 6, 4\)"):
        MapRenderer(classifier.model, images, {"flat": flat}, preprocess=classifier.preprocess).render(View())


def test_models_that_return_probabilities_or_one_output(parts):
    classifier, images, _ = parts
    with_softmax = torch.nn.Sequential(classifier.model, torch.nn.Softmax(1)).eval()
    explainers = {"x": lambda images, target: images[:, 0]}
    plain, soft = (MapRenderer(m, images, explainers, preprocess=classifier.preprocess) for m in (classifier.model, with_softmax))
    torch.testing.assert_close(plain.compute_probabilities(0), soft.compute_probabilities(0))
    single = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1))
    with pytest.raises(ValueError, match=r"two classes or more, got \(1, 1\)"):
        MapRenderer(single, images, explainers)
    with pytest.raises(ValueError, match="classes must hold 10 names, one for each of the model's classes, got 2"):
        MapRenderer(classifier.model, images, explainers, preprocess=classifier.preprocess, classes=["a", "b"])


# --- the widget ---


@pytest.fixture
def explorer(parts, tmp_path):
    classifier, images, explainers = parts
    names = {"preprocess": classifier.preprocess, "classes": classifier.classes}
    return Explorer(classifier.model, images, explainers, **names, save_to=tmp_path)


def shows_its_view(explorer):
    explorer.renderer.clear_cache()  # the figure must not depend on what is cached
    return explorer.picture.value == encode_png(explorer.renderer.render(explorer.view))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer", "layer2"),
        ("target", 7),
        ("methods", ("Grad-CAM",)),
        ("percentile", 50.0),
        ("opacity", 0.2),
        ("colormap", "cividis"),
        ("shared", True),
        ("top", 40.0),
        ("keep", True),
        ("strip", "percentiles"),
    ],
)
def test_every_control_changes_the_figure(explorer, name, value):
    before = explorer.picture.value
    explorer.controls[name].value = value
    assert getattr(explorer.view, name) == value and explorer.picture.value != before and shows_its_view(explorer)
    assert f"{name}={value!r}" in explorer.snippet.value and not explorer.message.value


def test_controls_follow_the_code(explorer):
    explorer.set(layer="layer2", percentile=70.0, strip="layers")
    assert explorer.controls["layer"].value == "layer2" and explorer.controls["percentile"].value == 70
    assert explorer.controls["strip"].value == "layers" and shows_its_view(explorer)
    explorer.set(target=5)
    explorer.set(image=2)
    assert explorer.view.target == int(
        explorer.renderer.compute_probabilities(2).argmax()
    )  # another image shows its predicted class
    with pytest.raises(ValueError, match=r"image must be in 0\.\.3, got 99"):
        explorer.set(image=99)
    assert explorer.view.image == 2
    explorer.set(colormap="jet", percentile=99.9)  # any of matplotlib's, although the list has five
    assert explorer.controls["colormap"].value == "jet" and explorer.controls["percentile"].value == 99.9
    with pytest.raises(ValueError, match="colormap must be .* got 'jett'"):
        explorer.set(colormap="jett")
    assert explorer.view.colormap == "jet" and shows_its_view(explorer)


def test_class_list_starts_with_the_five_most_probable(explorer):
    options = explorer.controls["target"].options
    probabilities = explorer.renderer.compute_probabilities(0)
    assert [c for _, c in options[:5]] == probabilities.topk(5).indices.tolist() and len(options) == 10
    assert options[0][0] == f"{explorer.renderer.classes[options[0][1]]} {probabilities.max():.2f}"


def test_thumbnails_choose_the_image(explorer):
    explorer.thumbnails.children[3].children[1].click()
    assert explorer.view.image == 3 and shows_its_view(explorer)


def upload(explorer, content):
    """Upload as ipywidgets 8 does; 7 gives a dictionary by file name."""
    explorer._add_upload(({"name": "x", "content": memoryview(content)},))


def encode(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def compute_mean(pixels):
    """Return the mean of an image in [0, 255], over white where it is transparent."""
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return 99 * 99 / 255 + 255 * (1 - 99 / 255)
    return pixels.mean() / (257 if pixels.dtype == np.uint16 else 1)


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((90, 120, 3), 200, np.uint8),
        np.full((1, 1, 3), 200, np.uint8),
        np.full((40, 40), 7, np.uint8),
        np.full((40, 40, 4), 99, np.uint8),
        np.full((30, 40), 40_000, np.uint16),
        np.zeros((2000, 1500, 3), np.uint8),
    ],
    ids=["landscape", "one pixel", "grey", "alpha", "16 bit", "large"],
)
def test_uploads_of_any_kind(explorer, pixels):
    upload(explorer, encode(pixels))
    assert explorer.view.image == 4 and len(explorer.thumbnails.children) == 5 and shows_its_view(explorer)
    assert abs(float(explorer.renderer.images[4].mean()) - compute_mean(pixels)) < 2
    explorer._add_upload({"y.png": {"content": encode(pixels)}})  # ipywidgets 7
    assert explorer.view.image == 5


def test_broken_upload_becomes_a_message(explorer):
    before = explorer.picture.value
    upload(explorer, b"no image <b>")
    assert "the upload cannot be read" in explorer.message.value and explorer.picture.value == before
    explorer.controls["percentile"].value = 60.0
    assert not explorer.message.value and shows_its_view(explorer)  # the explorer still works


def test_errors_of_an_explainer_become_a_message(parts, tmp_path):
    classifier, images, explainers = parts

    def fail(images, target):
        raise KeyError("not <this> one")

    both = {"x": fail, "Grad-CAM": explainers["Grad-CAM"]}
    explorer = Explorer(classifier.model, images, both, preprocess=classifier.preprocess, save_to=tmp_path)
    assert "KeyError" in explorer.message.value and "not &lt;this&gt; one" in explorer.message.value
    assert explorer.save() is None and "no figure to save" in explorer.message.value
    explorer.controls["methods"].value = ("Grad-CAM",)
    assert not explorer.message.value and shows_its_view(explorer)


def test_save(explorer, tmp_path):
    first, second = explorer.save(), explorer.save()
    assert [path.name for path in (first, second)] == ["explorer_00.png", "explorer_01.png"]
    assert np.array_equal(np.asarray(Image.open(first)), explorer.renderer.render(explorer.view))
    explorer.save_to = tmp_path / "explorer_00.png"
    assert explorer.save() is None and "cannot be saved" in explorer.message.value


def test_five_hundred_random_changes(explorer):
    draw = random.Random(0)
    choices = {
        "layer": ["layer4", "layer2", "layer3"],
        "target": list(range(10)),
        "methods": [("SCAN",), ("Grad-CAM", "diagonal"), ("SCAN", "Grad-CAM", "diagonal"), ()],
        "percentile": [0.0, 50.0, 95.0, 99.5],
        "opacity": [0.0, 0.5, 1.0],
        "colormap": ["magma", "viridis"],
        "shared": [True, False],
        "top": [0.0, 10.0, 100.0],
        "keep": [True, False],
        "strip": ["none", "layers", "percentiles"],
    }
    for number in range(500):
        if draw.random() < 0.1:
            explorer.thumbnails.children[draw.randrange(4)].children[1].click()
        else:
            name = draw.choice(list(choices))
            explorer.controls[name].value = draw.choice(choices[name])
        assert not explorer.message.value, explorer.message.value
        if number % 10 == 0:
            assert shows_its_view(explorer)
            for name, control in explorer.controls.items():
                value = tuple(control.value) if name == "methods" else control.value
                assert value == getattr(explorer.view, name)


# --- the carousel ---


def test_carousel_follows_a_training(parts):
    classifier, images, _ = parts
    scanner, unobserved = build_scanner(classifier, images, 5), build_scanner(classifier, images, 5)
    unobserved.decoder.load_state_dict(scanner.decoder.state_dict())
    carousel = TrainingCarousel(scanner, images[:2], every=2)
    shown = []
    carousel.picture.observe(lambda change: shown.append(change["new"]), "value")
    scanner.fit(2, verbose=False, on_step=carousel)
    unobserved.fit(2, verbose=False)
    for name, value in unobserved.decoder.state_dict().items():  # snapshots do not change the training
        assert torch.equal(value, scanner.decoder.state_dict()[name]), name
    assert [(epoch, step) for epoch, step, _ in carousel.snapshots] == [(e, s) for e in (0, 1) for s in (1, 2, 4)]
    assert carousel.slider.max == carousel.slider.value == 5 and len(shown) >= 6
    assert carousel.picture.value == encode_png(carousel.snapshots[5][2])
    carousel.previous.click()
    assert carousel.slider.value == 4 and carousel.picture.value == encode_png(carousel.snapshots[4][2])
    for _ in range(9):
        carousel.previous.click()
    assert carousel.slider.value == 0
    carousel.next.click()
    assert carousel.slider.value == 1
    confidence, reconstruction = scanner(images[:1], percentile=95)
    assert confidence.shape == (1, 64, 64) and reconstruction.shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        TrainingCarousel(scanner, images, every=0)


def test_a_refused_change_leaves_the_view(parts):
    classifier, images, explainers = parts
    explorer = Explorer(classifier.model, images, explainers, preprocess=classifier.preprocess, classes=classifier.classes)
    before, picture = explorer.view, explorer.picture.value
    for changes in ({"shared": "x"}, {"keep": 1}, {"image": 1.5}, {"target": "3"}, {"percentile": b"9"}, {"opacity": True}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
            explorer.set(**changes)
        assert explorer.view == before and explorer.picture.value == picture
    assert explorer.set(image=1).image == 1


def test_uploads_close_the_widgets_that_they_replace(parts):
    classifier, images, explainers = parts
    explorer = Explorer(classifier.model, images, explainers, preprocess=classifier.preprocess)
    file = io.BytesIO()
    Image.new("RGB", (80, 60), "orange").save(file, "png")
    old = [widget for box in explorer.thumbnails.children for widget in (box, *box.children)]
    explorer._add_upload([{"content": file.getvalue()}])
    assert len(explorer.thumbnails.children) == 5 and all(widget.comm is None for widget in old)


def test_images_that_cannot_be_drawn_raise():
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    with pytest.raises(ValueError, match=r"image must be \(3, H, W\) or \(1, H, W\) .*, got \(4, 8, 8\)"):
        MapRenderer(model, torch.rand(2, 4, 8, 8), {"Grad-CAM": GradCAM(model, "0")})


def test_another_preprocess_of_scan_is_noticed(parts):
    classifier, images, _ = parts
    scanner = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    renderer = MapRenderer(classifier.model, images, {"SCAN": scanner.as_explainer()}, preprocess=classifier.preprocess)
    view = View(target=3)
    before = renderer.compute_map(view, "SCAN")
    scanner.set_preprocess(lambda images: classifier.preprocess(255 - images))
    assert not torch.equal(renderer.compute_map(view, "SCAN"), before)
    torch.testing.assert_close(renderer.compute_map(view, "SCAN"), scanner(images[0], 3)[0])
