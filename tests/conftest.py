import pytest
import torch
from torch import nn


class TinyNet(nn.Module):
    """Two convolutions, pooling, a linear head; in-place ReLUs as real models have them."""

    def __init__(self, classes=5):
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.back = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, classes)
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.head(self.back(self.front(x)).mean((2, 3)))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return TinyNet().eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 255


@pytest.fixture(autouse=True)
def _quiet_figures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
