"""xSlot attention: every class has slots that attend to the values, and the sum of the attended values is the class's logit.

logits, attention = XSlotAttention(classes=10)(values, encode_positions(16, 16, 64))     # values (B, 256, 64), not negative

The main building block of SCOUTER (Li et al., ICCV 2021, arXiv 2009.06138, Sect. 3.2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scanlib.explainers.base import at_least_float32


class SlotOutput(NamedTuple):
    """Output of slot attention: logits (B, K) and attention (B, K, slots, ...) in [0, 1]."""

    logits: Tensor
    attention: Tensor


class XSlotAttention(nn.Module):
    """Attention from learned slots to values (paper, Sect. 3.2). A GRU updates the slots between the iterations.

    The slots are initialized once from a normal distribution and then learned. Raises ValueError for a count below 1 and for
    another sign.

    Args:
        classes: number of classes K. channels: size d of values and slots. slots: number per class.
        iterations: number of attention steps. key_layers: number of linear layers that compute the keys, with ReLU in between.
        sign: +1 if attended values count for the class, -1 if they count against it.
        rescale: scale every row of scores to the sum of all rows, as the released code does and the paper does not. Every class
            then depends on all others.
        bias: added to every score before the sigmoid. At 0, as in the paper, attention starts near .5 at every location; at 2 it
            starts near .88, and without an area term it stays high at most locations.
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
                raise ValueError(f"{name} must be an integer of at least 1, got {value}")
        if sign not in (1, -1):
            raise ValueError(f"sign must be +1 (evidence for a class) or -1 (evidence against it), got {sign!r}")
        self.classes, self.iterations, self.sign, self.rescale, self.bias = classes, iterations, sign, rescale, bias
        self.slots = nn.Parameter(torch.randn(classes * slots, channels))
        layers = [layer for _ in range(key_layers) for layer in (nn.Linear(channels, channels), nn.ReLU())]
        self.keys = nn.Sequential(*layers[:-1])
        self.update = nn.GRUCell(channels, channels)

    def forward(self, values: Tensor, positions: Tensor) -> SlotOutput:
        """Compute logits (B, K) and attention (B, K, slots, N) from values (B, N, d) >= 0 and position codes (N, d).

        Raises FloatingPointError if rescaling would divide by zero.
        """
        batch, _, channels = values.shape
        keys = self.keys(values + positions)  # (B, N, d): positions go into the keys only, not into the logits
        slots = self.slots.to(keys.dtype).expand(batch, -1, -1)  # (B, S, d), S = K * slots
        for iteration in range(self.iterations):
            scores = slots @ keys.mT / math.sqrt(channels)  # (B, S, N)
            if self.rescale:
                sums = scores.sum(2, keepdim=True)
                if (sums == 0).any():
                    raise FloatingPointError("rescale must be False here (as in the paper): the scores of a slot sum to zero")
                scores = scores / sums * sums.sum(1, keepdim=True)
            attention = (scores + self.bias).sigmoid()  # no softmax: slots do not compete
            attended = attention @ values / channels  # (B, S, d)
            if iteration < self.iterations - 1:
                slots = self.update(attended.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        logits = self.sign * at_least_float32(attended).unflatten(1, (self.classes, -1)).sum((2, 3))
        return SlotOutput(logits, attention.unflatten(1, (self.classes, -1)))


def encode_positions(height: int, width: int, channels: int) -> Tensor:
    """Encode the locations of a grid by sines and cosines (Carion et al. 2020, DETR); returns (h * w, d), row by row.

    The first d / 2 channels encode the row, the others the column. Rows and columns are scaled to (0, 2 pi]; the k-th pair of
    channels has the frequency 10000 ^ (-4 k / d).
    """
    frequency = 10_000 ** (-4 / channels * torch.arange(channels // 4))
    rows, columns = (2 * math.pi / count * torch.arange(1, count + 1) for count in (height, width))
    angles = torch.cartesian_prod(rows, columns)[..., None] * frequency  # (h * w, 2, d / 4)
    return torch.stack([angles.sin(), angles.cos()], 3).flatten(1)
