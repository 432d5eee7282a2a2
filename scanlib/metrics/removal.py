"""Removal metrics: does the score fall when the pixels with the highest map values are removed?

    score = build_class_score(model, preprocess, classes)
    deletion, insertion = compute_removal_curves(score, images, maps, patch=8, fill=fill_blur)  # (N, steps + 1) each
    compute_auc(deletion), compute_auc(insertion), compute_auc(insertion.flip(1))   # (N,): deletion, insertion, negative AUC

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import at_least_float32, choose_batch_size, prepare_inputs, validate_maps
from scanlib.layers import compute_logits
from scanlib.metrics.localisation import rank_pixels

# images (B, 3, H, W) in [0, 255] and their indices (B,) -> scores (B,)
ScoreFunction = Callable[[Tensor, Tensor], Tensor]
# A fill takes all images (N, 3, H, W). It returns replacement images (N, 3, H, W), or a function from indices (B,) and removed
# locations (B, H, W) bool to images (B, 3, H, W) with these locations replaced.
Fill = Callable[[Tensor], Tensor | Callable[[Tensor, Tensor], Tensor]]


def build_class_score(model: nn.Module, preprocess: Callable[[Tensor], Tensor], classes: Tensor) -> ScoreFunction:
    """Return a score function for the metrics: the probability of each image's class, ``classes`` (N,) int64.

    The probability is the softmax of the model's output in eval mode. If the rows of the first output are probabilities
    already (no negative entry, sum 1), no softmax is applied, with a warning. The score raises ValueError for a single output.
    """
    classes, has_probabilities = torch.as_tensor(classes), None

    def score(images: Tensor, indices: Tensor) -> Tensor:
        nonlocal has_probabilities
        output = compute_logits(model, prepare_inputs(model, preprocess, images)).float()
        if output.shape[1] < 2:
            raise ValueError("model must return logits (B, K >= 2), got a single output; pass your own score(images, indices)")
        if has_probabilities is None:
            has_probabilities = are_probabilities(output)
            if has_probabilities:
                warnings.warn("the model returns probabilities, so no softmax is applied", stacklevel=2)
        chosen = classes[indices.to(classes.device)][:, None].to(output.device)
        return (output if has_probabilities else output.softmax(1)).gather(1, chosen)[:, 0]

    return score


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether no entry of (N, K) is negative and every row sums to 1."""
    return bool((outputs >= 0).all()) and bool(((outputs.sum(1) - 1).abs() < 1e-2).all())


def fill_mean(images: Tensor) -> Tensor:
    """Fill with the mean colour of each image, (N, 3, H, W)."""
    return images.mean((2, 3), keepdim=True).expand_as(images)


def fill_black(images: Tensor) -> Tensor:
    """Fill with zeros, (N, 3, H, W)."""
    return torch.zeros_like(images)


def fill_blur(images: Tensor, share: float = 0.25) -> Tensor:
    """Fill with blurred images (N, 3, H, W): averaging and resizing remove details smaller than ``share`` times the side."""
    small = F.interpolate(images, size=(max(1, round(2 / share)),) * 2, mode="area")
    return F.interpolate(small, size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 255)


def rank_locations(maps: Tensor, patch: int = 1, seed: int = 0) -> tuple[Tensor, int]:
    """Rank the locations of maps (N, H, W); return each pixel's rank, (N, H, W) int32, 0 the highest, and the number of ranks.

    With ``patch`` > 1 the pixels of a square share a rank, by their mean; squares are cut at the right and lower edge if
    necessary. Ties are in a seeded random order. Raises ValueError for a patch larger than the map.
    """
    height, width = maps.shape[1:]
    if not 1 <= patch <= min(height, width):
        raise ValueError(f"patch must be from 1 to {min(height, width)} pixels for images of {height} x {width}, got {patch}")
    coarse = F.avg_pool2d(maps[:, None], patch, ceil_mode=True)[:, 0]
    ranks = rank_pixels(coarse, seed).argsort(1).int().view(coarse.shape)  # a permutation's argsort is its inverse
    return ranks.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :height, :width], coarse.shape[1:].numel()


@torch.no_grad()
def score_removals(
    score: ScoreFunction, images: Tensor, select_removed: Callable, fill: Fill, steps: int, batch_size: int | None
) -> Tensor:
    """Return the score of each image after each step, (N, steps), from batches that mix images and steps.

    select_removed: image indices and steps, (B,) each -> removed locations (B, H, W) bool.
    """
    images, batch_size = at_least_float32(images), choose_batch_size(images, batch_size)
    remove = _build_removal(images, fill)
    pairs = torch.cartesian_prod(torch.arange(len(images)), torch.arange(steps)).to(images.device)
    batches = (pair.unbind(1) for pair in pairs.split(batch_size))
    return _validate_scores(torch.cat([score(remove(i, select_removed(i, s)), i) for i, s in batches])).view(len(images), steps)


def _build_removal(images: Tensor, fill: Fill) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function from indices (B,) and removed locations (B, H, W) bool to images (B, 3, H, W)."""
    filled = fill(images)
    return filled if callable(filled) else lambda index, removed: torch.where(removed[:, None], filled[index], images[index])


def _validate_scores(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ValueError("score must return finite values, got NaN or infinite ones")
    return scores


def compute_removal_curves(
    score: ScoreFunction,
    images: Tensor,
    maps: Tensor,
    *,
    steps: int = 10,
    patch: int = 1,
    fill: Fill = fill_mean,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute deletion and insertion curves: the score while the highest locations of the map are removed, or inserted.

    Args:
        score: score function, such as ``build_class_score`` returns. steps: number of removals until nothing is left.
        images, maps: (N, 3, H, W) in [0, 255] and (N, H, W), of any range: only the order of the locations counts.
        patch: side in pixels of the squares that are removed at once.
        fill: what replaces removed pixels: ``fill_mean``, ``fill_blur``, ``fill_black``, ``fill_imputed`` or another ``Fill``.
        batch_size: images per run of the model; None uses ``choose_batch_size``. seed: of the random order of ties.

    Returns deletion and insertion, each (N, steps + 1): the score after 0, 1/steps, ..., all locations. ``compute_auc`` gives
    the area: low is good for deletion, high for insertion. ``insertion.flip(1)`` removes the least relevant locations first
    ("negative" curve). Raises ValueError for another number of maps, NaN, or a patch larger than the images.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    ranks, total = rank_locations(validate_maps(maps, len(images), images.shape[2:]).to(images.device), patch, seed)
    limits = torch.linspace(0, total, steps + 1).round().to(images.device)

    def select_removed(index: Tensor, step: Tensor) -> Tensor:
        inserts = step > steps  # steps 0 ... steps delete, the others insert between both ends
        limit = limits[torch.where(inserts, step - steps, step)]
        return (ranks[index] < limit[:, None, None]) ^ inserts[:, None, None]

    scores = score_removals(score, images, select_removed, fill, 2 * steps, batch_size)
    deletion = scores[:, : steps + 1]
    return deletion, torch.cat([deletion[:, -1:], scores[:, steps + 1 :], deletion[:, :1]], 1)


@torch.no_grad()
def order_patches_greedily(
    score: ScoreFunction,
    images: Tensor,
    patch: int = 8,
    *,
    per_round: int = 1,
    floor: float = 0.01,
    fill: Fill = fill_mean,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Order the patches of each image by a greedy search for the steepest deletion curve: what deletion can reach.

    Each round removes every patch that is left, one at a time, on top of those removed before, and keeps the ``per_round``
    removals with the lowest score. Once the score of an image is below ``floor`` times its first score, or nothing is left, its
    search ends; the other patches follow in the order of their scores in the last round.

    Args:
        score, images, patch, fill, batch_size: see ``compute_removal_curves``.

    Returns:
        Maps (N, H, W) in [0, 1], highest where a patch is removed first, and the runs of the model per image, (N,) int64.
    """
    from tqdm.auto import tqdm

    if per_round < 1 or not 0 <= floor < 1:
        raise ValueError(f"per_round must be at least 1 and floor in [0, 1), got {per_round} and {floor}")
    images, batch_size = at_least_float32(images), choose_batch_size(images, batch_size)
    patches, count = rank_locations(torch.zeros_like(images[:, 0])[:1], patch)
    patches, remove = patches[0].long(), _build_removal(images, fill)  # (H, W): the number of the patch of each pixel
    everything, nothing = torch.arange(len(images), device=images.device), torch.full_like(patches.flatten()[:1], count)
    removed = torch.zeros(len(images), count + 1, dtype=torch.bool, device=images.device)  # the last column is no patch
    ranks, runs = torch.zeros(len(images), count, device=images.device), torch.zeros_like(everything)

    def measure(owners: Tensor, trials: Tensor) -> Tensor:  # images (B,), and a patch (B,) that is removed as well -> (B,)
        runs.index_add_(0, owners, torch.ones_like(owners))
        parts = zip(owners.split(batch_size), trials.split(batch_size), strict=True)
        scores = [score(remove(i, removed[i].scatter(1, k[:, None], True)[:, patches]), i) for i, k in parts]
        return _validate_scores(torch.cat(scores))

    first, active = measure(everything, nothing.expand(len(images))), everything
    with tqdm(total=len(images), desc="greedy order", leave=False, disable=not progress) as bar:
        while len(active):
            left, done = ~removed[active, :count], removed[active, :count].sum(1, keepdim=True)
            owners, trials = left.nonzero().unbind(1)
            scores = first.new_full(left.shape, torch.inf)
            scores[owners, trials] = measure(active[owners], trials)
            order = done + scores.argsort(dim=1, stable=True).argsort(1)  # the place of each patch that is left
            ranks[active] = torch.where(left, order.to(ranks.dtype), ranks[active])
            removed[active, :count] = ~left | (order < done + per_round)
            lowest = measure(active, nothing.expand(len(active)))
            ended = (lowest <= floor * first[active]) | removed[active, :count].all(1)
            bar.update(int(ended.sum()))
            active = active[~ended]
    return 1 - (ranks / max(1, count - 1))[:, patches], runs


def compute_auc(curves: Tensor) -> Tensor:
    """Compute the area under each curve (N, K) over [0, 1] by the trapezoid rule, (N,)."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


@torch.no_grad()
def score_dimmed_images(
    score: ScoreFunction, images: Tensor, maps: Tensor, fill: Callable = fill_black, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the scores of the images (N, 3, H, W) and of the images multiplied by their maps (N, H, W) in [0, 1], (N,) each.

    fill: images -> what replaces pixels where the map is 0: black as published, or ``fill_mean``, which is less conspicuous.
    """
    images = at_least_float32(images)
    maps = validate_maps(maps, len(images), images.shape[2:]).to(images)[:, None]
    dimmed = torch.lerp(fill(images), images, maps)
    parts = torch.arange(len(images), device=images.device).split(choose_batch_size(images, batch_size))
    before, after = (_validate_scores(torch.cat([score(each[index], index) for index in parts])) for each in (images, dimmed))
    return before, after


def compute_drop(before: Tensor, after: Tensor) -> Tensor:
    """Compute drop %: the share of the score that is lost, (N,) in [0, 100]; low is good."""
    return 100 * (before - after).relu() / before.clamp_min(torch.finfo(before.dtype).tiny)


def compute_increase(before: Tensor, after: Tensor) -> Tensor:
    """Compute increase %: 100 where the score rises, else 0, (N,); high is good."""
    return 100.0 * (after > before)


def compute_win(ours: Tensor, theirs: Tensor) -> Tensor:
    """Compute win %: 100 where ours is below theirs (low is good), 50 for a tie, else 0, (N,). Both sides add up to 100.

    The result is nan where one of them is.
    """
    return torch.where(ours.isnan() | theirs.isnan(), torch.nan, 100.0 * (ours < theirs) + 50.0 * (ours == theirs))
