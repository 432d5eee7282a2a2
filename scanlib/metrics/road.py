"""ROAD: remove, and debias. What was removed is filled in from around it, so that the hole itself tells the model little.

morf, lerf = compute_road(score, images, maps)                  # (N, 9) each: most, least relevant first; change of the score
combined = (lerf - morf).mean(1) / 2                    # (N,), high is good
pictures = impute(images, removed)                      # (N, 3, H, W); each removed pixel the weighted mean of its neighbours

Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022. Every removed pixel is to
equal the mean of its eight neighbours, 1/6 for each beside it and 1/12 for each across a corner: D x = W x, as many equations as
removed pixels. Solved on tensors by conjugate gradients, preconditioned by one multigrid cycle, all pictures and steps at once.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlib.explainers.base import validate_maps
from scanlib.metrics.removal import ScoreFunction, rank_locations, score_removals

WEIGHTS = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]) / 12
PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)


def _around(x: Tensor) -> Tensor:
    """W x: the weighted sum over each pixel's neighbours, (C, N, H, W) -> the same. Pictures stand where channels do: quick."""
    return F.conv2d(x, WEIGHTS.to(x).expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def _halved(x: Tensor) -> Tensor:
    """Sums over squares of 2 x 2."""
    return F.avg_pool2d(x, 2, ceil_mode=True, divisor_override=1)


def _doubled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, by two, cut to size."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]


class _Grid(NamedTuple):
    """A grid of the multigrid cycle: what is unknown on it (1, N, h, w) in {0, 1}, and the diagonal D."""

    unknown: Tensor
    diagonal: Tensor


def _grids(unknown: Tensor) -> list[_Grid]:
    """From the picture's grid down to one of at most 4 x 4.

    A coarse cell is unknown where any of its four is. What its pixels draw from known ones adds to its diagonal, at most 4.
    """
    grids, drawn = [], torch.zeros_like(unknown)
    while True:
        inside = _around(torch.ones_like(unknown[:, :1]))  # less than 1 at the picture's edge, where neighbours are missing
        grids.append(_Grid(unknown, inside + drawn))
        if max(unknown.shape[-2:]) <= 4:
            return grids
        drawn = _halved(unknown * (drawn + inside - _around(unknown)))
        drawn = drawn / (1 + drawn / 4)
        unknown = (_halved(unknown) > 0).to(unknown.dtype)


def _cycle(residual: Tensor, grids: list[_Grid]) -> Tensor:
    """About (D - W)^-1 residual: average over the neighbours, correct by what the next coarser grid finds, average again."""
    unknown, diagonal = grids[0]
    weight = unknown / diagonal
    x = first = weight * residual
    if len(grids) == 1:
        for _ in range(8):
            x = torch.addcmul(first, weight, _around(x))
        return x
    left = unknown * _around(x)  # what x leaves of the residual: D x is all of it
    x = torch.addcmul(x, unknown, _doubled(_cycle(_halved(left), grids[1:]), x.shape[-2:]))
    return torch.addcmul(first, weight, _around(x))


def _guess(known: Tensor, unknown: Tensor, depth: int) -> Tensor:
    """Unknown pixels from the means of the known ones in the smallest square that has any."""
    sums, counts = [known], [1 - unknown]
    for _ in range(depth):
        sums, counts = [*sums, _halved(sums[-1])], [*counts, _halved(counts[-1])]
    x = sums[-1].sum((2, 3), keepdim=True) / counts[-1].sum((2, 3), keepdim=True).clamp_min(1)
    x = x.expand_as(sums[-1])
    for total, count in zip(reversed(sums), reversed(counts), strict=True):
        x = x if x.shape == total.shape else _doubled(x, total.shape[-2:])
        x = torch.where(count > 0, total / count.clamp_min(1), x)
    return x


@torch.no_grad()
def impute(images: Tensor, removed: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Pictures whose removed pixels are each the weighted mean of their eight neighbours.

    Args:
        images: (N, C, H, W), floating. removed: (N, H, W) bool.
        tolerance: the largest error, about, as a share of the largest value.

    A picture with nothing left comes back zero. Raises ValueError for another shape.
    """
    if removed.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"removed has shape {tuple(removed.shape)}; for these images it must be {(len(images), *images.shape[2:])}"
        )
    if not len(images):
        return images.clone()
    unknown = removed.to(images.dtype)[None].contiguous(memory_format=torch.channels_last)  # (1, N, H, W)
    known = images.transpose(0, 1).contiguous(memory_format=torch.channels_last) * (1 - unknown)  # (C, N, H, W)
    limit = tolerance * float(images.abs().max())
    grids = _grids(unknown)
    own, floor = unknown * grids[0].diagonal, torch.finfo(images.dtype).tiny ** 0.5  # a divisor, never zero

    x = _guess(known, unknown, len(grids) - 1)
    residual, step, old_residual, old_slope = unknown * _around(x) - own * x, None, None, None
    for _ in range(100):
        error = _cycle(residual, grids)  # about what x still lacks
        slope, largest = _dot(error, residual), _largest(error)
        moving = (largest > limit) & (slope > 0)  # a plane that is solved, or down to rounding, stands still from now on
        if not moving.any():
            break
        # Polak and Ribiere's direction: the cycle is not quite symmetric
        step = error if step is None else torch.addcmul(error, (slope - _dot(error, old_residual)) / old_slope, step)
        image = torch.addcmul(own * step, unknown, _around(step), value=-1)
        length = torch.where(moving, slope / _dot(step, image).clamp_min(floor), 0)
        old_residual, old_slope = residual, slope.clamp_min(floor)
        x, residual = x.addcmul_(length, step), torch.addcmul(residual, length, image, value=-1)
    if float(largest.max()) > limit:
        warnings.warn(f"imputation stops {float(largest.max()):.1e} from the solution, asked for {limit:.1e}", stacklevel=2)
    return x.transpose(0, 1).contiguous()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3), keepdim=True)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x.abs(), 16, ceil_mode=True).amax((2, 3), keepdim=True)  # pooling first is quicker by far


def fill_imputed(images: Tensor, noise: float = 0.01, seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    """ROAD's filling as ``removal_curves`` takes it, ``fill=imputed``: ``impute``, plus normal noise of ``noise`` times 255.

    One seeded draw of noise serves all pictures, so that all maps meet the same.
    """
    drawn = 255 * noise * torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed)).to(images)

    def put(which: Tensor, removed: Tensor) -> Tensor:
        return impute(images[which], removed) + drawn * removed[:, None]

    return put


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
    """ROAD's two curves, most and least relevant first, (N, K) each: the change of the score with all but some % filled in.

    Their mean over dim 1 is ROAD's average; (least - most) / 2 averaged is "combined", high is good. Arguments as in
    ``removal_curves``; ``percentiles`` are what is kept, in (0, 100). Kept are the ranks that a percentile threshold keeps of a
    map without ties; ties fall in a seeded random order, where a threshold would take them all or none.
    """
    if not all(0 < p < 100 for p in percentiles):
        raise ValueError(f"percentiles {list(percentiles)} must lie between 0 and 100: how much of the picture is kept")
    place, total = rank_locations(validate_maps(maps, len(images), images.shape[2:]).to(images.device), patch, seed)
    kept = torch.tensor([math.ceil(p * (total - 1) / 100) for p in percentiles], device=images.device)
    steps = len(kept)

    def removed(which: Tensor, at: Tensor) -> Tensor:  # K steps most relevant first, K least, one with nothing gone
        keep, here = kept[at % steps][:, None, None], place[which]
        gone = torch.where((at < steps)[:, None, None], here < total - keep, here >= keep)
        return gone & (at < 2 * steps)[:, None, None]

    scores = score_removals(score, images, removed, lambda x: fill_imputed(x, noise, seed), 2 * steps + 1, batch_size)
    change = scores[:, :-1] - scores[:, -1:]
    return change[:, :steps], change[:, steps:]
