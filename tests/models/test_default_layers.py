"""The layer that is explained by default, for every family of torchvision's and timm's models."""

from collections import OrderedDict

import pytest
import torch
import torchvision

from scanlib.hooks import FeatureTap
from scanlib.layers import find_default_layer


class Transpose(torch.nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_default_layer_of_torchvision_models():
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
def test_default_layer_of_a_transformer_is_the_first_norm_of_the_last_block(name):
    block = lambda: torch.nn.Sequential(OrderedDict({name: torch.nn.LayerNorm(4), "mlp": torch.nn.Linear(4, 4)}))  # noqa: E731
    parts = {
        "embed": torch.nn.Conv2d(3, 4, 4, 4),
        "flat": torch.nn.Flatten(2),
        "transpose": Transpose(),
        "a": block(),
        "b": block(),
    }
    assert find_default_layer(torch.nn.Sequential(OrderedDict(parts)), 16) == f"b.{name}"


IMAGE_SIZES = {
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


@pytest.mark.parametrize(("name", "size"), IMAGE_SIZES.items())
def test_default_layer_of_every_family_has_features_and_a_gradient(name, size):
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
def test_default_layer_of_timm_models_has_features_and_a_gradient(name, size, prefix):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    options = {"img_size": size} if "dinov2" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=7, **options).eval()
    with FeatureTap(model, find_default_layer(model, size)) as tap:
        assert tap(torch.rand(1, 3, size, size)).shape == (1, 7)
        assert tap.layout.prefix == prefix and tap.layout.to_maps(tap.gradient(3)).any()
