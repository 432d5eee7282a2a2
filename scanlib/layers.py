"""A layer of a model: find it, and read how it arranges its features.

name, layer = resolve_layer(model, "layer4")
maps = Layout.infer(features.shape, inputs.shape[2:]).to_maps(features)         # (B, C, h, w), whatever the layer's layout
"""

import contextlib
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

USUAL_PREFIX_TOKENS, MAX_PREFIX_TOKENS = 5, 16  # class, distillation and register tokens in front of the patch tokens


def resolve_layer(model: nn.Module, layer: str | int | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by name (``"layer4.1"``), by module, or by index into ``list(model.modules())[1:]``.

    Returns its dotted name and the module. Raises ValueError (unknown name or module, index out of range) and
    TypeError (anything else).
    """
    if isinstance(layer, str) and layer:
        with contextlib.suppress(AttributeError):
            return layer, model.get_submodule(layer)
    named = dict(list(model.named_modules())[1:])
    if isinstance(layer, str):
        close = difflib.get_close_matches(layer, named, n=5, cutoff=0.5) or list(dict(model.named_children()))
        raise ValueError(f"target_layer {layer!r} not found; close matches: {', '.join(close)}")
    if isinstance(layer, nn.Module):
        for name, module in named.items():
            if module is layer:
                return name, module
        raise ValueError(f"target_layer {type(layer).__name__} is not part of the model; take one of model.named_modules()")
    if isinstance(layer, int) and not isinstance(layer, bool):
        if -len(named) <= layer < len(named):
            return list(named.items())[layer]
        raise ValueError(f"target_layer {layer} is out of range: this model has layers 0..{len(named) - 1}")
    raise TypeError(f"target_layer must be a name, a module or an index, not {type(layer).__name__}")


@dataclass(frozen=True)
class Layout:
    """How a layer arranges its features: ``kind`` is "BCHW", "BHWC" or "BTC" (tokens, ``prefix`` of them not patches).

    "BCHW" stands for channels first, whatever the number of axes: signals and volumes have grids (l,) and (d, h, w).
    """

    kind: str
    channels: int
    grid: tuple[int, ...]
    prefix: int = 0

    @classmethod
    def infer(cls, shape: Sequence[int], image_size: tuple[int, ...]) -> "Layout":
        """Read the layout off a feature shape and the (H, W) of the model's input; (L,) of a signal, (D, H, W) of a volume.

        Of the two ways to read a 4-D shape, the one whose grid has the picture's aspect ratio is taken. Tokens are
        patches of a square p x p; what exceeds the (H // p) x (W // p) grid stands in front of them; of several such
        readings the one with up to 5 prefix tokens, then patches that tile the picture, is taken. Raises ValueError when
        there is no spatial extent.
        """
        if len(image_size) != 2:
            if len(shape) == len(image_size) + 2:  # channels first, but for a grid that fits the input better from behind
                first, last = cls("BCHW", shape[1], tuple(shape[2:])), cls("BHWC", shape[-1], tuple(shape[1:-1]))
                skews = [
                    [math.log(size / cells) for size, cells in zip(image_size, way.grid, strict=True)] for way in (first, last)
                ]
                layout = last if max(skews[1]) - min(skews[1]) < max(skews[0]) - min(skews[0]) - 1e-6 else first
                if math.prod(layout.grid) > 1:
                    return layout
            raise ValueError(f"the layer has no spatial extent: it returns {tuple(shape)} for an input of {tuple(image_size)}")
        height, width = image_size
        if len(shape) == 4:
            skew = lambda h, w: abs(math.log(h * width / (w * height)))  # noqa: E731
            if skew(shape[1], shape[2]) < skew(shape[2], shape[3]) - 1e-6:
                layout = cls("BHWC", shape[3], (shape[1], shape[2]))
            else:
                layout = cls("BCHW", shape[1], (shape[2], shape[3]))
            if layout.grid != (1, 1):
                return layout
        elif len(shape) == 3:
            fits = []
            for patch in range(1, max(height, width) + 1):
                h, w = height // patch, width // patch
                prefix = shape[1] - h * w
                if h * w > 1 and 0 <= prefix <= MAX_PREFIX_TOKENS:
                    # a usual number of prefix tokens first, then patches that tile the picture, then few prefix tokens
                    fits.append((prefix > USUAL_PREFIX_TOKENS, height % patch + width % patch > 0, prefix, (h, w)))
            if fits:
                *_, prefix, grid = min(fits)
                return cls("BTC", shape[2], grid, prefix)
        raise ValueError(
            f"the layer has no spatial extent: it returns {tuple(shape)} for a {height}x{width} input; take one that returns "
            "(B, C, h, w), (B, h, w, C) or patch tokens (B, T, C), before pooling and flattening"
        )

    @property
    def channel_dim(self) -> int:
        return 1 if self.kind == "BCHW" else -1

    def to_maps(self, x: Tensor) -> Tensor:
        """Any layout -> (B, C, h, w); prefix tokens are dropped."""
        if self.kind == "BTC":
            x = x[:, self.prefix :].unflatten(1, self.grid)
        return x if self.kind == "BCHW" else x.movedim(-1, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Any layout -> (B, T, C); prefix tokens are kept."""
        if self.kind == "BTC":
            return x
        return (x.flatten(2).transpose(1, 2)) if self.kind == "BCHW" else x.flatten(1, -2)
