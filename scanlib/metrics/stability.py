"""Does the map predict what the model does when the picture changes, and does it stay the same when the picture hardly does?

compute_infidelity(score, images, maps)                         # (N,), low is good
compute_max_sensitivity(explainer, images, target)              # (N,), low is good

Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanlib.explainers.base import choose_batch_size, validate_maps
from scanlib.metrics.removal import ScoreFunction, fill_mean, score_removals, to_floating
from scanlib.targets import select_targets


def compute_infidelity(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    *,
    patch: int = 8,
    share: float = 0.25,
    samples: int = 20,
    fill: Callable = fill_mean,
    rescale: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Mean over random sets S of patches of (s * map's sum over S - (score - score without S))^2, (N,); low is good.

    Each of ``samples`` sets holds every patch with probability ``share``; all maps meet the same sets. With ``rescale`` s is the
    best factor for each picture, so that maps of any unit compare; else 1. fill: as in ``removal_curves``.
    """
    height, width = images.shape[2:]
    maps = validate_maps(maps, len(images), (height, width)).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, -(-height // patch), -(-width // patch), generator=generator).to(images.device) < share
    sets = drawn.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
    sets = torch.cat([sets, torch.zeros_like(sets[:1])])  # and one without anything, for the score as it is
    scores = score_removals(score, images, lambda which, at: sets[at], fill, samples + 1, batch_size)
    change = scores[:, -1:] - scores[:, :-1]
    said = torch.einsum("nhw,shw->ns", maps, sets[:-1].to(maps.dtype)).to(change)
    if rescale:
        said = said * (said * change).sum(1, True) / said.square().sum(1, True).clamp_min(torch.finfo(said.dtype).tiny)
    return (said - change).square().mean(1)


def compute_max_sensitivity(
    explainer: Callable,
    images: Tensor,
    target=None,
    *,
    radius: float = 5.0,
    samples: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The largest change of the map, relative to it, under uniform noise of up to ``radius`` grey levels, (N,); low is good.

    explainer: any, called as ``explainer(images, target)``; give one class per image, so that noise can not change the question.
    A map of zeros that stays so counts 0; one that changes, nan. The same noise for all images and explainers.
    """
    images, generator = to_floating(images), torch.Generator().manual_seed(seed)
    noises = radius * (2 * torch.rand(samples, *images.shape[1:], generator=generator) - 1).to(images)
    worst = []
    for which in torch.arange(len(images), device=images.device).split(choose_batch_size(images, batch_size)):
        asked = select_targets(target, which)
        maps = explainer(images[which], asked).detach().flatten(1)
        noisy = (explainer((images[which] + noise).clamp(0, 255), asked).detach().flatten(1) for noise in noises)
        change = torch.stack([(each - maps).norm(dim=1) for each in noisy]).amax(0)
        worst.append(torch.where(change > 0, change / maps.norm(dim=1), 0))
    worst = torch.cat(worst) if worst else images.new_zeros(0)
    return worst.where(worst.isfinite(), torch.nan)
