"""Find a layer of a model, and read how it arranges its features.

name, layer = resolve_layer(model, "layer4")
maps = Layout.infer(features.shape, inputs.shape[2:]).to_maps(features)         # any layout -> (B, C, h, w)
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

USUAL_PREFIX_TOKENS, MAX_PREFIX_TOKENS = 5, 16  # class, distillation and register tokens before the patch tokens
HEAD_NAMES = ("classifier", "aux_classifier", "head", "heads", "fc", "AuxLogits", "aux1", "aux2")
BLOCK_NORMS = ("ln_1", "norm1", "layernorm_before")  # a transformer block's first LayerNorm: torchvision, timm, Hugging Face
NOT_FEATURES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Identity, nn.LayerNorm, torchvision.ops.Permute)


def resolve_layer(model: nn.Module, layer: str | int | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by name (``"layer4.1"``), by module, or by index into ``list(model.modules())[1:]``.

    Returns its dotted name and the module. Raises ValueError for an unknown name or module or an index out of range, TypeError
    for anything else.
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
    raise TypeError(f"target_layer must be a name, a module or an index, got {type(layer).__name__}")


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
    def infer(cls, shape: Sequence[int], image_size: Sequence[int]) -> "Layout":
        """Infer the layout from the shape of the features and the (H, W) of the input; (L,) of a signal, (D, H, W) of a volume.

        Channels are first or last, whichever gives the grid that is closer to the input's aspect ratio. Tokens are square
        patches p x p on a grid (H // p, W // p) after the prefix tokens. If several p are possible, one with at most 5 prefix
        tokens is preferred, then one whose patches tile the image. Raises ValueError for a layer without a spatial extent.
        """
        if len(shape) == len(image_size) + 2:
            first, last = cls("BCHW", shape[1], tuple(shape[2:])), cls("BHWC", shape[-1], tuple(shape[1:-1]))
            is_last = _compute_distortion(last.grid, image_size) < _compute_distortion(first.grid, image_size) - 1e-6
            layout = last if is_last else first
            if math.prod(layout.grid) > 1:
                return layout
        elif len(shape) == 3 and len(image_size) == 2:
            candidates = []
            for patch in range(1, max(image_size) + 1):
                h, w = image_size[0] // patch, image_size[1] // patch
                prefix, has_border = shape[1] - h * w, any(size % patch for size in image_size)
                if h * w > 1 and 0 <= prefix <= MAX_PREFIX_TOKENS:
                    candidates.append((prefix > USUAL_PREFIX_TOKENS, has_border, prefix, (h, w)))
            if candidates:
                *_, prefix, grid = min(candidates)
                return cls("BTC", shape[2], grid, prefix)
        raise ValueError(
            f"target_layer has no spatial extent: it returns {tuple(shape)} for an input of {tuple(image_size)}; take one that "
            "returns (B, C, h, w), (B, h, w, C) or patch tokens (B, T, C), before pooling and flattening"
        )

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


def _compute_distortion(grid: Sequence[int], image_size: Sequence[int]) -> float:
    """Return how far a grid is from the image's aspect ratio; 0 for the same ratio."""
    scales = [math.log(size / cells) for size, cells in zip(image_size, grid, strict=True)]
    return max(scales) - min(scales)


def find_default_layer(model: nn.Module, size: int | Sequence[int] = 224, channels: int = 3) -> str:
    """Return the name of the last layer with a spatial extent before the head. Runs the model once on zeros.

    For a vision transformer (torchvision, timm, Hugging Face) it is the last block's first LayerNorm: where the head reads only
    the class token, the block's own output has a gradient of zero at all patch tokens. Raises ValueError if there is none.

    size: pixels per side of the input, (H, W), (L,) of a signal, or (D, H, W) of a volume. channels: of the input.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    maps, norms = [], []

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if output.ndim == 3 and len(size) == 2 and name.rpartition(".")[2] in BLOCK_NORMS:
            norms.append(name)
        elif output.ndim == len(size) + 2 and not isinstance(module, NOT_FEATURES):
            grid = output.shape[1:3] if len(size) == 2 else output.shape[2:]  # [1:3] also serves channels last, as in Swin
            if min(grid) > 1:
                maps.append(name)

    with eval_mode(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and name.split(".")[0] not in HEAD_NAMES:
                hooks.enter_context(module.register_forward_hook(partial(record, name)))
        weight = next(model.parameters())
        model(torch.zeros(1, channels, *size, device=weight.device, dtype=weight.dtype))
    if not norms and not maps:
        raise ValueError(f"{type(model).__name__} has no layer with a spatial extent; give target_layer by name")
    return (norms or maps)[-1]


def get_logits(output: Any) -> Any:
    """Return the part of a model's output that scores are computed from.

    Logits (B, K) come from a tensor, a tuple whose first entry is one, an object with ``.logits`` (Inception, Hugging Face), or
    a dictionary with "logits" or "out" (segmentation). A list of dictionaries, one per image (detection), is returned as it is.
    Raises TypeError for any other output.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    if isinstance(output, (tuple, list)) and len(output) and isinstance(output[0], Mapping):
        return list(output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return logits (B, K), got {type(output).__name__}; wrap the model so that it does")
    return output if output.ndim > 1 else output.reshape(-1, 1)  # a binary model with one output per image


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module into eval mode, and restore each one's own mode afterwards, also after an exception."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def to_channels_last(inputs: Tensor) -> Tensor:
    """Convert image batches on the CPU to channels-last memory format, in which convolutions run faster."""
    is_image_batch = inputs.ndim == 4 and inputs.device.type == "cpu"
    return inputs.contiguous(memory_format=torch.channels_last) if is_image_batch else inputs
