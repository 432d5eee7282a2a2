"""TorchCAM and pytorch-grad-cam as a second opinion where they are right, and tests of each case where they are wrong.

Both come with the extra `peers`.
"""

import numpy as np
import pytest
import torch
from torch import nn

import scanlib
from scanlib.explainers.base import normalize_map
from scanlib.explainers.formulas import compute_first_component
from scanlib.hooks import FeatureTap
from tests.conftest import TinyNet
from tests.explainers.test_cams import FlattenNet, tiny_vit


def import_or_skip(name):
    try:
        return __import__(name, fromlist=["methods"])
    except ImportError as error:
        return pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture
def torchcam():
    return import_or_skip("torchcam.methods")


@pytest.fixture
def grad_cam():
    return import_or_skip("pytorch_grad_cam")


class NotInPlace(FlattenNet):
    """The peers return the layer's output after a later in-place operation has changed it (see the last test)."""

    def forward(self, x):
        return self.head(self.layer(x).relu())


@pytest.fixture(params=["pooled", "flatten"])
def net(request):
    """(model, layer, images): post-ReLU features, activations of both signs."""
    torch.manual_seed(0)
    model, layer = (TinyNet(), "back") if request.param == "pooled" else (NotInPlace(), "layer")
    return model.eval(), layer, torch.randn(3, 3, 16, 16)


CLASSES = [2, 0, 1]


def run_torchcam(method, model, layer, x, classes=CLASSES, **options):
    """Compute TorchCAM's raw maps. Its batch norms and in-place layers need inputs that require a gradient."""
    with method(model, layer, **options) as extractor:
        scores = model(x.clone().requires_grad_())
        return extractor(classes, scores, normalized=False)[0].detach()


def run_grad_cam(package, name, model, layer, x, classes=CLASSES, **options):
    """Compute pytorch-grad-cam's normalized maps at the images' size, NumPy."""
    targets = [package.utils.model_targets.ClassifierOutputTarget(k) for k in classes]
    layers = [model.get_submodule(layer)] if layer else []
    with getattr(package, name)(model=model, target_layers=layers, **options) as method:
        return method(input_tensor=x.clone(), targets=targets)


def assert_near(ours, theirs, tolerance=1e-5):
    scale = np.abs(np.asarray(theirs)).max()
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=tolerance * scale, rtol=0)


def assert_different(ours, theirs, by=1e-2):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert np.abs(ours - theirs).max() > by * np.abs(theirs).max()


# --- where they are right ---


@pytest.mark.parametrize("ours, theirs", [("GradCAM", "GradCAM"), ("XGradCAM", "XGradCAM"), ("LayerCAM", "LayerCAM")])
def test_maps_equal_torchcam(torchcam, net, ours, theirs):
    model, layer, x = net
    maps = getattr(scanlib, ours)(model, layer)(x, CLASSES, normalize=False)
    assert_near(maps, run_torchcam(getattr(torchcam, theirs), model, layer, x).relu())


def test_cam_equals_torchcam_after_relu(torchcam):
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.randn(3, 3, 16, 16)
    theirs = run_torchcam(torchcam.CAM, model, "back", x, fc_layer="head")
    assert theirs.amin() < 0  # its docstring has the ReLU
    assert_near(scanlib.CAM(model, "back")(x, CLASSES, normalize=False), theirs.relu())


@pytest.mark.parametrize("name, options", [("ScoreCAM", {}), ("SSCAM", {"samples": 2})])
def test_score_cams_equal_torchcam(torchcam, net, name, options):
    model, layer, x = net
    theirs_options = {"num_samples": 2} if options else {}
    torch.manual_seed(3)
    theirs = run_torchcam(getattr(torchcam, name), model, layer, x[:1], [2], **theirs_options)
    if name == "SSCAM":  # the same draws, on the CPU
        options["seed"] = 3
    explainer = getattr(scanlib, name)(model, layer, stretch="before", **options)
    assert_near(explainer(x[:1], 2, normalize=False), theirs.relu())


def test_is_cam_equals_torchcam_with_its_strengths(torchcam, net):
    """TorchCAM accumulates its coefficients, (0.1, 0.3, ..., 5.5); the paper averages over (0.1, 0.2, ..., 1)."""
    model, layer, x = net
    theirs = run_torchcam(torchcam.ISCAM, model, layer, x[:1], [2]).relu()
    explainer = scanlib.ISCAM(model, layer, stretch="before")
    assert explainer.strengths == pytest.approx([s / 10 for s in range(1, 11)])
    assert_different(explainer(x[:1], 2, normalize=False), theirs, 1e-4)
    explainer.strengths = [sum(range(1, s + 1)) / 10 for s in range(1, 11)]
    assert explainer.strengths[-1] == 5.5
    assert_near(explainer(x[:1], 2, normalize=False), theirs)


SAME = ["GradCAM", "XGradCAM", "LayerCAM", "HiResCAM", "GradCAMElementWise", "FEM", "SegEigenCAM"]


@pytest.mark.parametrize("name", SAME)
def test_maps_equal_grad_cam(grad_cam, net, name):
    model, layer, x = net
    assert_near(getattr(scanlib, name)(model, layer)(x, CLASSES), run_grad_cam(grad_cam, name, model, layer, x), 2e-5)


@pytest.mark.parametrize("name", ["GradCAM", "HiResCAM", "LayerCAM"])
def test_maps_of_vit_equal_grad_cam(grad_cam, name):
    torch.manual_seed(0)
    model, layer, x = tiny_vit().eval(), "encoder.layers.encoder_layer_1.ln_1", torch.randn(3, 3, 16, 16)
    fold = lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # noqa: E731
    theirs = run_grad_cam(grad_cam, name, model, layer, x, reshape_transform=fold)
    assert_near(getattr(scanlib, name)(model, layer)(x, CLASSES), theirs, 2e-5)


def test_shapley_and_finer_cam_equal_grad_cam(grad_cam, net):
    model, layer, x = net
    assert_near(scanlib.ShapleyCAM(model, layer)(x, CLASSES), run_grad_cam(grad_cam, "ShapleyCAM", model, layer, x), 2e-5)
    with torch.no_grad():
        classes = model(x).argmax(1).tolist()
    with grad_cam.FinerCAM(model, [model.get_submodule(layer)]) as finer:
        theirs = finer(input_tensor=x.clone(), targets=None)
    assert_near(scanlib.FinerCAM(model, layer)(x, classes), theirs, 2e-5)


@pytest.mark.parametrize("name, ours", [("EigenCAM", "EigenCAM"), ("EigenGradCAM", "EigenGradCAM"), ("KPCA_CAM", "KPCACAM")])
def test_components_equal_grad_cam_up_to_sign(grad_cam, net, name, ours):
    model, layer, x = net
    raw = getattr(scanlib, ours)(model, layer)(x, CLASSES, normalize=False)
    theirs = run_grad_cam(grad_cam, name, model, layer, x)
    for component, other in zip(raw, theirs, strict=True):
        either = [normalize_map((sign * component).relu()[None], (16, 16))[0] for sign in (1, -1)]
        assert min(float((maps - torch.from_numpy(other)).abs().max()) for maps in either) < 1e-4


def test_score_cam_equals_grad_cam_at_full_resolution(grad_cam):
    """Its masks are resized with aligned corners, which does not match the features' positions; without resizing both agree."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 4)).eval()
    x = torch.randn(3, 3, 8, 8)
    assert_near(scanlib.ScoreCAM(model, "1")(x, CLASSES), run_grad_cam(grad_cam, "ScoreCAM", model, "1", x), 2e-5)


def test_ablation_cam_equals_grad_cam_for_positive_scores(grad_cam):
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        model.head.bias += 10
    assert_near(scanlib.AblationCAM(model, "back")(x, CLASSES), run_grad_cam(grad_cam, "AblationCAM", model, "back", x), 1e-4)


def test_full_grad_correlates_with_grad_cam(grad_cam):
    """pytorch-grad-cam normalizes each channel's term separately, so that a weak bias counts as much as a strong one."""
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.randn(2, 3, 16, 16)
    model.unused = nn.Identity()  # it requires that every layer with a bias runs
    theirs = run_grad_cam(grad_cam, "FullGrad", model, None, x, [1, 1])
    ours = scanlib.FullGrad(model)(x, 1)
    assert_different(ours, theirs)
    assert np.corrcoef(ours.flatten(), theirs.flatten())[0, 1] > 0.7


# --- where they are wrong ---


def test_torchcam_does_not_divide_in_grad_cam_plus_plus(torchcam, net):
    """`alpha[idx][mask].div_(...)` works on a copy, so its weights are sum g^2 relu(g)."""
    model, layer, x = net
    theirs = run_torchcam(torchcam.GradCAMpp, model, layer, x)
    with FeatureTap(model, layer) as tap:
        tap(x)
        A, g = tap.features, tap.gradient(CLASSES)
    undivided = ((g**2 * g.relu()).sum((2, 3), keepdim=True) * A).sum(1)
    assert_near(undivided.relu(), theirs.relu())
    assert_different(
        normalize_map(scanlib.GradCAMPlusPlus(model, layer)(x, CLASSES, normalize=False), (16, 16)),
        normalize_map(theirs.relu(), (16, 16)),
    )


def test_grad_cam_shrinks_grad_cam_plus_plus_by_its_epsilon(grad_cam):
    """Its 1e-6 is added to G^2: where gradients are small, as before pooling over many locations, the weights shrink."""
    torch.manual_seed(0)
    model, x = NotInPlace().eval(), torch.randn(3, 3, 16, 16)
    method = grad_cam.GradCAMPlusPlus(model=model, target_layers=[model.layer])
    with FeatureTap(model, "layer") as tap:
        tap(x)
        A, g = tap.features, 1e-3 * tap.gradient(CLASSES)

    def weights(epsilon):
        alpha = g**2 / (2 * g**2 + A.sum((2, 3), keepdim=True) * g**3 + epsilon)
        return (torch.where(g != 0, alpha, 0) * g.relu()).sum((2, 3))

    theirs = method.get_cam_weights(x, None, None, A.numpy(), g.numpy())
    assert_near(weights(1e-6), theirs)
    shrunk = (weights(1e-6) / weights(0.0))[weights(0.0) > 0]
    assert float(shrunk.median()) < 0.5
    exact = (weights(0.0)[..., None, None] * A).sum(1).relu()
    assert_near(scanlib.explainers.formulas.grad_cam_plus_plus(A, g), exact)


def test_torchcam_uses_the_last_sample_in_smooth_grad_cam_plus_plus(torchcam, net):
    """Its denominator has sum(G^3 A) instead of sum(A) G^3, and its relu(G) is that of the last noisy sample."""
    model, layer, x = net
    torch.manual_seed(1)
    theirs = run_torchcam(torchcam.SmoothGradCAMpp, model, layer, x, num_samples=2, std=0.2)
    torch.manual_seed(1)
    with FeatureTap(model, layer) as tap:
        tap(x)
        A, g = tap.features, []
        for _ in range(2):
            tap(x + torch.distributions.Normal(0, 0.2).sample(x.shape))
            g.append(tap.gradient(CLASSES))
    g2, g3 = (sum(each**power for each in g) / 2 for power in (2, 3))
    alpha = g2 / (2 * g2 + (g3 * A).sum((2, 3), keepdim=True) + 1e-8)
    # after the call its features are those of the last noisy sample too
    assert_near(
        ((alpha * g[-1].relu()).sum((2, 3), keepdim=True) * tap_features(model, layer, x, theirs, alpha, g)).sum(1).relu(),
        theirs.relu(),
    )
    ours = scanlib.SmoothGradCAMPlusPlus(model, layer, samples=2, std=0.2)(x, CLASSES)
    assert_different(ours, normalize_map(theirs.relu(), (16, 16)))


def tap_features(model, layer, x, theirs, alpha, g):
    """Return the features that TorchCAM multiplies: of the image or of the last noisy copy, as its map shows."""
    torch.manual_seed(1)
    noise = [torch.distributions.Normal(0, 0.2).sample(x.shape) for _ in range(2)]
    candidates = []
    with FeatureTap(model, layer) as tap:
        for inputs in (x, x + noise[-1]):
            tap(inputs)
            candidates.append(tap.features)
    weights = (alpha * g[-1].relu()).sum((2, 3), keepdim=True)
    return min(candidates, key=lambda A: float(((weights * A).sum(1).relu() - theirs.relu()).abs().max()))


def test_grad_cam_inverts_ablation_cam_for_negative_scores(grad_cam):
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.randn(1, 3, 16, 16)
    maps = {}
    for shift in (10, -20):
        with torch.no_grad():
            model.head.bias += shift
        maps[shift] = run_grad_cam(grad_cam, "AblationCAM", model, "back", x, [2]), scanlib.AblationCAM(model, "back")(x, 2)
    assert_near(maps[10][1], maps[-20][1], 1e-3)  # ours: the same drop, the same map
    assert_different(maps[10][0], maps[-20][0], 0.1)


def test_grad_cam_accumulates_ablation_values_for_negative_features(grad_cam):
    """It ablates with min - 1e7, and the next channel's minimum includes that value: each channel gets another value."""
    layer = grad_cam.ablation_layer.AblationLayer()
    layer.indices = np.arange(3)
    layer.set_next_batch(0, torch.randn(1, 4, 2, 2), 3)
    ablated = [float(layer(None)[i, i, 0, 0]) for i in range(1)] + [float(layer.activations[i, i, 0, 0]) for i in (1, 2)]
    assert ablated[0] < -9e6 and ablated[1] < 1.9 * ablated[0] and ablated[2] < 2.8 * ablated[0]


def test_grad_cam_does_not_restore_the_layer_after_an_error(grad_cam):
    model, x = TinyNet().eval(), torch.randn(1, 3, 16, 16)
    layer, calls = model.back, []

    def target(output):
        calls.append(1)
        if len(calls) > 1:
            raise ZeroDivisionError
        return output[0]

    for method in (grad_cam.AblationCAM(model=model, target_layers=[layer]), scanlib.AblationCAM(model, "back")):
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            method(x, [target])
        assert (model.back is layer) == isinstance(method, scanlib.AblationCAM)
        model.back = layer


def test_grad_cam_has_no_fixed_sign_in_eigen_cam(grad_cam):
    """The same features with another order of channels: the sign of their map may change, ours may not."""
    changed = 0
    for seed in range(20):
        T = torch.rand(1, 6, 4, 4, generator=torch.Generator().manual_seed(seed))
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        projected = [grad_cam.utils.svd_on_activations.get_2d_projection(t.numpy()) for t in (T, T[:, order])]
        changed += bool((projected[0] * projected[1]).sum() < 0)
        torch.testing.assert_close(compute_first_component(T), compute_first_component(T[:, order]), rtol=1e-3, atol=1e-4)
    assert changed > 0


def test_grad_cam_accepts_too_few_targets(grad_cam):
    """One target for three images: two maps are empty. Ours raises an error."""
    torch.manual_seed(0)
    model, x = NotInPlace().eval(), torch.randn(3, 3, 16, 16)
    theirs = run_grad_cam(grad_cam, "GradCAM", model, "layer", x, [2])
    assert theirs.shape == (3, 16, 16) and not theirs[1:].any()
    with pytest.raises(ValueError, match="1 callables for 3 images"):
        scanlib.GradCAM(model, "layer")(x, [lambda row: row[2]])


class InPlaceBehind(nn.Module):
    """A ReLU behind the layer changes its output in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, 2, 1)
        self.head = nn.Linear(4 * 64, 3)

    def forward(self, x):
        return self.head(torch.relu_(self.layer(x)).flatten(1))


def test_peers_use_features_changed_in_place(torchcam, grad_cam):
    """The peers keep a reference to the output, which holds the values after the ReLU by then."""
    torch.manual_seed(0)
    model, x = InPlaceBehind().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        A = model.layer(x)
    assert (A < 0).any()
    with FeatureTap(model, "layer") as tap:
        tap(x)
        torch.testing.assert_close(tap.features, A)
        g = tap.gradient([0, 1])
    expected = (g.mean((2, 3), keepdim=True) * A).sum(1).relu()
    torch.testing.assert_close(scanlib.GradCAM(model, "layer")(x, [0, 1], normalize=False), expected)
    assert_different(expected, run_torchcam(torchcam.GradCAM, model, "layer", x, [0, 1]).relu())
    assert_different(normalize_map(expected, (16, 16)), run_grad_cam(grad_cam, "GradCAM", model, "layer", x, [0, 1]))
