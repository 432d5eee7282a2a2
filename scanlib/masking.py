"""What SCAN's decoder is given, and what it shall make of it: masked features, and a picture without detail.

SCAN (arXiv 2603.06523), Eq. 1: with G the positive gradient at the layer, Q the P-th percentile of its positive entries,
masked features = F * [G >= Q], image by image. The target is the picture blurred to the layer's grid.

    scores = compute_mask_scores(features, gradient, "gradient")                        # (B, C, h, w)
    masked = features * (scores >= compute_threshold(scores, 95))
    target = blur_to_grid(images, grid=(8, 8)) / 127.5 - 1                      # (B, 3, H, W) in [-1, 1]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MASK_METHODS = ("gradient", "attribution", "position", "relevance")


def compute_threshold(scores: Tensor, percentile: Tensor | float) -> Tensor:
    """The P-th percentile of each image's positive entries, linearly interpolated, shaped (B, 1, ...) to compare with the scores.

    scores (B, ...); percentile a number or (B,) in 0..100. An image without a positive entry gives 0, which keeps everything.
    """
    flat = scores.flatten(1).sort(1).values  # the positive ones stand last
    positives = (flat > 0).sum(1)
    first = flat.shape[1] - positives
    percentile = torch.as_tensor(percentile, dtype=flat.dtype, device=flat.device).expand(len(flat))
    place = percentile / 100 * (positives - 1).clamp_min(0)
    below = (first + place.floor().long()).clamp_max(flat.shape[1] - 1)[:, None]
    above = (first + place.ceil().long()).clamp_max(flat.shape[1] - 1)[:, None]
    threshold = torch.lerp(flat.gather(1, below), flat.gather(1, above), (place - place.floor())[:, None])
    threshold = torch.where(positives[:, None] > 0, threshold, 0)
    return threshold.view(-1, *[1] * (scores.ndim - 1))


def compute_mask_scores(
    features: Tensor, gradient: Tensor, mask_by: str, channel_dim: int = 1, relevance: Tensor | None = None
) -> Tensor:
    """What the percentile ranks, shaped like the features.

    "gradient": relu(G), as published. "attribution": relu(G F). "position": that times the positive part of its sum over the
    channels, so that an entry counts where the place as a whole speaks for the class. "relevance": relu(G) times the place's
    attention relevance, which must be given, with one channel, so that it counts where the deciding token draws from; tokens
    that are no place have none, and are masked.
    """
    if mask_by == "gradient":
        return gradient.relu()
    if mask_by == "relevance":
        return gradient.relu() * relevance
    attribution = gradient * features
    if mask_by == "attribution":
        return attribution.relu()
    return attribution.relu() * attribution.sum(channel_dim, keepdim=True).relu()


def blur_to_grid(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """The picture a layer with this grid can know: Gaussian blur, sigma = picture / grid per axis, reflected edges.

    images (N, 3, H, W), any scale; same shape returned.
    """
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
