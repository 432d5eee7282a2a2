"""Does the score survive when the picture is dimmed by its map? Drop, increase, and who wins.

before, after = confidences(score, images, maps)        # (N,) each
drop(before, after), increase(before, after), win(drop_a, drop_b)

Chattopadhay et al., "Grad-CAM++", WACV 2018. ``score`` should be a probability, as ``class_score`` makes it: a drop in
percent of a logit means nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanlib.explainer import batch_of
from scanlib.maps import fitting
from scanlib.removal import Score, black, floating


@torch.no_grad()
def confidences(
    score: Score, images: Tensor, maps: Tensor, fill: Callable[[Tensor], Tensor] = black, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The score of each picture as it is and dimmed by its map, (N,) each.

    images (N, 3, H, W), maps (N, H, W) in [0, 1]. Where the map is 0 the dimmed picture is ``fill``: black as published, or
    ``mean_colour``, which stands out less.
    """
    images = floating(images)
    maps = fitting(maps, len(images), images.shape[2:]).to(images)[:, None]
    dimmed = torch.lerp(fill(images), images, maps)
    values = []
    for which in torch.arange(len(images), device=images.device).split(batch_of(images, batch_size)):
        values.append(torch.stack([score(images[which], which), score(dimmed[which], which)], 1))
    before, after = torch.cat(values).unbind(1) if values else 2 * [images.new_zeros(0)]
    return before, after


def drop(before: Tensor, after: Tensor) -> Tensor:
    """Drop %: what share of the score is lost, (N,) in [0, 100]; low is good."""
    return 100 * (before - after).relu() / before.clamp_min(torch.finfo(before.dtype).tiny)


def increase(before: Tensor, after: Tensor) -> Tensor:
    """Increase %: 100 where the score rises, else 0, (N,); high is good."""
    return 100.0 * (after > before)


def win(ours: Tensor, theirs: Tensor) -> Tensor:
    """Win %: 100 where ours, of which low is good, is below theirs; 50 where they tie, (N,). So the two sides add up to 100."""
    return 100.0 * (ours < theirs) + 50.0 * (ours == theirs)
