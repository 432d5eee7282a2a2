"""Does the map lie on the object? Against its mask, or the box drawn around it.

compute_energy_inside(maps, masks)                                          # (N,) each
compute_peak_inside(maps, make_box_masks(boxes, size=(224, 224)))
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scanlib.explainers.base import validate_maps


def make_box_masks(boxes: Tensor | Sequence, size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) as x0, y0, x1, y1 in pixels, x1 and y1 past the last one -> masks (N, H, W) bool.

    What lies outside the picture is cut off. A list of (k, 4) gives each picture the union of its k boxes.

    Raises ValueError for a picture whose boxes hold no pixel of it.
    """
    several = not isinstance(boxes, Tensor) and any(torch.as_tensor(each).ndim == 2 for each in boxes)
    if several:
        masks = torch.stack([_inside(torch.as_tensor(each), size).any(0) for each in boxes])
    else:
        masks = _inside(torch.as_tensor(boxes), size)
    empty = (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist()
    if empty:
        box = torch.as_tensor(boxes[empty[0]]).tolist()
        raise ValueError(f"box {empty[0]}, {box}, holds no pixel of a picture of {size[0]} x {size[1]}; give x0, y0, x1, y1")
    return masks


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """(k, 4) -> (k, H, W): is the middle of the pixel in the box?"""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes have shape {tuple(boxes.shape)}; give (N, 4): x0, y0, x1, y1 in pixels")
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # (k, 1) each
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]


def validate_masks(masks: Tensor) -> Tensor:
    """(N, H, W), bool, with something in each; else ValueError."""
    if masks.ndim != 3:
        raise ValueError(f"masks have shape {tuple(masks.shape)}; give (N, H, W) bool, as box_masks makes of boxes")
    empty = (masks <= 0).flatten(1).all(1).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(f"masks {empty[:5]} of {len(masks)} are empty: nothing to be inside of; leave these pictures out")
    return masks > 0


def _pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Both checked, maps at the masks' size."""
    masks = validate_masks(masks).to(maps.device)
    return validate_maps(maps, len(masks), masks.shape[1:]), masks


def compute_energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share of each map's mass inside its mask, (N,) in [0, 1]; maps (N, H, W) >= 0, masks (N, H, W) bool (Score-CAM, 2020).

    SCOUTER's "precision", with the object's box for a mask. An empty map gives 0.
    """
    maps, masks = _pair(maps, masks)
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)


def compute_peak_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Pointing game (Zhang et al. 2016): is the peak inside the mask? (N,) in [0, 1]; tied peaks count by their share inside."""
    maps, masks = _pair(maps, masks)
    peaks = maps == maps.amax((1, 2), keepdim=True)
    return (peaks & masks).sum((1, 2)) / peaks.sum((1, 2))


def rank_pixels(maps: Tensor, seed: int = 0) -> Tensor:
    """Positions of each flattened map (N, ...) from highest to lowest, (N, P) int64; ties in a seeded random order."""
    flat = maps.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    return shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]


def compute_iou(maps: Tensor, masks: Tensor, seed: int = 0) -> Tensor:
    """Overlap of the mask with the map's top pixels, as many as the mask has, as intersection over union, (N,). By rank."""
    maps, masks = _pair(maps, masks)
    inside = masks.flatten(1).gather(1, rank_pixels(maps, seed))
    area = inside.sum(1)
    hits = (inside & (torch.arange(inside.shape[1], device=maps.device) < area[:, None])).sum(1)
    return hits / (2 * area - hits)
