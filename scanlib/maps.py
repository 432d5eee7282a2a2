"""What every explainer does last: bring its raw map to the picture's size and to [0, 1].

maps = stretched(raw, size=images.shape[-2:])       # (B, h, w) -> (B, H, W)
"""

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
