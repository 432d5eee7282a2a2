"""Figures for heat maps: does the map lie on the object, and does the score follow the map?

Everything is batched, on the maps' device, and depends on ranks only where it says so. Two baselines belong in every table:
a random map and the centre prior.

    energy_inside(maps, masks).mean()
    deletion, insertion = removal_curves(score, images, maps)           # (N, steps + 1) each
    deletion.mean(1)                                                    # area under each curve
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Baseline: uniform noise, (count, H, W) in [0, 1]."""
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


def centre_maps(count: int, size: tuple[int, int]) -> Tensor:
    """Baseline: a Gaussian bump in the middle, sigma a quarter of each side, (count, H, W) in [0, 1]."""
    y, x = (torch.linspace(-2, 2, side) for side in size)
    return torch.exp(-(y[:, None] ** 2 + x**2) / 2).expand(count, *size)


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's mass inside its mask, (N,) in [0, 1]; maps (N, H, W) >= 0, masks (N, H, W) bool.

    An empty map gives 0.
    """
    total = maps.sum((1, 2))
    return (maps * masks).sum((1, 2)) / total.clamp_min(torch.finfo(maps.dtype).tiny)


def peak_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Pointing game: is the map's peak inside the mask? (N,) in [0, 1]; tied peaks count by their share inside."""
    peaks = maps == maps.amax((1, 2), keepdim=True)
    return (peaks & masks).sum((1, 2)) / peaks.sum((1, 2))


def _ranked(maps: Tensor, seed: int = 0) -> Tensor:
    """Positions of each flattened map from highest to lowest, (N, P); ties in a seeded random order."""
    flat = maps.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    return shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]


def iou_at_area(maps: Tensor, masks: Tensor, seed: int = 0) -> Tensor:
    """Overlap of the mask with the map's top pixels, as many as the mask has, as intersection over union, (N,). By rank."""
    inside = masks.flatten(1).gather(1, _ranked(maps, seed))
    area = inside.sum(1)
    hits = (inside & (torch.arange(inside.shape[1], device=maps.device) < area[:, None])).sum(1)
    return hits / (2 * area - hits).clamp_min(1)


def checkerboard(maps: Tensor, period: int = 2) -> Tensor:
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


def mean_colour(images: Tensor) -> Tensor:
    """Each picture's mean colour, everywhere: (N, 3, H, W)."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def blurred(images: Tensor, share: float = 0.25) -> Tensor:
    """Each picture with everything finer than ``share`` of its side gone: reduced by averaging, then resized."""
    height, width = images.shape[-2:]
    small = F.interpolate(images, size=(max(1, round(2 / share)),) * 2, mode="area")
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 255)


@torch.no_grad()
def removal_curves(
    score: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 10,
    patch: int = 1,
    fill: Callable[[Tensor], Tensor] = mean_colour,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Deletion and insertion curves (Petsiuk et al. 2018): the score as the map's highest places are removed, or put back.

    Args:
        score: images (B, 3, H, W) in [0, 255] and their indices (B,) -> the explained class's probability (B,).
        images, maps: (N, 3, H, W) and (N, H, W). patch: side of what is removed at once, in pixels; a patch counts by its mean.
        fill: what stands where something was removed: ``mean_colour``, ``blurred``, or any function of the images.

    Returns deletion and insertion, each (N, steps + 1): the score with 0, 1/steps, ..., all places removed (or put back). Their
    means over dim 1 are the areas: low is good for deletion, high for insertion. By rank: ties in a seeded random order.
    """
    count, _, height, width = images.shape
    if maps.shape != (count, height, width):
        raise ValueError(f"maps have shape {tuple(maps.shape)}; for these images it must be {(count, height, width)}")
    if height % patch or width % patch:
        raise ValueError(f"patch {patch} does not divide the picture's {height}x{width}")
    coarse = F.avg_pool2d(maps[:, None].float(), patch)[:, 0]
    places = coarse[0].numel()
    rank = torch.empty(count, places, dtype=torch.long, device=maps.device)
    rank.scatter_(1, _ranked(coarse, seed), torch.arange(places, device=maps.device).expand(count, -1))
    rank = rank.view(count, *coarse.shape[1:]).repeat_interleave(patch, 1).repeat_interleave(patch, 2)  # (N, H, W), 0 is highest
    filled = fill(images)
    limits = torch.linspace(0, places, steps + 1).round().to(maps.device)
    which, step = torch.meshgrid(torch.arange(count), torch.arange(steps + 1), indexing="ij")
    curves = []
    for keep_top in (False, True):
        values = []
        for i, s in zip(which.flatten().split(batch_size), step.flatten().split(batch_size), strict=True):
            top = rank[i] < limits[s.to(maps.device)][:, None, None]
            keep = top if keep_top else ~top
            values.append(score(torch.where(keep[:, None], images[i], filled[i]), i))
        curves.append(torch.cat(values).view(count, steps + 1))
    return curves[0], curves[1]


def class_score(model, preprocess, classes: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The ``score`` of removal_curves: softmax probability of each picture's class, ``classes`` (N,) int64."""

    def score(images: Tensor, index: Tensor) -> Tensor:
        chosen = classes[index.to(classes.device)]
        return model(preprocess(images)).softmax(1).gather(1, chosen[:, None].to(images.device))[:, 0]

    return score


def evaluate(
    maps: Tensor, masks: Tensor, images: Tensor, score: Callable[[Tensor, Tensor], Tensor], **options
) -> dict[str, float]:
    """The five figures of a table, each a mean over the pictures: energy inside, peak inside, IoU, deletion, insertion.

    score and options are removal_curves'.
    """
    deletion, insertion = removal_curves(score, images, maps, **options)
    figures = {"energy": energy_inside(maps, masks), "peak": peak_inside(maps, masks), "IoU": iou_at_area(maps, masks)}
    figures |= {"deletion": deletion, "insertion": insertion}
    return {name: float(values.float().mean()) for name, values in figures.items()}
