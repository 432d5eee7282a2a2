import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from scanlib.training.feature_cache import is_repeatable
from scanlib.training.randomness import isolated_rng, iterate_seeded_batches


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


def test_loaders_get_their_random_state_back():
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(torch.arange(20.0)), 4, shuffle=True, generator=generator)
    before = generator.get_state()
    with isolated_rng():
        list(iterate_seeded_batches(loader, 0, 0))
        for _ in iterate_seeded_batches(loader, 0, 0):
            break
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("workers", [1, 2])
def test_order_does_not_depend_on_the_number_of_workers(workers):
    def draw(**options):
        loader = DataLoader(TensorDataset(torch.arange(20.0)), 4, shuffle=True, **options)
        with isolated_rng():
            batches = [(batch[0].tolist(), float(torch.rand(()))) for batch in iterate_seeded_batches(loader, 3, 1)]
        assert loader.sampler.generator is None
        return batches

    assert draw(num_workers=workers) == draw()


def test_looking_for_augmentation_draws_nothing():
    class Random(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(3), index

    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    assert not is_repeatable(DataLoader(Random(), 2))
    assert torch.equal(torch.rand(()), expected)
