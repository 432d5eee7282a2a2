"""Replay against full runs of the model with the layer's output replaced."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from scanlib.explainers.replay import Replay
from scanlib.hooks import FeatureTaps
from tests.conftest import TinyNet
from tests.explainers.test_cams import FlattenNet


class Shared(nn.Module):
    """One ReLU used four times, once behind the layer, and an in-place addition to a module's output."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.one, self.two, self.three = (nn.Conv2d(3, 3, 3, 1, 1) for _ in range(3))
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), self.relu)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.relu(self.one(x))
        skip = self.inner(x)
        y = self.two(self.relu(skip * 2))
        y += skip
        return self.head(self.relu(self.three(y)).mean((2, 3)))


MODELS = {
    "shared": (Shared, "two"),
    "flatten": (FlattenNet, "layer.1"),
    "resnet": (lambda: torchvision.models.resnet18(weights=None, num_classes=4), "layer2.1.conv1"),
    "densenet": (lambda: torchvision.models.DenseNet(4, (2, 2), 8, num_classes=4), "features.denseblock1.denselayer2.conv1"),
    "inception": (
        lambda: torchvision.models.googlenet(weights=None, num_classes=4, aux_logits=False, init_weights=False),
        "inception4b.branch2.0",
    ),
    "vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 8, 16, num_classes=4),
        "encoder.layers.encoder_layer_1.ln_2",
    ),
    "swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=4),
        "features.3.0.norm1",
    ),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(weights=None, num_classes=4), "features.5.block.1"),
}


class Multiplications(TorchFunctionMode):
    """Count convolutions and linear layers."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.conv2d, F.linear)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_replay_equals_full_run_and_skips_the_front(name):
    """Given features lead to the outputs of a full run with a replacing hook; nothing in front of the layer runs again."""
    torch.manual_seed(0)
    build, layer = MODELS[name]
    model = build().eval()
    x = torch.rand(1, 3, *((16, 16) if name == "flatten" else (32, 32)))
    module = model.get_submodule(layer)
    with Replay(model, layer, x) as replay:
        with FeatureTaps(model, [layer], record=None) as taps:
            torch.testing.assert_close(taps(x), replay.outputs)
            torch.testing.assert_close(taps.features[0], replay.features)
        versions = torch.randn(5, *replay.features.shape[1:])
        with Multiplications() as behind:
            outputs = replay(versions)
        torch.testing.assert_close(replay(versions[:2]), outputs[:2])  # a second call, with another count
    in_front = []
    with Multiplications() as whole, torch.no_grad():
        handle = module.register_forward_hook(lambda *_: in_front.append(whole.count))
        model(x)
        handle.remove()
    assert behind.count == whole.count - in_front[-1]
    handle = module.register_forward_hook(lambda m, inputs, output: versions.clone())
    with torch.no_grad():
        torch.testing.assert_close(outputs, model(x.repeat(5, 1, 1, 1)), rtol=1e-4, atol=1e-5)
    handle.remove()
    assert not any("forward" in vars(m) for m in model.modules())


def test_forward_of_an_instance_is_restored():
    """A forward set on an instance is restored afterwards, also after an error."""
    model = TinyNet().eval()
    own = lambda x, forward=model.front.forward: forward(x)  # noqa: E731
    model.front.forward = own
    with Replay(model, "back", torch.rand(1, 3, 16, 16)) as replay:
        replay(torch.rand(2, 8, 4, 4))
        assert model.front.forward is own
        with pytest.raises(RuntimeError):
            replay(torch.rand(2, 9, 4, 4))
        assert model.front.forward is own
    assert math.isfinite(float(model(torch.rand(1, 3, 16, 16)).sum().detach()))


class Batched(TinyNet):
    """A model that treats the images of a batch differently: the first image's features are doubled."""

    def forward(self, x):
        x = self.front(x)
        return self.head(self.back(x * (1 + (torch.arange(len(x)) == 0)[:, None, None, None])).mean((2, 3)))


def test_replay_runs_the_whole_model_if_recorded_outputs_differ():
    torch.manual_seed(0)
    model, x = Batched().eval(), torch.rand(3, 3, 16, 16)
    with Replay(model, "back.0", x) as replay:
        assert replay._recorded
    with Replay(model, "front.1", x) as replay:  # the last image alone would be the first
        assert not replay._recorded
        replaced = replay(replay.features[:2], image=0)
    with torch.no_grad():
        brighter = model.front(x[:2]) * torch.tensor([2.0, 1.0])[:, None, None, None]
        torch.testing.assert_close(replaced, model.head(model.back(brighter).mean((2, 3))))


class Activated(nn.Module):
    """One activation in two containers; the layer's last run is inside the second one."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), act), nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), act))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Encoder(nn.Module):
    """torch's encoder layers use a fused path if they have no hooks."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def halved(model):
    """Add a user's hook that changes the layer's output."""
    model.back.register_forward_hook(lambda module, inputs, output: output * 0.5)
    return model


@pytest.mark.parametrize(
    "build, layer",
    [
        (Activated, "body.1.1"),
        (Encoder, "encoder.layers.1.norm1"),
        (lambda: torchvision.models.resnet18(weights=None, num_classes=4), "layer4.0.downsample"),
        (lambda: halved(TinyNet()), "back"),
    ],
)
def test_replay_equals_full_run_for_unusual_models(build, layer):
    """Compare with full runs in which a hook replaces the layer's output, twice for each image."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(2, 3, 64, 64)
    with Replay(model, layer, x) as replay:
        assert replay._recorded
        for image in (1, 0, 1):
            versions, runs = torch.rand(3, *replay.features.shape[1:]), []

            def replace(module, inputs, output, versions=versions, runs=runs):
                runs.append(module)
                return versions.clone() if len(runs) == replay._runs else output

            handle = model.get_submodule(layer).register_forward_hook(replace, prepend=True)
            with torch.no_grad():
                expected = model(x[image : image + 1].repeat(3, 1, 1, 1))
            handle.remove()
            for _ in range(2):
                torch.testing.assert_close(replay(versions, image), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(replay(versions[:1], image), expected[:1], rtol=1e-4, atol=1e-5)
