"""Small classifiers for Signs: a residual CNN and a vision transformer."""

import torch
import torchvision
from torch import Tensor, nn


class Normalize(nn.Module):
    """Images in [0, 255] -> (x / 255 - mean) / std per channel."""

    def __init__(self, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images / 255 - self.mean.to(images.device)) / self.std.to(images.device)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        )
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class SmallResNet(nn.Module):
    """A residual CNN for 64 px, about 0.7 M parameters: (B, 3, 64, 64) -> (B, classes).

    stem and layer1 32 channels at 32x32, layer2 64 and layer3 96 at 16x16, layer4 192 at 8x8; mean over the grid; linear.
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


def build_small_vit(classes: int = 10) -> nn.Module:
    """torchvision's VisionTransformer for 64 px: patches of 8, six blocks, 128 wide, four heads, about 1.2 M parameters."""
    return torchvision.models.VisionTransformer(
        64, 8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=classes
    )
