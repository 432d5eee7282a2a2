"""Figures for the map itself: how much it covers, whether it dithers, whether it stands by what it said.

compute_complexity(maps)                                        # (N,) each
compute_coherency(explainer, images, maps, target)
compute_arcc(complexity, coherency, road_combined), compute_adcc(complexity, coherency, drop)

Poppi et al., "Revisiting the Evaluation of Class Activation Mapping for Explainability", CVPRW 2021 (ADCC); ARCC has
ROAD in place of the drop.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanlib.explainers.base import validate_maps


def compute_complexity(maps: Tensor) -> Tensor:
    """The mean of each map (N, H, W) in [0, 1], (N,): how much of the picture it takes; low is good. SCOUTER's "area"."""
    return validate_maps(maps, len(maps), maps.shape[1:]).abs().mean((1, 2))


def compute_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of maps (N, ...) with maps (N, ...), (N,) in [-1, 1]; 0 where one is constant."""
    a, b = (x.flatten(1) for x in (a, b))
    constant = (a.amax(1) == a.amin(1)) | (b.amax(1) == b.amin(1))
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return torch.where(constant, 0, (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny))


def compute_coherency(explainer: Callable, images: Tensor, maps: Tensor, target=None) -> Tensor:
    """How alike the map is to that of the picture dimmed by it: (Pearson's correlation + 1) / 2, (N,) in [0, 1]; high is good."""
    maps = validate_maps(maps, len(images), images.shape[2:]).to(images.device)
    again = validate_maps(explainer(images * maps[:, None], target).detach(), len(images), images.shape[2:]).to(images.device)
    return (compute_correlation(again, maps) + 1) / 2


def compute_arcc(complexity: Tensor, coherency: Tensor, road: Tensor) -> Tensor:
    """Harmonic mean of coherency, 1 - complexity and twice ROAD's combined figure cut to [0, 1], (N,); high is good."""
    return _harmonic(coherency, 1 - complexity, (2 * road).clamp(0, 1))


def compute_adcc(complexity: Tensor, coherency: Tensor, drop: Tensor) -> Tensor:
    """Harmonic mean of coherency, 1 - complexity and 1 - drop, the drop in %, (N,); high is good."""
    return _harmonic(coherency, 1 - complexity, 1 - drop / 100)


def _harmonic(*parts: Tensor) -> Tensor:
    return len(parts) / sum(1 / part.clamp_min(1e-8) for part in parts)


def compute_checkerboard(maps: Tensor, period: int = 2) -> Tensor:
    """Dithering: share of each map's variance that repeats every ``period`` pixels, across or down; (N, H, W) -> (N,) in [0, 1].

    1 for a checkerboard at period 2 (the Nyquist frequency), near 0 for a smooth map. A decoder that doubles its grid n times
    can leave patterns of 2, 4, ..., 2**n of its own pixels. Raises ValueError when the period does not divide both sides.
    """
    height, width = maps.shape[1:]
    if period < 2 or height % period or width % period:
        raise ValueError(f"period {period} does not divide a map of {height} x {width}; take one that does, 2 or more")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    power = torch.fft.fft2(maps - maps.mean((1, 2), keepdim=True)).abs().square()
    down, across = (torch.arange(side, device=maps.device) * period % side == 0 for side in (height, width))
    down, across = down & (torch.arange(height, device=maps.device) > 0), across & (torch.arange(width, device=maps.device) > 0)
    waves = (power * (down[:, None] | across)).sum((1, 2))
    return waves / power.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
