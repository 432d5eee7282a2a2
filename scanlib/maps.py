"""What every explainer does last, bring its raw map to the picture's size and to [0, 1]; what every metric does first.

maps = stretched(raw, size=images.shape[-2:])       # (B, h, w) -> (B, H, W)
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of axes


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), bilinearly; signals (B, l) and volumes (B, d, h, w) likewise."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode=INTERPOLATION[maps.ndim - 1], align_corners=False)[:, 0]


def unit_range(maps: Tensor) -> Tensor:
    """Each map (B, ...) stretched to [0, 1]; a constant map becomes 0."""
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def stretched(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), resized bilinearly and stretched to [0, 1] each; a constant map becomes 0."""
    return unit_range(resized(maps, size))


def fitting(maps: Tensor, count: int, size: Sequence[int]) -> Tensor:
    """Maps to measure, (N, h, w) of any dtype -> (N, H, W) in single precision or better.

    Maps of another size than the pictures' are resized, and a warning says so. Raises ValueError for another count, NaN or
    infinity.
    """
    if maps.ndim != 3 or len(maps) != count:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; for these images it must be {(count, *size)}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    broken = (~maps.isfinite()).any((1, 2)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"maps {broken[:5]} of {count} hold NaN or infinite values; leave them out, or find out why")
    if tuple(maps.shape[1:]) != tuple(size):
        warnings.warn(f"maps of {tuple(maps.shape[1:])} are resized to the pictures' {tuple(size)}", stacklevel=3)
    return resized(maps, size)
