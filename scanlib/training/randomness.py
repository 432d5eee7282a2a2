"""Make everything random a function of (seed, epoch, step), so that a killed run can go on as if never killed.

The generators of torch, numpy and Python are seeded anew before each batch is drawn, and the caller's own state is left alone.
(A data set with a generator of its own has to see to itself.)

    with isolated_rng(device):
        for batch in iterate_seeded_batches(loader, seed=0, epoch=3):
            ...
"""

import contextlib
import random
from collections.abc import Iterable

import numpy as np
import torch


def _key(seed: int, epoch: int, step: int) -> int:
    """A seed for (seed, epoch, step), well mixed, the same on every platform."""
    return random.Random(f"{seed} {epoch} {step}").getrandbits(63)


@contextlib.contextmanager
def isolated_rng(device: torch.device):
    """Inside, draw freely: the caller's torch, numpy and Python generators are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _seed(key: int) -> None:
    torch.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)


def iterate_seeded_batches(loader: Iterable, seed: int, epoch: int):
    """The batches of one epoch, every draw a function of (seed, epoch, step). To be used inside ``isolated_rng``."""
    _seed(_key(seed, epoch, 0))
    holders = [loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler"))]
    for holder in [*holders, getattr(holders[2], "sampler", None)]:
        if isinstance(getattr(holder, "generator", None), torch.Generator):
            holder.generator.manual_seed(_key(seed, epoch, 0))
        if hasattr(holder, "set_epoch"):
            holder.set_epoch(epoch)
    batches, step = iter(loader), 0
    while True:
        _seed(_key(seed, epoch, step))
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch
        step += 1
