"""Slot attention that scores: classes' slots look at values, and the mass that their attention covers is the logit.

logits, attention = XSlotAttention(classes=10)(values, encode_positions(16, 16, 64))     # values (B, 256, 64), not negative

SCOUTER's first building block (Li et al., ICCV 2021, arXiv 2009.06138, Sect. 3.2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scanlib.explainers.base import at_least_float32


class SlotOutput(NamedTuple):
    """What slot attention returns: logits (B, K), attention (B, K, slots, ...) in [0, 1]."""

    logits: Tensor
    attention: Tensor


class XSlotAttention(nn.Module):
    """Slots of every class look at the values, three times, each time knowing what they saw before (paper, Sect. 3.2).

    Args:
        classes: K. channels: d, of values and slots. slots: per class. iterations: how often they look.
        key_layers: linear layers that make keys, with ReLU in between.
        sign: +1, what is found speaks for the class; -1, against it.
        rescale: every row of scores scaled to the sum of all, as in the released code and not in the paper. It couples every
            class to every other.
        bias: added to every score before the sigmoid. At 0, as in the paper, a slot begins by looking half at everything; at 2,
            by looking .88 at it, and without an area term it goes on looking at most.

    Slots are drawn once from a normal distribution and learned.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 64,
        slots: int = 1,
        iterations: int = 3,
        key_layers: int = 1,
        sign: int = 1,
        rescale: bool = False,
        bias: float = 0.0,
    ):
        super().__init__()
        for name, value in {"classes": classes, "slots": slots, "iterations": iterations, "key_layers": key_layers}.items():
            if value != int(value) or value < 1:
                raise ValueError(f"{name} {value} is no count; give 1 or more")
        if sign not in (1, -1):
            raise ValueError(f"sign {sign!r} is not known; take +1, evidence for a class, or -1, against it")
        self.classes, self.iterations, self.sign, self.rescale, self.bias = classes, iterations, sign, rescale, bias
        self.slots = nn.Parameter(torch.randn(classes * slots, channels))
        layers = [layer for _ in range(key_layers) for layer in (nn.Linear(channels, channels), nn.ReLU())]
        self.keys = nn.Sequential(*layers[:-1])
        self.update = nn.GRUCell(channels, channels)

    def forward(self, values: Tensor, positions: Tensor) -> SlotOutput:
        """Values (B, N, d), not negative, and the code of their places (N, d) -> logits (B, K), attention (B, K, slots, N).

        Raises FloatingPointError where rescaling would divide by zero.
        """
        batch, _, channels = values.shape
        keys = self.keys(values + positions)  # (B, N, d): only keys know where they are
        slots = self.slots.to(keys.dtype).expand(batch, -1, -1)  # (B, S, d), S = K * slots
        for iteration in range(self.iterations):
            if iteration:
                slots = self.update(found.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)  # noqa: F821
            scores = slots @ keys.mT / math.sqrt(channels)  # (B, S, N)
            if self.rescale:
                scores = _rescaled(scores)
            attention = (scores + self.bias).sigmoid()  # no softmax: slots do not compete
            found = attention @ values / channels  # (B, S, d)
        logits = self.sign * at_least_float32(found).unflatten(1, (self.classes, -1)).sum((2, 3))
        return SlotOutput(logits, attention.unflatten(1, (self.classes, -1)))


def _rescaled(scores: Tensor) -> Tensor:
    """Each row times the sum of all rows over its own."""
    sums = scores.sum(2, keepdim=True)
    if (sums == 0).any():
        raise FloatingPointError("a slot's scores sum to zero, so they can not be rescaled; take rescale=False, as in the paper")
    return scores / sums * sums.sum(1, keepdim=True)


def encode_positions(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the row, then of the column, d / 2 channels each: (h * w, d), row by row (Carion et al. 2020, DETR).

    Rows and columns run over (0, 2 pi] whatever their number; the k-th pair has the frequency 10000 ^ (-4 k / d).
    """
    frequency = 10_000 ** (-4 / channels * torch.arange(channels // 4))

    def code(count):
        angle = 2 * math.pi / count * torch.arange(1, count + 1)[:, None] * frequency  # (count, d / 4)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (count, d / 2)

    rows, columns = code(height)[:, None].expand(-1, width, -1), code(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)
