"""Small classifiers for Signs: a residual CNN and a vision transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer


class Normalize(nn.Module):
    """Scale images in [0, 255] to [0, 1] and normalize each channel: (x / 255 - mean) / std."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = (0.5, 0.5, 0.5), std: Sequence[float] = (0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images / 255 - self.mean.to(images.device)) / self.std.to(images.device)


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        )
        same_shape = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same_shape else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class SmallResNet(nn.Module):
    """A residual CNN for images of 64 px, about 0.7 M parameters: (B, 3, 64, 64) -> (B, classes).

    stem and layer1 have 32 channels at 32x32, layer2 64 and layer3 96 at 16x16, layer4 192 at 8x8. The head is global average
    pooling and a linear layer.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.layer1 = _Block(32, 32)
        self.layer2 = _Block(32, 64, stride=2)
        self.layer3 = _Block(64, 96)
        self.layer4 = _Block(96, 192, stride=2)
        self.head = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def build_small_vit(classes: int = 10) -> VisionTransformer:
    """Build a VisionTransformer for images of 64 px: patch size 8, 6 blocks, width 128, 4 heads, about 1.2 M parameters."""
    return VisionTransformer(64, 8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=classes)
