"""Loss and metrics of an epoch, summed over batches and processes.

totals = Totals([Accuracy()])
totals.update(loss, outputs, target)        # once a batch
totals.compute("loader")                    # {"loss": 0.3, "Accuracy": 0.9}
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scanlib.layers import get_logits
from scanlib.training.distributed import all_reduce_sum


def detach_outputs(outputs):
    """Return a step's outputs, a tensor or a (named) tuple of tensors, without their graph."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    return getattr(type(outputs), "_make", type(outputs))([output.detach() for output in outputs])


class Totals:
    """Loss and metrics over all images since construction, which resets the metrics.

    metrics: objects with reset(), update(preds, target), compute(), whose attributes are sums over images.
    """

    def __init__(self, metrics: Sequence):
        self.loss, self.images, self.metrics = 0.0, 0, metrics
        for metric in metrics:
            metric.reset()

    def update(self, loss: float, outputs, target) -> None:
        """Add a batch: its mean loss, and the outputs and the target that the metrics compare. An empty batch adds nothing."""
        self.loss, self.images = self.loss + loss * len(target), self.images + len(target)
        for metric in self.metrics if len(target) else ():
            metric.update(detach_outputs(outputs), target)

    def compute(self, source: str) -> dict[str, float]:
        """Return the mean "loss" and the metrics, named by their class, over the images of all processes.

        Raises ValueError if there are no images; ``source`` is the argument that should have held them.
        """
        loss, images = all_reduce_sum([self.loss, self.images])
        if not images:
            raise ValueError(f"{source} must have at least one batch, got none; with drop_last it needs batch_size images")
        results = {"loss": loss / images}
        for metric in copy.deepcopy(self.metrics):
            vars(metric).update(zip(list(vars(metric)), all_reduce_sum(list(vars(metric).values())), strict=True))
            results[type(metric).__name__] = metric.compute()
        return results


class Accuracy:
    """Share of images whose largest logit is that of the label."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.right = self.seen = 0

    @torch.no_grad()
    def update(self, preds, target: Tensor) -> None:
        """Add a batch: logits (B, K), or a model output that ``get_logits`` accepts, and labels (B,)."""
        self.right += int((get_logits(preds).argmax(1) == target).sum())
        self.seen += len(target)

    def compute(self) -> float:
        return self.right / self.seen if self.seen else math.nan
