"""Does the score follow the map? Take away what the map ranks highest, and watch.

deletion, insertion = compute_removal_curves(score, images, maps, patch=8, fill=blurred)    # (N, steps + 1) each
compute_auc(deletion), compute_auc(insertion), compute_auc(insertion.flip(1))               # (N,): AUC-D, insertion, negative AUC

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import choose_batch_size, prepare_inputs, validate_maps
from scanlib.layers import eval_mode, get_logits
from scanlib.metrics.localisation import rank_pixels

ScoreFunction = Callable[[Tensor, Tensor], Tensor]  # images (B, 3, H, W) in [0, 255] and their indices (B,) -> (B,)


def build_class_score(model: nn.Module, preprocess: Callable[[Tensor], Tensor], classes: Tensor) -> ScoreFunction:
    """The probability of each picture's class, ``classes`` (N,) int64: the ``score`` that every metric takes.

    The softmax of what the model, in eval mode, returns. A model that returns probabilities already, none negative and every row
    adding up to one, is taken at its word, and a warning says so. Raises ValueError for a model with a single output.
    """
    classes, certain = torch.as_tensor(classes), None

    def score(images: Tensor, index: Tensor) -> Tensor:
        nonlocal certain
        with eval_mode(model):
            output = get_logits(model(prepare_inputs(model, preprocess, images))).float()
        if output.shape[1] < 2:
            raise ValueError("the model has a single output, whose softmax is always 1; write a score(images, index) of your own")
        if certain is None:
            certain = are_probabilities(output)
            if certain:
                warnings.warn("the model returns probabilities: no softmax is taken of them", stacklevel=2)
        chosen = classes[index.to(classes.device)][:, None].to(output.device)
        return (output if certain else output.softmax(1)).gather(1, chosen)[:, 0]

    return score


def are_probabilities(outputs: Tensor) -> bool:
    """Is nothing in (N, K) negative, and does every row add up to one?"""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-2).all())


def to_floating(images: Tensor) -> Tensor:
    """Images of any dtype as floating ones."""
    return images if images.is_floating_point() else images.float()


def fill_mean(images: Tensor) -> Tensor:
    """Each picture's mean colour, everywhere: (N, 3, H, W)."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def fill_black(images: Tensor) -> Tensor:
    """Zero everywhere: (N, 3, H, W)."""
    return torch.zeros_like(images)


def fill_blur(images: Tensor, share: float = 0.25) -> Tensor:
    """Each picture with everything finer than ``share`` of its side gone: reduced by averaging, then resized."""
    height, width = images.shape[-2:]
    small = F.interpolate(images, size=(max(1, round(2 / share)),) * 2, mode="area")
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False).clamp(0, 255)


def rank_locations(maps: Tensor, patch: int = 1, seed: int = 0) -> tuple[Tensor, int]:
    """Each pixel's place in its map's order, 0 the highest, (N, H, W) int32, and how many places there are.

    With ``patch`` > 1 the pixels of a square share a place, found by their mean; squares are cut at the right and lower edge
    where the side is no multiple. Ties in a seeded random order.
    """
    count, height, width = maps.shape
    if not 1 <= patch <= min(height, width):
        raise ValueError(
            f"patch {patch} does not fit a picture of {height} x {width}; give a side in pixels from 1 to {min(height, width)}"
        )
    coarse = F.avg_pool2d(maps[:, None], patch, ceil_mode=True)[:, 0]
    total = coarse.shape[1] * coarse.shape[2]
    place = torch.empty(count, total, dtype=torch.long, device=maps.device)
    place.scatter_(1, rank_pixels(coarse, seed), torch.arange(total, device=maps.device).expand(count, -1))
    place = place.int().view(coarse.shape).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return place[:, :height, :width], total


@torch.no_grad()
def score_removals(
    score: ScoreFunction, images: Tensor, removed: Callable, fill: Callable, steps: int, batch_size: int | None
) -> Tensor:
    """(N, steps): the score of each picture at each step, in batches that mix both.

    removed: indices and steps, (B,) each -> (B, H, W) bool. fill: as in ``compute_removal_curves``.
    """
    images, batch_size = to_floating(images), choose_batch_size(images, batch_size)
    filled = fill(images)
    put = filled if callable(filled) else lambda which, gone: torch.where(gone[:, None], filled[which], images[which])
    picture, step = (each.flatten() for each in torch.meshgrid(torch.arange(len(images)), torch.arange(steps), indexing="ij"))
    batches = zip(picture.to(images.device).split(batch_size), step.to(images.device).split(batch_size), strict=True)
    values = [score(put(which, removed(which, at)), which) for which, at in batches]
    return torch.cat(values).view(len(images), steps) if values else images.new_zeros(0, steps)


def compute_removal_curves(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 10,
    patch: int = 1,
    fill: Callable = fill_mean,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Deletion and insertion curves: the score as the map's highest places are removed, or put back.

    Args:
        score: as ``build_class_score`` makes it. images, maps: (N, 3, H, W) in [0, 255] and (N, H, W).
        patch: side in pixels of what is removed at once.
        fill: what stands where something was removed: ``fill_mean``, ``fill_blur``, ``fill_black``, ``road.imputed``, or any function
            of the images that gives pictures (N, 3, H, W), or a function of indices (B,) and removed places (B, H, W) that does.
        batch_size: pictures a run of the model; None takes what is quick on the images' device, see ``explainer.batch_of``.

    Returns deletion and insertion, each (N, steps + 1): the score with 0, 1/steps, ..., all places removed (or put back); ``compute_auc``
    gives the areas: low is good for deletion, high for insertion. Putting back the highest is removing the lowest, read
    backwards: the "negative" curve, least relevant first, is ``insertion.flip(1)``. By rank: ties in a seeded random order.
    """
    place, total = rank_locations(validate_maps(maps, len(images), images.shape[2:]).to(images.device), patch, seed)
    limits = torch.linspace(0, total, steps + 1).round().to(images.device)

    def removed(which: Tensor, at: Tensor) -> Tensor:  # steps 0 ... steps delete; those behind, 1 ... steps - 1, insert
        highest = place[which] < limits[torch.where(at > steps, at - steps, at)][:, None, None]
        return highest ^ (at > steps)[:, None, None]

    both = score_removals(score, images, removed, fill, 2 * steps, batch_size)
    deletion = both[:, : steps + 1]
    return deletion, torch.cat([deletion[:, -1:], both[:, steps + 1 :], deletion[:, :1]], 1)


def compute_auc(curves: Tensor) -> Tensor:
    """Area under each curve (N, K) over [0, 1], by the trapezoid rule, (N,)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


@torch.no_grad()
def score_dimmed_images(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    fill: Callable[[Tensor], Tensor] = fill_black,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The score of each picture as it is and dimmed by its map, (N,) each.

    images (N, 3, H, W), maps (N, H, W) in [0, 1]. Where the map is 0 the dimmed picture is ``fill``: black as published, or
    ``mean_colour``, which stands out less.
    """
    images = to_floating(images)
    maps = validate_maps(maps, len(images), images.shape[2:]).to(images)[:, None]
    dimmed = torch.lerp(fill(images), images, maps)
    values = []
    for which in torch.arange(len(images), device=images.device).split(choose_batch_size(images, batch_size)):
        values.append(torch.stack([score(images[which], which), score(dimmed[which], which)], 1))
    before, after = torch.cat(values).unbind(1) if values else 2 * [images.new_zeros(0)]
    return before, after


def compute_drop(before: Tensor, after: Tensor) -> Tensor:
    """Drop %: what share of the score is lost, (N,) in [0, 100]; low is good."""
    return 100 * (before - after).relu() / before.clamp_min(torch.finfo(before.dtype).tiny)


def compute_increase(before: Tensor, after: Tensor) -> Tensor:
    """Increase %: 100 where the score rises, else 0, (N,); high is good."""
    return 100.0 * (after > before)


def compute_win(ours: Tensor, theirs: Tensor) -> Tensor:
    """Win %: 100 where ours, of which low is good, is below theirs; 50 where they tie, (N,). So the two sides add up to 100."""
    return 100.0 * (ours < theirs) + 50.0 * (ours == theirs)
