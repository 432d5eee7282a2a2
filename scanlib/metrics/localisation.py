"""Localisation metrics: is the map on the object? They compare a map with the object's mask or its bounding box.

compute_energy_inside(maps, masks)                                          # (N,) each
compute_peak_inside(maps, make_box_masks(boxes, size=(224, 224)))
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scanlib.explainers.base import validate_maps


def make_box_masks(boxes: Tensor | Sequence, size: tuple[int, int]) -> Tensor:
    """Convert boxes (N, 4) to masks (N, H, W) bool. A pixel is inside if its middle is.

    A box is x0, y0, x1, y1 in pixels; x1 and y1 are exclusive. Parts outside the image are cut off. A list of (k, 4) gives each
    image the union of its k boxes. Raises ValueError for another shape, and for an image without a pixel inside its boxes.
    """
    if not isinstance(boxes, Tensor) and any(torch.as_tensor(each).ndim == 2 for each in boxes):
        masks = torch.stack([_rasterize_boxes(torch.as_tensor(each), size).any(0) for each in boxes])
    else:
        masks = _rasterize_boxes(torch.as_tensor(boxes), size)
    if empty := (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist():
        index, box = empty[0], torch.as_tensor(boxes[empty[0]]).tolist()
        raise ValueError(f"boxes must be x0, y0, x1, y1 inside the image of {size[0]} x {size[1]}, got {box} for image {index}")
    return masks


def _rasterize_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert boxes (k, 4) to one mask each, (k, H, W) bool."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4) with x0, y0, x1, y1 in pixels, got {tuple(boxes.shape)}")
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)  # (k, 1) each
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    return ((y0 <= y) & (y < y1))[:, :, None] & ((x0 <= x) & (x < x1))[:, None]


def validate_masks(masks: Tensor) -> Tensor:
    """Return masks (N, H, W) as bool. Raises ValueError for another number of axes and for an empty mask."""
    if masks.ndim != 3:
        raise ValueError(f"masks must be (N, H, W) bool, got shape {tuple(masks.shape)}; make_box_masks makes them from boxes")
    if empty := (masks <= 0).flatten(1).all(1).nonzero()[:, 0].tolist():
        raise ValueError(f"masks must not be empty, got no pixel in masks {empty[:5]} of {len(masks)}; leave these images out")
    return masks > 0


def _validate_pair(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Check both; return the maps at the masks' size, and the masks on the maps' device."""
    masks = validate_masks(masks).to(maps.device)
    return validate_maps(maps, len(masks), masks.shape[1:]), masks


def compute_energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the share of each map's sum inside its mask, (N,) in [0, 1] (energy-based pointing game, Score-CAM 2020).

    maps: (N, H, W), 0 or more; an empty map gives 0. masks: (N, H, W) bool. With boxes as masks this is SCOUTER's "precision".
    """
    maps, masks = _validate_pair(maps, masks)
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)


def compute_peak_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the pointing game (Zhang et al. 2016), (N,): 1 if the map's peak is inside its mask, else 0; for ties the share."""
    maps, masks = _validate_pair(maps, masks)
    peaks = maps == maps.amax((1, 2), keepdim=True)
    return (peaks & masks).sum((1, 2)) / peaks.sum((1, 2))


def rank_pixels(maps: Tensor, seed: int = 0) -> Tensor:
    """Return the indices of each flattened map (N, ...) from highest to lowest, (N, P) int64; ties in a seeded random order."""
    flat = maps.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(seed)).to(flat.device)
    return shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]


def compute_iou(maps: Tensor, masks: Tensor, seed: int = 0) -> Tensor:
    """Compute the intersection over union of each mask and as many of the map's highest pixels (``rank_pixels``), (N,)."""
    maps, masks = _validate_pair(maps, masks)
    inside = masks.flatten(1).gather(1, rank_pixels(maps, seed))
    area = inside.sum(1)
    hits = (inside & (torch.arange(inside.shape[1], device=maps.device) < area[:, None])).sum(1)
    return hits / (2 * area - hits)
