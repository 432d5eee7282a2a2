"""The self-confidence loss: reconstruct the image, and be confident on a limited area, where the reconstruction is good.

SCAN (Lee, Jeong, Jhang, IEEE TAI 2026, arXiv 2603.06523), Eqs. 4-10. The decoder returns four channels: z, the raw confidence,
and a reconstruction in [-1, 1]. With confidence C = compute_confidence(z), squared error e2 = (target - reconstruction)^2 per
pixel, mean confidence mu = mean(C) and area A_c = 1 / (1 + alpha):

    omega       = (mu - A_c)^2 / (mu (1 - mu))               how far the confident area is from A_c
    L_c         = (1 + omega) (mean(e2) + lambda) - lambda   confidence loss: keep the area
    L_r         = mean(alpha C e2 + (1 - C) e2)              reconstruction loss: be right where the confidence is high
    loss        = mean over images of L_c + L_r

    loss = SelfConfidenceLoss(alpha=4.0)(decoder(features), reference)   # (B, 4, H, W), (B, 3, H, W) -> scalar
"""

import math

import torch
from torch import Tensor, nn


def compute_confidence(z: Tensor) -> Tensor:
    """Compute the confidence C = (sign(z) sin(2 pi |z| / (8 + 0.15 |z|)) + 1) / 2 in [0, 1] from z (Eq. 4); C(0) = 1/2."""
    return (torch.sin(2 * math.pi * z / (8 + 0.15 * z.abs())) + 1) / 2  # the sine is odd: sign(z) sin(a |z|) = sin(a z)


def split_outputs(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Split the decoder's output (B, 4, H, W) into confidence (B, 1, H, W) in [0, 1] and reconstruction (B, 3, H, W)."""
    return compute_confidence(outputs[:, :1]), outputs[:, 1:]


class SelfConfidenceLoss(nn.Module):
    """The loss of Eqs. 5-10, a scalar: the mean of ``per_image(outputs, target)``, (B,).

    alpha: positive; the map should cover A_c = 1 / (1 + alpha) of the image. lam: lambda, which keeps the area when e2 is near 0.
    """

    def __init__(self, alpha: float = 4.0, lam: float = 0.1):
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"loss_alpha must be positive, got {alpha}; the map covers 1 / (1 + alpha) of the image")
        self.alpha, self.lam = alpha, lam

    def per_image(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each image, (B,). outputs: (B, 4, H, W). target: the reference (B, 3, H, W) in [-1, 1]."""
        confidence, reconstruction = split_outputs(outputs)
        squared_error = (target - reconstruction).square()  # (B, 3, H, W)
        area = 1 / (1 + self.alpha)
        mu = confidence.mean((1, 2, 3))
        omega = (mu - area).square() / (mu * (1 - mu)).clamp_min(1e-12)
        confidence_loss = (1 + omega) * (squared_error.mean((1, 2, 3)) + self.lam) - self.lam
        weight = self.alpha * confidence + (1 - confidence)
        return confidence_loss + (weight * squared_error).mean((1, 2, 3))

    def forward(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.per_image(outputs, target).mean()


class ConfidentMAE:
    """Mean of |target - reconstruction| weighted by the confidence, over all batches since ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.error = self.weight = 0.0

    def compute_pixel_weight(self, confidence: Tensor) -> Tensor:
        return confidence

    @torch.no_grad()
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch. preds: decoder outputs (B, 4, H, W). target: the reference (B, 3, H, W) in [-1, 1]."""
        confidence, reconstruction = split_outputs(preds.float())
        weight = self.compute_pixel_weight(confidence)
        self.error += float((weight * (target - reconstruction).abs().mean(1, keepdim=True)).sum())
        self.weight += float(weight.sum())

    def compute(self) -> float:
        """Return the mean; NaN before the first batch."""
        return self.error / self.weight if self.weight else math.nan


class NonConfidentMAE(ConfidentMAE):
    """Mean of |target - reconstruction| weighted by 1 - confidence."""

    def compute_pixel_weight(self, confidence: Tensor) -> Tensor:
        return 1 - confidence


# the names of the public implementation, so that its imports work
ConfMSELoss, ConfMAE_Metric, NoConfMAE_Metric = SelfConfidenceLoss, ConfidentMAE, NonConfidentMAE
