"""How a layer arranges its features: which axis holds the channels, and which grid covers the image.

layout = Layout.infer(features.shape, inputs.shape[2:])         # from the shapes alone
layout = read_layout(model, "layer4", features, inputs)         # also from the type of the layer and, if need be, two runs
maps = layout.to_maps(features)                                 # any layout -> (B, C, h, w)
"""

import contextlib
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torchvision
from torch import Tensor, nn

USUAL_PREFIX_TOKENS, MAX_PREFIX_TOKENS = 5, 16  # class, distillation and register tokens before the patch tokens
USUAL_PATCHES = (4, 8, 14, 16, 32)  # pixels per side
FEWEST_CHANNELS = 4  # of a layer, where the shape allows two readings
LEAST_SHIFT = 0.02  # of the response to a moved spot, as a share of the axis
ROUNDING = 2  # cells by which padding and rounding may change a grid
CHANNELS_FIRST = (
    *(nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, torchvision.ops.FrozenBatchNorm2d, nn.GroupNorm),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.Upsample, nn.PixelShuffle),
)
CHANNELS_LAST = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.Embedding)
KEEPING = ("modules.activation", "modules.dropout")  # modules of torch.nn that keep the layout of their input
REORDERING = ("Unroll",)  # modules that put tokens into another order than the image's rows (Hiera)


@dataclass(frozen=True)
class Layout:
    """How a layer arranges its features.

    kind: "BCHW" (channels first, for any number of spatial axes), "BHWC" (channels last) or "BTC" (tokens). grid: (h, w); (l,)
    of a signal, (d, h, w) of a volume. prefix: the number of tokens before the patch tokens, such as a class token.
    """

    kind: str
    channels: int
    grid: tuple[int, ...]
    prefix: int = 0

    @classmethod
    def infer(
        cls,
        shape: Sequence[int],
        image_size: Sequence[int],
        is_channels_first: bool | None = None,
        locate: Callable[[], bool] | None = None,
    ) -> "Layout":
        """Infer the layout from the shape of the features and the (H, W) of the input; (L,) of a signal, (D, H, W) of a volume.

        The grid must have the input's aspect ratio up to rounding. Tokens are square patches p x p on a grid (H // p, W // p)
        after the prefix tokens. If several p are possible, one with at most 5 prefix tokens is preferred, then one whose patches
        tile the image. Some models resize a wide image to a square one. So a reading of a wide or tall image with 3 or more
        prefix tokens is refused if the same tokens may be a square grid with at most a class token.

        Args:
            is_channels_first: True or False if the type of the layer says so.
            locate: function that finds it out. It is called where channels first and channels last are both possible; without it
                the grid that is closer to the input's aspect ratio is taken.

        Raises ValueError for a layer without a spatial extent, and for a grid that does not fit the image.
        """
        if len(shape) == len(image_size) + 2:
            first, last = cls("BCHW", shape[1], tuple(shape[2:])), cls("BHWC", shape[-1], tuple(shape[1:-1]))
            slack = 0.05 if is_channels_first is None else math.inf if is_channels_first else 0.5
            readings = [first, last] if is_channels_first is None else [first] if is_channels_first else [last]
            is_pooled = min(math.prod(first.grid), math.prod(readings[-1].grid)) == 1
            possible = [x for x in readings if not is_pooled and _covers_image(x.grid, image_size, slack)]
            if len(wide := [x for x in possible if x.channels >= FEWEST_CHANNELS]) == 1:
                possible = wide
            if len(possible) == 2:
                closer = min(possible, key=lambda x: (_compute_distortion(x.grid, image_size), x is last))
                possible = [closer] if locate is None else [first if locate() else last]
        elif len(shape) == 3 and len(image_size) == 2:
            tokens = None if is_channels_first else _read_tokens(shape[1], shape[2], tuple(image_size))
            if (
                is_channels_first is None
                and locate is not None
                and _read_tokens(shape[2], shape[1], tuple(image_size), 0) is not None
            ):
                tokens = None if locate() else tokens
            possible = [] if tokens is None else [tokens]
        else:
            possible = []
        if not possible:
            raise ValueError(
                f"target_layer has no spatial extent that fits the image: it returns {tuple(shape)} for an input of "
                f"{tuple(image_size)}; take one that returns (B, C, h, w), (B, h, w, C) or patch tokens (B, T, C), before "
                "pooling and flattening, or pass layout"
            )
        return possible[0]

    @classmethod
    def parse(cls, layout: "str | Layout", shape: Sequence[int], image_size: Sequence[int]) -> "Layout":
        """Return a layout that the caller names: "BCHW", "BHWC", "BTC", or a Layout, which is returned as it is."""
        if isinstance(layout, cls):
            if layout.kind not in ("BCHW", "BHWC", "BTC"):
                raise ValueError(f"layout.kind must be 'BCHW', 'BHWC' or 'BTC', got {layout.kind!r}")
            return layout
        if layout == "BCHW" and len(shape) > 2:
            return cls("BCHW", shape[1], tuple(shape[2:]))
        if layout == "BHWC" and len(shape) > 2:
            return cls("BHWC", shape[-1], tuple(shape[1:-1]))
        if layout == "BTC" and len(shape) == 3:
            if (tokens := _read_tokens(shape[1], shape[2], tuple(image_size))) is not None:
                return tokens
            raise ValueError(
                f"layout 'BTC' does not tell the grid of {tuple(shape)}; pass Layout('BTC', channels, (h, w), prefix)"
            )
        raise ValueError(f"layout must be 'BCHW', 'BHWC', 'BTC' or a Layout that fits the output {tuple(shape)}, got {layout!r}")

    @property
    def channel_dim(self) -> int:
        """Index of the channel axis."""
        return 1 if self.kind == "BCHW" else -1

    def to_maps(self, x: Tensor) -> Tensor:
        """Arrange features as (B, C, h, w); prefix tokens are dropped."""
        if self.kind == "BTC":
            x = x[:, self.prefix :].unflatten(1, self.grid)
        return x if self.kind == "BCHW" else x.movedim(-1, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Arrange features as (B, T, C); prefix tokens are kept."""
        if self.kind == "BTC":
            return x
        return x.flatten(2).transpose(1, 2) if self.kind == "BCHW" else x.flatten(1, -2)


def _covers_image(grid: Sequence[int], image_size: Sequence[int], slack: float) -> bool:
    """Return whether one stride takes the image to the grid, up to ROUNDING cells and a share ``slack`` of the cells."""
    if slack == math.inf:
        return True
    if len(grid) == 1:  # any length would do, so the stride must be whole
        stride = image_size[0] / grid[0]
        strides = {max(1, math.floor(stride)), math.ceil(stride)} if stride >= 1 else {1 / round(1 / stride)}
        return any(abs(image_size[0] / each - grid[0]) <= 1 + slack * grid[0] for each in strides)
    if len(grid) == 3:  # videos have another stride in time
        return grid[0] <= image_size[0] and _covers_image(grid[1:], image_size[1:], slack)
    spans = [(size, cells, ROUNDING + slack * cells) for size, cells in zip(image_size, grid, strict=True)]
    largest = min(size / (cells - most) if cells > most else math.inf for size, cells, most in spans)
    return max(size / (cells + most) for size, cells, most in spans) <= largest


def _compute_distortion(grid: Sequence[int], image_size: Sequence[int]) -> float:
    """Return how far a grid is from the image's aspect ratio; 0 for the same ratio."""
    scales = [math.log(size / cells) for size, cells in zip(image_size, grid, strict=True)]
    return max(scales) - min(scales)


@lru_cache(maxsize=1000)
def _read_tokens(count: int, channels: int, image_size: tuple[int, ...], max_prefix: int = MAX_PREFIX_TOKENS) -> Layout | None:
    """Return the layout of ``count`` tokens that are square patches, or None."""
    candidates = []
    for patch in range(1, max(image_size) + 1):
        for h, w in {(image_size[0] // patch, image_size[1] // patch), tuple(-(-size // patch) for size in image_size)}:
            prefix, has_border = count - h * w, any(size % patch for size in image_size)
            is_cropped = h * patch <= image_size[0] and w * patch <= image_size[1]
            # a model may resize a wide image to a square one: believe an incomplete patch only if it has a usual size
            is_usual = not has_border or len(set(image_size)) == 1 or patch in USUAL_PATCHES
            if h * w > 1 and is_usual and 0 <= prefix <= (max_prefix if is_cropped else 0):  # padded: no prefix tokens
                candidates.append((prefix > USUAL_PREFIX_TOKENS, has_border, not is_cropped, prefix, (h, w)))
    if not candidates:
        return None
    *_, prefix, grid = min(candidates)
    if len(set(grid)) > 1 and prefix > 2 and count - math.isqrt(count) ** 2 < 2:
        return None  # may also be a square grid with a class token: the model may resize images to squares (CrossViT)
    return Layout("BTC", channels, grid, prefix)


_located: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model -> {(layer, shape, size): whether channels are first}


def read_layout(
    model: nn.Module,
    name: str,
    features: Tensor,
    inputs: Tensor,
    run: Callable[[Tensor], Tensor],
    layout: "str | Layout | None" = None,
) -> Layout:
    """Return the layout of a layer's output; see ``Layout.infer``.

    Where both readings fit, the layer runs on a blank image with a spot in several places: the centre of its response moves along
    the spatial axes and stays along the channels. Tokens are checked the same way: tokens whose response does not follow the spot
    may be no patches, which gives a warning.

    run: function from inputs (n, ...) to the layer's output. layout: overrules everything else.
    """
    image_size = tuple(inputs.shape[2:])
    if layout is not None:
        return Layout.parse(layout, features.shape, image_size)
    module, known = model.get_submodule(name), _located.setdefault(model, {})
    if features.ndim == 3 and len(image_size) == 2 and "reorders" not in known:
        known["reorders"] = any(type(each).__name__ in REORDERING for each in model.modules())
    if features.ndim == 3 and len(image_size) == 2 and known["reorders"]:
        raise ValueError(f"layer {name!r} holds its tokens in another order than the image; pass layout or use a CNN's layer")
    key = (name, tuple(features.shape[1:]), image_size)

    def locate() -> bool:
        if key not in known:
            known[key] = _is_first_axis_channels(run, inputs[:1])
        return known[key]

    try:
        found = Layout.infer(features.shape, image_size, is_channels_first(module, features), locate)
    except ValueError as error:
        raise ValueError(str(error).replace("target_layer", f"layer {name!r}", 1)) from None
    if found.kind == "BTC" and ("follows", key) not in known:
        known["follows", key] = True
        with contextlib.suppress(ValueError):  # a model may refuse a blank image
            if not _follows_spot(run, inputs[:1], found):
                warnings.warn(
                    f"the {len(features[0])} tokens of layer {name!r} do not follow a spot in the image: they may be no "
                    "patches, or each may see the whole image; a map of this layer may mean nothing",
                    stacklevel=2,
                )
    return found


def is_channels_first(module: nn.Module, output: Tensor) -> bool | None:
    """Return whether the type of a module says that its output has the channels first; None if it does not say."""
    if isinstance(module, nn.Sequential):
        last = next((child for child in reversed(module) if not type(child).__module__.endswith(KEEPING)), None)
        return None if last is None else is_channels_first(last, output)
    if isinstance(module, CHANNELS_FIRST):
        return True
    if type(module) is nn.LayerNorm:  # subclasses may transpose
        return False if len(module.normalized_shape) == 1 else None
    return False if isinstance(module, CHANNELS_LAST) else None


def _draw_spots(inputs: Tensor) -> Tensor:
    """Return a blank image, and for each side two images whose spot is at 1/4 and at 3/4 of that side."""
    sizes = inputs.shape[2:]
    blank = inputs.mean(tuple(range(2, inputs.ndim)), keepdim=True).expand_as(inputs)
    images = blank.repeat(1 + 2 * len(sizes), *[1] * (inputs.ndim - 1))
    for index in range(2 * len(sizes)):
        quarters = [2] * len(sizes)  # the spot is in the middle of the other sides
        quarters[index // 2] = 1 + 2 * (index % 2)
        ends = [(quarter * size // 4, size // 8) for quarter, size in zip(quarters, sizes, strict=True)]
        place = (slice(None), *(slice(max(0, middle - half), middle + half + 1) for middle, half in ends))
        images[1 + index][place] += (inputs.amax() - inputs.amin()).clamp_min(1)
    return images


def _measure_shift(responses: Tensor, side: int, axis: int) -> float:
    """Return how far the response moves along an axis when the spot moves along a side, as a share of the axis."""
    profiles = responses[2 * side : 2 * side + 2].movedim(axis, 1).flatten(2).sum(2)
    places = torch.linspace(0, 1, profiles.shape[1], device=profiles.device)
    centres = (profiles * places).sum(1) / profiles.sum(1).clamp_min(1e-30)
    return float(centres[1] - centres[0])


def _follows_spot(run: Callable[[Tensor], Tensor], inputs: Tensor, layout: Layout) -> bool:
    """Return whether the response to a spot moves with it along each side of the image."""
    maps = layout.to_maps(run(_draw_spots(inputs)).detach().float())
    responses = (maps[1:] - maps[:1]).square().sum(1, keepdim=True)
    sides = [side for side in range(len(layout.grid)) if layout.grid[side] > 1]
    return not responses.any() or all(_measure_shift(responses, side, 2 + side) >= 0.05 for side in sides)


def _is_first_axis_channels(run: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
    """Return whether axis 1 of the layer's output, and not the last one, holds the channels.

    Moves a spot on a blank image along each side: the centre of the response must move along the axis that belongs to that side.
    Raises ValueError if that decides nothing.
    """
    sizes = inputs.shape[2:]
    outputs = run(_draw_spots(inputs)).detach().float()
    responses = (outputs[1:] - outputs[:1]).square()
    if outputs.ndim != len(sizes) + 2 or len(sizes) == 1:  # a sequence, of tokens in the order of the rows or of a signal
        first, last = _measure_shift(responses, 0, 2), _measure_shift(responses, 0, 1)
        is_decided = max(first, last) >= max(LEAST_SHIFT, 2 * min(first, last))
    else:
        shifts = [[_measure_shift(responses, side, side + offset) for side in range(len(sizes))] for offset in (2, 1)]
        first, last = map(sum, shifts)
        better, offset = (shifts[0], 2) if first > last else (shifts[1], 1)
        moved = [shift for side, shift in enumerate(better) if outputs.shape[side + offset] > 1]
        is_decided = min(moved, default=0) >= 0.1 and max(first, last) >= 3 * min(first, last)
    if not is_decided:
        shape = tuple(outputs.shape[1:])
        raise ValueError(f"the layer returns {shape}, which may have the channels first or last; pass layout='BCHW' or 'BHWC'")
    return first > last
