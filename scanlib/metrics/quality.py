"""Metrics of the map itself: how much of the image it covers, its checkerboard artefacts, its coherency.

    compute_complexity(maps)                                                    # (N,) each
    compute_coherency(explainer, images, maps, target)
    compute_arcc(complexity, coherency, road), compute_adcc(complexity, coherency, drop)

Poppi et al., "Revisiting the Evaluation of Class Activation Mapping for Explainability", CVPRW 2021 (ADCC).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanlib.explainers.base import at_least_float32, validate_maps
from scanlib.targets import Target

ExplainerFunction = Callable[[Tensor, Target], Tensor]  # images (N, 3, H, W) in [0, 255] and target -> maps (N, H, W)


def run_explainer(explainer: ExplainerFunction, images: Tensor, target: Target = None) -> Tensor:
    """Call ``explainer(images, target)`` and return its maps, detached. Raises TypeError if these are not a tensor."""
    maps = explainer(images, target) if callable(explainer) else None
    if not isinstance(maps, Tensor):
        returned = f"{type(maps).__name__} from {type(explainer).__name__}" if callable(explainer) else type(explainer).__name__
        raise TypeError(f"explainer must return maps (N, H, W), got {returned}; for a SCAN pass scanner.as_explainer()")
    return maps.detach()


def compute_complexity(maps: Tensor) -> Tensor:
    """Compute the mean of each map (N, H, W) in [0, 1], (N,): the share of the image it covers; low is good. SCOUTER's "area"."""
    return validate_maps(maps, len(maps), maps.shape[1:]).abs().mean((1, 2))


def find_constant_maps(maps: Tensor) -> Tensor:
    """Return which maps (N, ...) have the same value everywhere, (N,) bool."""
    return maps.flatten(1).amax(1) == maps.flatten(1).amin(1)


def compute_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Compute Pearson's correlation of maps (N, ...) with maps (N, ...), (N,) in [-1, 1]; 0 where one is constant."""
    a, b = (x.flatten(1) for x in (a, b))
    constant = find_constant_maps(a) | find_constant_maps(b)
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return torch.where(constant, 0, (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny))


def compute_coherency(explainer: ExplainerFunction, images: Tensor, maps: Tensor, target: Target = None) -> Tensor:
    """Compute how similar the map stays for the image multiplied by it: (correlation + 1) / 2, (N,) in [0, 1]; high is good.

    images: (N, 3, H, W) in [0, 255]. maps: (N, H, W) in [0, 1], the explainer's for these images and target.
    """
    maps = validate_maps(maps, len(images), images.shape[2:]).to(images.device)
    dimmed = run_explainer(explainer, images * maps[:, None], target)
    return (compute_correlation(validate_maps(dimmed, len(images), images.shape[2:]).to(images.device), maps) + 1) / 2


def compute_arcc(complexity: Tensor, coherency: Tensor, road: Tensor) -> Tensor:
    """Compute ADCC with ROAD instead of the drop: its third part is twice ROAD clamped to [0, 1], (N,); high is good."""
    return _compute_harmonic_mean(coherency, 1 - complexity, (2 * road).clamp(0, 1))


def compute_adcc(complexity: Tensor, coherency: Tensor, drop: Tensor) -> Tensor:
    """Compute the harmonic mean of coherency, 1 - complexity and 1 - drop / 100 (drop in %), (N,); high is good."""
    return _compute_harmonic_mean(coherency, 1 - complexity, 1 - drop / 100)


def _compute_harmonic_mean(*parts: Tensor) -> Tensor:
    return len(parts) / sum((1 / part.clamp_min(1e-8) for part in parts), torch.zeros((), device=parts[0].device))


def compute_checkerboard(maps: Tensor, period: int = 2) -> Tensor:
    """Compute the share of each map's variance that repeats every ``period`` pixels, across or down: (N, H, W) -> (N,) in [0, 1].

    1 for a checkerboard at period 2 (the Nyquist frequency), near 0 for a smooth map. A decoder that doubles its grid n times
    can leave patterns of 2, 4, ..., 2**n of its own pixels. Raises ValueError if the period does not divide both sides.
    """
    height, width = maps.shape[1:]
    if period < 2 or height % period or width % period:
        raise ValueError(f"period must be at least 2 and divide both sides of the {height} x {width} maps, got {period}")
    maps = at_least_float32(maps)
    power = torch.fft.fft2(maps - maps.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.arange(side, device=maps.device) for side in (height, width))
    repeats_down, repeats_across = (rows > 0) & (rows * period % height == 0), (columns > 0) & (columns * period % width == 0)
    waves = (power * (repeats_down[:, None] | repeats_across)).sum((1, 2))
    return waves / power.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
