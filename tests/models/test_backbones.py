import sys

import pytest
import torch
from torch import nn
from torchvision import models

from scanlib import load_classifier
from scanlib.models.backbones import build_classifier, replace_head


def equal_except(head, model, other):
    """Return whether all weights outside the head are equal."""
    ours, theirs = ({k: v for k, v in m.state_dict().items() if not k.startswith(head)} for m in (model, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- build_classifier ---


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("squeezenet1_1", "features")])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_build_torchvision_classifier(name, layer, classes):
    classifier = build_classifier(name, classes, None, image_size=64)
    assert (
        classifier.layer == layer and classifier.image_size == (64, 64) and classifier.classes == [str(c) for c in range(classes)]
    )
    assert not any(module.training for module in classifier.model.modules())
    with torch.no_grad():
        logits = classifier.model(classifier.preprocess(torch.rand(2, 3, 64, 64) * 255))
    assert logits.shape == (2, classes) and torch.isfinite(logits).all()


def test_image_size_is_the_models_by_default():
    assert build_classifier("resnet18", 3, None).image_size == (224, 224)
    assert build_classifier("signs_vit", 10).image_size == (64, 64)
    assert build_classifier("resnet18", 3, None, 260).image_size == (260, 260)


def test_head_is_kept_for_the_published_number_of_classes():
    shipped = load_classifier("signs_cnn")
    classifier = build_classifier("signs_cnn", 10, image_size=64)
    assert equal_except("none", classifier.model, shipped.model) and classifier.layer == "layer4" and classifier.classes[3] == "3"
    fewer = build_classifier("signs_cnn", 4, image_size=64)
    assert fewer.model.head.weight.shape == (4, 192) and fewer.classes == ["0", "1", "2", "3"]
    assert equal_except("head", fewer.model, shipped.model)
    with torch.no_grad():
        assert fewer.model(fewer.preprocess(torch.rand(2, 3, 64, 64) * 255)).shape == (2, 4)


def test_side_heads_are_removed():
    """In train mode, googlenet and inception_v3 return a tuple with the outputs of their side heads for 1000 classes."""
    model = build_classifier("googlenet", 5, None).model.train()
    logits = model(torch.rand(2, 3, 64, 64))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5)
    assert not any(name.startswith("aux") for name, _ in model.named_parameters())


def test_weights_from_a_path(tmp_path):
    model = models.squeezenet1_1(weights=None)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", str(tmp_path / "w.pth")):
        loaded = build_classifier("squeezenet1_1", 6, path).model
        assert equal_except("classifier", loaded, model) and loaded.classifier[1].weight.shape == (6, 512, 1, 1)
    assert equal_except("none", build_classifier("squeezenet1_1", 1000, tmp_path / "w.pth").model, model)
    with pytest.raises(ValueError, match=r"weights of resnet18 at .*w.pth is of another model: "):
        build_classifier("resnet18", 6, tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet18", "signs_cnn", "vit_tiny"])
def test_build_classifier_raises_if_weights_are_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"weights of {name} not found at .*none.pth") as raised:
        build_classifier(name, 3, tmp_path / "none.pth")
    assert "\n" not in str(raised.value)


def test_build_classifier_raises_if_weights_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network,\nand no cache")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match="weights of resnet18 could not be downloaded .*; put resnet18-") as raised:
        build_classifier("resnet18", 3)
    assert "\n" not in str(raised.value)
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(FileNotFoundError, match=r"weights of resnest26d could not be downloaded \(OSError\); pass") as raised:
        build_classifier("resnest26d", 3)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("classes", [0, -3])
def test_build_classifier_raises_for_fewer_than_one_class(classes):
    for name in ("resnet18", "signs_cnn", "resnest26d"):
        with pytest.raises(ValueError, match=f"classes must be 1 or more, got {classes}"):
            build_classifier(name, classes, None)


def test_build_classifier_raises_for_a_size_that_the_model_does_not_accept():
    with pytest.raises(ValueError, match="image_size must be 64 for signs_vit, got 32"):
        build_classifier("signs_vit", 3, None, 32)


# --- timm ---


def test_build_timm_classifier():
    pytest.importorskip("timm")
    classifier = build_classifier("resnest26d", 7, None, image_size=64)
    assert classifier.layer.startswith("layer4") and classifier.image_size == (64, 64) and len(classifier.classes) == 7
    assert classifier.model.fc.weight.shape == (7, 2048) and not any(module.training for module in classifier.model.modules())
    assert classifier.preprocess(torch.zeros(1, 3, 1, 1)).flatten().tolist() == pytest.approx(
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    )
    with torch.no_grad():
        assert classifier.model(classifier.preprocess(torch.rand(2, 3, 64, 64) * 255)).shape == (2, 7)


def test_timm_weights_from_a_path(tmp_path):
    """A published state dict has the published head, which is replaced after loading."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = build_classifier("mobilenetv3_small_050", 6, tmp_path / "w.pth").model
    assert equal_except("classifier", loaded, model) and loaded.classifier.weight.shape == (6, 1024)
    assert equal_except("none", build_classifier("mobilenetv3_small_050", 1000, tmp_path / "w.pth").model, model)
    with pytest.raises(ValueError, match=r"weights of resnet10t at .*w.pth is of another model: "):
        build_classifier("resnet10t", 6, tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.pth"):
        build_classifier("mobilenetv3_small_050", 6, tmp_path / "none.pth")


@pytest.mark.parametrize(("name", "close"), [("resnest27d", "resnest26d"), ("resnst26d", "resnest26d"), ("resnet81", "resnet18")])
def test_build_classifier_raises_for_an_unknown_name(name, close):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match=f"model '{name}' not found in torchvision or timm; close matches: .*{close}") as raised:
        build_classifier(name, 3, None)
    assert "\n" not in str(raised.value)


def test_timm_is_needed_only_for_its_models(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="model 'resnest26d' not found in torchvision; for timm's models, `pip install timm`"):
        build_classifier("resnest26d", 3, None)
    assert build_classifier("signs_cnn", 3, None).model.head.out_features == 3


# --- replace_head ---


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("resnet18", "fc", nn.Linear),
        ("squeezenet1_1", "classifier.1", nn.Conv2d),
        ("mobilenet_v3_small", "classifier.3", nn.Linear),
        ("shufflenet_v2_x0_5", "fc", nn.Linear),
    ],
)
def test_replace_head_changes_only_the_head(name, head, kind):
    model = models.get_model(name, weights=None)
    old, state = model.get_submodule(head), {key: value.clone() for key, value in model.state_dict().items()}
    assert replace_head(model, 3) is model
    new = model.get_submodule(head)
    assert type(new) is kind and new.weight.shape == (3, *old.weight.shape[1:]) and new.bias.shape == (3,)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if not key.startswith(head))
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_replace_head_replaces_only_the_last_of_several_layers():
    model = nn.Module()
    model.classifier = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5, bias=False)).double().eval()
    replace_head(model, 3)
    first, _, last = model.classifier
    assert first.weight.shape == (5, 7) and last.weight.shape == (3, 5) and last.bias is None
    assert last.weight.dtype == torch.float64 and not last.training


def test_replace_head_leaves_the_auxiliary_head_of_a_segmentation_model():
    model = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    model.aux_classifier = nn.Sequential(nn.Conv2d(4, 21, 1))
    model.classifier = nn.Sequential(nn.Conv2d(8, 21, 1))
    replace_head(model, 3)
    assert model.classifier[0].out_channels == 3 and model.aux_classifier[0].out_channels == 21


def test_replace_head_raises_without_a_head():
    with pytest.raises(
        ValueError, match="model must have a linear layer or a convolution in classifier, .*, got Sequential; replace its head"
    ):
        replace_head(nn.Sequential(nn.Conv2d(3, 4, 3)), 3)
