"""Weighting by hand; the explainer that uses it is tested in test_scan.py."""

import numpy as np
import pytest
import torch
from torch import nn

from scanlib import CAM, FinerCAM, GradCAM, ScoreCAM
from scanlib.explainers.weighted import compute_evidence, explain_log_probability, find_empty_maps, weight_by_confidence
from scanlib.targets import LogProbability


def test_weight_by_confidence_by_hand():
    confidence = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2, dtype=torch.float64)  # mean 1/2, so C / mean(C) is 2 or 0
    evidence = torch.tensor([[[0.5, 0.25], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    assert weight_by_confidence(evidence, confidence).tolist() == [[[1.5, 0.25], [0.0, 3.0]], confidence[1].tolist()]
    assert find_empty_maps(evidence).tolist() == [False, True]


def test_evidence_is_resized_to_the_confidence():
    found = weight_by_confidence(torch.ones(1, 2, 2), torch.full((1, 4, 4), 0.3))
    assert found.shape == (1, 4, 4)
    torch.testing.assert_close(found, torch.full((1, 4, 4), 2.0))


def test_invalid_evidence_raises():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="evidence must be an explainer, .*, got 3"):
        compute_evidence(3, images, None)
    for maps in (torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4), torch.full((2, 4, 4), -1.0)):
        with pytest.raises(ValueError, match=r"evidence must be maps \(N, h, w\), 0 or more, got"):
            compute_evidence(lambda x, target, maps=maps: maps, images, None)
    with pytest.raises(ValueError, match="got tuple; for a SCAN pass scanner.as_explainer"):
        compute_evidence(lambda x, target: (x, x), images, None)
    with pytest.raises(ValueError, match="evidence must be maps"):
        compute_evidence(lambda x, target: torch.full((2, 4, 4), torch.nan), images, None)


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("method", [GradCAM, ScoreCAM])
@pytest.mark.parametrize(
    ("target", "classes"),
    [
        (torch.tensor([2, 0]), [2, 0]),
        ([1, 2], [1, 2]),
        (1, [1, 1]),
        (torch.tensor(1), [1, 1]),
        (np.int64(1), [1, 1]),
    ],
)
def test_explain_log_probability_is_the_same_explainer_of_another_score(model, method, target, classes):
    images, explainer = torch.rand(2, 3, 8, 8), method(model, "1")
    explain = explain_log_probability(explainer)
    scores = [LogProbability(c) for c in classes]
    assert torch.equal(explain(images, target), explainer(images, scores))
    assert torch.equal(explain(images, target, normalize=False), explainer(images, scores, normalize=False))


def test_explain_log_probability_differs_from_the_logit(model):
    images = torch.rand(2, 3, 8, 8)
    assert not torch.allclose(explain_log_probability(GradCAM(model, "1"))(images, 1), GradCAM(model, "1")(images, 1))


def test_explain_log_probability_takes_any_function(model):
    explain = explain_log_probability(lambda images, target: target)
    assert explain(torch.rand(2, 3, 8, 8), [1, 2]) == [LogProbability(1), LogProbability(2)]


def test_explain_log_probability_raises_without_a_class(model):
    with pytest.raises(ValueError, match="target must be a class or one per image, got None"):
        explain_log_probability(GradCAM(model, "1"))(torch.rand(2, 3, 8, 8), None)


@pytest.mark.parametrize("method", [CAM, FinerCAM])
def test_methods_of_classes_reject_log_probabilities(model, method):
    with pytest.raises(TypeError, match=f"target must be a class for {method.__name__}, .* got a callable"):
        explain_log_probability(method(model, "1"))(torch.rand(2, 3, 8, 8), [0, 1])
