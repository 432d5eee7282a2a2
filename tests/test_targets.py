import math
import pickle

import numpy as np
import pytest
import torch

from scanlib.targets import (
    BinaryScore,
    Contrast,
    DetectionScore,
    LogProbability,
    OutputValue,
    Probability,
    ReST,
    SegmentationScore,
    Similarity,
    check_count,
    compute_scores,
    is_callable_target,
    resolve_classes,
    select_targets,
)


def test_classes_and_their_scores():
    logits = torch.tensor([[1.0, 3, 2], [5, 4, 6]])
    assert resolve_classes(logits, None).tolist() == [1, 2]
    assert resolve_classes(logits, torch.tensor([-1, 0]), unknown=True).tolist() == [1, 0]  # -1 becomes the predicted class
    assert resolve_classes(logits, torch.tensor([0, 2], dtype=torch.uint8)).tolist() == [0, 2]
    assert compute_scores(logits, 0).tolist() == [1, 5]
    assert compute_scores(logits, [2, 1]).tolist() == [2, 4]
    assert compute_scores(logits, [OutputValue(2), OutputValue(0)]).tolist() == [2, 5]


def test_callable_targets_are_recognised():
    assert is_callable_target(Probability(1)) and is_callable_target([Probability(1), lambda output: output[0]])
    assert not any(map(is_callable_target, (None, 1, [1, 2], [], torch.tensor([1]))))


def test_selected_targets_belong_to_the_selected_images():
    indices = torch.tensor([2, 0])
    assert select_targets(torch.tensor([4, 5, 6]), indices).tolist() == [6, 4]
    assert select_targets([Probability(4), Probability(5), Probability(6)], indices) == [Probability(6), Probability(4)]
    assert select_targets(3, indices) == 3 and select_targets(None, indices) is None


def test_target_functions_by_hand():
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    assert float(Probability(1)(logits)) == pytest.approx(p[1])
    assert float(LogProbability(2)(logits)) == pytest.approx(math.log(p[2]))
    assert float(ReST(1)(logits)) == pytest.approx(3 + math.log(p[1]))
    assert float(BinaryScore()(logits[:1])) == 1 and float(BinaryScore(False)(logits[:1])) == -1
    assert float(OutputValue(2)(logits)) == 2
    assert float(Contrast(None, 1, 0.5)(logits)) == pytest.approx(3 - 0.5 * 2)
    assert float(Contrast(0, 2)(logits)) == pytest.approx((p[2] * (1 - 2) + p[1] * (1 - 3)) / (p[1] + p[2]))
    assert float(Similarity(torch.tensor([0.0, 1.0, 0.0]))(logits)) == pytest.approx(3 / math.sqrt(14))
    maps = torch.arange(8.0).view(2, 2, 2)
    assert float(SegmentationScore(1, torch.tensor([[True, False], [False, True]]))(maps)) == 4 + 7


def test_detection_score_by_hand():
    detections = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 10], [50, 50, 60, 60]]),
        "labels": torch.tensor([1, 1, 2]),
        "scores": torch.tensor([0.5, 0.9, 0.8]),
    }
    boxes = torch.tensor([[0.0, 0, 8, 10], [50, 50, 60, 60]])
    assert float(DetectionScore(boxes, [1, 2])(detections)) == pytest.approx(0.8 + 0.5 + 1 + 0.8)
    assert float(DetectionScore(boxes, torch.tensor([1, 2]), iou=0.9)(detections)) == pytest.approx(1 + 0.8)
    assert float(DetectionScore(boxes, [2, 1])(detections)) == 0  # wrong labels
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert float(DetectionScore(boxes, [1, 2])(empty)) == 0


def test_target_functions_can_be_printed_compared_and_pickled():
    functions = [Probability(1), LogProbability(1), ReST(1), BinaryScore(), OutputValue(), Contrast(1, [2, 3])]
    for function in functions:
        assert pickle.loads(pickle.dumps(function)) == function
    assert repr(Contrast(1, [2, 3])) == "Contrast(target=1, references=[2, 3], strength=1.0)"
    maps, mask = torch.arange(8.0).view(2, 2, 2), torch.tensor([[True, False], [False, True]])
    with_tensors = [
        (SegmentationScore(1, mask), maps),
        (Similarity(torch.tensor([1.0, 2.0])), torch.tensor([3.0, 1.0])),
        (
            DetectionScore(torch.tensor([[0.0, 0, 2, 2]]), [1]),
            {"boxes": torch.tensor([[0.0, 0, 2, 2]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])},
        ),
    ]
    for function, output in with_tensors:
        assert torch.equal(pickle.loads(pickle.dumps(function))(output), function(output))
        assert function == function and function != pickle.loads(pickle.dumps(function))  # compared by identity
    assert repr(SegmentationScore(1, mask)) == "SegmentationScore(target=1)"


def test_log_probability_ignores_evidence_that_all_classes_share():
    features = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[3.0, 1.0], [2.0, 1.0]], dtype=torch.float64)  # the second feature raises both logits equally
    logits = weights @ features
    gradient = torch.autograd.grad(LogProbability(0)(logits), features)[0]
    p = logits.detach().softmax(0)
    assert torch.allclose(gradient, weights[0] - p @ weights) and float(gradient[1]) == pytest.approx(0, abs=1e-12)


def test_log_probability_has_a_gradient_where_the_model_is_certain():
    logits = torch.tensor([30.0, 0.0, -1.0], requires_grad=True)  # in float32, p_c is rounded to 1
    gradient = torch.autograd.grad(LogProbability(0)(logits), logits)[0]
    others = [math.exp(-30), math.exp(-31)]
    expected = torch.tensor([sum(others), -others[0], -others[1]]) / (1 + sum(others))
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"target class 3 is out of range: the model has classes 0\.\.2"):
        LogProbability(3)(logits)


@pytest.mark.parametrize(
    ("outputs", "target", "error", "message"),
    [
        (torch.zeros(2, 3), 3, ValueError, r"target class 3 is out of range: the model has classes 0\.\.2"),
        (torch.zeros(2, 3), [0, -1], ValueError, "target class -1 is out of range"),
        (torch.zeros(2, 3), [0, 1, 2], ValueError, "one per image, got 3 classes for 2 images"),
        (torch.zeros(2, 3), "dog", TypeError, "target must be a class index, one index per image, or callables, got 'dog'"),
        (torch.zeros(2, 3), [0.0, 1.0], TypeError, r"target must hold class indices \(integers\), got torch.float32"),
        (torch.zeros(2, 3, 4), 0, ValueError, r"the model must return logits \(B, K\), got \(2, 3, 4\)"),
        (torch.zeros(2, 3), [Probability(0)] * 3, ValueError, "one per image, got 3 callables for 2 images"),
        (torch.zeros(2, 3), lambda output: output, TypeError, r"to a scalar tensor, .* got tensor\(\[0., 0., 0.\]\)"),
    ],
)
def test_compute_scores_raises_for_wrong_targets(outputs, target, error, message):
    with pytest.raises(error, match=message):
        compute_scores(outputs, target)


@pytest.mark.parametrize("kind", [Probability, LogProbability, ReST, Contrast, lambda c: Contrast(0, [c]), OutputValue])
def test_classes_out_of_range_raise(kind):
    for wrong in (-1, 5, 99):
        with pytest.raises(ValueError, match=f"target class {wrong} is out of range: the model has classes 0..4"):
            compute_scores(torch.randn(2, 5), kind(wrong))
    with pytest.raises(ValueError, match="target class 5 is out of range"):
        compute_scores(torch.randn(2, 5, 3, 3), SegmentationScore(5, torch.ones(3, 3)))
    with pytest.raises(ValueError, match="references must be classes, or how many of them, at least 1, got 0"):
        Contrast(1, 0)(torch.randn(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_are_those_of_float32(dtype):
    logits = torch.tensor([[40.0, 0, -30, 2], [60000, 1, 2, 3]], dtype=dtype)
    for target in (Probability(1), LogProbability(1), ReST(0), Contrast(0), Contrast(3, [1, 2])):
        scores = compute_scores(logits, target)
        assert scores.isfinite().all() and torch.equal(scores, compute_scores(logits.float(), target))


def test_wrong_number_of_callables_raises():
    with pytest.raises(ValueError, match="target must be a callable or one per image, got 3 callables for 2 images"):
        check_count([Probability(0)] * 3, 2)
    check_count([Probability(0)] * 2, 2), check_count(Probability(0), 2), check_count([1, 2, 3], 2)  # the last is for others


def test_contrast_of_a_model_that_is_certain():
    """Probabilities of 1e-18 must not be rounded away: the weights are their ratios."""
    output = torch.tensor([40.0, 0, -1, -2, -5], requires_grad=True)
    score = Contrast(0)(output)
    (gradient,) = torch.autograd.grad(score, output)
    others = torch.tensor([0.0, -1, -2])
    torch.testing.assert_close(score, 40 - (others.softmax(0) * others).sum())
    torch.testing.assert_close(gradient[0], torch.tensor(1.0))


@pytest.mark.parametrize("kind", [Probability, LogProbability, ReST, OutputValue, lambda c: Contrast(0, [c])])
def test_classes_that_are_no_integers_raise(kind):
    for wrong in (True, 1.5, "3"):
        with pytest.raises(TypeError, match="target class must be an integer, got"):
            compute_scores(torch.randn(2, 5), kind(wrong))
