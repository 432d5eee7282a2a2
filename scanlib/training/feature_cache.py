"""Encode a loader's batches once: the model is frozen, so its features do not change between epochs.

batches = FeatureCache.build(loader, encode, seed=0, device=device)     # runs encode(batch) -> tensors once a batch
batches = EncodedLoader(loader, encode)                                 # runs it in every epoch
"""

import math
from collections.abc import Callable, Sequence
from operator import length_hint

import torch
from torch import Tensor

from scanlib.training.randomness import isolated_rng, iterate_seeded_batches

Encode = Callable[..., tuple[Tensor, ...]]  # a loader's batch -> tensors of the same length


class FeatureCache:
    """Encoded batches in memory.

    Args:
        tensors: the encoded data set, one row an image. batch_size: rows of a batch. shuffle: draw a new order in each epoch.
        identity: plain values that say what was encoded, and by which encoder.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, shuffle: bool, identity: dict | None = None):
        self.tensors, self.batch_size, self.shuffle, self.identity = tensors, batch_size, shuffle, identity or {}
        self.source: object = self  # what it was encoded from, if that is known

    @classmethod
    def build(
        cls, loader, encode: Encode, seed: int, device: torch.device, verbose: bool = False, identity: dict | None = None
    ) -> "FeatureCache":
        """Run a loader once and keep what ``encode`` returns for its batches. Raises ValueError for an empty loader."""
        from tqdm.auto import tqdm

        with isolated_rng():  # the order in memory depends on the seed alone
            batches = iterate_seeded_batches(loader, seed, 0)
            total = length_hint(loader) or None  # a stream has no length
            parts = [encode(batch) for batch in tqdm(batches, "features", total, disable=not verbose, leave=False)]
        if not parts:
            raise ValueError("loader must have at least one batch, got none; with drop_last it needs batch_size images")
        size, columns = len(parts[0][0]), [list(column) for column in zip(*parts, strict=True)]
        del parts
        tensors = []
        while columns:  # one column at a time, so that only one tensor is in memory twice
            tensors.append(torch.cat(columns.pop(0)))
        shuffle = isinstance(getattr(loader, "sampler", None), torch.utils.data.RandomSampler)
        return cls(tensors, size, shuffle, {**(identity or {}), "images": len(tensors[0]), "seed": seed})

    def check_identity(self, expected: dict) -> None:
        """Raise ValueError if the features were encoded with other settings."""
        for name, value in expected.items():
            if self.identity.get(name) != value:
                raise ValueError(
                    f"the features must be encoded for {name} = {value}, got {self.identity.get(name)}; encode the images again"
                )

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __len__(self) -> int:
        return math.ceil(len(self.tensors[0]) / self.batch_size)

    def __iter__(self):
        count = len(self.tensors[0])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size):
            yield tuple(tensor[index.to(tensor.device)] for tensor in self.tensors)


class EncodedLoader:
    """A loader whose batches are encoded in every epoch."""

    def __init__(self, loader, encode: Encode):
        self.loader, self.source, self.encode = loader, loader, encode
        for name in ("sampler", "batch_sampler", "generator", "num_workers"):  # iterate_seeded_batches seeds them
            setattr(self, name, getattr(loader, name, None))

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return (self.encode(batch) for batch in self.loader)


def count_images(loader) -> float:
    """Return the number of images of a loader's data set, infinity if it is unknown."""
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return math.inf


def is_repeatable(loader) -> bool:
    """Return whether each epoch has the same images, so that a cache freezes no augmentation and no drawing of samples.

    True for a plain loader only: default collate, every image once an epoch. Up to 16 images are read twice and compared. Rare
    random changes may remain unnoticed; use cache=False for them.
    """
    data, batches = torch.utils.data, getattr(loader, "batch_sampler", None)
    sampler = getattr(loader, "sampler", None)
    if type(batches) is not data.BatchSampler or loader.drop_last or loader.collate_fn is not data.default_collate:
        return False
    visits_once = type(sampler) is data.SequentialSampler or (type(sampler) is data.RandomSampler and not sampler.replacement)
    if not visits_once or sampler is not batches.sampler or length_hint(sampler) != len(loader.dataset):
        return False
    with isolated_rng():
        for index in range(min(16, len(loader.dataset))):
            items = loader.dataset[index], loader.dataset[index]
            first, second = (item[0] if isinstance(item, (tuple, list)) else item for item in items)
            if not isinstance(first, Tensor) or not torch.equal(first, second):
                return False
    return True
