"""Encode a loader's batches once, or as they come: the model is frozen, so its features need computing only once.

batches = FeatureCache([features, scores, targets], batch_size=16, shuffle=True)     # from memory, anew each epoch
batches = Encoded(loader, encode)                                                   # encode(batch), each time
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class FeatureCache:
    """Batches of encoded pictures from memory: the frozen model runs once, not once an epoch."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, shuffle: bool):
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[0]) / self.batch_size)

    def __iter__(self):
        count = len(self.tensors[0])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size):
            yield tuple(tensor[index.to(tensor.device)] for tensor in self.tensors)


class Encoded:
    """A loader whose batches are encoded as they come."""

    def __init__(self, loader, encode):
        self.loader, self.encode = loader, encode
        for name in ("sampler", "batch_sampler", "generator"):  # what seeds a loader's draws
            setattr(self, name, getattr(loader, name, None))

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return (self.encode(batch) for batch in self.loader)


def is_stream(loader) -> bool:
    return isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset)


def repeats(loader) -> bool:
    """Does each epoch hold the same pictures? A cache must freeze no augmentation and no drawing of samples.

    Only a plain loader qualifies: default collate, every picture once an epoch. A few pictures are read twice to see whether
    they come the same each time; rare random changes may slip through, and want cache=False.
    """
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    data = torch.utils.data
    plain = type(batch_sampler) is data.BatchSampler and not loader.drop_last and loader.collate_fn is data.default_collate
    once = type(sampler) is data.SequentialSampler or (type(sampler) is data.RandomSampler and not sampler.replacement)
    if not (plain and once and sampler is batch_sampler.sampler and len(sampler) == len(loader.dataset)):
        return False
    for index in range(min(16, len(loader.dataset))):
        items = loader.dataset[index], loader.dataset[index]
        first, second = (item[0] if isinstance(item, (tuple, list)) else item for item in items)
        if not isinstance(first, Tensor) or not torch.equal(first, second):
            return False
    return True
