from collections import OrderedDict

import pytest
import torch
import torchvision

from scanlib import Signs, SmallResNet, build_small_vit, load_classifier
from scanlib.explainers.base import normalize_map
from scanlib.explainers.formulas import grad_cam
from scanlib.hooks import FeatureTap
from scanlib.layers import find_default_layer
from scanlib.models.small import Normalize


def test_small_models():
    for model in (SmallResNet(), build_small_vit()):
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
        assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_normalize_by_hand():
    x = torch.full((1, 3, 1, 1), 51.0, dtype=torch.float64)
    assert Normalize((0.1,) * 3, (0.5,) * 3)(x).flatten().tolist() == pytest.approx([0.2] * 3)


def test_torchvision_target_with_random_weights():
    target = load_classifier("resnet18", weights=None)
    assert (
        target.layer == "layer4"
        and target.image_size == (224, 224)
        and target.classes[0] == "tench"
        and not target.model.training
    )
    assert target.preprocess(torch.zeros(1, 3, 8, 8))[0, 0, 0, 0] == pytest.approx(-0.485 / 0.229)


def test_default_layers():
    for name, layer in [
        ("squeezenet1_1", "features"),
        ("vgg11", "features"),
        ("densenet121", "features"),
        ("mobilenet_v3_small", "features"),
    ]:
        model = torchvision.models.get_model(name, weights=None)
        found = find_default_layer(model)
        assert found.split(".")[0] == layer
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32)
    assert find_default_layer(vit, 32) == "encoder.layers.encoder_layer_1.ln_1"
    assert find_default_layer(vit.double(), (32, 32)) == find_default_layer(vit.bfloat16(), 32)
    with pytest.raises(ValueError, match="no layer with a spatial extent"):
        find_default_layer(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), size=2)


@pytest.mark.parametrize("name", ["ln_1", "norm1", "layernorm_before"])
def test_the_default_layer_of_a_transformer_is_its_last_blocks_first_norm(name):
    block = lambda: torch.nn.Sequential(OrderedDict({name: torch.nn.LayerNorm(4), "mlp": torch.nn.Linear(4, 4)}))  # noqa: E731
    parts = {"embed": torch.nn.Conv2d(3, 4, 4, 4), "flat": torch.nn.Flatten(2), "turn": _Turned(), "a": block(), "b": block()}
    assert find_default_layer(torch.nn.Sequential(OrderedDict(parts)), 16) == f"b.{name}"


class _Turned(torch.nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_weights_from_a_path(tmp_path):
    model = torchvision.models.squeezenet1_1(weights=None, num_classes=1000)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "w.pth")
    loaded = load_classifier("squeezenet1_1", tmp_path / "w.pth").model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="w.pth does not hold the weights of resnet18"):
        load_classifier("resnet18", tmp_path / "w.pth")
    with pytest.raises(
        FileNotFoundError, match=r"no weights at .*none.pth; put a state dict of resnet18 there \(torchvision's is resnet18-"
    ):
        load_classifier("resnet18", tmp_path / "none.pth")


def test_default_weights_offline_name_file_and_folder(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"put resnet18-f37072fd.pth into .*checkpoints, or pass weights=PATH") as raised:
        load_classifier("resnet18", "DEFAULT")
    assert "\n" not in str(raised.value)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    assert load_classifier("resnet18", "DEFAULT").classes[0] == "tench"  # once it is there, it is used


def test_inputs_are_scaled_as_the_weights_were_trained(tmp_path):
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "g.pth")
    assert load_classifier("googlenet", tmp_path / "g.pth").model.transform_input
    assert load_classifier("inception_v3", None).image_size == (299, 299)
    swin = load_classifier("vit_b_16", None)
    assert swin.layer == "encoder.layers.encoder_layer_11.ln_1" and len(swin.classes) == 1000


def test_vit_tiny(tmp_path):
    target = load_classifier("vit_tiny", None)
    assert target.layer == "encoder.layers.encoder_layer_11.ln_1" and len(target.classes) == 1000
    assert target.preprocess(torch.full((1, 3, 1, 1), 255.0)).flatten().tolist() == [1, 1, 1]
    torch.save(target.model.state_dict(), tmp_path / "w.pth")
    loaded = load_classifier("vit_tiny", tmp_path / "w.pth").model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in target.model.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no weights of vit_tiny at DEFAULT; torchvision publishes none"):
        load_classifier("vit_tiny")
    with pytest.raises(FileNotFoundError, match=r"no weights of vit_tiny at .*none.pth"):
        load_classifier("vit_tiny", tmp_path / "none.pth")


def test_files_that_are_no_state_dict(tmp_path):
    for content in (torch.ones(3), {"state_dict": 3}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="w.pth is no state dict; it must map parameter names of resnet18 to tensors"):
            load_classifier("resnet18", tmp_path / "w.pth")


def test_unknown_names():
    with pytest.raises(ValueError, match="model 'resnet_50' is not known; close matches: resnet50"):
        load_classifier("resnet_50")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_classifier("signs_cnn", "nowhere.pt")


def test_shipped_classifier_on_fresh_scenes():
    target = load_classifier("signs_cnn")
    images, labels = zip(*Signs(200, seed=77), strict=True)
    with torch.no_grad():
        right = target.model(target.preprocess(torch.stack(images))).argmax(1) == torch.tensor(labels)
    assert right.float().mean() >= 0.98


def test_grad_cam_by_hand():
    acts = torch.tensor([[[[1.0, 2], [3, 4]], [[4.0, 3], [2, 1]]]], dtype=torch.float64)
    grads = torch.tensor([[[[2.0, 0], [0, 0]], [[-1.0, -1], [-1, -1]]]], dtype=torch.float64)
    # weights: 0.5 and -1
    assert grad_cam(acts, grads).tolist() == [[[0, 0], [0, 1]]]
    assert normalize_map(torch.tensor([[[2.0, 4], [3, 2]]]), (2, 2)).tolist() == [[[0, 1], [0.5, 0]]]
    assert normalize_map(torch.ones(1, 2, 2), (4, 4)).eq(0).all()


SMALL = {
    "alexnet": 64,
    "vgg11": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 107,  # with its auxiliary head
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "shufflenet_v2_x0_5": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "swin_v2_t": 64,
    "maxvit_t": 224,
}


@pytest.mark.parametrize(("name", "size"), SMALL.items())
def test_every_family_gives_a_layer_its_features_and_their_gradient(name, size):
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    layer = find_default_layer(model, size)
    with FeatureTap(model, layer) as tap:
        logits = tap(torch.rand(1, 3, size, size))
        maps = tap.layout.to_maps(tap.gradient(3))
    assert logits.shape == (1, 1000) and maps.shape[-2:] == tap.layout.grid and min(tap.layout.grid) > 1
    assert tap.layout.kind == ("BHWC" if "swin" in name else "BCHW")
    assert maps.isfinite().all() and maps.any()


@pytest.mark.parametrize(
    ("name", "size", "prefix"),
    [
        ("vit_tiny_patch16_224", 224, 1),
        ("deit_tiny_distilled_patch16_224", 224, 2),
        ("vit_small_patch14_reg4_dinov2", 70, 5),
        ("vit_medium_patch16_reg4_gap_256", 256, 4),
        ("convnext_atto", 64, 0),
        ("resnest26d", 64, 0),
    ],
)
def test_timms_models_too(name, size, prefix):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    options = {"img_size": size} if "dinov2" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    with FeatureTap(model, find_default_layer(model, size)) as tap:
        assert tap(torch.rand(1, 3, size, size)).shape == (1, 7)
        assert tap.layout.prefix == prefix and tap.layout.to_maps(tap.gradient(3)).any()


def test_shipped_vit_on_fresh_scenes():
    target = load_classifier("signs_vit")
    images, labels = zip(*Signs(200, seed=7), strict=True)
    with torch.no_grad():
        predicted = target.model(target.preprocess(torch.stack(images))).argmax(1)
    assert (predicted == torch.tensor(labels)).float().mean() >= 0.95
    assert target.layer == "encoder.layers.encoder_layer_1"
