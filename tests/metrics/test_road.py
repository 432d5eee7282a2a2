import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

from scanlib.metrics.road import compute_road, fill_imputed, impute


def impute_directly(image, removed):
    """Solve the equations as a dense linear system: (C, H, W), (H, W) bool -> (C, H, W), float64."""
    height, width = removed.shape
    number = {tuple(location): k for k, location in enumerate(removed.nonzero().tolist())}
    A, b = torch.zeros(len(number), len(number), dtype=torch.float64), torch.zeros(len(number), len(image), dtype=torch.float64)
    for (y, x), k in number.items():
        for dy, dx in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]:
            weight = 1 / 6 if dy == 0 or dx == 0 else 1 / 12
            if 0 <= y + dy < height and 0 <= x + dx < width:
                A[k, k] += weight
                if (y + dy, x + dx) in number:
                    A[k, number[y + dy, x + dx]] -= weight
                else:
                    b[k] += weight * image[:, y + dy, x + dx].double()
    filled = image.double().clone()
    filled[:, removed] = torch.linalg.solve(A, b).T
    return filled


def test_impute_known_values():
    image = torch.tensor([[[1.0, 2, 3], [4, 99, 6], [7, 8, 9]]], dtype=torch.float64)
    hole = torch.zeros(1, 3, 3, dtype=torch.bool)
    hole[0, 1, 1] = True
    assert impute(image[None], hole)[0, 0, 1, 1].item() == pytest.approx((2 + 4 + 6 + 8) / 6 + (1 + 3 + 7 + 9) / 12)
    corner = torch.zeros(1, 3, 3, dtype=torch.bool)
    corner[0, 0, 0] = True  # three neighbours: 2 and 4 direct, 99 diagonal
    assert impute(image[None], corner)[0, 0, 0, 0].item() == pytest.approx((2 * 2 + 2 * 4 + 99) / 5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 17), st.integers(2, 17), st.floats(0.05, 0.98), st.booleans())
@example(0, 2, 3, 0.5, False)  # one image is solved up to rounding before the other
def test_impute_equals_the_direct_solution(seed, height, width, share, smooth):
    generator = torch.Generator().manual_seed(seed)
    images = 255 * torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64)
    ranks = torch.rand(2, 1, 3 if smooth else height, 3 if smooth else width, generator=generator, dtype=torch.float64)
    removed = F.interpolate(ranks, size=(height, width), mode="bicubic")[:, 0] < share
    removed[:, 0, 0] = False  # at least one pixel is known
    found = impute(images, removed, tolerance=1e-10)
    expected = torch.stack([impute_directly(*pair) for pair in zip(images, removed, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    default = impute(images.float(), removed)
    assert (default - expected).abs().max() < 0.2 and (default - expected).abs().mean() < 0.05  # grey levels
    assert torch.equal(found.movedim(1, 3)[~removed], images.movedim(1, 3)[~removed])


def test_impute_constant_empty_and_wrong_images():
    flat = torch.full((2, 3, 40, 30), 77.0)
    removed = torch.ones(2, 40, 30, dtype=torch.bool)
    removed[0, 39, 29] = False
    removed[1] = False
    torch.testing.assert_close(impute(flat, removed), flat)
    everything = impute(flat, torch.ones(2, 40, 30, dtype=torch.bool))
    assert everything.isfinite().all() and (everything == 0).all()
    assert impute(flat[:0], removed[:0]).shape == (0, 3, 40, 30)
    with pytest.raises(ValueError, match=r"removed must have shape \(2, 40, 30\) for these images, got \(2, 30, 40\)"):
        impute(flat, removed.mT)


def test_impute_large_hole():
    y, x = torch.meshgrid(torch.arange(224.0), torch.arange(224.0), indexing="ij")
    plane = (y + 0.5 * x)[None, None].double().expand(1, 3, -1, -1)  # a linear image satisfies the equations
    removed = torch.zeros(1, 224, 224, dtype=torch.bool)
    removed[0, 20:200, 30:210] = True
    assert (impute(plane, removed, 1e-6) - plane).abs().max() < 0.01
    assert (impute(plane.float(), removed) - plane).abs().max() < 0.1  # of up to 334


def test_noise_is_seeded_and_only_where_removed():
    images, removed = torch.rand(2, 3, 16, 16) * 255, torch.rand(2, 16, 16) < 0.5
    which = torch.tensor([1, 0])
    quiet, noisy = (fill_imputed(images, noise)(which, removed) for noise in (0, 0.01))
    difference = (noisy - quiet).movedim(1, 3)
    assert (difference[~removed] == 0).all() and 1.5 < difference[removed].std() < 4
    torch.testing.assert_close(fill_imputed(images, 0.01)(which, removed), noisy)
    assert not torch.equal(fill_imputed(images, 0.01, seed=1)(which, removed), noisy)


def test_road_known_values():
    """The score is the left half's mean minus the right half's; the map ranks the left half first."""
    images = torch.zeros(1, 3, 8, 8)
    images[..., :4] = 200
    score = lambda x, i: x[..., :4].mean((1, 2, 3)) - x[..., 4:].mean((1, 2, 3))  # noqa: E731
    left = torch.linspace(1, 0, 64).view(1, 8, 8).mT  # column by column
    morf, lerf = compute_road(score, images, left, percentiles=(50, 90), noise=0)
    assert morf.shape == lerf.shape == (1, 2)
    assert morf[0, 0] == pytest.approx(-200, abs=0.1) == lerf[0, 0]  # one half remains, and the other gets its colour
    few = math.ceil(0.9 * 63)  # at 90 % all but seven pixels are kept, which are in the first or the last column
    assert few == 57 and morf[0, 1] == pytest.approx(0, abs=0.1) == lerf[0, 1]  # imputed from a column of the same colour
    spot = torch.zeros(1, 3, 8, 8)
    spot[..., 3:5, 3:5] = 240
    bright = lambda x, i: x[..., 3:5, 3:5].mean((1, 2, 3))  # noqa: E731
    heat = torch.rand(1, 8, 8) * 0.5
    heat[..., 3:5, 3:5] = 1
    morf, lerf = compute_road(bright, spot, heat, percentiles=(60, 90), noise=0)
    assert (morf < -200).all() and lerf.abs().max() < 0.1  # the spot is removed first, or last
    inverted = compute_road(bright, spot, -heat, percentiles=(60, 90), noise=0)
    torch.testing.assert_close(morf, inverted[1], atol=0.1, rtol=0)
    with pytest.raises(ValueError, match=r"percentiles must be between 0 and 100, .* got \[0, 50\]"):
        compute_road(score, images, left, percentiles=(0, 50))


def test_impute_warns_above_the_tolerance():
    images, removed = torch.rand(1, 3, 40, 40), torch.rand(1, 40, 40) < 0.9
    with pytest.warns(UserWarning, match="imputation stopped at an error of"):
        impute(images, removed, tolerance=0)


def test_road_agrees_with_grad_cam():
    metrics = pytest.importorskip("pytorch_grad_cam.metrics.road")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1568, 4)).eval()
    model[3].weight.data *= 5  # confident, so that removal changes the score
    images = F.interpolate(torch.randn(3, 3, 8, 8), size=(32, 32), mode="bicubic") + 0.3 * torch.randn(3, 3, 32, 32)
    maps = F.interpolate(torch.rand(3, 1, 6, 6), size=(32, 32), mode="bicubic")[:, 0]  # no ties
    classes = [0, 3, 1]
    targets = [ClassifierOutputSoftmaxTarget(k) for k in classes]
    percentiles = (10, 35, 70, 90)

    def theirs(kind, p):
        perturbation = kind(p)
        perturbation.perturbation.imputer.noise = 0
        with torch.no_grad():
            return torch.from_numpy(np.asarray(perturbation(images, maps.numpy(), targets, model)))

    def score(x, index):
        return model(x).softmax(1).gather(1, torch.tensor(classes)[index][:, None])[:, 0]

    ours = compute_road(score, images, maps, percentiles, noise=0)
    for kind, found in zip((metrics.ROADMostRelevantFirst, metrics.ROADLeastRelevantFirst), ours, strict=True):
        expected = torch.stack([theirs(kind, p) for p in percentiles], 1)
        assert expected.abs().max() > 0.05  # not all zero
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
