"""Non-negative factors that are known, and what a model says of them."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from scanlib import DeepFeatureFactorization, FeatureTap
from scanlib.explainers.factorization import Factorization, nmf
from tests.conftest import TinyNet
from tests.explainers.test_cams import tiny_vit


def test_known_factors_are_found():
    """Rows and columns that are one concept's alone make the factors unique but for order and scale."""
    generator = torch.Generator().manual_seed(0)
    alone, mixed = torch.eye(3, dtype=torch.float64), torch.rand(8, 3, generator=generator, dtype=torch.float64)
    H, W = torch.cat([alone, alone, mixed]), torch.cat([alone, mixed[:4]]).T
    found_H, found_W = nmf(H @ W, 3, 3000)
    assert float((found_H @ found_W - H @ W).norm() / (H @ W).norm()) < 1e-3
    unit = lambda rows: rows / rows.norm(dim=1, keepdim=True)  # noqa: E731
    assert (unit(W) @ unit(found_W).T).amax(1).min() > 0.99


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 8), k=st.integers(1, 5), seed=st.integers(0, 100))
def test_more_steps_are_never_worse(rows, columns, k, seed):
    V = torch.rand(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    errors = []
    for steps in (0, 1, 2, 5, 20):
        H, W = nmf(V, k, steps, seed)
        assert (H >= 0).all() and (W >= 0).all()
        errors.append(float((V - H @ W).norm()))
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(errors))


def test_as_good_as_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn comes with the extra peers")
    V = torch.rand(60, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    H, W = nmf(V, 4, 300)
    other = decomposition.NMF(4, init="random", random_state=0, max_iter=2000, tol=1e-8)
    theirs = np.linalg.norm(V.numpy() - other.fit_transform(V.numpy()) @ other.components_)
    assert float((V - H @ W).norm()) < 1.02 * theirs


def test_concepts_of_a_network():
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
    torch.testing.assert_close(found.scores, model.head(found.concepts))  # pooling a constant map gives the concept back
    lines = found.labels([f"class {i}" for i in range(5)], top=2)
    assert len(lines) == 2 and lines[0].startswith(f"class {int(found.scores[0].argmax())} ")


def test_scores_do_not_hang_on_the_features_scale():
    """The same function with features four times as large: concepts grow alike, and their scores stay."""
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
    with pytest.raises(ValueError, match="images is empty"):
        DeepFeatureFactorization(model, "back")(x[:0])


def test_tokens_and_negative_features():
    torch.manual_seed(0)
    model, x = tiny_vit().eval(), torch.randn(2, 3, 16, 16)
    found = DeepFeatureFactorization(model, concepts=3)(x)
    assert found.maps.shape == (2, 3, 16, 16) and found.scores.shape == (3, 4) and found.error < 0.6


def test_bad_arguments():
    with pytest.raises(ValueError, match="concepts 0 is too few"):
        DeepFeatureFactorization(TinyNet(), "back", concepts=0)
