"""Compare the Score-CAM family and Ablation-CAM with loops over the channels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import scanlib
from tests.conftest import TinyNet
from tests.explainers.test_cams import FlattenNet, case, plain, relu  # noqa: F401  (case is a fixture)


def masked_scores(model, x, a, k, strength=1.0, noise=None, before=False):
    """Compute the score of one image under each channel's mask, one run each."""
    scores = []
    for c in range(len(a)):
        mask = torch.from_numpy(a[c])[None, None]
        scale = lambda m: (m - m.min()) / (m.max() - m.min()) if m.max() > m.min() else torch.zeros_like(m)  # noqa: E731
        resize = lambda m: F.interpolate(m, x.shape[-2:], mode="bilinear", align_corners=False)  # noqa: E731
        mask = resize(scale(mask)) if before else scale(resize(mask))
        if noise is not None:
            mask = mask + noise[c]
        with torch.no_grad():
            scores.append(float(model(strength * x[None] * mask)[0, k]))
    return np.array(scores)


def softmax(s):
    return np.exp(s - s.max()) / np.exp(s - s.max()).sum()


@pytest.mark.parametrize("before", [False, True])
def test_score_cam_equals_loop(case, before):  # noqa: F811
    model, layer, x = case
    A, _ = plain(model, layer, x, 0)
    explainer = scanlib.ScoreCAM(model, layer, batch_size=3, stretch="before" if before else "after")
    maps = explainer(x, target=[2, 0, 1], normalize=False)
    for i, k in enumerate((2, 0, 1)):
        weights = softmax(masked_scores(model, x[i], A[i], k, before=before))
        np.testing.assert_allclose(maps[i].numpy(), relu(np.tensordot(weights, A[i], 1)), rtol=1e-8, atol=1e-12)


def test_score_cam_with_softmax_over_classes_equals_loop():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    every = np.stack([masked_scores(model, x[0], A[0], k) for k in range(4)], 1)  # (channels, classes)
    expected = relu(np.tensordot(np.stack([softmax(row) for row in every])[:, 1], A[0], 1))
    maps = scanlib.ScoreCAM(model, "layer", softmax="classes")(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), expected, rtol=1e-8, atol=1e-12)


def test_ss_cam_equals_loop():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    generator = torch.Generator().manual_seed(7)
    noise = [2 * torch.randn(5, 16, 16, generator=generator, dtype=x.dtype) for _ in range(3)]
    expected = softmax(np.mean([masked_scores(model, x[0], A[0], 1, noise=n) for n in noise], 0))
    maps = scanlib.SSCAM(model, "layer", samples=3, seed=7)(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), relu(np.tensordot(expected, A[0], 1)), rtol=1e-7, atol=1e-12)
    small = scanlib.SSCAM(model, "layer", samples=3, seed=7, batch_size=2)(x, target=1, normalize=False)
    torch.testing.assert_close(small, maps)  # the same noise, drawn in several batches


def test_is_cam_equals_loop():
    torch.manual_seed(0)
    model, x = FlattenNet().double().eval(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    A, _ = plain(model, "layer", x, 0)
    expected = softmax(np.mean([masked_scores(model, x[0], A[0], 1, strength=s / 4) for s in (1, 2, 3, 4)], 0))
    maps = scanlib.ISCAM(model, "layer", samples=4)(x, target=1, normalize=False)
    np.testing.assert_allclose(maps[0].numpy(), relu(np.tensordot(expected, A[0], 1)), rtol=1e-8, atol=1e-12)


def test_constant_channels_share_one_run():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.back[0].bias[:6] = -100  # six of eight channels are always 0
    seen = []
    handle = model.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
    maps = scanlib.ScoreCAM(model, "back")(x, target=1, normalize=False)
    handle.remove()
    assert seen == [2, 4, 2]  # the images, two active channels each, and two black images
    A, _ = plain(model, "back", x, 1)
    for i in range(2):
        weights = softmax(masked_scores(model, x[i], A[i], 1))
        np.testing.assert_allclose(maps[i].numpy(), relu(np.tensordot(weights, A[i], 1)), rtol=1e-8, atol=1e-12)


def ablated(model, layer, x, k, channels):
    """Compute y, and y without each channel, a full run each."""
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
def test_ablation_cam_equals_loop(case, batch_size):  # noqa: F811
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


def test_ablation_map_is_independent_of_the_sign_of_the_score():
    """Adding a constant to all logits changes neither the drop of a channel nor the normalized map."""
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    explainer = scanlib.AblationCAM(model, "back")
    with torch.no_grad():
        model.head.bias += 10
        above = explainer(x, 1)
        model.head.bias -= 20
        assert (model(x)[:, 1] < 0).all()
        torch.testing.assert_close(explainer(x, 1), above)


def test_invalid_arguments_raise():
    model = TinyNet()
    for method, options, message in (
        ("ScoreCAM", {"batch_size": 0}, "batch_size must be at least 1 or None, got 0"),
        ("ScoreCAM", {"softmax": "rows"}, "softmax must be 'channels' or 'classes', got 'rows'"),
        ("ScoreCAM", {"stretch": "never"}, "stretch must be 'before' or 'after', got 'never'"),
        ("AblationCAM", {"batch_size": 0}, "batch_size must be at least 1 or None, got 0"),
        ("SSCAM", {"samples": 0}, "samples must be at least 1, got 0"),
        ("ISCAM", {"samples": 0}, "samples must be at least 1, got 0"),
        ("ScoreCAM", {"differentiable": True}, "differentiable must be False for ScoreCAM"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(scanlib, method)(model, "back", **options)
    with pytest.raises(RuntimeError, match="did not run"):
        scanlib.AblationCAM(model.eval(), "unused")(torch.rand(1, 3, 16, 16))


def test_callable_targets_equal_classes():
    torch.manual_seed(0)
    model, x = TinyNet().double().eval(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    rows = [lambda row: row[3], lambda row: row[0]]
    for method in (scanlib.ScoreCAM, scanlib.AblationCAM):
        explainer = method(model, "back")
        torch.testing.assert_close(explainer(x, rows), explainer(x, [3, 0]))
        torch.testing.assert_close(explainer(x, rows[0]), explainer(x, 3))


def test_bfloat16_map_is_close_to_float32():
    torch.manual_seed(0)
    model, x = FlattenNet().eval(), torch.randn(2, 3, 16, 16)
    exact, fast = (scanlib.ScoreCAM(model, "layer", amp=amp)(x, 1) for amp in (False, True))
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    torch.testing.assert_close(exact, fast, rtol=0, atol=0.02)


def test_softmax_over_classes_leaves_callables_unchanged():
    torch.manual_seed(0)
    model, x = FlattenNet().eval(), torch.randn(1, 3, 16, 16)
    explainer = scanlib.ScoreCAM(model, "layer", softmax="classes")
    together = explainer.explain_classes(x, [3, lambda row: row.double().softmax(0)[3]])
    torch.testing.assert_close(together[:, :1], explainer.explain_classes(x, [3]))
    torch.testing.assert_close(together[:, 1], together[:, 0], rtol=1e-4, atol=1e-5)
    single = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 1))
    with pytest.raises(ValueError, match="softmax must be 'channels' for a model with a single output"):
        scanlib.ScoreCAM(single, "1", softmax="classes")(torch.rand(1, 3, 8, 8))


def test_maps_of_zero_features_are_empty():
    model = TinyNet().eval()
    with torch.no_grad():
        model.back[0].bias -= 1e6
    for method in (scanlib.ScoreCAM, scanlib.AblationCAM, scanlib.GradCAM):
        for target in (1, lambda row: row[1]):
            assert not method(model, "back")(torch.rand(2, 3, 16, 16), target).any()
