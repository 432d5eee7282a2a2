"""Weighting by hand; the explainer that uses it is tested in test_scan.py."""

import pytest
import torch

from scanlib.explainers.weighted import compute_evidence, find_empty_maps, weight_by_confidence


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
