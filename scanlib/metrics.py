"""Every figure for heat maps in one place, and the two baselines that belong in every table: a random map and the centre prior.

localisation.py   energy_inside, peak_inside (pointing game), iou_at_area; box_masks
removal.py        removal_curves (deletion, insertion, negative), auc; mean_colour, blurred, black; class_score
road.py           road (most and least relevant first), impute, imputed
confidence.py     confidences, drop, increase, win
stability.py      infidelity, max_sensitivity
quality.py        complexity, coherency, arcc, adcc, checkerboard
sanity.py         parameter_randomisation, rank_correlation, ssim

All are batched, on the maps' device, one figure per picture; what depends on an order goes by rank, ties in a seeded random
order.
"""

import torch
from torch import Tensor

from scanlib.confidence import confidences, drop, increase, win
from scanlib.localisation import box_masks, energy_inside, iou_at_area, peak_inside, ranked
from scanlib.quality import adcc, arcc, checkerboard, coherency, complexity
from scanlib.removal import Score, auc, black, blurred, class_score, mean_colour, removal_curves
from scanlib.road import impute, imputed, road
from scanlib.sanity import parameter_randomisation, randomised, rank_correlation, ssim, stages_of
from scanlib.stability import infidelity, max_sensitivity

__all__ = [
    "Score",
    "adcc",
    "arcc",
    "area",
    "auc",
    "black",
    "blurred",
    "box_masks",
    "centre_maps",
    "checkerboard",
    "class_score",
    "coherency",
    "complexity",
    "confidences",
    "drop",
    "energy_inside",
    "evaluate",
    "impute",
    "imputed",
    "increase",
    "infidelity",
    "iou_at_area",
    "max_sensitivity",
    "mean_colour",
    "parameter_randomisation",
    "peak_inside",
    "precision",
    "random_maps",
    "randomised",
    "rank_correlation",
    "ranked",
    "removal_curves",
    "road",
    "ssim",
    "stages_of",
    "win",
]


area, precision = complexity, energy_inside  # by SCOUTER's names


def random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Baseline: uniform noise, (count, H, W) in [0, 1]."""
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed))


def centre_maps(count: int, size: tuple[int, int]) -> Tensor:
    """Baseline: a Gaussian bump in the middle, sigma a quarter of each side, (count, H, W) in [0, 1]."""
    y, x = (torch.linspace(-2, 2, side) for side in size)
    return torch.exp(-(y[:, None] ** 2 + x**2) / 2).expand(count, *size)


def evaluate(maps: Tensor, masks: Tensor, images: Tensor, score: Score, **options) -> dict[str, float]:
    """The five figures of a short table, each a mean over the pictures: energy inside, peak inside, IoU, deletion, insertion.

    score and options are removal_curves'.
    """
    deletion, insertion = removal_curves(score, images, maps, **options)
    figures = {"energy": energy_inside(maps, masks), "peak": peak_inside(maps, masks), "IoU": iou_at_area(maps, masks)}
    figures |= {"deletion": auc(deletion), "insertion": auc(insertion)}
    return {name: float(values.float().mean()) for name, values in figures.items()}
