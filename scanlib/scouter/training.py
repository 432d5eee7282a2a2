"""Training of a Scouter: loss, step, augmentation, and metrics that show whether the slots still learn.

loss = compute_scouter_loss(logits, attention, labels, lam=10)
trainer = Trainer(scouter, build_scouter_step(scouter, lam=10), optimizer, metrics=[Accuracy(), Area(), OwnArea(), LogitRange()])
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from scanlib.explainers.base import at_least_float32
from scanlib.scouter.model import Scouter
from scanlib.scouter.slot_attention import SlotOutput
from scanlib.training.distributed import all_reduce_sum


def compute_scouter_loss(logits: Tensor, attention: Tensor, labels: Tensor, lam: float = 1.0, power: float = 2.0) -> Tensor:
    """Compute cross-entropy + lam * (mean attention) ^ power (paper, Eqs. 7 and 8).

    The area term makes the maps readable: without it, nothing stops the slots from attending to every location.
    """
    return F.cross_entropy(logits, labels) + lam * attention.mean() ** power


def build_scouter_step(
    scouter: Scouter, lam: float = 1.0, power: float = 2.0, device="cpu", *, use_features: bool = False, patience: int = 100
) -> Callable:
    """Build the training step of a Scouter for ``Trainer``: (images in [0, 255], labels) -> loss, SlotOutput, labels.

    With ``use_features``, batches hold the features of a frozen backbone, as ``scouter.extract_features`` returns them.

    Raises FloatingPointError if the logits of every image are equal for ``patience`` training steps in a row: all sigmoids are
    then 0 or 1 and have no gradient, while the loss stays finite.
    """
    flat_steps = 0

    def step(batch, training):
        nonlocal flat_steps
        images, labels = batch[0].to(device), batch[1].to(device)
        output = scouter.attend_features(images) if use_features else scouter.attend(scouter.preprocess(images))
        if training:
            logits = output.logits.detach()
            logit_range = all_reduce_sum([float((logits.amax(1) - logits.amin(1)).amax())])[0]
            flat_steps = flat_steps + 1 if logit_range < 0.01 else 0
            if flat_steps >= patience:
                area = float(output.attention.detach().mean())
                raise FloatingPointError(
                    f"the slots no longer learn: all logits were equal for {flat_steps} steps at a mean attention of {area:.1g}; "
                    f"start from a backbone trained with its own head, or use lam below {lam:g} or a smaller learning rate"
                )
        return compute_scouter_loss(*output, labels, lam, power), output, labels

    return step


class AugmentedDataset(Dataset):
    """Images at random flipped, rotated by up to 10 degrees, and shifted and scaled by up to 10 %, different in each epoch."""

    def __init__(self, dataset: Dataset):
        affine = v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=127)
        self.dataset, self.transform = dataset, v2.Compose([v2.RandomHorizontalFlip(), affine])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index][:2]
        return self.transform(image), label


class _Mean:
    """Mean of one value per image."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sum, self.seen = 0.0, 0

    def compute(self) -> float:
        return self.sum / self.seen if self.seen else math.nan

    def _add(self, values: Tensor) -> None:
        self.sum, self.seen = self.sum + float(values.sum()), self.seen + len(values)


class Area(_Mean):
    """Raw area: mean attention over the slots of all classes, in [0, 1]."""

    def update(self, preds: SlotOutput, target: Tensor) -> None:
        self._add(at_least_float32(preds.attention).flatten(1).mean(1))


class OwnArea(_Mean):
    """Raw area of an image's own class, the label: mean attention over its slots, in [0, 1]."""

    def update(self, preds: SlotOutput, target: Tensor) -> None:
        self._add(at_least_float32(preds.attention[torch.arange(len(target)), target]).flatten(1).mean(1))


class LogitRange(_Mean):
    """Largest logit of an image minus its smallest. It falls to 0 when the slots no longer learn."""

    def update(self, preds: SlotOutput, target: Tensor) -> None:
        self._add(preds.logits.amax(1) - preds.logits.amin(1))
