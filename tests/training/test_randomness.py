import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scanlib.training.randomness import isolated_rng, iterate_seeded_batches

CPU = torch.device("cpu")


def draw():
    """One number from each generator."""
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_isolated_rng_restores_torch_numpy_and_python(fails):
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    expected = draw()
    torch.set_rng_state(states[0]), np.random.set_state(states[1]), random.setstate(states[2])
    try:
        with isolated_rng():
            draw()
            torch.manual_seed(1), np.random.seed(1), random.seed(1)
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert draw() == expected


@pytest.mark.parametrize("generator", [False, True])
def test_batches_are_a_function_of_seed_and_epoch(generator):
    loader = DataLoader(range(20), 4, shuffle=True, generator=torch.Generator() if generator else None)

    def iterate(seed, epoch):
        draw()  # the state outside must not matter
        with isolated_rng():
            return [(batch.tolist(), draw()) for batch in iterate_seeded_batches(loader, seed, epoch)]

    first = iterate(0, 0)
    assert first == iterate(0, 0)
    others = [iterate(0, 1), iterate(1, 0)]
    assert all(order != first for order in others) and others[0] != others[1]
    assert len({drawn for _, numbers in first for drawn in numbers}) == 15  # no two steps and generators draw the same


def test_set_epoch_is_called():
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

    sampler = Sampler(range(3))
    list(iterate_seeded_batches(DataLoader(range(3), sampler=sampler), 0, 7))
    assert sampler.epoch == 7
