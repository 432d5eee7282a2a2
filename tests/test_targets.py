import math

import numpy as np
import pytest
import torch
from torch import nn

from scanlib import CAM, FinerCAM, GradCAM, ScoreCAM, targets
from scanlib.targets import against_others, compute_scores, resolve_classes


def test_classes_and_their_scores():
    logits = torch.tensor([[1.0, 3, 2], [5, 4, 6]])
    assert resolve_classes(logits, None).tolist() == [1, 2]
    assert resolve_classes(logits, torch.tensor([-1, 0]), unknown=True).tolist() == [1, 0]  # not known: the predicted one
    assert compute_scores(logits, 0).tolist() == [1, 5]
    assert compute_scores(logits, [2, 1]).tolist() == [2, 4]


def test_targets_are_what_they_say():
    row = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    p = np.exp(row.numpy()) / np.exp(row.numpy()).sum()
    assert float(targets.softmax(1)(row)) == pytest.approx(p[1])
    assert float(targets.log_probability(2)(row)) == pytest.approx(math.log(p[2]))
    assert float(targets.rest(1)(row)) == pytest.approx(3 + math.log(p[1]))
    assert float(targets.binary()(row[:1])) == 1 and float(targets.binary(False)(row[:1])) == -1
    assert float(targets.regression(2)(row)) == 2
    assert float(targets.contrast(None, 1, 0.5)(row)) == pytest.approx(3 - 0.5 * 2)
    assert float(targets.contrast(0, 2)(row)) == pytest.approx((p[2] * (1 - 2) + p[1] * (1 - 3)) / (p[1] + p[2]))
    assert float(targets.similarity(torch.tensor([0.0, 1.0, 0.0]))(row)) == pytest.approx(3 / math.sqrt(14))
    maps = torch.arange(8.0).view(2, 2, 2)
    assert float(targets.segmentation(1, torch.tensor([[True, False], [False, True]]))(maps)) == 4 + 7
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 10], [50, 50, 60, 60]]),
        "labels": torch.tensor([1, 1, 2]),
        "scores": torch.tensor([0.5, 0.9, 0.8]),
    }
    wanted = torch.tensor([[0.0, 0, 8, 10], [50, 50, 60, 60]])
    assert float(targets.detection(wanted, [1, 2])(found)) == pytest.approx(0.8 + 0.5 + 1 + 0.8)
    assert float(targets.detection(wanted, [2, 1])(found)) == 0  # wrong labels
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert float(targets.detection(wanted, [1, 2])(nothing)) == 0


def test_the_log_probability_leaves_out_what_all_classes_share():
    features = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[3.0, 1.0], [2.0, 1.0]], dtype=torch.float64)  # the second feature speaks for both alike
    row = weights @ features
    gradient = torch.autograd.grad(targets.log_probability(0)(row), features)[0]
    p = row.detach().softmax(0)
    assert torch.allclose(gradient, weights[0] - p @ weights) and float(gradient[1]) == pytest.approx(0, abs=1e-12)


def test_the_log_probability_has_a_gradient_where_the_model_is_sure():
    row = torch.tensor([30.0, 0.0, -1.0], requires_grad=True)  # 1 - p_c is far below what a float32 next to 1 can tell
    gradient = torch.autograd.grad(targets.log_probability(0)(row), row)[0]
    rest = [math.exp(-30), math.exp(-31)]
    exact = torch.tensor([sum(rest), -rest[0], -rest[1]]) / (1 + sum(rest))
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="class 3 is out of range: the model has classes 0..2"):
        targets.log_probability(3)(row)


def test_against_others_is_the_same_explainer_of_the_log_probability():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.rand(2, 3, 8, 8)
    for explain in (GradCAM(model, "1"), ScoreCAM(model, "1")):
        asked = against_others(explain)
        for target, each in (
            (torch.tensor([2, 0]), [2, 0]),
            ([1, 2], [1, 2]),
            (1, [1, 1]),
            (torch.tensor(1), [1, 1]),
            (np.int64(1), [1, 1]),
        ):
            expected = explain(images, [targets.log_probability(c) for c in each])
            assert torch.equal(asked(images, target), expected)
        assert asked(images, 1, normalize=False).shape == (2, 8, 8)
    assert not torch.allclose(against_others(GradCAM(model, "1"))(images, 1), GradCAM(model, "1")(images, 1))
    with pytest.raises(ValueError, match="target is None; give a class"):
        asked(images, None)
    for of_classes in (CAM, FinerCAM):
        with pytest.raises(TypeError, match=f"{of_classes.__name__}'s target must be a class, not a callable"):
            against_others(of_classes(model, "1"))(images, [0, 1])
