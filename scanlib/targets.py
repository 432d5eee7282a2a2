"""Scores to explain, beyond the logit of a class: each a function of one image's own output, to be given as ``target``.

    explainer(images, target=softmax(3))                            # one for all images, or a list with one for each
    explainer(images, target=[segmentation(12, mask) for mask in masks])

What an image's output is depends on the model: logits (K,) of a classifier, (K, H, W) of a segmentation model, a dictionary of
boxes, labels and scores of a detector, an embedding (D,).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

Score = Callable[[Tensor], Tensor]


def softmax(target: int) -> Score:
    """The probability of a class. Its gradient fades where the model is sure."""
    return lambda row: row.softmax(0)[target]


def rest(target: int) -> Score:
    """ReST, y_c + log p_c: the logit, and how it stands among the others (Cai 2025, "CAMs as Shapley Value-based Explainers")."""
    return lambda row: row[target] + row.log_softmax(0)[target]


def binary(positive: bool = True) -> Score:
    """A classifier with a single output: evidence for the positive class, or for the negative one."""
    return lambda row: row.squeeze() if positive else -row.squeeze()


def regression(index: int = 0) -> Score:
    """An output as it is: what makes the number large?"""
    return lambda row: row.reshape(-1)[index]


def contrast(target: int | None = None, references: int | Sequence[int] = 3, strength: float = 1.0) -> Score:
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


def segmentation(target: int, mask: Tensor) -> Score:
    """Sum of a class's scores over the pixels of a mask, (H, W) bool or weights; for outputs (K, H, W)."""
    return lambda maps: (maps[target] * mask.to(maps)).sum()


def detection(boxes: Tensor, labels: Sequence[int], iou: float = 0.5) -> Score:
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


def similarity(embedding: Tensor) -> Score:
    """Cosine of the output and another embedding (D,): what makes this image like that one?"""
    return lambda row: F.cosine_similarity(row.reshape(-1), embedding.to(row).reshape(-1), dim=0)
