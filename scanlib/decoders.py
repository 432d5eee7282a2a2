"""Decoders: from the masked features of one layer to a small image and its confidence.

Both return (B, 4, h', w'): channel 0 is the raw confidence, channels 1 to 3 are the reconstruction in [-1, 1]. The reference is
blurred to the feature grid, so by default they decode at four times the grid. That loses nothing visible and costs about a tenth
of full resolution (``output_stride=1``).

    decoder = ConvolutionalDecoder(2048, grid=(7, 7), image_size=(224, 224))
    decoder(features).shape                                             # (B, 4, 28, 28)

Widths as in SCAN (arXiv 2603.06523): 512, 384, 256, 192 channels from stride 32 to stride 4, then 128 and 64.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

PUBLISHED_WIDTHS = (192, 256, 384, 512)  # at strides 4, 8, 16, 32


class ResidualModule(nn.Module):
    """Pre-activation bottleneck block, (B, in_channels, h, w) -> (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        hidden = max(channels // 2, 8)
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True), nn.Conv2d(in_channels, hidden, 1, bias=False)),
            *(nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, hidden, 3, padding=1, bias=False)),
            *(nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), nn.Conv2d(hidden, channels, 1)),
        )
        self.shortcut = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


class TransformerBlock(nn.TransformerEncoderLayer):
    """Post-norm encoder block with an MLP of 4 times the width, (B, T, width) -> (B, T, width). heads must divide the width."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=False)


def choose_head_count(width: int, at_most: int = 12) -> int:
    """Return the largest number of attention heads up to ``at_most`` that divides the width: 12 for 192 and 768, 8 for 128."""
    return next(heads for heads in range(min(at_most, width), 0, -1) if width % heads == 0)


def count_doublings(grid: Sequence[int], image_size: Sequence[int], output_stride: int | None) -> tuple[int, int]:
    """Count the doublings from the grid to stride 1 and to ``output_stride``. Raises ValueError for an impossible stride."""
    full = max(round(math.log2(min(image_size[0] / grid[0], image_size[1] / grid[1]))), 0)
    if output_stride is None:
        return full, min(2, full)
    strides = [2**level for level in range(full + 1)]
    if output_stride not in strides:
        options = ", ".join(map(str, strides))
        raise ValueError(f"output_stride must be one of {options}, or None for four times the grid, got {output_stride!r}")
    return full, full - strides.index(output_stride)


def choose_widths(channels: int, full: int, ch_per_lv: Sequence[int] | None, full_widths_from: int) -> list[int]:
    """Return the channels at the grid and after each of ``full`` doublings; arguments as for ``ConvolutionalDecoder``."""
    widths = [64, 128, *(PUBLISHED_WIDTHS if ch_per_lv is None else ch_per_lv)]  # at strides 1, 2, 4, 8, ...
    if ch_per_lv is None:
        scale = min(1.0, channels / full_widths_from)
        widths = [max(32, 32 * int(width * scale / 32)) for width in widths]  # multiples of 32 use vector units fully
    widths = widths[min(max(full, 2), len(widths) - 1) :: -1]
    return widths + widths[-1:] * (full + 1 - len(widths))


class _Level(nn.Module):
    """Two residual modules with a skip connection, then upsampling by 2."""

    def __init__(self, in_channels: int, channels: int, upsampling: str):
        super().__init__()
        self.blocks = nn.Sequential(ResidualModule(in_channels, in_channels), ResidualModule(in_channels, in_channels))
        if upsampling == "transposed":
            self.up: nn.Module = nn.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1)
        else:
            bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)  # last, at a quarter of the cost
            self.up = nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), bilinear)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x + self.blocks(x))


class _Decoder(nn.Module):
    """Base class of the decoders: the upsampling levels and the head. Subclasses bring features to ``widths[0]`` channels."""

    def __init__(self, widths: Sequence[int], doublings: int, upsampling: str):
        super().__init__()
        if upsampling not in ("bilinear", "transposed"):
            raise ValueError(f"upsampling must be 'bilinear' or 'transposed', got {upsampling!r}")
        self.up = nn.Sequential(*(_Level(widths[i], widths[i + 1], upsampling) for i in range(doublings)))
        self.head = nn.Sequential(nn.BatchNorm2d(widths[doublings]), nn.ReLU(inplace=True), nn.Conv2d(widths[doublings], 4, 1))


class ConvolutionalDecoder(_Decoder):
    """Decoder of feature maps: masked features (B, in_channels, h, w) -> (B, 4, h', w').

    Args:
        in_channels, grid: channels and (h, w) of the target layer.
        image_size: (H, W) of the images.
        ch_per_lv: widths at strides 4, 8, 16, 32; None scales the published ones, see full_widths_from.
        output_stride: image pixels per decoded pixel, a power of two; None decodes at four times the grid, 1 at full resolution.
        upsampling: "transposed" (as published; learns fastest on the features of a CNN) or "bilinear" after a 3x3 convolution
            (no checkerboard pattern).
        full_widths_from: layers with at least this many channels get the published widths, others the same share of them.
    """

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        image_size: Sequence[int],
        ch_per_lv: Sequence[int] | None = None,
        output_stride: int | None = None,
        upsampling: str = "transposed",
        full_widths_from: int = 512,
    ):
        full, doublings = count_doublings(grid, image_size, output_stride)
        widths = choose_widths(in_channels, full, ch_per_lv, full_widths_from)
        super().__init__(widths, doublings, upsampling)
        self.project = nn.Conv2d(in_channels, widths[0], 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.up(self.project(features)))


class TransformerDecoder(_Decoder):
    """Decoder of tokens: masked tokens (B, prefix + h * w, in_channels) -> (B, 4, h', w').

    ``depth`` encoder blocks process all tokens (4 as published; on Signs 1, 2 and 4 gave equally good maps, and 1 is fastest).
    Then the ``prefix`` tokens are dropped, and the patch tokens are arranged on the grid and upsampled, bilinearly because
    transposed convolutions give tokens a checkerboard pattern. heads: None takes the largest number up to 12 that divides
    in_channels. The other arguments are those of ``ConvolutionalDecoder``. full_widths_from is smaller, because tokens carry more
    information per channel.
    """

    def __init__(
        self,
        in_channels: int,
        grid: Sequence[int],
        image_size: Sequence[int],
        prefix: int = 0,
        ch_per_lv: Sequence[int] | None = None,
        output_stride: int | None = None,
        upsampling: str = "bilinear",
        depth: int = 1,
        heads: int | None = None,
        full_widths_from: int = 256,
    ):
        full, doublings = count_doublings(grid, image_size, output_stride)
        widths = choose_widths(in_channels, full, ch_per_lv, full_widths_from)
        super().__init__(widths, doublings, upsampling)
        heads = heads or choose_head_count(in_channels)
        self.blocks = nn.Sequential(*(TransformerBlock(in_channels, heads) for _ in range(depth)))
        self.project = nn.Conv2d(in_channels, widths[0], 1)
        self.prefix, self.grid = prefix, tuple(grid)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.blocks(tokens)[:, self.prefix :]
        return self.head(self.up(self.project(patches.transpose(1, 2).unflatten(2, self.grid))))
