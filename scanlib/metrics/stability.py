"""Stability metrics: does the map predict how the score changes, and is it the same for an image with a little noise?

    compute_infidelity(score, images, maps)                                     # (N,), low is good
    compute_max_sensitivity(explainer, images, target)                          # (N,), low is good

Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019.
"""

import torch
from torch import Tensor

from scanlib.explainers.base import at_least_float32, choose_batch_size, validate_maps
from scanlib.metrics.quality import ExplainerFunction, run_explainer
from scanlib.metrics.removal import Fill, ScoreFunction, fill_mean, score_removals
from scanlib.targets import Target, select_targets


def compute_infidelity(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    *,
    patch: int = 8,
    share: float = 0.25,
    samples: int = 20,
    fill: Fill = fill_mean,
    rescale: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute the mean over random sets S of patches of (s * map's sum over S - (score - score without S))^2, (N,); low is good.

    Each of ``samples`` sets, the same for all maps, contains every patch with probability ``share``. ``rescale`` uses the best s
    for each image, so that maps of any unit can be compared; without it s is 1. For the others see ``compute_removal_curves``.
    """
    height, width = images.shape[2:]
    maps = validate_maps(maps, len(images), (height, width)).to(images.device)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(samples, -(-height // patch), -(-width // patch), generator=generator).to(images.device) < share
    sets = drawn.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width]
    sets = torch.cat([sets, torch.zeros_like(sets[:1])])  # the last is empty: the score of the unchanged image
    scores = score_removals(score, images, lambda index, step: sets[step], fill, samples + 1, batch_size)
    change = scores[:, -1:] - scores[:, :-1]
    predicted = torch.einsum("nhw,shw->ns", maps, sets[:-1].to(maps.dtype)).to(change)
    if rescale:
        squares = predicted.square().sum(1, True).clamp_min(torch.finfo(predicted.dtype).tiny)
        predicted = predicted * (predicted * change).sum(1, True) / squares
    return (predicted - change).square().mean(1)


def compute_max_sensitivity(
    explainer: ExplainerFunction,
    images: Tensor,
    target: Target = None,
    *,
    radius: float = 5.0,
    samples: int = 10,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Compute the largest relative change of the map under uniform noise of up to ``radius`` grey levels, (N,); low is good.

    Pass one class per image as target: None could be another class for each noisy image. The ``samples`` draws of noise are the
    same for all images and explainers. A map of zeros that does not change gives 0; one that changes gives nan.
    """
    images, generator = at_least_float32(images), torch.Generator().manual_seed(seed)
    noises = radius * (2 * torch.rand(samples, *images.shape[1:], generator=generator, device="cpu") - 1).to(images)
    worst = []
    for index in torch.arange(len(images), device=images.device).split(choose_batch_size(images, batch_size)):
        targets = select_targets(target, index)
        maps = run_explainer(explainer, images[index], targets).flatten(1)
        noisy = (run_explainer(explainer, (images[index] + noise).clamp(0, 255), targets).flatten(1) for noise in noises)
        change = torch.stack([(each - maps).norm(dim=1) for each in noisy]).amax(0)
        if not change.isfinite().all():
            raise ValueError("maps must be finite, got NaN or infinite values for the images or for noisy ones")
        worst.append(torch.where(change > 0, change / maps.norm(dim=1), 0))
    ratio = torch.cat(worst)
    return ratio.where(ratio.isfinite(), torch.nan)
