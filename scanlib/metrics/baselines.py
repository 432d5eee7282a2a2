"""Baselines that belong in every table: a random map and a centre prior."""

import torch
from torch import Tensor


def make_random_maps(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return maps of uniform noise, (count, H, W) in [0, 1]."""
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(seed), device="cpu")


def make_centre_maps(count: int, size: tuple[int, int]) -> Tensor:
    """Return maps with a Gaussian in the middle, sigma a quarter of each side, (count, H, W) in [0, 1]."""
    y, x = (torch.linspace(-2, 2, side, device="cpu") for side in size)
    return torch.exp(-(y[:, None] ** 2 + x**2) / 2).expand(count, *size)
