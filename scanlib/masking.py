"""SCAN's masks and reconstruction targets: the decoder gets masked features, and must reconstruct a blurred image.

SCAN (arXiv 2603.06523), Eq. 1: with F the features of a layer, G the positive part of the gradient there, and Q the P-th
percentile of G's positive entries, computed for each image, masked features = F * [G >= Q].

    scores = compute_mask_scores(features, gradient, "gradient")                # (B, C, h, w)
    masked = mask_features(features, scores, percentile=95)                     # (B, C, h, w)
    reference = blur_to_grid(images, grid=(8, 8)) / 127.5 - 1                   # (B, 3, H, W) in [-1, 1]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_METHODS = ("gradient", "attribution", "position", "relevance", "libra")


def compute_threshold(scores: Tensor, percentile: Tensor | float) -> Tensor:
    """Compute the P-th percentile of each image's positive scores, linearly interpolated (Q in Eq. 1).

    scores: (B, ...). percentile: a number or (B,), in [0, 100]. Returns (B, 1, ...), to compare with the scores. An image without
    positive scores gets 0, which keeps all its features.
    """
    ordered = scores.flatten(1).sort(1).values  # the positive scores come last
    positives = (ordered > 0).sum(1)
    first = ordered.shape[1] - positives
    percentile = torch.as_tensor(percentile, dtype=ordered.dtype, device=ordered.device).expand(len(ordered))
    rank = percentile / 100 * (positives - 1).clamp_min(0)
    below = (first + rank.floor().long()).clamp_max(ordered.shape[1] - 1)[:, None]
    above = (first + rank.ceil().long()).clamp_max(ordered.shape[1] - 1)[:, None]
    threshold = torch.lerp(ordered.gather(1, below), ordered.gather(1, above), (rank - rank.floor())[:, None])
    threshold = torch.where(positives[:, None] > 0, threshold, 0)
    return threshold.view(-1, *[1] * (scores.ndim - 1))


def compute_mask_scores(
    features: Tensor, gradient: Tensor, mask_by: str, channel_dim: int = 1, relevance: Tensor | None = None
) -> Tensor:
    """Compute the scores that the mask ranks features by, shaped like the features; G is the gradient, F the features.

    mask_by: "gradient": relu(G), as published. "attribution": relu(G F). "position": relu(G F) times relu of the sum of G F over
    channels, which is the evidence for the class at the location. "relevance": relu(G) times ``relevance``, the location's
    attention relevance with one channel. "libra": relu(G F) times relu of ``relevance``, the location's value in the map of
    ``Libra``; G is LibraGrad's. ``relevance`` is divided by its maximum in each image: products of small numbers would become 0.
    The relevance of tokens that are not patches is 0, so that they are masked.
    """
    if mask_by == "gradient":
        return gradient.relu()
    if mask_by in ("relevance", "libra"):
        if relevance is None:
            raise ValueError(f"relevance must be given for mask_by {mask_by!r}, got None")
        relevance = relevance.relu() / relevance.flatten(1).amax(1).clamp_min(1e-30).view(-1, *[1] * (relevance.ndim - 1))
        return (gradient if mask_by == "relevance" else gradient * features).relu() * relevance
    attribution = gradient * features
    if mask_by == "attribution":
        return attribution.relu()
    return attribution.relu() * attribution.sum(channel_dim, keepdim=True).relu()


def mask_features(features: Tensor, scores: Tensor, percentile: Tensor | float) -> Tensor:
    """Set features to zero where the score is below the threshold (Eq. 1); shapes as in ``compute_threshold``."""
    return features * (scores >= compute_threshold(scores, percentile))


def blur_to_grid(images: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Blur images (N, 3, H, W) to the detail a grid (h, w) can hold: a Gaussian, sigma (H / h, W / w), with reflected borders."""
    for axis, cells in ((2, grid[0]), (3, grid[1])):
        sigma = images.shape[axis] / cells
        radius = min(int(2 * sigma) // 2, images.shape[axis] - 1)  # reflection reaches no further
        if radius == 0:
            continue
        kernel = torch.exp(-torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype).square() / (2 * sigma**2))
        kernel = kernel / kernel.sum()
        pad = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        weight = (kernel.view(1, 1, -1, 1) if axis == 2 else kernel.view(1, 1, 1, -1)).expand(images.shape[1], 1, -1, -1)
        images = F.conv2d(F.pad(images, pad, mode="reflect"), weight, groups=images.shape[1])
    return images
