"""How a Scouter is trained: its loss, the step that ``Trainer`` takes, and the figures that tell whether its slots live.

loss = compute_scouter_loss(logits, attention, labels, lam=10)
trainer = Trainer(scouter, build_scouter_step(scouter, lam=10), optimizer, metrics=[Accuracy(), Area(), OwnArea(), LogitRange()])
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlib.explainers.base import at_least_float32
from scanlib.scouter.model import Scouter
from scanlib.scouter.slot_attention import SlotOutput
from scanlib.training.distributed import all_reduce_sum


def compute_scouter_loss(logits: Tensor, attention: Tensor, labels: Tensor, lam: float = 1.0, power: float = 2.0) -> Tensor:
    """Cross-entropy + lam * (mean attention) ^ power (paper, Eqs. 7 and 8). The area term makes the map legible: without it
    nothing keeps the slots from looking everywhere."""
    return F.cross_entropy(logits, labels) + lam * attention.mean() ** power


def build_scouter_step(
    scouter: Scouter, lam: float = 1.0, power: float = 2.0, device="cpu", *, encoded: bool = False, patience: int = 100
) -> Callable:
    """The step of a Scouter, for ``Trainer``: (images in [0, 255], labels) -> loss, Slots, labels; with ``encoded``, batches
    hold a frozen backbone's features in the images' place.

    Raises FloatingPointError after ``patience`` training steps in a row in which the logits of no image differ: the sigmoids are
    all 0, or all 1, and send no gradient. The loss stays finite then, and would not tell.
    """
    still = 0

    def step(batch, training):
        nonlocal still
        images, labels = batch[0].to(device), batch[1].to(device)
        slots = scouter.look(images) if encoded else scouter.attend(scouter.preprocess(images))
        if training:
            logits = slots.logits.detach()
            apart = all_reduce_sum([float((logits.amax(1) - logits.amin(1)).amax())], logits.device)[0]
            still = still + 1 if apart < 0.01 else 0
            if still >= patience:
                area = float(slots.attention.detach().mean())
                raise FloatingPointError(
                    f"the slots died: for {still} steps all classes had the same logit, at a mean attention of {area:.1g}; start "
                    f"from a backbone trained with its own head, or take lam below {lam:g} or a smaller learning rate"
                )
        return compute_scouter_loss(*slots, labels, lam, power), slots, labels

    return step


class _Mean:
    """A mean over images."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sum, self.seen = 0.0, 0

    @torch.no_grad()
    def update(self, target: Tensor, slots: SlotOutput) -> None:
        values = self.values(target, slots)
        self.sum, self.seen = self.sum + float(values.sum()), self.seen + len(values)

    def compute(self) -> float:
        return self.sum / self.seen if self.seen else math.nan


class Area(_Mean):
    """Raw area: the mean attention of all classes' slots, in [0, 1]."""

    def values(self, target, slots):
        return at_least_float32(slots.attention).flatten(1).mean(1)


class OwnArea(_Mean):
    """Raw area of the label's class, in [0, 1]."""

    def values(self, target, slots):
        return at_least_float32(slots.attention[torch.arange(len(target)), target]).flatten(1).mean(1)


class LogitRange(_Mean):
    """How far an image's logits lie apart, largest less smallest. It falls to 0 when the slots die."""

    def values(self, target, slots):
        return slots.logits.amax(1) - slots.logits.amin(1)
