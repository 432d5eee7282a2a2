import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from scanlib import SCAN, GradCAM, LayerCAM, Signs, load_classifier
from scanlib.explorer.view import FILM_PERCENTILES, MapRenderer, View
from scanlib.explorer.widgets import Explorer, TrainingCarousel, encode_png
from scanlib.masking import compute_threshold
from scanlib.models.zoo import CHECKPOINTS

pytest.importorskip("ipywidgets")


@pytest.fixture(scope="module")
def parts():
    """The Signs CNN, four scenes, a SCAN at two layers (one of them hardly trained), CAMs, and a map of no layer."""
    target = load_classifier("signs_cnn")
    images = torch.stack([image for image, _ in Signs(4, seed=3)])
    trained = SCAN(target.model, "layer4", (64, 64), device="cpu").set_preprocess(target.preprocess)
    trained.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    other = SCAN(target.model, "layer2", (64, 64), device="cpu").set_preprocess(target.preprocess)
    other.set_dataset([(images, torch.zeros(4).long())]).generate_decoder(ch_per_lv=[8, 8, 8, 8]).compile().fit(1, verbose=False)
    diagonal = lambda images, target: torch.eye(64).expand(len(images), -1, -1)  # noqa: E731
    explainers = {"SCAN": {"layer4": trained, "layer2": other}, "Grad-CAM": GradCAM, "diagonal": diagonal}
    return target, images, explainers


def options(target):
    return {"preprocess": target.preprocess, "classes": target.classes, "layers": ["layer4", "layer2", "layer3"]}


@pytest.fixture
def scene(parts):
    target, images, explainers = parts
    return MapRenderer(target.model, images, explainers, **options(target))


def test_maps_are_the_explainers_own(scene, parts):
    target, images, explainers = parts
    view = View(image=1, layer="layer2", target=4, percentile=80)
    torch.testing.assert_close(scene.heat(view, "SCAN"), explainers["SCAN"]["layer2"](images[1], 4, 80)[0])
    expected = GradCAM(target.model, "layer2", preprocess=target.preprocess)(images[1:2], 4)[0]
    torch.testing.assert_close(scene.heat(view, "Grad-CAM"), expected)
    assert torch.equal(scene.heat(view, "diagonal"), torch.eye(64))
    assert scene.heat(replace(view, layer="layer3"), "SCAN") is None
    features, scores = explainers["SCAN"]["layer2"].extract(images[1:2], 4)
    assert scene.share(view, "SCAN") == pytest.approx(float((scores >= compute_threshold(scores, 80)).float().mean()))
    assert features.shape == scores.shape


def test_what_is_tried_out_by_hand(scene, parts):
    target, images, _ = parts
    view = View(target=2, methods=("diagonal",), top=100 * 64 / 64**2)  # just the diagonal
    on = torch.eye(64, dtype=torch.bool)
    mean = images[0].mean((1, 2))[:, None, None]
    for keep in (False, True):
        changed = torch.where(on != keep, mean, images[0])
        with torch.no_grad():
            expected = target.model(target.preprocess(changed[None])).softmax(1)[0, 2]
        assert scene.tried(replace(view, keep=keep))["diagonal"] == pytest.approx(float(expected), abs=1e-5)


def test_the_picture(scene):
    wide = scene.render(View(methods=("SCAN", "Grad-CAM")))
    assert wide.dtype == np.uint8 and wide.shape == (wide.shape[0], 4 * 182, 3)  # scene, SCAN, rebuilt, Grad-CAM
    assert scene.render(View(methods=("Grad-CAM",))).shape[1] == 2 * 182
    for strip, count in (("layers", 3), ("percentiles", len(FILM_PERCENTILES))):
        tall = scene.render(View(strip=strip))
        assert tall.shape[0] > wide.shape[0] and len(scene._places(View(strip=strip))) == count
    assert not np.array_equal(wide, scene.render(View(methods=("SCAN", "Grad-CAM"), colormap="viridis")))
    assert not np.array_equal(wide, scene.render(View(methods=("SCAN", "Grad-CAM"), shared=True)))
    assert scene.render(View(layer="layer3")).shape[1] == 4 * 182  # a grey panel where there is no decoder


def test_the_model_runs_once_a_picture_layer_and_class(scene, parts):
    target, runs = parts[0], []
    handle = target.model.register_forward_hook(lambda *_: runs.append(1))
    try:
        view = View(image=2, methods=("SCAN", "Grad-CAM"))
        scene.render(view)
        first = len(runs)
        for changed in ({"opacity": 0.1}, {"colormap": "viridis"}, {"shared": True}):
            scene.render(replace(view, **changed))
        assert len(runs) == first
        scene.render(replace(view, percentile=70))
        assert len(runs) == first + 1  # only to try the new map out
        scene.render(view)
        assert len(runs) == first + 1
        scene.render(replace(view, layer="layer2"))
        assert len(runs) > first + 1
    finally:
        handle.remove()


def test_the_code_of_a_view_makes_it_again(scene):
    view = View(image=3, layer="layer2", methods=("SCAN",), percentile=60.0, strip="layers", keep=True)
    again = eval(view.code(), {"View": View})
    assert again == view and View().code() == "View()"
    assert np.array_equal(scene.render(again), scene.render(view))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": 9}, "image 9 is out of range: there are 0..3"),
        ({"layer": "layer1"}, "layer 'layer1' is not to be chosen; take one of layer4"),
        ({"target": 10}, "target class 10 is out of range"),
        ({"methods": ("CAM",)}, r"methods \['CAM'\] are not known"),
        ({"percentile": 101}, "percentile 101"),
        ({"opacity": -1}, "opacity -1"),
        ({"strip": "both"}, "strip 'both'"),
        ({"colormap": "jett"}, "colormap 'jett' is not known"),
    ],
)
def test_views_that_do_not_fit(scene, changes, words):
    with pytest.raises(ValueError, match=words):
        scene.render(View(**changes))


def test_what_can_not_be_explored(parts):
    target, images, _ = parts
    with pytest.raises(ValueError, match="images must be a tensor"):
        MapRenderer(target.model, images[0], {"Grad-CAM": GradCAM})
    with pytest.raises(ValueError, match=r"explainers \['x'\]: give a dictionary"):
        MapRenderer(target.model, images, {"x": 3})


def test_a_decoder_trained_further_is_noticed(parts):
    target, images, _ = parts
    scanner = SCAN(target.model, "layer4", (64, 64), device="cpu").set_preprocess(target.preprocess)
    scanner.set_dataset([(images, torch.zeros(4).long())]).generate_decoder(ch_per_lv=[8, 8, 8, 8]).compile()
    scanner.fit(1, verbose=False)
    scene = MapRenderer(target.model, images, {"SCAN": scanner}, preprocess=target.preprocess)  # a bare SCAN is one of its layer
    before = scene.heat(View(), "SCAN")
    scanner.fit(1, verbose=False)
    after = scene.heat(View(), "SCAN")
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, scanner(images[0])[0])


def test_maps_of_another_size_and_pictures_that_are_not_square(parts):
    target, _, _ = parts
    images = torch.rand(2, 3, 96, 64) * 255
    coarse = lambda images, target: torch.rand(len(images), 6, 4)  # noqa: E731
    scene = MapRenderer(
        target.model, images, {"coarse": coarse, "Grad-CAM": GradCAM}, preprocess=target.preprocess, layers=["layer4"]
    )
    assert scene.heat(View(), "coarse").shape == (96, 64) and scene.render(View()).ndim == 3
    number = scene.add(torch.rand(3, 30, 50) * 255)
    assert scene.images[number].shape == (3, 96, 64)
    flat = lambda images, target: torch.rand(len(images), 1, 6, 4)  # noqa: E731
    with pytest.raises(ValueError, match=r"maps of shape \(1, 6, 4\)"):
        MapRenderer(target.model, images, {"flat": flat}, preprocess=target.preprocess).render(View())


def test_models_of_probabilities_and_of_one_output(parts):
    target, images, _ = parts
    sure = torch.nn.Sequential(target.model, torch.nn.Softmax(1)).eval()
    plain, soft = (
        MapRenderer(model, images, {"x": lambda i, t: i[:, 0]}, preprocess=target.preprocess) for model in (target.model, sure)
    )
    torch.testing.assert_close(plain.probabilities(0), soft.probabilities(0))
    one = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 1))
    with pytest.raises(ValueError, match="two classes or more"):
        MapRenderer(one, images, {"x": lambda i, t: i[:, 0]})
    with pytest.raises(ValueError, match="classes names 2, and the model has 10"):
        MapRenderer(target.model, images, {"Grad-CAM": GradCAM}, preprocess=target.preprocess, classes=["a", "b"])


# --- the widget ---


@pytest.fixture
def explorer(parts, tmp_path):
    target, images, explainers = parts
    return Explorer(target.model, images, explainers, save_to=tmp_path, **options(target))


def shows_its_view(explorer):
    explorer.scene.forget()  # nothing may hang on what was kept
    return explorer.picture.value == encode_png(explorer.scene.render(explorer.view))


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
def test_every_control_changes_the_picture(explorer, name, value):
    before = explorer.picture.value
    explorer.controls[name].value = value
    assert getattr(explorer.view, name) == value and explorer.picture.value != before and shows_its_view(explorer)
    assert f"{name}={value!r}" in explorer.snippet.value and not explorer.line.value


def test_from_code_the_controls_follow(explorer):
    explorer.set(layer="layer2", percentile=70.0, strip="layers")
    assert explorer.controls["layer"].value == "layer2" and explorer.controls["percentile"].value == 70
    assert explorer.controls["strip"].value == "layers" and shows_its_view(explorer)
    explorer.set(target=5)
    explorer.set(image=2)
    assert explorer.view.target == int(explorer.scene.probabilities(2).argmax())  # another picture, its own class
    with pytest.raises(ValueError, match="image 99"):
        explorer.set(image=99)
    assert explorer.view.image == 2
    explorer.set(colormap="jet", percentile=99.9)  # any of matplotlib's, though the list has five
    assert explorer.controls["colormap"].value == "jet" and explorer.controls["percentile"].value == 99.9
    with pytest.raises(ValueError, match="colormap 'jett'"):
        explorer.set(colormap="jett")
    assert explorer.view.colormap == "jet" and shows_its_view(explorer)


def test_the_class_list_leads_with_the_five_most_probable(explorer):
    options = explorer.controls["target"].options
    probabilities = explorer.scene.probabilities(0)
    assert [c for _, c in options[:5]] == probabilities.topk(5).indices.tolist() and len(options) == 10
    assert options[0][0] == f"{explorer.scene.classes[options[0][1]]} {probabilities.max():.2f}"


def test_thumbnails_choose_the_picture(explorer):
    explorer.thumbnails.children[3].children[1].click()
    assert explorer.view.image == 3 and shows_its_view(explorer)


def upload(explorer, content):
    """As ipywidgets 8 hands it over; 7 gives a dictionary by name."""
    explorer._uploaded(({"name": "x", "content": memoryview(content)},))


def saved(array, kind="png"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def pixels_mean(pixels):
    """Grey level, alpha laid on white."""
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
    upload(explorer, saved(pixels))
    assert explorer.view.image == 4 and len(explorer.thumbnails.children) == 5 and shows_its_view(explorer)
    assert abs(float(explorer.scene.images[4].mean()) - pixels_mean(pixels)) < 2
    explorer._uploaded({"y.png": {"content": saved(pixels)}})  # ipywidgets 7
    assert explorer.view.image == 5


def test_a_broken_upload_is_a_line(explorer):
    before = explorer.picture.value
    upload(explorer, b"no picture <b>")
    assert "the upload could not be read" in explorer.line.value and explorer.picture.value == before
    explorer.controls["percentile"].value = 60.0
    assert not explorer.line.value and shows_its_view(explorer)  # and it goes on


def test_errors_of_an_explainer_are_a_line(parts, tmp_path):
    target, images, _ = parts

    def refuses(images, target):
        raise KeyError("not <this> one")

    explorer = Explorer(
        target.model, images, {"x": refuses, "Layer-CAM": LayerCAM}, preprocess=target.preprocess, save_to=tmp_path
    )
    assert "KeyError" in explorer.line.value and "not &lt;this&gt; one" in explorer.line.value
    assert explorer.save() is None and "no picture to save" in explorer.line.value
    explorer.controls["methods"].value = ("Layer-CAM",)
    assert not explorer.line.value and shows_its_view(explorer)


def test_save(explorer, tmp_path):
    first, second = explorer.save(), explorer.save()
    assert [path.name for path in (first, second)] == ["explorer_00.png", "explorer_01.png"]
    assert np.array_equal(np.asarray(Image.open(first)), explorer.scene.render(explorer.view))
    explorer.save_to = tmp_path / "explorer_00.png"
    assert explorer.save() is None and "could not be saved" in explorer.line.value


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
        assert not explorer.line.value, explorer.line.value
        if number % 10 == 0:
            assert shows_its_view(explorer)
            for name, control in explorer.controls.items():
                assert tuple(control.value) == explorer.view.methods if name == "methods" else control.value == getattr(explorer.view, name)  # fmt: skip


# --- the carousel ---


def test_the_carousel_follows_a_training(parts):
    target, images, _ = parts
    scanner = SCAN(target.model, "layer4", (64, 64), device="cpu").set_preprocess(target.preprocess)
    scanner.set_dataset([(images, torch.zeros(4).long())] * 5).generate_decoder(ch_per_lv=[8, 8, 8, 8]).compile()
    plain = SCAN(target.model, "layer4", (64, 64), device="cpu").set_preprocess(target.preprocess)
    plain.set_dataset([(images, torch.zeros(4).long())] * 5).generate_decoder(ch_per_lv=[8, 8, 8, 8]).compile()
    plain.decoder.load_state_dict(scanner.decoder.state_dict())
    carousel = TrainingCarousel(scanner, images[:2], every=2)
    seen = []
    carousel.picture.observe(lambda change: seen.append(change["new"]), "value")
    scanner.fit(2, verbose=False, on_step=carousel)
    plain.fit(2, verbose=False)
    for name, value in plain.decoder.state_dict().items():  # looking on changes nothing
        assert torch.equal(value, scanner.decoder.state_dict()[name]), name
    assert [(epoch, step) for epoch, step, _ in carousel.shots] == [(e, s) for e in (0, 1) for s in (1, 2, 4)]
    assert carousel.slider.max == carousel.slider.value == 5 and len(seen) >= 6
    assert carousel.picture.value == encode_png(carousel.shots[5][2])
    carousel.previous.click()
    assert carousel.slider.value == 4 and carousel.picture.value == encode_png(carousel.shots[4][2])
    for _ in range(9):
        carousel.previous.click()
    assert carousel.slider.value == 0
    carousel.next.click()
    assert carousel.slider.value == 1
    heat, rebuilt = scanner(images[:1], percentile=95)
    assert heat.shape == (1, 64, 64) and rebuilt.shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="every 0"):
        TrainingCarousel(scanner, images, every=0)
