"""Random small networks, layers, image shapes, targets and precisions: every map has the right shape and range, or is refused.

``benchmarks/fuzz.py`` runs the same cases 10,000 times.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

import scanlib
from scanlib.cli.shared import METHODS
from scanlib.targets import Contrast, LogProbability, Probability

CLASSES = 4
SLOW = ("SSCAM", "ISCAM")  # many runs of the model for each map
NOT_MIRRORED = ("SmoothGradCAMPlusPlus", "SSCAM", "SmoothGrad", "RISE", "Occlusion")  # noise, or squares from the upper left
INPUT = ("FullGrad", "Saliency", "InputXGradient", "IntegratedGradients", "SmoothGrad", "RISE", "Occlusion")  # they take no layer
ATTENTION = ("AttentionRollout", "AttentionRelevance", "LeGrad")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16)


class RandomCNN(nn.Module):
    """Convolutions with options drawn at random. With mirrored=True the network commutes with mirroring the image."""

    def __init__(self, draw, channels, mirrored):
        super().__init__()
        self.blocks, width = nn.ModuleList(), channels
        for _ in range(draw(st.integers(1, 3))):
            out, groups = draw(st.sampled_from([4, 6, 8])), draw(st.sampled_from([1, 1, 2]))
            stride = 1 if mirrored else draw(st.sampled_from([1, 2, (2, 1)]))
            dilation, padding = draw(st.sampled_from([1, 2])), draw(st.sampled_from([0, 1, 2]))
            groups = groups if width % groups == 0 else 1
            conv = nn.Conv2d(width, out, 3, stride, padding, dilation, groups)
            norm = draw(st.sampled_from([nn.Identity(), nn.BatchNorm2d(out), nn.GroupNorm(2, out)]))
            self.blocks.append(nn.Sequential(conv, norm, draw(st.sampled_from([nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()]))))
            width = out
        self.head, self.flattens, self.mirrored = nn.Linear(width, CLASSES), draw(st.booleans()), mirrored
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, 0, 0.1)
            if mirrored and isinstance(module, nn.Conv2d):
                module.weight.data = (module.weight.data + module.weight.data.flip(-1)) / 2

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1) if self.flattens else x.mean((2, 3)))


class RandomViT(nn.Module):
    """Patches, an optional class token, blocks of torch's or of our own."""

    def __init__(self, draw, channels, size, patch):
        super().__init__()
        width, self.has_class = 8, draw(st.booleans())
        tokens = (size[0] // patch) * (size[1] // patch) + self.has_class
        self.embed, self.token = nn.Conv2d(channels, width, patch, patch), nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, tokens, width))
        norm_first = draw(st.booleans())
        options = {"batch_first": True, "norm_first": norm_first, "dropout": 0.1}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 16, **options) for _ in range(draw(st.integers(1, 2))))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        if self.has_class:
            x = torch.cat([self.token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.has_class else x.mean(1))


def draw_target(draw, count):
    kinds = [
        None,
        1,
        [2] * count,
        torch.arange(count) % CLASSES,
        Probability(1),
        [LogProbability(k % CLASSES) for k in range(count)],
    ]
    return draw(st.sampled_from([*kinds, Contrast(2), lambda row: row[0] - row[3]]))


def check_example(draw, longest=64):
    """Draw a case and check it. Return "right", or "refused" and why."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    mirrored, is_vit = draw(st.booleans()), draw(st.integers(0, 3)) == 0
    channels, count = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    if is_vit:
        patch = draw(st.sampled_from([4, 8]))
        size = tuple(patch * draw(st.integers(1, 6)) for _ in range(2))
        model = RandomViT(draw, channels, size, patch)
    else:
        size = tuple(draw(st.one_of(st.integers(1, 24), st.integers(1, longest))) for _ in range(2))
        model = RandomCNN(draw, channels, mirrored)
    dtype = draw(st.sampled_from(DTYPES))
    model = model.train(draw(st.booleans())).to(dtype)
    name = draw(st.sampled_from([method for method in METHODS if method not in SLOW and (is_vit or method not in ATTENTION)]))
    layers = [layer for layer, _ in model.named_modules() if layer.startswith(("blocks.", "embed"))]
    layer = None if name in (*ATTENTION, *INPUT, "Libra") else draw(st.sampled_from([None, *layers]))
    images, target = torch.rand(count, channels, *size), draw_target(draw, count)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    try:
        explainer = getattr(scanlib, name)(model, layer, **({"masks": 20} if name == "RISE" else {}))
        maps = explainer(images, target)
    except (ValueError, TypeError, RuntimeError) as error:
        assert not isinstance(error, RuntimeError) or "did not run in the forward pass" in str(error)
        assert str(error) and "\n" not in str(error)
        maps, reason = None, str(error)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if maps is None:
        return f"refused: {reason[:40]}"
    assert maps.shape == (count, *size) and maps.isfinite().all() and maps.min() >= 0 and maps.max() <= 1
    assert maps.dtype in (torch.float32, torch.float64) and not maps.requires_grad
    if mirrored and not is_vit and dtype == torch.float64 and name not in NOT_MIRRORED:
        again = explainer(
            images.flip(-1), explainer._compute_logits(explainer._prepare(images)).argmax(1) if target is None else target
        )
        raw, raw_again = explainer(images, target, normalize=False), explainer(images.flip(-1), target, normalize=False)
        if float(raw.max() - raw.min()) > 1e-9 * float(raw.abs().max()) and "Eigen" not in name and name != "KPCACAM":
            torch.testing.assert_close(raw_again.flip(-1), raw, atol=1e-7 * float(raw.abs().max()), rtol=1e-5)
        assert again.shape == maps.shape
    return "right"


RESULTS = []


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.filterwarnings("ignore:the .* tokens of layer")  # with random weights a token may see the whole image
def test_random_networks(data):
    RESULTS.append(check_example(data.draw))


def test_refusals_are_a_small_share():
    assert len(RESULTS) >= 250 and RESULTS.count("right") > 0.65 * len(RESULTS)
