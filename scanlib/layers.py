"""A layer of a model: find it, and read how it arranges its features.

name, layer = resolve_layer(model, "layer4")
maps = Layout.infer(features.shape, inputs.shape[2:]).to_maps(features)         # (B, C, h, w), whatever the layer's layout
"""

import contextlib
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torchvision
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


HEAD_NAMES = ("classifier", "aux_classifier", "head", "heads", "fc", "AuxLogits", "aux1", "aux2")
BLOCK_NORMS = ("ln_1", "norm1", "layernorm_before")  # a transformer block's first LayerNorm: torchvision, timm, Hugging Face
NOT_FEATURES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Identity, nn.LayerNorm, torchvision.ops.Permute)


def find_default_layer(model: nn.Module, size: int | tuple[int, ...] = 224, channels: int = 3) -> str:
    """The last layer with a spatial extent in front of the head, found by one forward pass of zeros of ``size``: pixels, (H, W),
    the (L,) of a signal, or the (D, H, W) of a volume.

    For a vision transformer (torchvision, timm, Hugging Face): the last block's first LayerNorm. The block's own output sends
    no gradient to the patch tokens where the head reads the class token only. Raises ValueError when no layer has a spatial
    extent.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    maps, norms, handles = [], [], []

    def note(name):
        def hook(module, inputs, output):
            if not isinstance(output, Tensor):
                return
            spatial = output.shape[1:3] if len(size) == 2 else output.shape[2:]  # (N, h, w, C) too: Swin
            if output.ndim == 3 and len(size) == 2 and name.rpartition(".")[2] in BLOCK_NORMS:
                norms.append(name)
            elif output.ndim == len(size) + 2 and min(spatial) > 1 and not isinstance(module, NOT_FEATURES):
                maps.append(name)

        return hook

    with eval_mode(model), torch.no_grad():
        try:
            for name, module in model.named_modules():
                if name and name.split(".")[0] not in HEAD_NAMES:
                    handles.append(module.register_forward_hook(note(name)))
            first = next(model.parameters())
            model(torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype))
        finally:
            for handle in handles:
                handle.remove()
    if not norms and not maps:
        raise ValueError(f"{type(model).__name__} has no layer with a spatial extent; give target_layer by name")
    return (norms or maps)[-1]


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Put every module into eval mode, and back as each was, exceptions included."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def get_logits(output):
    """What scores are made of: logits (B, K) out of a tensor, a tuple led by one, an object with ``.logits`` (Inception, Hugging
    Face), or a dictionary with "out" (segmentation); a list of dictionaries, one per image (detection), stays as it is."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    if isinstance(output, (tuple, list)) and len(output) and isinstance(output[0], Mapping):
        return list(output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}; wrap it so that it returns logits (B, K)")
    return output if output.ndim > 1 else output.reshape(-1, 1)  # a binary model with one output per image
