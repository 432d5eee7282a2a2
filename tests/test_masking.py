import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings, strategies as st

from scanlib.masking import blur_to_grid, compute_mask_scores, compute_threshold, mask_features


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0, 100), st.integers(0, 10**6), st.floats(0, 1))
def test_threshold_is_numpys_percentile_of_the_positive_scores(entries, percentile, seed, share):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 2, entries)) * (rng.random((3, 2, entries)) < share)
    result = compute_threshold(torch.tensor(scores), percentile)
    assert result.shape == (3, 1, 1)
    for row, threshold in zip(scores, result.flatten().tolist(), strict=True):
        positives = row[row > 0]
        assert threshold == pytest.approx(np.percentile(positives, percentile) if positives.size else 0.0, abs=1e-12)


def test_threshold_takes_one_percentile_per_image():
    scores = torch.arange(1.0, 12).expand(3, 11)
    assert compute_threshold(scores, torch.tensor([0.0, 50, 100])).flatten().tolist() == [1, 6, 11]


def test_mask_scores_by_hand():
    features = torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]])
    gradient = torch.tensor([[[[2.0]], [[-1.0]], [[1.0]]]])
    assert compute_mask_scores(features, gradient, "gradient").flatten().tolist() == [2, 0, 1]
    assert compute_mask_scores(features, gradient, "attribution").flatten().tolist() == [2, 0, 3]
    assert compute_mask_scores(features, gradient, "position").flatten().tolist() == [6, 0, 9]  # times 2 - 2 + 3
    tokens, token_gradient = (x.flatten(2).transpose(1, 2) for x in (features, gradient))
    assert compute_mask_scores(tokens, token_gradient, "position", channel_dim=-1).flatten().tolist() == [6, 0, 9]
    gradient, relevance = torch.tensor([[[[2.0, 3.0]], [[-1.0, 5.0]]]]), torch.tensor([[[[1.0, 0.5]]]])
    assert compute_mask_scores(gradient, gradient, "relevance", relevance=relevance).flatten().tolist() == [2, 1.5, 0, 2.5]


def test_masked_features_by_hand():
    features = torch.tensor([[5.0, -6, 7, 8], [1, 2, 3, 4]])
    scores = torch.tensor([[0.0, 1, 2, 3], [0, 0, 0, 0]])
    assert mask_features(features, scores, 50).tolist() == [[0, 0, 7, 8], [1, 2, 3, 4]]  # no positive score: all are kept
    assert mask_features(features, scores, torch.tensor([0.0, 100])).tolist() == [[0, -6, 7, 8], [1, 2, 3, 4]]


def test_blur_is_torchvisions_gaussian():
    x = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    expected = torchvision.transforms.functional.gaussian_blur(x, [17, 17], [8.0, 8.0])
    torch.testing.assert_close(blur_to_grid(x, (8, 8)), expected)


def test_blur_is_stronger_along_the_axis_with_larger_cells():
    blurred = blur_to_grid(torch.rand(1, 3, 32, 64, dtype=torch.float64), (8, 8))  # sigma 4 vertically, 8 horizontally
    assert blurred.shape == (1, 3, 32, 64)
    assert blurred.diff(dim=3).abs().mean() < blurred.diff(dim=2).abs().mean()


def test_blur_keeps_a_constant_image():
    torch.testing.assert_close(blur_to_grid(torch.full((1, 3, 16, 16), 7.0), (2, 2)), torch.full((1, 3, 16, 16), 7.0))
