"""Make every random number a function of (seed, epoch, step), so that a killed run can continue as if it had not been killed.

The generators of torch, NumPy and Python are seeded before each batch, and the caller's random state is restored afterwards.
A data set with its own generator must seed it itself.

    with isolated_rng():
        for batch in iterate_seeded_batches(loader, seed=0, epoch=3):
            ...
"""

import contextlib
import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler


@contextlib.contextmanager
def isolated_rng():
    """Restore the random state of torch (CPU, every CUDA device, MPS), NumPy and Python when the block ends."""
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []  # manual_seed seeds all of them
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)


def _mix_seed(seed: int, epoch: int, step: int) -> int:
    # Python seeds from a string by its hash, so neighbouring steps get unrelated seeds, the same ones on every platform
    return random.Random(f"{seed} {epoch} {step}").getrandbits(63)


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def iterate_seeded_batches(loader: Iterable, seed: int, epoch: int) -> Iterator:
    """Iterate over one epoch, with every draw a function of (seed, epoch, step). Use it inside ``isolated_rng``.

    The loader's own generators are seeded too; they get their state back afterwards. The order of the images is the same with any
    number of worker processes. Random augmentation is not: each worker process has its own random state.
    """
    _seed_all(_mix_seed(seed, epoch, 0))
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(loader, "sampler", None)
    drawers: list[Any] = [loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    states = []
    for drawer in drawers:
        if isinstance(getattr(drawer, "generator", None), torch.Generator):
            states.append((drawer.generator, drawer.generator.get_state()))
            drawer.generator.manual_seed(_mix_seed(seed, epoch, 0))
        if hasattr(drawer, "set_epoch"):
            drawer.set_epoch(epoch)
    # worker processes draw the order earlier than the main process would, from another random state
    draws_order = type(sampler) is RandomSampler and sampler.generator is None and getattr(loader, "num_workers", 0) > 0
    if draws_order:
        sampler.generator = torch.Generator().manual_seed(_draw_seed())
    try:
        batches = iter(loader)
        for step in itertools.count():
            _seed_all(_mix_seed(seed, epoch, step))
            if step == 0 and draws_order:
                _draw_seed()  # as the sampler does that draws its order now
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch
    finally:
        if draws_order:
            sampler.generator = None
        for generator, state in reversed(states):  # one may be listed twice
            generator.set_state(state)


def _draw_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())
