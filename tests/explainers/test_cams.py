"""Compare every method with a float64 reference: loops in numpy on activations and gradients from ordinary autograd."""

import contextlib
import gc
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn

import scanlib
from scanlib import targets
from scanlib.explainers.base import normalize_map, resize_map
from scanlib.explainers.formulas import FUSIONS, compute_first_component
from scanlib.explainers.fullgrad import compute_implicit_bias
from scanlib.hooks import FeatureTaps
from scanlib.layers import Layout
from tests.conftest import TinyNet


class FlattenNet(nn.Module):
    """No pooling, and a head of two layers: the gradient differs between locations."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, 2, 1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(5 * 4 * 4, 9), nn.Softplus(), nn.Linear(9, 4))

    def forward(self, x):
        return self.head(self.layer(x).relu_())


def tiny_vit():
    model = torchvision.models.VisionTransformer(16, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    return model


MODELS = {
    "pooled": (TinyNet, "back", 16),
    "flatten": (FlattenNet, "layer", 16),
    "vit": (tiny_vit, "encoder.layers.encoder_layer_1.ln_1", 16),
}


@pytest.fixture(params=MODELS)
def case(request):
    """Return (model, layer, inputs) in float64."""
    build, layer, size = MODELS[request.param]
    torch.manual_seed(0)
    model = build().double().eval()
    for module in model.modules():  # so that batch norms change their input
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1), module.running_var.uniform_(0.5, 2), nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, layer, torch.randn(3, 3, size, size, dtype=torch.float64)


def plain(model, layer, x, target):
    """Compute activations and gradients, numpy (N, C, h, w), with a hook and a full backward pass for each image."""
    A, G = [], []
    for i in range(len(x)):
        kept = {}

        def keep(module, inputs, output, kept=kept):
            kept["o"] = output
            return output.clone()  # the model may change it in place

        handle = model.get_submodule(layer).register_forward_hook(keep)
        y = model(x[i : i + 1].clone().requires_grad_())[0, target]
        handle.remove()
        (g,) = torch.autograd.grad(y, kept["o"])
        a, g = (t.detach().numpy()[0] for t in (kept["o"], g))
        if a.ndim == 2:  # tokens, one of them the class token
            side = math.isqrt(len(a) - 1)
            a, g = (t[1:].T.reshape(-1, side, side) for t in (a, g))
        A.append(a), G.append(g)
    return np.stack(A), np.stack(G)


relu = lambda x: np.maximum(x, 0)  # noqa: E731


def component(T):
    """Compute the first principal component of (C, h, w) by a full singular value decomposition, with positive third moment."""
    X = T.reshape(len(T), -1).T
    X = X - X.mean(0)
    projected = X @ np.linalg.svd(X, full_matrices=True)[2][0]
    return (projected if (projected**3).sum() >= 0 else -projected).reshape(T.shape[1:])


def reference_grad_cam(A, g):
    return relu(sum(g[c].mean() * A[c] for c in range(len(A))))


def reference_grad_cam_plus_plus(A, g):
    total = np.zeros_like(A[0])
    for c in range(len(A)):
        weight = 0.0
        for location in np.ndindex(A[c].shape):
            denominator = 2 * g[c][location] ** 2 + A[c].sum() * g[c][location] ** 3
            weight += g[c][location] ** 2 / denominator * max(g[c][location], 0) if denominator else 0.0
        total += weight * A[c]
    return relu(total)


def reference_x_grad_cam(A, g):
    return relu(sum((g[c] * A[c]).sum() / A[c].sum() * A[c] for c in range(len(A)) if A[c].sum()))


def reference_seg_eigen_cam(A, g):
    found = component(np.abs(g) * A)
    return -found if -found.min() > found.max() else found


def reference_kpca_cam(A, g):
    X = A.reshape(len(A), -1).T
    X = X - X.mean(0)
    K = np.tanh(X @ X.T / X.shape[1] + 1)
    n = np.full_like(K, 1 / len(K))
    values, vectors = np.linalg.eigh(K - n @ K - K @ n + n @ K @ n)
    found = vectors[:, -1] * np.sqrt(values[-1])
    return (found if (found**3).sum() >= 0 else -found).reshape(A.shape[1:])


def reference_fem(A, g):
    return relu(sum((a > a.mean() + 2 * a.std()).mean() * a for a in A))


REFERENCES = {
    "GradCAM": reference_grad_cam,
    "GradCAMPlusPlus": reference_grad_cam_plus_plus,
    "XGradCAM": reference_x_grad_cam,
    "LayerCAM": lambda A, g: relu((relu(g) * A).sum(0)),
    "HiResCAM": lambda A, g: relu((g * A).sum(0)),
    "GradCAMElementWise": lambda A, g: relu(g * A).sum(0),
    "EigenCAM": lambda A, g: component(A),
    "EigenGradCAM": lambda A, g: component(g * A),
    "SegEigenCAM": reference_seg_eigen_cam,
    "KPCACAM": reference_kpca_cam,
    "FEM": reference_fem,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_maps_equal_numpy_reference(case, name):
    model, layer, x = case
    A, G = plain(model, layer, x, 2)
    maps = getattr(scanlib, name)(model, layer)(x, target=2, normalize=False)
    assert maps.dtype == torch.float64 and maps.abs().amax() > 0
    expected = np.stack([REFERENCES[name](a, g) for a, g in zip(A, G, strict=True)])
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-8, atol=1e-12)


def test_smooth_grad_cam_plus_plus_equals_numpy_reference(case):
    model, layer, x = case
    maps = scanlib.SmoothGradCAMPlusPlus(model, layer, samples=3, std=0.2, seed=5)(x, target=1, normalize=False)
    generator = torch.Generator().manual_seed(5)
    G = [plain(model, layer, x + 0.2 * torch.randn(x.shape, generator=generator, dtype=x.dtype), 1)[1] for _ in range(3)]
    A, _ = plain(model, layer, x, 1)
    g1, g2, g3 = (np.mean([g**power for g in G], axis=0) for power in (1, 2, 3))
    denominator = 2 * g2 + A.sum((2, 3), keepdims=True) * g3
    alpha = np.divide(g2, denominator, out=np.zeros_like(g2), where=denominator != 0)
    weights = (alpha * relu(g1)).sum((2, 3), keepdims=True)
    np.testing.assert_allclose(maps.numpy(), relu((weights * A).sum(1)), rtol=1e-8, atol=1e-12)


def test_shapley_cam_equals_finite_differences(case):
    model, layer, x = case
    score = targets.ReST(2)
    maps = scanlib.ShapleyCAM(model, layer)(x, target=score, normalize=False)

    def gradient(step):
        """Compute the score's gradient for the layer output A (1 + step), image by image."""
        rows = []
        for i in range(len(x)):
            leaf = []

            def scale(m, a, output, leaf=leaf):
                leaf.append((output * (1 + step)).detach().requires_grad_())
                return leaf[0].clone()

            handle = model.get_submodule(layer).register_forward_hook(scale)
            y = score(model(x[i : i + 1])[0])
            handle.remove()
            rows.append(torch.autograd.grad(y, leaf[0])[0])
        return torch.cat(rows)

    hvp = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    with FeatureTaps(model, [layer], record=None) as taps:
        taps(x)
        to_maps, A = taps.layouts[0].to_maps, taps.features[0]
    weights = to_maps(gradient(0) - hvp / 2).mean((2, 3), keepdim=True)
    torch.testing.assert_close(maps, (weights * to_maps(A)).sum(1).relu(), rtol=1e-5, atol=1e-8)


def test_cam_equals_numpy_reference_and_finds_its_head():
    model = TinyNet().double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "back", x, 0)
    W = model.head.weight.detach().numpy()
    classes = [3, 1]
    expected = [relu(sum(W[k, c] * A[i, c] for c in range(8))) for i, k in enumerate(classes)]
    for options in ({}, {"fc_layer": "head"}, {"fc_layer": model.head}):
        maps = scanlib.CAM(model, "back", **options)(x, target=classes, normalize=False)
        np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="fc_layer must be one linear layer from 6 channels to 5 classes, found: none"):
        scanlib.CAM(model, "front")(x)
    for fc_layer, message in (("hed", "fc_layer 'hed' not found"), ("back", "found: none"), (model.back[0], "found: none")):
        with pytest.raises(ValueError, match=message):
            scanlib.CAM(model, "back", fc_layer=fc_layer)(x)
    for method in (scanlib.CAM, scanlib.FinerCAM):
        with pytest.raises(TypeError, match="target must be a class for .*, got a callable; use GradCAM"):
            method(model, "back")(x, lambda row: row[0])
    squeeze = torchvision.models.squeezenet1_1(weights=None).eval()  # the head is a convolution
    assert scanlib.CAM(squeeze, "features")(torch.rand(1, 3, 64, 64)).shape == (1, 64, 64)


def test_full_grad_equals_terms_by_hand():
    """x -> conv (bias) -> BN -> ReLU -> conv (bias) -> mean: compute each term; the signed terms sum to the score."""
    torch.manual_seed(0)
    model = TinyNet().double().eval()
    bn = model.front[1]
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2), nn.init.uniform_(bn.weight), nn.init.uniform_(bn.bias)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    conv, back = model.front[0](x), model.back[0]
    normed = bn(conv)
    second = back(normed.relu())
    y = model.head(second.relu().mean((2, 3)))[:, 4].sum()
    g = torch.autograd.grad(y, [x, conv, normed, second])
    terms = [
        g[0] * x,
        *(
            b[:, None, None] * gradient
            for b, gradient in zip(map(compute_implicit_bias, (model.front[0], bn, back)), g[1:], strict=True)
        ),
    ]
    total = sum(t.sum() for t in terms) + 2 * model.head.bias[4]
    torch.testing.assert_close(total, y)
    expected = sum(resize_map(t.abs().sum(1), (16, 16)) for t in terms)
    maps = scanlib.FullGrad(model)(x.detach(), target=4, normalize=False)
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.googlenet])
def test_full_grad_reads_every_bias(build):
    """The signed terms sum to the score on real networks, for any order in which layers are registered."""
    torch.manual_seed(0)
    model = build(
        weights=None, num_classes=5, **({"aux_logits": False, "init_weights": True} if build.__name__ == "googlenet" else {})
    )
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1), nn.init.uniform_(module.bias, -0.1, 0.1)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    signed = []

    def watch(module, _, output):
        bias = compute_implicit_bias(module)
        if bias is not None and output.ndim == 4:
            output.register_hook(lambda g: signed.append((g * bias[:, None, None]).sum()))

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    x.requires_grad_()
    y = model(x)[0, 1]
    (g,) = torch.autograd.grad(y, x)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close((g * x).sum() + sum(signed) + model.fc.bias[1], y, rtol=1e-6, atol=1e-9)
    assert len(signed) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(scanlib.FullGrad(model)(x.detach(), target=1, normalize=False)[0], full_grad_by_hand(model, x, 1))
    frozen = torchvision.ops.FrozenBatchNorm2d(8).double()
    frozen.running_mean.uniform_(-1, 1), frozen.bias.uniform_(-1, 1)
    torch.testing.assert_close(compute_implicit_bias(frozen), frozen(torch.zeros(1, 8, 1, 1, dtype=torch.float64)).flatten())


def full_grad_by_hand(model, x, target):
    """Compute |G x| + sum of |b G| for one image, with one backward pass through all recorded outputs."""
    kept = []

    def keep(module, _, output):
        if compute_implicit_bias(module) is not None and output.ndim == 4:
            kept.append((compute_implicit_bias(module), output))
            return output.clone()  # the model may change it in place

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    x = x.detach().requires_grad_()
    y = model(x)[0, target]
    for handle in handles:
        handle.remove()
    g_x, *gradients = torch.autograd.grad(y, [x, *(output for _, output in kept)])
    terms = [(g * b[:, None, None]).abs().sum(1) for (b, _), g in zip(kept, gradients, strict=True)]
    return sum((resize_map(term, x.shape[2:]) for term in terms), (g_x * x).abs().sum(1))[0].detach()


def test_full_grad_reads_transformers_and_raises_for_windows():
    """Norms and linear layers of tokens and of channels-last maps; windows raise an error."""
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=4)
    convnext = torchvision.models.convnext_tiny(weights=None, num_classes=4)
    for model, size in ((tiny_vit(), 16), (swin, 32), (convnext, 32)):
        maps = scanlib.FullGrad(model.eval())(torch.rand(2, 3, size, size), 1)
        assert maps.shape == (2, size, size) and maps.amax() == 1
    with pytest.raises(ValueError, match="cannot locate the bias of layer 'blocks"):
        scanlib.FullGrad(torchvision.models.maxvit_t(weights=None).eval())(torch.rand(1, 3, 224, 224), 1)


def test_finer_cam_equals_grad_cam_of_contrast():
    torch.manual_seed(0)
    model = TinyNet().double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = model(x).detach()
    combined = []
    for row in y:
        order, own = np.argsort(np.abs(row.numpy() - row.max().item()), kind="stable")[1:4].copy(), int(row.argmax())

        def score(outputs, order=order, own=own):
            p = outputs.softmax(0)[order]
            return sum(p[i] * (outputs[own] - 0.5 * outputs[o]) for i, o in enumerate(order)) / p.sum()

        combined.append(score)
    maps = scanlib.FinerCAM(model, "back", strength=0.5)(x, normalize=False)
    torch.testing.assert_close(maps, scanlib.GradCAM(model, "back")(x, target=combined, normalize=False))
    one = scanlib.FinerCAM(model, "back", references=[0, 3])(x, target=2, normalize=False)
    torch.testing.assert_close(one, scanlib.GradCAM(model, "back")(x, targets.Contrast(2, [0, 3]), normalize=False))


# --- equal methods ---


def test_three_methods_are_equal_only_before_global_pooling():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    for model, layer, same in ((TinyNet().eval(), "back", True), (FlattenNet().eval(), "layer", False)):
        maps = [getattr(scanlib, name)(model, layer)(x, target=1) for name in ("GradCAM", "XGradCAM", "HiResCAM")]
        for other in maps[1:]:
            assert torch.allclose(maps[0], other, atol=1e-4) == same


def test_grad_cam_is_proportional_to_cam_before_global_pooling():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    grad, plain_cam = (getattr(scanlib, name)(model, "back")(x, target=1, normalize=False) for name in ("GradCAM", "CAM"))
    torch.testing.assert_close(grad * plain_cam[0].numel(), plain_cam)


# --- invariances ---

GRADIENT = ["GradCAM", "XGradCAM", "LayerCAM", "HiResCAM", "GradCAMElementWise", "EigenGradCAM", "SegEigenCAM", "ShapleyCAM"]
NO_CLASS = ["EigenCAM", "KPCACAM", "FEM"]
EVERY = [
    *GRADIENT,
    *NO_CLASS,
    "GradCAMPlusPlus",
    "SmoothGradCAMPlusPlus",
    "FullGrad",
    "FinerCAM",
    "ScoreCAM",
    "ISCAM",
    "AblationCAM",
]


def explained(name, model, layer, x, target=1, normalize=True):
    arguments = () if name == "FullGrad" else (layer,)
    return getattr(scanlib, name)(model, *arguments)(x, target=target, normalize=normalize)


@pytest.mark.parametrize("name", EVERY)
def test_batch_equals_single_images(case, name):
    model, layer, x = case
    if name == "SmoothGradCAMPlusPlus":
        pytest.skip("its noise depends on the index in the batch")
    together = explained(name, model, layer, x, [0, 1, 2], normalize=False)
    alone = torch.cat([explained(name, model, layer, x[i : i + 1], i, normalize=False) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-7, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_scaled_logits_give_equal_maps(scale, seed):
    """Excludes Grad-CAM++, whose alpha mixes G^2 and G^3, and the formulas with a softmax."""
    torch.manual_seed(seed)
    model, x = FlattenNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    names = [*GRADIENT, "AblationCAM"]
    before = [explained(name, model, "layer", x) for name in names]
    with torch.no_grad():
        model.head[-1].weight.mul_(scale), model.head[-1].bias.mul_(scale)
    for name, maps in zip(names, before, strict=True):
        torch.testing.assert_close(explained(name, model, "layer", x), maps, rtol=1e-6, atol=1e-7, msg=name)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000))
def test_permuted_channels_give_equal_maps(seed):
    torch.manual_seed(seed)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = {name: explained(name, model, "back", x) for name in [*EVERY, "CAM"]}
    order = torch.randperm(8)
    with torch.no_grad():
        model.back[0].weight.copy_(model.back[0].weight[order]), model.back[0].bias.copy_(model.back[0].bias[order])
        model.head.weight.copy_(model.head.weight[:, order])
    for name, maps in before.items():
        torch.testing.assert_close(explained(name, model, "back", x), maps, rtol=1e-6, atol=1e-7, msg=name)


class Equivariant(nn.Module):
    """Convolutions with mirrored kernels and mean pooling: a mirrored image gives mirrored features."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 7, 3, 1, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(7, 6), nn.Softplus(), nn.Linear(6, 4))
        for conv in (self.layer[0], self.layer[2]):
            conv.weight.data = (conv.weight.data + conv.weight.data.flip(3)) / 2

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_mirrored_image_has_mirrored_map(seed):
    torch.manual_seed(seed)
    model, x = Equivariant().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for name in EVERY:
        if name != "SmoothGradCAMPlusPlus":  # its noise is not mirrored
            maps, mirrored = (explained(name, model, "layer", images) for images in (x, x.flip(3)))
            torch.testing.assert_close(mirrored.flip(2), maps, rtol=1e-6, atol=1e-7, msg=name)


@settings(max_examples=30, deadline=None)
@given(channels=st.integers(1, 9), side=st.integers(2, 5), seed=st.integers(0, 1000))
def test_first_component_equals_numpy_reference(channels, side, seed):
    """Both Gram matrices give the result of the singular value decomposition, with the same sign."""
    T = torch.randn(2, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(compute_first_component(T).numpy(), [component(t.numpy()) for t in T], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(compute_first_component(3 * T), 3 * compute_first_component(T), rtol=1e-7, atol=1e-9)


# --- options ---


def test_fused_layers_equal_formulas():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    apart = [scanlib.GradCAM(model, layer)(x, 1, normalize=False) for layer in ("front", "back")]
    finest = [resize_map(maps, (8, 8)) for maps in apart]
    unit = [(m - m.amin((1, 2), keepdim=True)) / (m.amax((1, 2), keepdim=True) - m.amin((1, 2), keepdim=True)) for m in finest]
    for fuse, expected in (
        ("mean", (unit[0] + unit[1]) / 2),
        ("max", torch.maximum(*unit)),
        ("product", unit[0] * unit[1]),
        (lambda maps: maps[0] - maps[1], finest[0] - finest[1]),
    ):
        for layers in (["front", "back"], [model.back, "front"][::-1]):
            together = scanlib.GradCAM(model, layers, fuse=fuse)(x, 1, normalize=False)
            torch.testing.assert_close(together, expected)
    layer_maps = [resize_map(scanlib.LayerCAM(model, layer)(x, 1, normalize=False), (8, 8)) for layer in ("front", "back")]
    tanh = torch.maximum(*(torch.tanh(2 * m / m.amax((1, 2), keepdim=True)) for m in layer_maps))
    torch.testing.assert_close(scanlib.LayerCAM(model, ["front", "back"])(x, 1, normalize=False), tanh)
    plus = scanlib.GradCAMPlusPlus(model, ["front", "back"], fuse="product")(x, 1)
    torch.testing.assert_close(scanlib.RefineCAM(model, ["front", "back"])(x, 1), plus)
    assert scanlib.GradCAM(model, ["back", "front"])(x).shape == (2, 16, 16)  # listed back to front
    assert set(FUSIONS) == {"mean", "max", "product", "tanh"}
    with pytest.raises(ValueError, match="fuse must be one of mean, .*, or a function, got 'sum'"):
        scanlib.GradCAM(model, "back", fuse="sum")
    with pytest.raises(ValueError, match=r"target_layer must be a layer, a list of layers, or None for the last one, got \[\]"):
        scanlib.GradCAM(model, [])


def test_default_layer_is_found_and_shown():
    model = torchvision.models.resnet18(weights=None)
    explainer = scanlib.GradCAM(model)
    assert explainer(torch.rand(1, 3, 64, 64)).shape == (1, 64, 64)
    assert explainer.layers[0].startswith("layer4") and explainer.layers[0] in repr(explainer)


def test_fusing_sets_negative_values_to_zero():
    torch.manual_seed(0)
    model, x = FlattenNet().eval(), torch.randn(2, 3, 16, 16)
    repeated = scanlib.EigenCAM(model, ["layer", "layer"])(x)
    torch.testing.assert_close(repeated, scanlib.EigenCAM(model, "layer")(x))


def test_default_layer_depends_on_image_size():
    model = torchvision.models.resnet18(weights=None)
    explainer = scanlib.GradCAM(model)
    for size in (32, 224, 32):
        explainer(torch.rand(1, 3, size, size))
        assert explainer.layers[0].startswith("layer3" if size == 32 else "layer4")


def test_wrong_number_of_maps_raises():
    """A layer whose first axis is the tokens would give 25 maps for four images."""

    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).flatten(2).permute(2, 0, 1)).mean(0))

    model, x = TokensFirst().eval(), torch.rand(4, 3, 20, 20)
    with pytest.raises(ValueError, match=r"returns \(25, 4, 8\) for 4 images: its first axis is not the batch.*reshape"):
        scanlib.GradCAM(model, "norm")(x, 1)
    fold = lambda tokens: tokens.permute(1, 2, 0).unflatten(2, (5, 5))  # noqa: E731
    assert scanlib.GradCAM(model, "norm", reshape=fold)(x, 1).shape == (4, 20, 20)
    assert scanlib.GradCAM(model, "norm", reshape=fold)(x[:1], 1).shape == (
        1,
        20,
        20,
    )  # one image: the shape alone does not show the axis


def test_layout_of_volumes_with_channels_last():
    assert Layout.infer((1, 8, 7, 7, 768), (16, 224, 224)) == Layout("BHWC", 768, (8, 7, 7))
    assert Layout.infer((1, 768, 8, 7, 7), (16, 224, 224)) == Layout("BCHW", 768, (8, 7, 7))
    x = torch.randn(2, 3, 4, 5, 6)
    torch.testing.assert_close(Layout("BHWC", 6, (3, 4, 5)).to_maps(x), x.permute(0, 4, 1, 2, 3))


def test_eigen_smooth_equals_numpy_reference():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    A, G = plain(model, "layer", x, 1)
    smooth = scanlib.GradCAM(model, "layer", eigen_smooth=True)(x, 1, normalize=False)
    expected = [relu(component(g.mean((1, 2), keepdims=True) * a)) for a, g in zip(A, G, strict=True)]
    np.testing.assert_allclose(smooth.numpy(), expected, rtol=1e-8, atol=1e-12)
    hires = scanlib.HiResCAM(model, "layer", eigen_smooth=True)(x, 1)
    torch.testing.assert_close(hires, normalize_map(scanlib.EigenGradCAM(model, "layer")(x, 1, normalize=False).relu(), (16, 16)))


@pytest.mark.parametrize("name", ["EigenCAM", "EigenGradCAM", "SegEigenCAM", "KPCACAM"])
def test_eigen_smooth_raises_for_components(name):
    with pytest.raises(ValueError, match=f"eigen_smooth must be False for {name}"):
        getattr(scanlib, name)(TinyNet(), "back", eigen_smooth=True)


def test_aug_smooth_averages_six_maps():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    classes = model(x).argmax(1)
    maps = [scanlib.GradCAM(model, "back")(s * x, classes, normalize=False) for s in (0.9, 1, 1.1)]
    maps += [scanlib.GradCAM(model, "back")(s * x.flip(3), classes, normalize=False).flip(2) for s in (0.9, 1, 1.1)]
    smooth = scanlib.GradCAM(model, "back", aug_smooth=True)(x, normalize=False)
    torch.testing.assert_close(smooth, torch.stack(maps).mean(0))


@pytest.mark.parametrize("name", ["GradCAM", "CAM", "SmoothGradCAMPlusPlus", "ShapleyCAM", "EigenCAM", "ScoreCAM", "AblationCAM"])
def test_explain_classes_equals_one_call_per_class(name):
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    explainer = getattr(scanlib, name)(model, "back")
    for normalize in (True, False):
        each = torch.stack([explainer(x, c, normalize) for c in (3, 0, 4)], 1)
        maps = explainer.explain_classes(x, [3, 0, 4], normalize)
        torch.testing.assert_close(maps, each)
        alone = explainer.explain_classes(x[0], [3, 0, 4], normalize)  # (3, H, W) -> (K, H, W)
        torch.testing.assert_close(alone, explainer.explain_classes(x[:1], [3, 0, 4], normalize)[0])
    assert maps.shape == (2, 3, 4, 4) and explainer.explain_classes(x[:0], [1, 2]).shape == (0, 2, 16, 16)


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "GradCAMPlusPlus", "ShapleyCAM", "LayerCAM"])
@pytest.mark.parametrize("build", [FlattenNet, tiny_vit])
def test_differentiable_maps_equal_finite_differences(name, build):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="differentiable must be False for principal components"):
        scanlib.EigenCAM(TinyNet(), "back", differentiable=True)
    if (name, build) == ("ShapleyCAM", tiny_vit):
        with pytest.raises(ValueError, match="differentiable must be False .* third derivative"):
            scanlib.ShapleyCAM(tiny_vit(), differentiable=True)
        return
    model, layer = build().double().eval(), "layer" if build is FlattenNet else "encoder.layers.encoder_layer_1.ln_1"
    model.requires_grad_(False)
    explainer = getattr(scanlib, name)(model, layer, differentiable=True)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64)
    loss = lambda images: (explainer(images, 1, normalize=False) * weight).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(loss(x), x)
    direction = torch.randn_like(x)
    numerical = (loss(x + 1e-6 * direction) - loss(x - 1e-6 * direction)).detach() / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), numerical, rtol=1e-4, atol=1e-7)
    plain_maps = getattr(scanlib, name)(model, layer)(x.detach(), 1)
    assert not plain_maps.requires_grad
    torch.testing.assert_close(explainer(x, 1).detach(), plain_maps)


def test_reshape_replaces_inferred_layout():
    torch.manual_seed(0)
    model, layer = tiny_vit().eval(), "encoder.layers.encoder_layer_1.ln_1"
    x = torch.randn(2, 3, 16, 16)
    fold = lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # noqa: E731
    torch.testing.assert_close(scanlib.GradCAM(model, layer, reshape=fold)(x, 1), scanlib.GradCAM(model, layer)(x, 1))
    with pytest.raises(ValueError, match="reshape must be None for AblationCAM"):
        scanlib.AblationCAM(model, layer, reshape=fold)


@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("name", [*EVERY, "CAM", "SSCAM"])
def test_explainers_accept_signals_and_volumes(dimensions, name):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dimensions - 1]
    model = nn.Sequential(conv(2, 4, 3, 2, 1), nn.ReLU(), conv(4, 5, 3, 2, 1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(5, 3))
    x = torch.rand(2, 2, *(40, 8, 8)[:dimensions])
    options = {"samples": 2} if name == "SSCAM" else {}
    explainer = getattr(scanlib, name)(model.eval(), **options)
    maps = explainer(x, 1)
    assert maps.shape == (2, *x.shape[2:]) and maps.amax() == 1 and maps.amin() == 0
    if name in ("GradCAM", "HiResCAM"):
        with FeatureTaps(model, ["3"]) as taps:
            taps(x)
            A, g = taps.features[0], taps.gradients(1)[0]
        g = g.mean(tuple(range(2, g.ndim)), keepdim=True) if name == "GradCAM" else g
        torch.testing.assert_close(explainer(x, 1, normalize=False), (g * A).sum(1).relu())


@pytest.mark.parametrize("name", ["GradCAM", "EigenCAM", "AblationCAM", "GradCAMPlusPlus"])
def test_explainers_accept_channels_last_swin(name):
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=4).eval()
    x = torch.rand(2, 3, 32, 32) * 255
    maps = getattr(scanlib, name)(model, "norm").explain_classes(x, range(4), normalize=False)
    assert maps.shape == (2, 4, 4, 4) and maps.amax() > 0
    if name == "GradCAM":
        with FeatureTaps(model, ["norm"]) as taps:
            taps(x)
            A, g = taps.features[0], taps.gradients(1)[0]
        torch.testing.assert_close(maps[:, 1], (A * g.mean((1, 2), keepdim=True)).sum(3).relu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["GradCAM", "GradCAMPlusPlus", "EigenCAM", "ScoreCAM", "AblationCAM", "FullGrad"])
def test_maps_are_float32_or_better(name, dtype):
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.rand(2, 3, 32, 32)
    expected = explained(name, model, "back", x)
    maps = explained(name, model.to(dtype), "back", x)
    assert maps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and torch.isfinite(maps).all()
    correlation = torch.corrcoef(torch.stack([maps.flatten().float(), expected.flatten()]))[0, 1]
    assert correlation > 0.98


# --- targets ---


def by_hook(model, layer, x, score):
    """Compute Grad-CAM with an ordinary hook and a backward pass through the whole model."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output)
        return output.clone()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    y = score(model(x.clone().requires_grad_()))
    handle.remove()
    (g,) = torch.autograd.grad(y, kept[0])
    return (g.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu().detach()


def test_grad_cam_of_segmentation_score():
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    x, mask = torch.rand(2, 3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    mask[10:30, 20:50] = True
    maps = scanlib.GradCAM(model, "backbone.16")(x, target=targets.SegmentationScore(2, mask), normalize=False)
    assert maps.amax() > 0
    torch.testing.assert_close(maps, by_hook(model, "backbone.16", x, lambda out: out["out"][:, 2, mask].sum()))
    for name in ("GradCAM", "ScoreCAM", "AblationCAM", "SmoothGradCAMPlusPlus"):
        for target in (2, None):
            with pytest.raises(ValueError, match=r"must return logits \(B, K\), got \(2, 4, 64, 64\)"):
                getattr(scanlib, name)(model, "backbone.16")(x, target=target)
    with pytest.raises(ValueError, match="aug_smooth must be False .* mirrors the images"):
        scanlib.GradCAM(model, "backbone.16", aug_smooth=True)(x, targets.SegmentationScore(2, mask))


def test_grad_cam_of_detection_score():
    torch.manual_seed(0)
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    x = torch.rand(1, 3, 320, 320)
    with torch.no_grad():
        found = model(x)[0]
    score = targets.DetectionScore(found["boxes"][:3], found["labels"][:3])
    assert float(score(found)) > 3  # each box overlaps itself and has a score
    maps = scanlib.GradCAM(model, "backbone.features.0.13")(x, target=score, normalize=False)
    assert maps.amax() > 0
    torch.testing.assert_close(maps, by_hook(model, "backbone.features.0.13", x, lambda out: score(out[0])))


def test_explainers_accept_hugging_face_outputs():
    class Outputs:
        def __init__(self, logits):
            self.logits = logits

    class Wrapped(TinyNet):
        def forward(self, x):
            return Outputs(super().forward(x))

    torch.manual_seed(0)
    model, x = Wrapped().eval(), torch.rand(2, 3, 16, 16)
    plain_model = TinyNet().eval()
    plain_model.load_state_dict(model.state_dict())
    for name in ("GradCAM", "CAM", "ScoreCAM", "AblationCAM", "FullGrad"):
        torch.testing.assert_close(explained(name, model, "back", x, None), explained(name, plain_model, "back", x, None))


# --- invalid input, and the model after a call ---


@pytest.mark.parametrize("name", [*EVERY, "CAM"])
def test_invalid_targets_raise(name):
    model, x = TinyNet().eval(), torch.rand(3, 3, 16, 16)
    cases = [([1, 2], "2 classes for 3 images"), (5, "class 5 is out of range"), ([0, 1, -1], "class -1 is out of range")]
    for target, message in cases:
        with pytest.raises(ValueError, match=message):
            explained(name, model, "back", x, target)


@pytest.mark.parametrize("name", [*EVERY, "CAM", "SSCAM"])
def test_context_manager_with_empty_batch_and_single_image(name):
    arguments = () if name == "FullGrad" else ("back",)
    images = torch.rand(2, 3, 16, 16)
    with getattr(scanlib, name)(TinyNet().eval(), *arguments) as explainer:
        assert explainer(images[:0]).shape == (0, 16, 16)
        for normalize in (True, False):
            single = explainer(images[0], 1, normalize)
            torch.testing.assert_close(single, explainer(images[:1], 1, normalize)[0])


def test_invalid_images_raise():
    explainer = scanlib.GradCAM(TinyNet().eval(), "back")
    for images, message in (
        (torch.rand(16, 16), r"got \(16, 16\)"),
        (torch.rand(2, 16, 16), r"got \(1, 2, 16, 16\)"),
        (torch.rand(2, 16, 16, 3), r"got \(2, 16, 16, 3\)"),
        (torch.rand(2, 6, 16, 16), r"got \(2, 6, 16, 16\)"),
        (np.zeros((1, 3, 16, 16)), "got ndarray"),
        (torch.full((1, 3, 16, 16), math.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            explainer(images)
    with pytest.raises(ValueError, match="target_layer must be None for FullGrad, which reads every layer, got 'back'"):
        scanlib.FullGrad(TinyNet(), "back")


def state(model, x):
    with torch.no_grad():
        return (
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [b.clone() for b in [*model.buffers(), *model.parameters()]],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
            [sorted(vars(m)) for m in model.modules()],
            model(x).clone(),
        )


def same(before, after):
    for a, b in zip(before, after, strict=True):
        if isinstance(a, torch.Tensor) or (a and isinstance(a[0], torch.Tensor)):
            assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
        else:
            assert a == b


@pytest.mark.parametrize("name", [*EVERY, "CAM", "SSCAM", "DeepFeatureFactorization"])
def test_model_is_unchanged(name):
    torch.manual_seed(0)
    model, x = TinyNet(), torch.rand(2, 3, 16, 16)
    model.train()
    model.front[1].eval(), model.head.requires_grad_(False)
    arguments = () if name == "FullGrad" else ("back",)
    options = {"SSCAM": {"samples": 1}}.get(name, {})
    explainer = getattr(scanlib, name)(model, *arguments, **options)
    before = state(model, x)
    explainer(x)
    same(before, state(model, x))

    class HookError(Exception):
        pass

    calls = 0

    def fail(module, inputs, output):
        nonlocal calls
        calls += 1
        if calls >= last:
            raise HookError

    for run in (1, 2):  # in the first run of the model, and in a later one
        calls, last = 0, run
        handle = model.head.register_forward_hook(fail)
        with contextlib.suppress(HookError):
            explainer(x)
        handle.remove()
        same(before, state(model, x))


def test_thousand_calls_leak_no_tensors():
    model, x = TinyNet().eval(), torch.rand(1, 3, 16, 16)
    explainers = [scanlib.GradCAM(model, "back"), scanlib.ShapleyCAM(model, "back"), scanlib.AblationCAM(model, "back")]

    def count_tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    for explainer in explainers:
        explainer(x)
    before = count_tensors()
    for _ in range(334):
        for explainer in explainers:
            explainer(x)
    assert count_tensors() <= before


def test_maps_are_equal_in_no_grad_and_inference_mode_with_frozen_weights():
    torch.manual_seed(0)
    model, x = TinyNet().eval().requires_grad_(False), torch.rand(2, 3, 16, 16)
    for name in ("GradCAM", "ShapleyCAM", "FullGrad", "AblationCAM"):
        expected = explained(name, model, "back", x)
        with torch.no_grad():
            torch.testing.assert_close(explained(name, model, "back", x), expected)
        with torch.inference_mode():
            torch.testing.assert_close(explained(name, model, "back", x.clone()), expected)
