"""The self-confidence loss: rebuild the picture, and say where you are good at it, on a budget.

SCAN (Lee, Jeong, Jhang, IEEE TAI 2026, arXiv 2603.06523), Eqs. 4-10. The decoder returns four channels: z, the raw
confidence, and a reconstruction in [-1, 1]. With C = compute_confidence(z), e2 = (target - reconstruction)^2 per pixel,
mu = mean(C) and A_c = 1 / (1 + alpha):

    omega       = (mu - A_c)^2 / (mu (1 - mu))               how far the map is off its area budget
    L_c         = (1 + omega) (mean(e2) + lambda) - lambda   confidence: keep the budget
    L_r         = mean(alpha C e2 + (1 - C) e2)              reconstruction: be right where you are sure
    loss        = mean over images of L_c + L_r

    loss = SelfConfidenceLoss(alpha=4.0)(decoder(features), target)      # (B,4,H,W), (B,3,H,W) -> scalar
"""

import math

import torch
from torch import Tensor, nn


def compute_confidence(z: Tensor) -> Tensor:
    """Raw confidence -> confidence in [0, 1] (Eq. 4): a sine whose period stretches with |z|.

    C = (sign(z) sin(2 pi |z| / (8 + 0.15 |z|)) + 1) / 2; the sine is odd, so the sign moves inside. C(0) = 1/2.
    """
    return (torch.sin(2 * math.pi * z / (8 + 0.15 * z.abs())) + 1) / 2


def split_outputs(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Decoder output (B, 4, H, W) -> confidence (B, 1, H, W) in [0, 1], reconstruction (B, 3, H, W)."""
    return compute_confidence(outputs[:, :1]), outputs[:, 1:]


class SelfConfidenceLoss(nn.Module):
    """Eqs. 5-10. alpha sets the area the map should cover, A_c = 1 / (1 + alpha); lam keeps the budget felt when e2 -> 0.

    ``per_image(outputs, target)`` gives (B,); calling it gives their mean, a scalar.
    """

    def __init__(self, alpha: float = 4.0, lam: float = 0.1):
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"loss_alpha must be positive, not {alpha}; the map covers 1 / (1 + alpha) of the picture")
        self.alpha, self.lam = alpha, lam

    def per_image(self, outputs: Tensor, target: Tensor) -> Tensor:
        confidence, reconstruction = split_outputs(outputs)
        squared = (target - reconstruction).square()  # e2: (B, 3, H, W)
        area = 1 / (1 + self.alpha)
        mu = confidence.mean((1, 2, 3))
        omega = (mu - area).square() / (mu * (1 - mu)).clamp_min(1e-12)
        confidence_loss = (1 + omega) * (squared.mean((1, 2, 3)) + self.lam) - self.lam
        weight = self.alpha * confidence + (1 - confidence)
        return confidence_loss + (weight * squared).mean((1, 2, 3))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.per_image(outputs, target).mean()


class ConfidentMAE:
    """Mean |target - reconstruction| weighted by the confidence, over everything seen since ``reset``."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.error = self.weight = 0.0

    def pixel_weight(self, confidence: Tensor) -> Tensor:
        return confidence

    @torch.no_grad()
    def update(self, target: Tensor, outputs: Tensor) -> None:
        """Add a batch: target (B, 3, H, W) in [-1, 1], decoder outputs (B, 4, H, W)."""
        confidence, reconstruction = split_outputs(outputs.float())
        weight = self.pixel_weight(confidence)
        self.error += float((weight * (target - reconstruction).abs().mean(1, keepdim=True)).sum())
        self.weight += float(weight.sum())

    def compute(self) -> float:
        return self.error / self.weight if self.weight else math.nan


class NonConfidentMAE(ConfidentMAE):
    """The same, weighted by 1 - confidence."""

    def pixel_weight(self, confidence: Tensor) -> Tensor:
        return 1 - confidence


# the names of the public implementation, so that its imports keep working
ConfMSELoss, ConfMAE_Metric, NoConfMAE_Metric = SelfConfidenceLoss, ConfidentMAE, NonConfidentMAE
