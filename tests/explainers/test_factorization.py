"""Non-negative matrix factorization against known factors, and the concepts of small models."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from scanlib import DeepFeatureFactorization, FeatureTap
from scanlib.explainers.factorization import Factorization, nmf
from tests.conftest import TinyNet
from tests.explainers.test_cams import tiny_vit


def test_nmf_finds_known_factors():
    """Rows and columns that belong to one concept make the factors unique up to order and scale."""
    generator = torch.Generator().manual_seed(0)
    alone, mixed = torch.eye(3, dtype=torch.float64), torch.rand(8, 3, generator=generator, dtype=torch.float64)
    H, W = torch.cat([alone, alone, mixed]), torch.cat([alone, mixed[:4]]).T
    found_H, found_W = nmf(H @ W, 3, 3000)
    assert float((found_H @ found_W - H @ W).norm() / (H @ W).norm()) < 1e-3
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    assert (unit(W) @ unit(found_W).T).amax(1).min() > 0.99


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 8), k=st.integers(1, 5), seed=st.integers(0, 100))
def test_nmf_error_never_grows(rows, columns, k, seed):
    V = torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    errors = []
    for steps in (0, 1, 2, 5, 20):
        H, W = nmf(V, k, steps, seed)
        assert (H >= 0).all() and (W >= 0).all()
        errors.append(float((V - H @ W).norm()))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))


def test_nmf_error_is_close_to_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn comes with the extra peers")
    V = torch.rand(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H, W = nmf(V, 4, 300)
    other = decomposition.NMF(4, init="random", random_state=0, max_iter=2000, tol=1e-8)
    theirs = np.linalg.norm(V.numpy() - other.fit_transform(V.numpy()) @ other.components_)
    assert float((V - H @ W).norm()) < 1.02 * theirs


def test_factorization_of_network():
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.rand(3, 3, 32, 32)
    found = DeepFeatureFactorization(model, "back", concepts=2)(x)
    assert isinstance(found, Factorization) and found.maps.shape == (3, 2, 32, 32) and found.raw.shape == (3, 2, 8, 8)
    assert found.maps.amin() >= 0 and torch.allclose(found.maps.amax((0, 2, 3)), torch.ones(2))
    with FeatureTap(model, "back") as tap:
        tap(x)
        again = torch.einsum("nkhw,kc->nchw", found.raw, found.concepts)
        error = float((again - tap.features).norm() / tap.features.norm())
    assert found.error == pytest.approx(error, rel=1e-4) and error < 0.5
    torch.testing.assert_close(found.scores, model.head(found.concepts))  # pooling a constant map returns the concept
    lines = found.labels([f"class {i}" for i in range(5)], top=2)
    assert len(lines) == 2 and lines[0].startswith(f"class {int(found.scores[0].argmax())} ")


def test_scores_are_independent_of_feature_scale():
    """The same function with features four times as large: the concepts scale too, the scores stay the same."""
    torch.manual_seed(0)
    model, x = TinyNet().eval(), torch.rand(3, 3, 32, 32)
    before = DeepFeatureFactorization(model, "back", concepts=2)(x)
    with torch.no_grad():
        model.back[0].weight *= 4
        model.back[0].bias *= 4
        model.head.weight /= 4
    after = DeepFeatureFactorization(model, "back", concepts=2)(x)
    torch.testing.assert_close(after.scores, before.scores, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.raw.amax((0, 2, 3)), torch.ones(2))
    with pytest.raises(ValueError, match="images must hold at least one image to factorize, got 0"):
        DeepFeatureFactorization(model, "back")(x[:0])


def test_factorization_of_tokens():
    torch.manual_seed(0)
    model, x = tiny_vit().eval(), torch.randn(2, 3, 16, 16)
    found = DeepFeatureFactorization(model, concepts=3)(x)
    assert found.maps.shape == (2, 3, 16, 16) and found.scores.shape == (3, 4) and found.error < 0.6


def test_negative_features_are_shifted_before_the_factorization():
    """Two colours with 5 subtracted are two concepts; without the shift no non-negative factors describe them."""
    left, right = torch.tensor([9.0, 0, 0], dtype=torch.float64), torch.tensor([0, 6.0, 3], dtype=torch.float64)
    image = torch.stack([left, left, right, right]).T[None, :, None].repeat(1, 1, 4, 1)  # (1, 3, 4, 4)
    layer = nn.Conv2d(3, 3, 1).double()
    nn.init.dirac_(layer.weight), nn.init.constant_(layer.bias, -5)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = DeepFeatureFactorization(model, "0", concepts=2)(image)
    assert found.error < 1e-6
    order = found.concepts[:, 0].argsort(descending=True)
    torch.testing.assert_close(found.concepts[order], torch.stack([left, right]) - 5, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.scores, found.concepts)
    one = torch.ones(4, 2, dtype=torch.float64)
    expected = torch.stack([torch.cat([one, 0 * one], 1), torch.cat([0 * one, one], 1)])
    torch.testing.assert_close(found.maps[0, order], expected, rtol=0, atol=1e-5)


def test_invalid_concepts_raise():
    with pytest.raises(ValueError, match="concepts must be at least 1, got 0"):
        DeepFeatureFactorization(TinyNet(), "back", concepts=0)
