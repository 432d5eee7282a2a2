"""Decoders: from one layer's masked features back to a small picture and its confidence.

Both return (B, 4, h', w'): channel 0 the raw confidence, channels 1..3 the reconstruction in [-1, 1]. Since the target is
blurred to the feature grid (it holds nothing finer than one cell), decoding at four times the grid and resizing loses nothing
one could see and costs about a tenth; ``output_stride=1`` decodes at full resolution.

    decoder = ConvolutionalDecoder(2048, grid=(7, 7), image_size=(224, 224))
    decoder(features).shape                                             # (B, 4, 28, 28)

Widths after SCAN (arXiv 2603.06523): 512, 384, 256, 192 from stride 32 to 4, then 128 and 64.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

PUBLISHED_WIDTHS = (192, 256, 384, 512)  # at strides 4, 8, 16, 32


class ResidualModule(nn.Module):
    """Pre-activation bottleneck, (B, C_in, h, w) -> (B, C, h, w). The shortcut exists from the start, so it is trained."""

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
    """Post-norm encoder block with a 4x MLP, (B, T, C) -> (B, T, C). heads must divide the width."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=False)


def choose_head_count(width: int, at_most: int = 12) -> int:
    """The largest number of heads <= at_most that divides the width (12 for 192 and 768, 8 for 128)."""
    return next(heads for heads in range(min(at_most, width), 0, -1) if width % heads == 0)


def _double(in_channels: int, channels: int, upsampling: str) -> nn.Module:
    """x2 up: a 3x3 convolution, then bilinear (no checkerboard, and a quarter of the cost of the other order); or transposed."""
    if upsampling == "transposed":
        return nn.ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    )


class _Level(nn.Module):
    """Two residual modules and a skip around them, then x2 up."""

    def __init__(self, in_channels: int, channels: int, upsampling: str):
        super().__init__()
        self.blocks = nn.Sequential(ResidualModule(in_channels, in_channels), ResidualModule(in_channels, in_channels))
        self.up = _double(in_channels, channels, upsampling)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x + self.blocks(x))


def count_doublings(grid: Sequence[int], image_size: Sequence[int], output_stride: int | None) -> tuple[int, int]:
    """(doublings up to full resolution, doublings this decoder does). Raises ValueError for a stride that is no such step."""
    stride = min(image_size[0] / grid[0], image_size[1] / grid[1])
    full = max(round(math.log2(stride)), 0)
    if output_stride is None:
        return full, min(2, full)
    doublings = full - math.log2(output_stride) if output_stride > 0 else -1
    if doublings != int(doublings) or doublings < 0:
        options = ", ".join(str(2**level) for level in range(full + 1))
        raise ValueError(f"output_stride {output_stride} does not fit this layer; take one of {options}, or None for 4x the grid")
    return full, int(doublings)


def _widths(channels: int, full: int, ch_per_lv: Sequence[int] | None, full_widths_from: int) -> list[int]:
    """Channels at the grid and after each doubling; left out, the published ones, scaled down for layers with fewer channels."""
    if ch_per_lv is None:
        scale = min(1.0, channels / full_widths_from)
        # multiples of 32, rounded down: the convolutions' vector units are filled
        ch_per_lv, tail = ([max(32, 32 * int(width * scale / 32)) for width in group] for group in (PUBLISHED_WIDTHS, (128, 64)))
    else:
        tail = [128, 64]
    level = min(max(full - 2, 0), len(ch_per_lv) - 1)
    widths = [*reversed(ch_per_lv[: level + 1]), *tail]
    return widths + widths[-1:] * (full + 1 - len(widths))


class _Decoder(nn.Module):
    """What both decoders share: the way up and the head."""

    def __init__(self, widths: Sequence[int], doublings: int, upsampling: str):
        super().__init__()
        if upsampling not in ("bilinear", "transposed"):
            raise ValueError(f"upsampling {upsampling!r} is not known; take 'bilinear' or 'transposed'")
        self.up = nn.Sequential(*(_Level(widths[i], widths[i + 1], upsampling) for i in range(doublings)))
        self.head = nn.Sequential(nn.BatchNorm2d(widths[doublings]), nn.ReLU(inplace=True), nn.Conv2d(widths[doublings], 4, 1))


class ConvolutionalDecoder(_Decoder):
    """(B, in_channels, h, w) masked features -> (B, 4, h', w').

    Args:
        in_channels, grid: channels and (h, w) of the target layer.
        image_size: (H, W) of the pictures.
        ch_per_lv: widths at strides 4, 8, 16, 32; None scales the published (192, 256, 384, 512), see full_widths_from.
        output_stride: picture pixels per decoded pixel, a power of two; None decodes at four times the grid, 1 in full.
        upsampling: "transposed" (as published; on CNN features it learns fastest) or "bilinear" behind a 3x3 convolution (no
            checkerboard).
        full_widths_from: layers with this many channels or more get the published widths, others their share of them.
    """

    def __init__(
        self, in_channels, grid, image_size, ch_per_lv=None, output_stride=None, upsampling="transposed", full_widths_from=512
    ):
        full, doublings = count_doublings(grid, image_size, output_stride)
        widths = _widths(in_channels, full, ch_per_lv, full_widths_from)
        super().__init__(widths, doublings, upsampling)
        self.project = nn.Conv2d(in_channels, widths[0], 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.up(self.project(features)))


class TransformerDecoder(_Decoder):
    """(B, prefix + h * w, in_channels) masked tokens -> (B, 4, h', w').

    Post-norm encoder blocks read the tokens; then the prefix tokens go, the rest is folded to the grid, and it goes up as
    in the convolutional decoder, bilinearly: on tokens transposed convolutions end in a checkerboard. Tokens say more in fewer
    channels than a CNN's maps, so the published widths begin at 256. depth: the number of blocks, as published 4; on Signs one,
    two and four gave equally good maps, and one costs least. heads: None takes the largest number up to 12 that divides the
    width. The other arguments are ConvolutionalDecoder's.
    """

    def __init__(
        self,
        in_channels,
        grid,
        image_size,
        prefix=0,
        ch_per_lv=None,
        output_stride=None,
        upsampling="bilinear",
        depth=1,
        heads=None,
        full_widths_from=256,
    ):
        full, doublings = count_doublings(grid, image_size, output_stride)
        widths = _widths(in_channels, full, ch_per_lv, full_widths_from)
        super().__init__(widths, doublings, upsampling)
        heads = heads or choose_head_count(in_channels)
        self.blocks = nn.Sequential(*(TransformerBlock(in_channels, heads) for _ in range(depth)))
        self.project = nn.Conv2d(in_channels, widths[0], 1)
        self.prefix, self.grid = prefix, tuple(grid)

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.blocks(tokens)[:, self.prefix :]
        return self.head(self.up(self.project(patches.transpose(1, 2).unflatten(2, self.grid))))


def build_decoder(config: dict) -> nn.Module:
    """The decoder that a config describes, untrained. Raises KeyError for a kind that is not known."""
    arguments = {name: value for name, value in config.items() if name != "decoder"}
    kinds = {kind.__name__: kind for kind in (ConvolutionalDecoder, TransformerDecoder)}
    with torch.inference_mode(False):  # parameters made in inference mode could never be trained
        return kinds[config["decoder"]](**arguments)
