"""ROAD (remove and debias): removed pixels are imputed from their surroundings, so that the hole itself tells the model little.

    morf, lerf = compute_road(score, images, maps)          # most, least relevant first: (N, 9) each, change of the score
    combined = (lerf - morf).mean(1) / 2                    # (N,), high is good; morf.mean(1) is ROAD's average
    imputed = impute(images, removed)                       # (N, 3, H, W)

Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022. Each removed pixel x becomes
the weighted mean of its eight neighbours, with weight 1/6 for the direct ones and 1/12 for the diagonal ones: D x = W x, one
equation per removed pixel. All images and steps are solved at once by conjugate gradients, preconditioned by a multigrid cycle.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlib.explainers.base import validate_maps
from scanlib.metrics.removal import ScoreFunction, rank_locations, score_removals

WEIGHTS = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def _sum_neighbours(x: Tensor) -> Tensor:
    """Compute W x, (C, N, H, W) -> the same shape; images are on the channel axis, where the convolution is faster."""
    return F.conv2d(x, WEIGHTS.to(x).expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def _pool_sums(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=1)


def _upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]


def _build_grids(unknown: Tensor, known_weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the unknown pixels (1, N, h, w) in {0, 1} and the diagonal D of each grid, from this one to at most 4 x 4.

    A coarse cell is unknown if any of its four cells is. The weights of their known neighbours add to its diagonal, at most 4.
    """
    inside = _sum_neighbours(torch.ones_like(unknown[:, :1]))  # below 1 at the image's edge, where neighbours are missing
    grid = (unknown, inside + known_weight)
    if max(unknown.shape[-2:]) <= 4:
        return [grid]
    weight = _pool_sums(unknown * (known_weight + inside - _sum_neighbours(unknown)))
    return [grid, *_build_grids((_pool_sums(unknown) > 0).to(unknown.dtype), weight / (1 + weight / 4))]


def _run_cycle(residual: Tensor, grids: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Approximate (D - W)^-1 residual: smooth, add the next coarser grid's correction, smooth again."""
    unknown, diagonal = grids[0]
    weight = unknown / diagonal
    x = first = weight * residual
    if len(grids) == 1:
        for _ in range(8):
            x = torch.addcmul(first, weight, _sum_neighbours(x))
        return x
    remaining = unknown * _sum_neighbours(x)  # the residual after x, because D x = residual
    x = torch.addcmul(x, unknown, _upsample(_run_cycle(_pool_sums(remaining), grids[1:]), x.shape[-2:]))
    return torch.addcmul(first, weight, _sum_neighbours(x))


def _initialize(sums: Tensor, counts: Tensor) -> Tensor:
    """Return each cell's mean, from the sums and counts of its known pixels; without any, that of the next coarser grid."""
    if max(sums.shape[-2:]) <= 4:
        x = sums.sum((2, 3), keepdim=True) / counts.sum((2, 3), keepdim=True).clamp_min(1)
    else:
        x = _upsample(_initialize(_pool_sums(sums), _pool_sums(counts)), sums.shape[-2:])
    return torch.where(counts > 0, sums / counts.clamp_min(1), x)


@torch.no_grad()
def impute(images: Tensor, removed: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Replace each removed pixel by the weighted mean of its eight neighbours.

    Args:
        images: (N, C, H, W), floating. removed: (N, H, W) bool.
        tolerance: approximate largest error, as a share of the images' largest value. A warning says if it is not reached.

    Returns images (N, C, H, W); an image without remaining pixels becomes zero. Raises ValueError for another shape of removed.
    """
    expected = (len(images), *images.shape[2:])
    if removed.shape != expected:
        raise ValueError(f"removed must have shape {expected} for these images, got {tuple(removed.shape)}")
    if not len(images):
        return images.clone()
    unknown = removed.to(images.dtype)[None].contiguous(memory_format=torch.channels_last)  # (1, N, H, W)
    known = images.transpose(0, 1).contiguous(memory_format=torch.channels_last) * (1 - unknown)  # (C, N, H, W)
    limit = tolerance * float(images.abs().max())
    grids = _build_grids(unknown, torch.zeros_like(unknown))
    diagonal, tiny = unknown * grids[0][1], torch.finfo(images.dtype).tiny ** 0.5

    x = _initialize(known, 1 - unknown)
    residual = old_residual = unknown * _sum_neighbours(x) - diagonal * x
    step, old_slope = torch.zeros_like(x), torch.ones_like(x[..., :1, :1])
    for _ in range(100):
        error = _run_cycle(residual, grids)  # approximate error of x
        slope = _compute_dot(error, residual)
        largest = F.max_pool2d(error.abs(), 16, ceil_mode=True).amax((2, 3), keepdim=True)  # much faster than amax alone
        active = (largest > limit) & (slope > 0)  # an image that is solved, or exact up to rounding, is not updated again
        if not active.any():
            break
        # Polak and Ribiere's direction, because the cycle is not exactly symmetric
        step = torch.addcmul(error, (slope - _compute_dot(error, old_residual)) / old_slope, step)
        change = torch.addcmul(diagonal * step, unknown, _sum_neighbours(step), value=-1)
        length = torch.where(active, slope / _compute_dot(step, change).clamp_min(tiny), 0)
        old_residual, old_slope = residual, slope.clamp_min(tiny)
        x, residual = x.addcmul_(length, step), torch.addcmul(residual, length, change, value=-1)
    if float(largest.max()) > limit:
        warnings.warn(f"imputation stopped at an error of {float(largest.max()):.1e}, above {limit:.1e}", stacklevel=2)
    return x.transpose(0, 1).contiguous()


def _compute_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def fill_imputed(images: Tensor, noise: float = 0.01, seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """Fill as ROAD does, for ``compute_removal_curves(..., fill=fill_imputed)``: ``impute`` plus normal noise of ``noise`` * 255.

    The noise is drawn once, with the seed, and is the same for all images and maps.
    """
    drawn = 255 * noise * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed), device="cpu").to(images)
    return lambda index, removed: impute(images[index], removed) + drawn * removed[:, None]


def compute_road(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    percentiles: Sequence[float] = PERCENTILES,
    *,
    noise: float = 0.01,
    patch: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute ROAD's curves, most and least relevant first, (N, K) each: the change of the score with imputed pixels.

    percentiles: the K shares of the image that are kept, in (0, 100). Each keeps as many locations as a threshold does for a map
    without ties. The other arguments are those of ``compute_removal_curves``. Raises ValueError for a percentile out of range.
    """
    if not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles must be between 0 and 100, the share of the image that is kept, got {list(percentiles)}")
    ranks, total = rank_locations(validate_maps(maps, len(images), images.shape[2:]).to(images.device), patch, seed)
    kept = torch.tensor([math.ceil(p * (total - 1) / 100) for p in percentiles], device=images.device)
    steps = len(kept)

    def select_removed(index: Tensor, step: Tensor) -> Tensor:  # K steps most relevant first, K least, one without removal
        keep, rank = kept[step % steps][:, None, None], ranks[index]
        removed = torch.where((step < steps)[:, None, None], rank < total - keep, rank >= keep)
        return removed & (step < 2 * steps)[:, None, None]

    scores = score_removals(score, images, select_removed, lambda x: fill_imputed(x, noise, seed), 2 * steps + 1, batch_size)
    change = scores[:, :-1] - scores[:, -1:]
    return change[:, :steps], change[:, steps:]
