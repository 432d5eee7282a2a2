"""Class specificity: does the map answer for the class that was asked?

For images with two known objects, one of whose classes is asked:

    energy in other      the share of the map on the other object                                       low is good
    asked denser         1 if the map is denser on the asked object than on the other                   high is good
    other correlation    the correlation of the map with that of the other object's class               low is good

For a class that is not in the image:

    absent energy        the share of its map on the object                                             low is good
    absent correlation   the correlation of its map with that of the class that is there                low is good

    compare(model, images, explainers, masks=masks, target=labels, other_masks=other_masks, other_classes=other_labels,
            absent_classes=draw_absent_classes(torch.stack([labels, other_labels], 1), classes=10))

``compute_energy_inside`` computes the shares. The last one is the Random-Logit test (Sixt et al., "When Explanations Lie", ICML
2020), with Pearson's correlation as the similarity.
"""

import torch
from torch import Tensor

from scanlib.explainers.base import validate_maps
from scanlib.metrics.localisation import validate_masks
from scanlib.metrics.quality import compute_correlation, find_constant_maps


def compute_density(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the mean of each map (N, H, W) inside its mask (N, H, W) bool, (N,)."""
    masks = validate_masks(masks).to(maps.device)
    maps = validate_maps(maps, len(masks), masks.shape[1:])
    return (maps * masks).sum((1, 2)) / masks.sum((1, 2))


def compute_asked_denser(maps: Tensor, masks: Tensor, other_masks: Tensor) -> Tensor:
    """Compute whether each map is denser inside ``masks`` than inside ``other_masks``, (N,): 1, 0, or 0.5 for a tie.

    maps: (N, H, W) of the class of the object in ``masks``. Both masks: (N, H, W) bool. A random map has 0.5 on average.
    """
    asked, other = compute_density(maps, masks), compute_density(maps, other_masks)
    return (asked > other).to(asked.dtype) + 0.5 * (asked == other)


def compute_class_correlation(maps: Tensor, other_maps: Tensor) -> Tensor:
    """Compute Pearson's correlation of the maps (N, H, W) of two classes, (N,) in [-1, 1]; nan where one map is constant."""
    maps = validate_maps(maps, len(maps), maps.shape[1:])
    other_maps = validate_maps(other_maps, len(maps), maps.shape[1:]).to(maps)
    constant = find_constant_maps(maps) | find_constant_maps(other_maps)
    return compute_correlation(maps, other_maps).masked_fill(constant, torch.nan)


def draw_absent_classes(labels: Tensor, classes: int, seed: int = 0) -> Tensor:
    """Draw for each image a class that is not in it, (N,) int64.

    labels: the classes that are in it, (N,) or (N, k) int. classes: the number of classes. Raises ValueError if all are there.
    """
    present = torch.as_tensor(labels).view(len(labels), -1)
    chances = torch.rand(len(present), classes, generator=torch.Generator().manual_seed(seed), device="cpu").to(present.device)
    if present.numel() and not 0 <= int(present.min()) <= int(present.max()) < classes:
        raise ValueError(f"labels must be from 0 to {classes - 1}, got {int(present.min())} to {int(present.max())}")
    chances = chances.scatter(1, present, -1.0)
    if full := (chances < 0).all(1).nonzero()[:, 0].tolist():
        raise ValueError(f"labels must leave out a class, got all {classes} classes for image {full[0]}")
    return chances.argmax(1)
