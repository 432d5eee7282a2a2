"""Targets: what an explainer explains. A class, or any score computed from the model's output for one image.

    explainer(images, target=[3, 7])                                # one class per image; None explains the predicted class
    explainer(images, target=Probability(3))                        # one target function for all images
    explainer(images, target=[SegmentationScore(12, mask) for mask in masks])       # or one per image

The output for one image depends on the model: logits (K,) of a classifier, maps (K, H, W) of a segmentation model, an
embedding (D,), or a detector's dictionary of boxes, labels and scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

TargetFunction = Callable[[Any], Tensor]  # from the output for one image to a scalar
Target = int | Sequence[int] | Tensor | TargetFunction | Sequence[TargetFunction] | None


def is_callable_target(target: Target) -> TypeGuard[TargetFunction | Sequence[TargetFunction]]:
    """Return whether the target is a callable or a sequence of callables."""
    return callable(target) or (isinstance(target, Sequence) and len(target) > 0 and all(map(callable, target)))


def select_targets(target: Target, indices: Tensor) -> Target:
    """Return the targets of the images with these indices (n,). A target for all images is returned unchanged."""
    if isinstance(target, Tensor) and target.ndim:
        return target[indices.to(target.device)]
    return [target[i] for i in indices.tolist()] if isinstance(target, (list, tuple)) else target


def resolve_classes(logits: Tensor, target: Target, unknown: bool = False) -> Tensor:
    """Return one class index per image, (B,) int64, from logits (B, K) and None (predicted class), a class, or one per image.

    unknown: whether -1 is allowed; it becomes the predicted class. Raises ValueError for outputs that are not logits, a class
    out of range or a wrong number of classes, TypeError for anything but integers.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits (B, K), got {seen}; for other outputs pass a callable as target")
    count, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        index = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target must be a class index, one index per image, or callables, got {target!r}") from error
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"target must hold class indices (integers), got {index.dtype}")
    index = index.long().expand(count) if index.ndim == 0 else index.long()
    if index.shape != (count,):
        given = f"{index.numel()} classes" if index.ndim == 1 else f"shape {tuple(index.shape)}"
        raise ValueError(f"target must be one class or a flat list with one per image, got {given} for {count} images")
    invalid = index[(index < (-1 if unknown else 0)) | (index >= classes)]
    if len(invalid):
        raise ValueError(f"target class {int(invalid[0])} is out of range: the model has classes 0..{classes - 1}")
    return torch.where(index < 0, logits.argmax(1), index)


def compute_scores(outputs: Any, target: Target = None) -> Tensor:
    """Compute the score of each image, (B,): the logit of a class, or the value of a target function.

    outputs: logits (B, K); for callables anything with one entry per image, such as maps (B, K, H, W) or a list of detections.
    Raises ValueError for a wrong number of callables, TypeError for a value that is not a scalar tensor.
    """
    if not is_callable_target(target):
        return outputs.gather(1, resolve_classes(outputs, target)[:, None])[:, 0]
    check_count(target, len(outputs))
    functions = [target] * len(outputs) if callable(target) else list(target)
    scores = [function(output) for function, output in zip(functions, outputs, strict=True)]
    for score in scores:
        if not isinstance(score, Tensor) or score.numel() != 1:
            raise TypeError(f"target must map an image's output to a scalar tensor, as `lambda output: output[3]`, got {score!r}")
    return torch.stack([score.reshape(()) for score in scores])


def check_count(target: Target, count: int) -> None:
    """Raise ValueError for a list of callables whose length is not the number of images."""
    if is_callable_target(target) and not callable(target) and len(target) != count:
        raise ValueError(f"target must be a callable or one per image, got {len(target)} callables for {count} images")


def select_class(output: Tensor, target: int) -> Tensor:
    """Return the entry of a class in the output for one image. Raises ValueError for a class out of range."""
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)):
        raise TypeError(f"target class must be an integer, got {target!r}")
    if not 0 <= target < len(output):
        raise ValueError(f"target class {target} is out of range: the model has classes 0..{len(output) - 1}")
    return output[target]


def _widen(output: Tensor) -> Tensor:
    """Convert half precision to float32: sums of exponentials overflow in float16."""
    return output.to(torch.promote_types(output.dtype, torch.float32))


@dataclass(frozen=True)
class Probability:
    """Probability p_c of a class. Its gradient vanishes where the model is certain."""

    target: int

    def __call__(self, output: Tensor) -> Tensor:
        return select_class(_widen(output).softmax(0), self.target)


@dataclass(frozen=True)
class LogProbability:
    """Log-probability log p_c of a class: the evidence for the class against all others.

    Its gradient is that of y_c minus the probability-weighted mean over all logits. The form -softplus(log sum_(k != c) exp y_k -
    y_c) keeps that gradient where p_c is rounded to 1. Raises ValueError for a class out of range.
    """

    target: int

    def __call__(self, output: Tensor) -> Tensor:
        output = _widen(output)
        own = select_class(output, self.target)
        return -F.softplus(torch.cat([output[: self.target], output[self.target + 1 :]]).logsumexp(0) - own)


@dataclass(frozen=True)
class ReST:
    """ReST score y_c + log p_c: the logit plus its log-probability (Cai 2025, "CAMs as Shapley Value-based Explainers")."""

    target: int

    def __call__(self, output: Tensor) -> Tensor:
        return select_class(_widen(output), self.target) + _widen(output).log_softmax(0)[self.target]


@dataclass(frozen=True)
class BinaryScore:
    """Score of a classifier with a single output: evidence for the positive class, or for the negative one."""

    positive: bool = True

    def __call__(self, output: Tensor) -> Tensor:
        return output.squeeze() if self.positive else -output.squeeze()


@dataclass(frozen=True)
class OutputValue:
    """One value of the flattened output, such as a regression's: what makes this number large?"""

    index: int = 0

    def __call__(self, output: Tensor) -> Tensor:
        return select_class(output.reshape(-1), self.index)


@dataclass(frozen=True)
class Contrast:
    """Difference between a class and similar ones: sum_i p_i (y_c - strength * y_i) / sum_i p_i (Zhang et al. 2025, Finer-CAM).

    target: None takes the predicted class. references: the classes i, or how many, those with the logits closest to y_c.
    """

    target: int | None = None
    references: int | Sequence[int] = 3
    strength: float = 1.0

    def __call__(self, output: Tensor) -> Tensor:
        output, own = _widen(output), int(output.argmax()) if self.target is None else self.target
        own_score = select_class(output, own)
        if isinstance(self.references, int):
            distance = (output - own_score).detach().abs()
            distance[own] = -1  # the class itself sorts first, even when others have the same logit
            others = distance.argsort(stable=True)[1 : self.references + 1]
        else:
            for reference in self.references:
                select_class(output, reference)  # raises for a class out of range
            others = torch.as_tensor(self.references, dtype=torch.long, device=output.device)
        if not len(others):
            raise ValueError(f"references must be classes, or how many of them, at least 1, got {self.references!r}")
        weight = output[others].softmax(0)  # p_i / sum_i p_i, which does not underflow where the model is certain
        return (weight * (own_score - self.strength * output[others])).sum()


@dataclass(frozen=True, eq=False)
class SegmentationScore:
    """Sum of a class's scores over a mask, for outputs (K, H, W). mask: (H, W), bool or weights."""

    target: int
    mask: Tensor = field(repr=False)

    def __call__(self, output: Tensor) -> Tensor:
        return (select_class(output, self.target) * self.mask.to(output)).sum()


@dataclass(frozen=True, eq=False)
class DetectionScore:
    """How well a detector finds the given boxes (n, 4) with their labels (n,); the output is its dictionary for one image.

    Each box adds overlap plus score of the detection that overlaps it most, or 0 for an overlap up to ``iou`` or another label.
    """

    boxes: Tensor = field(repr=False)
    labels: Sequence[int] | Tensor
    iou: float = 0.5

    def __call__(self, output: dict[str, Tensor]) -> Tensor:
        boxes, scores = output["boxes"], output["scores"]
        if not len(boxes):
            return scores.sum()  # 0, connected to the graph
        overlap, best = torchvision.ops.box_iou(self.boxes.to(boxes), boxes).max(1)
        is_found = (overlap > self.iou) & (output["labels"][best] == torch.as_tensor(self.labels, device=boxes.device))
        return ((overlap + scores[best]) * is_found).sum()


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosine similarity of the output to another embedding (D,): what makes this image similar to that one?"""

    embedding: Tensor = field(repr=False)

    def __call__(self, output: Tensor) -> Tensor:
        return F.cosine_similarity(output.reshape(-1), self.embedding.to(output).reshape(-1), dim=0)
