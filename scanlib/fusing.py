"""Maps of several layers become one, by a function of their list.

maps = fused([coarse, fine], FUSE["product"])       # (N, h, w) of any sizes -> (N, h, w) at the finest's
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scanlib.maps import resized, unit_range


def fused(maps: Sequence[Tensor], fuse: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Each layer's map (N, h, w), resized to the finest -> one; a single one stays as it is."""
    if len(maps) == 1:
        return maps[0]
    finest = max((layer.shape[1:] for layer in maps), key=lambda grid: grid.numel())
    return fuse([resized(layer, finest) for layer in maps])


def mean_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their mean."""
    return torch.stack([unit_range(layer.relu()) for layer in maps]).mean(0)


def max_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their maximum."""
    return torch.stack([unit_range(layer.relu()) for layer in maps]).amax(0)


def product_of_maps(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their product: what all layers agree on."""
    return torch.stack([unit_range(layer.relu()) for layer in maps]).prod(0)


def max_of_tanh(maps: Sequence[Tensor]) -> Tensor:
    """Layer-CAM's fusion (Jiang et al. 2021, Eqs. 7-8): tanh(2 M / max M), then the maximum."""
    peaks = [M.amax(tuple(range(1, M.ndim)), keepdim=True).clamp_min(1e-12) for M in maps]
    return torch.stack([(2 * M / peak).tanh() for M, peak in zip(maps, peaks, strict=True)]).amax(0)


FUSE = {"mean": mean_of_maps, "max": max_of_maps, "product": product_of_maps, "tanh": max_of_tanh}
