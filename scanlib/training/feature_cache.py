"""Encode a loader's batches once, or as they come: the model is frozen, so its features need computing only once.

batches = FeatureCache.filled(loader, encode, seed=0, device=device)    # encode(batch) -> tensors, once; then from memory
batches = EncodedLoader(loader, encode)                                       # each time
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scanlib.training.randomness import isolated_rng, iterate_seeded_batches


class FeatureCache:
    """Batches of encoded pictures from memory: the frozen model runs once, not once an epoch."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, shuffle: bool):
        self.tensors, self.batch_size, self.shuffle = tensors, batch_size, shuffle
        self.belongs_to: dict = {}  # what was encoded by whom, where someone will ask

    @classmethod
    def filled(cls, loader, encode: Callable, seed: int, device: torch.device, verbose: bool = False) -> "FeatureCache":
        """Run a loader once. encode(batch) -> a tuple of tensors. Raises ValueError for an empty loader."""
        from tqdm.auto import tqdm

        with isolated_rng(device):  # the order in memory is a function of the seed, as every other draw
            batches = iterate_seeded_batches(loader, seed, 0)
            total = len(loader) if hasattr(loader, "__len__") and not is_stream(loader) else None
            parts = [encode(batch) for batch in tqdm(batches, "features", total, disable=not verbose, leave=False)]
        if not parts:
            raise ValueError("the loader is empty; give it at least one batch (with drop_last, at least batch_size pictures)")
        size, tensors = len(parts[0][0]), []
        for column in range(len(parts[0])):  # one by one, each part let go, so that only one tensor is held twice at a time
            tensors.append(torch.cat([part[column] for part in parts]))
            parts = [(*part[:column], None, *part[column + 1 :]) for part in parts]
        return cls(tensors, size, isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[0]) / self.batch_size)

    def __iter__(self):
        count = len(self.tensors[0])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size):
            yield tuple(tensor[index.to(tensor.device)] for tensor in self.tensors)


class EncodedLoader:
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


def count_images(loader) -> float:
    """How many pictures a loader's data set holds; infinite where it does not tell."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return math.inf


def is_repeatable(loader) -> bool:
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
