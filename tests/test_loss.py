import math

import pytest
import torch
from hypothesis import given, strategies as st

from scanlib.loss import ConfidentMAE, NonConfidentMAE, SelfConfidenceLoss, compute_confidence


def test_confidence_by_hand():
    z = torch.tensor([0.0, 2.0, -2.0, 4.0], dtype=torch.float64)
    expected = [0.5] + [(s * math.sin(2 * math.pi * a / (8 + 0.15 * a)) + 1) / 2 for s, a in ((1, 2), (-1, 2), (1, 4))]
    torch.testing.assert_close(compute_confidence(z), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


@given(st.floats(-1e4, 1e4))
def test_confidence_is_in_range_and_symmetric_about_one_half(z):
    up, down = compute_confidence(torch.tensor([z, -z], dtype=torch.float64))
    assert 0 <= up <= 1
    assert up + down == pytest.approx(1)


def compute_z(confidence):
    """Return the z closest to 0 with compute_confidence(z) = confidence."""
    angle = math.asin(2 * confidence - 1)
    return 8 * angle / (2 * math.pi - 0.15 * abs(angle))


def test_loss_by_hand():
    """Two pixels, confidences 0.8 and 0.1, errors 0.5 and 1: every term computed by hand (Eqs. 5-10)."""
    alpha, lam = 4.0, 0.1
    outputs = torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    outputs[0, 0, 0] = torch.tensor([compute_z(0.8), compute_z(0.1)], dtype=torch.float64)
    target = torch.tensor([0.5, 1.0], dtype=torch.float64).expand(1, 3, 1, 2)
    mu, area, mse = 0.45, 0.2, (0.25 + 1) / 2
    omega = (mu - area) ** 2 / (mu * (1 - mu))
    confidence = (1 + omega) * (mse + lam) - lam
    reconstruction = ((4 * 0.8 + 0.2) * 0.25 + (4 * 0.1 + 0.9) * 1) / 2
    assert float(SelfConfidenceLoss(alpha, lam)(outputs, target)) == pytest.approx(confidence + reconstruction, abs=1e-12)


def test_loss_is_the_mean_over_images():
    torch.manual_seed(0)
    outputs, target = torch.randn(3, 4, 5, 5), torch.randn(3, 3, 5, 5)
    loss = SelfConfidenceLoss()
    each = torch.stack([loss(outputs[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(loss.per_image(outputs, target), each)
    torch.testing.assert_close(loss(outputs, target), each.mean())


def test_both_losses_have_the_same_weight_at_the_target_area():
    """At mu = A_c, with a confidence independent of the error, alpha mu = 1 - mu. This defines A_c."""
    alpha = 4.0
    area = 1 / (1 + alpha)
    assert alpha * area == pytest.approx(1 - area)
    outputs = torch.full((1, 4, 4, 4), 0.0, dtype=torch.float64)
    outputs[:, 0] = compute_z(area)
    target = torch.ones(1, 3, 4, 4, dtype=torch.float64)
    # omega = 0: the confidence loss is e2, the reconstruction loss 2 (1 - A_c) e2
    assert float(SelfConfidenceLoss(alpha)(outputs, target)) == pytest.approx(1 + 2 * (1 - area))


def test_loss_and_gradients_are_finite_for_saturated_confidence():
    outputs = torch.zeros(1, 4, 2, 2)
    outputs[:, 0] = compute_z(1e-12)
    outputs.requires_grad_()
    loss = SelfConfidenceLoss()(outputs, torch.zeros(1, 3, 2, 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(outputs.grad).all()


def test_loss_raises_for_alpha_that_is_not_positive():
    with pytest.raises(ValueError, match="loss_alpha must be positive, got 0"):
        SelfConfidenceLoss(0)


def test_mean_absolute_errors_by_hand_over_two_batches():
    outputs = torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    outputs[0, 0, 0] = torch.tensor([compute_z(0.75), compute_z(0.25)], dtype=torch.float64)
    target = torch.tensor([1.0, 3.0], dtype=torch.float64).expand(1, 3, 1, 2)
    confident, non_confident = ConfidentMAE(), NonConfidentMAE()
    for _ in range(2):
        confident.update(outputs, target)
        non_confident.update(outputs, target)
    assert confident.compute() == pytest.approx(0.75 * 1 + 0.25 * 3, abs=1e-6)
    assert non_confident.compute() == pytest.approx(0.25 * 1 + 0.75 * 3, abs=1e-6)
    confident.reset()
    assert math.isnan(confident.compute())
