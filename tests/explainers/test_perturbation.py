"""Score-CAM's family and Ablation-CAM against loops written out, and the tail of a model run by itself."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

import scanlib
from scanlib.explainers.replay import Replay
from scanlib.hooks import FeatureTaps
from tests.conftest import TinyNet
from tests.explainers.test_cams import FlattenNet, case, plain, relu  # noqa: F401  (case is a fixture)


def masked_scores(model, x, a, k, strength=1.0, noise=None, before=False):
    """One image's score under each channel's mask, one run each."""
    scores = []
    for c in range(len(a)):
        mask = torch.from_numpy(a[c])[None, None]
        stretch = lambda m: (m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else torch.zeros_like(m)  # noqa: E731
        resize = lambda m: F.interpolate(m, x.shape[-2:], mode="bilinear", align_corners=False)  # noqa: E731
        mask = resize(stretch(mask)) if before else stretch(resize(mask))
        if noise is not None:
            mask = mask + noise[c]
        with torch.no_grad():
            scores.append(float(model(strength * x[None] * mask)[0, k]))
    return np.array(scores)


def softmax(s):
    return np.exp(s - s.max()) / np.exp(s - s.max()).sum()


@pytest.mark.parametrize("before", [False, True])
def test_score_cam(case, before):  # noqa: F811
    model, layer, x = case
    A, _ = plain(model, layer, x, 0)
    explainer = scanlib.ScoreCAM(model, layer, batch_size=3, stretch="before" if before else "after")
    maps = explainer(x, target=[2, 0, 1], normalize=False)
    for i, k in enumerate((2, 0, 1)):
        weights = softmax(masked_scores(model, x[i], A[i], k, before=before))
        np.testing.assert_allclose(maps[i].numpy(), relu(np.tensordot(weights, A[i], 1)), rtol=1e-8, atol=1e-12)


def test_score_cam_with_softmax_over_classes():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    every = np.stack([masked_scores(model, x[0], A[0], k) for k in range(4)], 1)  # (channels, classes)
    expected = relu(np.tensordot(np.stack([softmax(row) for row in every])[:, 1], A[0], 1))
    maps = scanlib.ScoreCAM(model, "layer", softmax="classes")(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), expected, rtol=1e-8, atol=1e-12)


def test_ss_cam():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    generator = torch.Generator().manual_seed(7)
    noise = [2 * torch.randn(5, 16, 16, generator=generator, dtype=x.dtype) for _ in range(3)]
    expected = softmax(np.mean([masked_scores(model, x[0], A[0], 1, noise=n) for n in noise], 0))
    maps = scanlib.SSCAM(model, "layer", samples=3, seed=7)(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), relu(np.tensordot(expected, A[0], 1)), rtol=1e-7, atol=1e-12)
    small = scanlib.SSCAM(model, "layer", samples=3, seed=7, batch_size=2)(x, target=1, normalize=False)
    torch.testing.assert_close(small, maps)  # the same noise, drawn in pieces


def test_is_cam():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    expected = softmax(np.mean([masked_scores(model, x[0], A[0], 1, strength=s / 4) for s in (1, 2, 3, 4)], 0))
    maps = scanlib.ISCAM(model, "layer", samples=4)(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), relu(np.tensordot(expected, A[0], 1)), rtol=1e-8, atol=1e-12)


def test_constant_channels_are_tried_once():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.back[0].bias[:6] = -100  # six of eight channels are dead
    seen = []
    handle = model.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    maps = scanlib.ScoreCAM(model, "back")(x, target=1, normalize=False)
    handle.remove()
    assert seen == [2, 4, 2]  # the images, two live channels each, and two black images
    A, _ = plain(model, "back", x, 1)
    for i in range(2):
        weights = softmax(masked_scores(model, x[i], A[i], 1))
        np.testing.assert_allclose(maps[i].numpy(), relu(np.tensordot(weights, A[i], 1)), rtol=1e-8, atol=1e-12)


def ablated(model, layer, x, k, channels):
    """(y, y without each channel), a whole run each."""
    scores = []
    for c in [None, *range(channels)]:

        def zero(module, inputs, output, c=c):
            output = output.clone()
            if c is not None and output.ndim == 3:
                output[:, 1:, c] = 0
            elif c is not None:
                output[:, c] = 0
            return output

        handle = model.get_submodule(layer).register_forward_hook(zero)
        with torch.no_grad():
            scores.append(float(model(x)[0, k]))
        handle.remove()
    return scores[0], np.array(scores[1:])


@pytest.mark.parametrize("batch_size", [None, 3])
def test_ablation_cam(case, batch_size):  # noqa: F811
    model, layer, x = case
    A, _ = plain(model, layer, x, 0)
    maps = scanlib.AblationCAM(model, layer, batch_size=batch_size)(x, target=[2, 0, 1], normalize=False)
    signs = set()
    for i, k in enumerate((2, 0, 1)):
        y, without = ablated(model, layer, x[i : i + 1], k, A.shape[1])
        signs.add(y > 0)
        weights = (y - without) / abs(y)
        np.testing.assert_allclose(maps[i].numpy(), relu(np.tensordot(weights, A[i], 1)), rtol=1e-8, atol=1e-12)
    assert maps.amax() > 0


def test_ablation_keeps_its_sign_where_the_score_is_negative():
    """Shift every logit: the drop of a channel is the same, and so is the normalised map."""
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    explainer = scanlib.AblationCAM(model, "back")
    with torch.no_grad():
        model.head.bias += 10
        above = explainer(x, 1)
        model.head.bias -= 20
        assert (model(x)[:, 1] < 0).all()
        torch.testing.assert_close(explainer(x, 1), above)


def test_perturbation_arguments():
    model = TinyNet()
    for method, options, message in (
        ("ScoreCAM", {"batch_size": 0}, "batch_size 0"),
        ("ScoreCAM", {"softmax": "rows"}, "softmax 'rows'"),
        ("ScoreCAM", {"stretch": "never"}, "stretch 'never'"),
        ("AblationCAM", {"batch_size": 0}, "batch_size 0"),
        ("SSCAM", {"samples": 0}, "samples 0"),
        ("ISCAM", {"samples": 0}, "samples 0"),
        ("ScoreCAM", {"differentiable": True}, "differentiable=True is not for ScoreCAM"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(scanlib, method)(model, "back", **options)
    with pytest.raises(RuntimeError, match="did not run"):
        scanlib.AblationCAM(model.eval(), "unused")(torch.rand(1, 3, 16, 16))


def test_callables_as_targets():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    rows = [lambda row: row[3], lambda row: row[0]]
    for method in (scanlib.ScoreCAM, scanlib.AblationCAM):
        explainer = method(model, "back")
        torch.testing.assert_close(explainer(x, rows), explainer(x, [3, 0]))
        torch.testing.assert_close(explainer(x, rows[0]), explainer(x, 3))


# --- the tail of a model ---


class Shared(nn.Module):
    """One ReLU in four places, one of them behind the layer; an in-place addition to what a module returned."""

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


TAILS = {
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
    """Counts convolutions and linear layers."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.conv2d, F.linear)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TAILS)
def test_the_tail_is_what_lies_behind_the_layer(name):
    """Any features put into the layer's place give what a whole run with a replacing hook gives; nothing in front runs again."""
    torch.manual_seed(0)
    build, layer = TAILS[name]
    model = build().eval()
    x = torch.rand(1, 3, *((16, 16) if name == "flatten" else (32, 32)))
    module = model.get_submodule(layer)
    with Replay(model, layer, x) as tail:
        with FeatureTaps(model, [layer], graph=None) as taps:
            torch.testing.assert_close(taps(x), tail.outputs)
            torch.testing.assert_close(taps.features[0], tail.features)
        versions = torch.randn(5, *tail.features.shape[1:])
        with Multiplications() as behind:
            outputs = tail(versions)
        torch.testing.assert_close(tail(versions[:2]), outputs[:2])  # again, and with another count
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


def test_a_tail_of_ones_own_forward():
    """A forward that somebody put on an instance is there again afterwards, errors included."""
    model = TinyNet().eval()
    own = lambda x, forward=model.front.forward: forward(x)  # noqa: E731
    model.front.forward = own
    with Replay(model, "back", torch.rand(1, 3, 16, 16)) as tail:
        tail(torch.rand(2, 8, 4, 4))
        assert model.front.forward is own
        with pytest.raises(RuntimeError):
            tail(torch.rand(2, 9, 4, 4))
        assert model.front.forward is own
    assert math.isfinite(float(model(torch.rand(1, 3, 16, 16)).sum()))


def test_bfloat16_runs_give_nearly_the_same_map():
    torch.manual_seed(0)
    model, x = FlattenNet().eval(), torch.randn(2, 3, 16, 16)
    exact, quick = (scanlib.ScoreCAM(model, "layer", amp=amp)(x, 1) for amp in (False, True))
    assert quick.dtype == torch.float32 and not torch.equal(exact, quick)
    torch.testing.assert_close(exact, quick, rtol=0, atol=0.02)


class Batched(TinyNet):
    """A front that treats the images of a batch differently: the first gets a brighter look."""

    def forward(self, x):
        x = self.front(x)
        return self.head(self.back(x * (1 + (torch.arange(len(x)) == 0)[:, None, None, None])).mean((2, 3)))


def test_a_tail_notices_that_it_can_not_remember():
    torch.manual_seed(0)
    model, x = Batched().eval(), torch.rand(3, 3, 16, 16)
    with Replay(model, "back.0", x) as tail:
        assert tail._recorded
    with Replay(model, "front.1", x) as tail:  # here the last image, alone, would be the first
        assert not tail._recorded
        replaced = tail(tail.features[:2], image=0)
    with torch.no_grad():
        brighter = model.front(x[:2]) * torch.tensor([2.0, 1.0])[:, None, None, None]
        torch.testing.assert_close(replaced, model.head(model.back(brighter).mean((2, 3))))


class Activated(nn.Module):
    """One activation in two containers: the layer is its second run, inside the second of them."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), act), nn.Sequential(nn.Conv2d(4, 5, 3, 2, 1), act))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Encoder(nn.Module):
    """torch's own encoder layers take a fused path when nobody watches them."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))


def halved(model):
    """With a user's hook that changes what the layer returns."""
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
def test_ablation_where_a_tail_could_go_wrong(build, layer):
    """Against a hook that replaces the layer's output in whole runs of the model, twice for each image."""
    torch.manual_seed(0)
    model, x = build().eval(), torch.rand(2, 3, 64, 64)
    with Replay(model, layer, x) as tail:
        assert tail._recorded
        for image in (1, 0, 1):
            versions, runs = torch.rand(3, *tail.features.shape[1:]), []

            def replace(module, inputs, output, versions=versions, runs=runs):
                runs.append(module)
                return versions.clone() if len(runs) == tail._runs else output

            handle = model.get_submodule(layer).register_forward_hook(replace, prepend=True)
            with torch.no_grad():
                expected = model(x[image : image + 1].repeat(3, 1, 1, 1))
            handle.remove()
            for _ in range(2):
                torch.testing.assert_close(tail(versions, image), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tail(versions[:1], image), expected[:1], rtol=1e-4, atol=1e-5)


def test_softmax_over_classes_is_each_targets_own_business():
    torch.manual_seed(0)
    model, x = FlattenNet().eval(), torch.randn(1, 3, 16, 16)
    explainer = scanlib.ScoreCAM(model, "layer", softmax="classes")
    together = explainer.for_classes(x, [3, lambda row: row.double().softmax(0)[3]])
    torch.testing.assert_close(together[:, :1], explainer.for_classes(x, [3]))
    torch.testing.assert_close(together[:, 1], together[:, 0], rtol=1e-4, atol=1e-5)
    single = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 1))
    with pytest.raises(ValueError, match="says nothing of a single output"):
        scanlib.ScoreCAM(single, "1", softmax="classes")(torch.rand(1, 3, 8, 8))


def test_dead_layers_have_empty_maps():
    model = TinyNet().eval()
    with torch.no_grad():
        model.back[0].bias -= 1e6
    for method in (scanlib.ScoreCAM, scanlib.AblationCAM, scanlib.GradCAM):
        for target in (1, lambda row: row[1]):
            assert not method(model, "back")(torch.rand(2, 3, 16, 16), target).any()
