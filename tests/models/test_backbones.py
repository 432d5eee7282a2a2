import sys

import pytest
import torch
from torch import nn
from torchvision import models

from scanlib import load_classifier
from scanlib.models.backbones import build_classifier, replace_head


def same_but(model, other, head):
    """Are all weights equal, those of the head left out?"""
    ours, theirs = ({k: v for k, v in m.state_dict().items() if not k.startswith(head)} for m in (model, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# --- classifier ---


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("squeezenet1_1", "features")])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_torchvision(name, layer, classes):
    base = build_classifier(name, classes, None, image_size=64)
    assert base.layer == layer and base.image_size == (64, 64) and base.classes == [str(c) for c in range(classes)]
    assert not any(module.training for module in base.model.modules())
    with torch.no_grad():
        logits = base.model(base.preprocess(torch.rand(2, 3, 64, 64) * 255))
    assert logits.shape == (2, classes) and torch.isfinite(logits).all()


def test_the_picture_size_is_the_models_own_unless_given():
    assert build_classifier("resnet18", 3, None).image_size == (224, 224)
    assert build_classifier("signs_vit", 10).image_size == (64, 64)
    assert build_classifier("resnet18", 3, None, 260).image_size == (260, 260)


def test_signs_cnn_keeps_the_head_that_fits():
    shipped = load_classifier("signs_cnn")
    base = build_classifier("signs_cnn", 10, image_size=64)
    assert same_but(base.model, shipped.model, "none") and base.layer == "layer4" and base.classes[3] == "3"
    few = build_classifier("signs_cnn", 4, image_size=64)
    assert few.model.head.weight.shape == (4, 192) and few.classes == ["0", "1", "2", "3"]
    assert same_but(few.model, shipped.model, "head")
    with torch.no_grad():
        assert few.model(few.preprocess(torch.rand(2, 3, 64, 64) * 255)).shape == (2, 4)


def test_side_heads_are_let_go():
    """In train mode googlenet and inception_v3 return a tuple, with the side heads' outputs for 1000 classes."""
    model = build_classifier("googlenet", 5, None).model.train()
    logits = model(torch.rand(2, 3, 64, 64))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5)
    assert not any(name.startswith("aux") for name, _ in model.named_parameters())


def test_weights_from_a_path(tmp_path):
    model = models.squeezenet1_1(weights=None)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for path in (tmp_path / "w.pth", str(tmp_path / "w.pth")):
        loaded = build_classifier("squeezenet1_1", 6, path).model
        assert same_but(loaded, model, "classifier") and loaded.classifier[1].weight.shape == (6, 512, 1, 1)
    assert same_but(build_classifier("squeezenet1_1", 1000, tmp_path / "w.pth").model, model, "none")
    with pytest.raises(ValueError, match="w.pth does not hold the weights of resnet18"):
        build_classifier("resnet18", 6, tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["resnet18", "signs_cnn", "vit_tiny"])
def test_weights_that_are_not_there(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no weights .*none.pth") as raised:
        build_classifier(name, 3, tmp_path / "none.pth")
    assert "\n" not in str(raised.value)


def test_weights_that_can_not_be_downloaded(tmp_path, monkeypatch):
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
def test_no_classes(classes):
    for name in ("resnet18", "signs_cnn", "resnest26d"):
        with pytest.raises(ValueError, match=f"classes {classes} is no count; give 1 or more"):
            build_classifier(name, classes, None)


# --- timm ---


def test_resnest():
    pytest.importorskip("timm")
    base = build_classifier("resnest26d", 7, None, image_size=64)
    assert base.layer.startswith("layer4") and base.image_size == (64, 64) and len(base.classes) == 7
    assert base.model.fc.weight.shape == (7, 2048) and not any(module.training for module in base.model.modules())
    assert base.preprocess(torch.zeros(1, 3, 1, 1)).flatten().tolist() == pytest.approx(
        [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    )
    with torch.no_grad():
        assert base.model(base.preprocess(torch.rand(2, 3, 64, 64) * 255)).shape == (2, 7)


def test_timm_weights_from_a_path(tmp_path):
    """A published state dict has the published head: it is made anew behind the loading."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv3_small_050")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = build_classifier("mobilenetv3_small_050", 6, tmp_path / "w.pth").model
    assert same_but(loaded, model, "classifier") and loaded.classifier.weight.shape == (6, 1024)
    assert same_but(build_classifier("mobilenetv3_small_050", 1000, tmp_path / "w.pth").model, model, "none")
    with pytest.raises(ValueError, match="w.pth does not hold the weights of resnet10t"):
        build_classifier("resnet10t", 6, tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*none.pth"):
        build_classifier("mobilenetv3_small_050", 6, tmp_path / "none.pth")


@pytest.mark.parametrize(("name", "close"), [("resnest27d", "resnest26d"), ("resnst26d", "resnest26d"), ("resnet81", "resnet18")])
def test_unknown_names(name, close):
    pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=f"backbone '{name}' is neither torchvision's nor timm's; close matches: .*{close}"
    ) as raised:
        build_classifier(name, 3, None)
    assert "\n" not in str(raised.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="backbone 'resnest26d' is not torchvision's; for timm's, `pip install timm`"):
        build_classifier("resnest26d", 3, None)
    assert build_classifier("signs_cnn", 3, None).model.head.out_features == 3  # the others need no timm


# --- with_head ---


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        ("resnet18", "fc", nn.Linear),
        ("squeezenet1_1", "classifier.1", nn.Conv2d),
        ("mobilenet_v3_small", "classifier.3", nn.Linear),
        ("shufflenet_v2_x0_5", "fc", nn.Linear),
    ],
)
def test_only_the_head_is_new(name, head, kind):
    model = models.get_model(name, weights=None)
    old, state = model.get_submodule(head), {key: value.clone() for key, value in model.state_dict().items()}
    assert replace_head(model, 3) is model
    new = model.get_submodule(head)
    assert type(new) is kind and new.weight.shape == (3, *old.weight.shape[1:]) and new.bias.shape == (3,)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if not key.startswith(head))
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 3)


def test_a_head_of_several_layers_loses_its_last_only():
    model = nn.Module()
    model.classifier = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 5, bias=False)).double().eval()
    replace_head(model, 3)
    first, _, last = model.classifier
    assert first.weight.shape == (5, 7) and last.weight.shape == (3, 5) and last.bias is None
    assert last.weight.dtype == torch.float64 and not last.training  # as the one that it replaces


def test_the_head_of_a_segmentation_is_not_its_side_head():
    model = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    model.aux_classifier = nn.Sequential(nn.Conv2d(4, 21, 1))
    model.classifier = nn.Sequential(nn.Conv2d(8, 21, 1))
    replace_head(model, 3)
    assert model.classifier[0].out_channels == 3 and model.aux_classifier[0].out_channels == 21


def test_no_head():
    with pytest.raises(ValueError, match="Sequential has no head among classifier, .*; replace it yourself"):
        replace_head(nn.Sequential(nn.Conv2d(3, 4, 3)), 3)
