"""Make every random number a function of (seed, epoch, step), so that a killed run can continue as if it had not been killed.

The generators of torch, NumPy and Python are seeded before each batch, and the caller's random state is restored afterwards.
A data set with its own generator must seed it itself.

    with isolated_rng(device):
        for batch in iterate_seeded_batches(loader, seed=0, epoch=3):
            ...
"""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def isolated_rng(device: torch.device):
    """Restore the random state of torch (CPU and a CUDA ``device``), NumPy and Python when the block ends."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _mix_seed(seed: int, epoch: int, step: int) -> int:
    # Python seeds from a string by its hash, so neighbouring steps get unrelated seeds, the same ones on every platform
    return random.Random(f"{seed} {epoch} {step}").getrandbits(63)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def iterate_seeded_batches(loader: Iterable, seed: int, epoch: int) -> Iterator:
    """Iterate over one epoch, with every draw a function of (seed, epoch, step). Use it inside ``isolated_rng``."""
    _seed_all(_mix_seed(seed, epoch, 0))
    batch_sampler = getattr(loader, "batch_sampler", None)
    drawers: list[Any] = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    for drawer in drawers:
        if isinstance(getattr(drawer, "generator", None), torch.Generator):
            drawer.generator.manual_seed(_mix_seed(seed, epoch, 0))
        if hasattr(drawer, "set_epoch"):
            drawer.set_epoch(epoch)
    batches, step = iter(loader), 0
    while True:
        _seed_all(_mix_seed(seed, epoch, step))
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch
        step += 1
