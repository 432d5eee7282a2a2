"""Targets: what is to be explained. The logit of a class, or any score, a function of one image's own output.

    explainer(images, target=[3, 7])                                # None (the predicted class), a class, or one for each image
    explainer(images, target=softmax(3))                            # one for all images, or a list with one for each
    explainer(images, target=[segmentation(12, mask) for mask in masks])
    against_others(explainer)(images, target=[3, 7])                # what speaks for these classes against all others

What an image's output is depends on the model: logits (K,) of a classifier, (K, H, W) of a segmentation model, a dictionary of
boxes, labels and scores of a detector, an embedding (D,).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

TargetFunction = Callable[[Tensor], Tensor]
Target = int | Sequence[int] | Tensor | TargetFunction | Sequence[TargetFunction] | None


def is_callable_target(target: Target) -> bool:
    """Is the target a callable, or a sequence of them?"""
    return callable(target) or (isinstance(target, Sequence) and len(target) > 0 and all(map(callable, target)))


def select_targets(target: Target, which: Tensor) -> Target:
    """The part of a target that belongs to these images, given by their indices: of one per image those, else all of it."""
    if isinstance(target, Tensor) and target.ndim:
        return target[which.to(target.device)]
    return [target[i] for i in which.tolist()] if isinstance(target, (list, tuple)) else target


def resolve_classes(logits: Tensor, target, unknown: bool = False) -> Tensor:
    """One class index per image, (B,) int64, from None (predicted class), an int, or one class per image.

    unknown: let -1 mean "not known", and become the predicted class. Raises ValueError for a class out of range or a wrong
    count, TypeError for anything but integers.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {seen}, no logits (B, K); give a callable as target, see scanlib.targets")
    count, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        index = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target {target!r} is no class; give an index, one per image, or callables") from error
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"target must hold class indices (integers), not {index.dtype}")
    if index.ndim == 0:
        index = index.expand(count)
    if index.shape != (count,):
        has = f"{index.numel()} classes" if index.ndim == 1 else f"shape {tuple(index.shape)}"
        raise ValueError(f"target has {has} for {count} images; give one class, or a flat list with one per image")
    lowest = -1 if unknown else 0
    for extreme in (index.max(), index.min()) if index.numel() else ():
        if not lowest <= int(extreme) < classes:
            raise ValueError(f"target class {int(extreme)} is out of range: the model has classes 0..{classes - 1}")
    return torch.where(index < 0, logits.argmax(1), index.long())


def compute_scores(outputs, target: Target = None) -> Tensor:
    """The score of each image, (B,): the logit of a class, or what a callable makes of the image's own output.

    outputs: (B, K) logits; for callables anything with an entry for each image, as maps (B, K, H, W) or a list of detections.
    """
    if is_callable_target(target):
        functions = [target] * len(outputs) if callable(target) else list(target)
        if len(functions) != len(outputs):
            raise ValueError(f"target has {len(functions)} callables for {len(outputs)} images; give one, or one per image")
        scores = [function(row) for function, row in zip(functions, outputs, strict=True)]
        if not all(isinstance(score, Tensor) and score.numel() == 1 for score in scores):
            raise TypeError("target's callable must map an image's outputs (K,) to a scalar tensor, as `lambda row: row[3]`")
        return torch.stack([score.reshape(()) for score in scores])
    return outputs.gather(1, resolve_classes(outputs, target)[:, None])[:, 0]


# --- scores beyond the logit of a class ---


def softmax(target: int) -> TargetFunction:
    """The probability of a class. Its gradient fades where the model is sure."""
    return lambda row: row.softmax(0)[target]


def log_probability(target: int) -> TargetFunction:
    """log p_c, the logit less what all classes have in common: what speaks for the class against the others.

    Its gradient is that of y_c less the mean of all logits', weighed by probability. Written as
    -softplus(log sum_(k != c) exp y_k - y_c), which keeps that gradient where p_c is rounded to 1. Raises ValueError for a class
    out of range.
    """

    def score(row: Tensor) -> Tensor:
        if not 0 <= target < len(row):
            raise ValueError(f"target class {target} is out of range: the model has classes 0..{len(row) - 1}")
        others = torch.cat([row[:target], row[target + 1 :]])
        return -F.softplus(others.logsumexp(0) - row[target])

    return score


def against_others(explain: Callable) -> Callable:
    """An explainer that explains a class's log-probability where it would explain its logit: (images, class or classes) -> maps.

    explain: any explainer, a SCAN too. The class is to be given, since None would be another one for each masked or noisy copy
    that a method makes of an image.
    """
    explain = getattr(explain, "explain", explain)

    def of_log_probability(images: Tensor, target: int | Sequence[int] | Tensor, **options) -> Tensor:
        if target is None:
            raise ValueError("target is None; give a class, or one per image, as model(inputs).argmax(1)")
        classes = torch.as_tensor(target).tolist()
        score = [log_probability(c) for c in classes] if isinstance(classes, list) else log_probability(classes)
        return explain(images, score, **options)

    return of_log_probability


def rest(target: int) -> TargetFunction:
    """ReST, y_c + log p_c: the logit, and how it stands among the others (Cai 2025, "CAMs as Shapley Value-based Explainers")."""
    return lambda row: row[target] + row.log_softmax(0)[target]


def binary(positive: bool = True) -> TargetFunction:
    """A classifier with a single output: evidence for the positive class, or for the negative one."""
    return lambda row: row.squeeze() if positive else -row.squeeze()


def regression(index: int = 0) -> TargetFunction:
    """An output as it is: what makes the number large?"""
    return lambda row: row.reshape(-1)[index]


def contrast(target: int | None = None, references: int | Sequence[int] = 3, strength: float = 1.0) -> TargetFunction:
    """What sets a class apart from similar ones: sum_i p_i (y_c - strength * y_i) / sum_i p_i  (Zhang et al. 2025, Finer-CAM).

    target: None takes the predicted class. references: the classes to compare with, or how many of those with the closest logits.
    """

    def score(row: Tensor) -> Tensor:
        own = int(row.argmax()) if target is None else target
        if isinstance(references, int):
            distance = (row.detach() - row.detach()[own]).abs()
            distance[own] = -1  # first in the order, whatever ties
            others = distance.argsort(stable=True)[1 : references + 1]
        else:
            others = torch.as_tensor(references, device=row.device)
        probability = row.softmax(0)[others]
        return (probability * (row[own] - strength * row[others])).sum() / probability.sum().clamp_min(1e-9)

    return score


def segmentation(target: int, mask: Tensor) -> TargetFunction:
    """Sum of a class's scores over the pixels of a mask, (H, W) bool or weights; for outputs (K, H, W)."""
    return lambda maps: (maps[target] * mask.to(maps)).sum()


def detection(boxes: Tensor, labels: Sequence[int], iou: float = 0.5) -> TargetFunction:
    """How well a detector still finds these boxes (n, 4) with these labels: for each, overlap and score of the detection that
    covers it best, if they overlap by more than ``iou`` and the label is right; else 0."""

    def score(found: dict[str, Tensor]) -> Tensor:
        wanted, kinds = boxes.to(found["boxes"]), torch.as_tensor(labels, device=found["labels"].device)
        if not len(found["boxes"]):
            return found["scores"].sum()
        overlap, best = torchvision.ops.box_iou(wanted, found["boxes"]).max(1)
        right = (overlap > iou) & (found["labels"][best] == kinds)
        return ((overlap + found["scores"][best]) * right).sum()

    return score


def similarity(embedding: Tensor) -> TargetFunction:
    """Cosine of the output and another embedding (D,): what makes this image like that one?"""
    return lambda row: F.cosine_similarity(row.reshape(-1), embedding.to(row).reshape(-1), dim=0)
