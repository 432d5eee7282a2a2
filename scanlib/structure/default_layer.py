"""Find the layer that an explainer reads if the user names none."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from scanlib.structure.eval_copy import make_eval_copy
from scanlib.structure.inputs import call_model
from scanlib.structure.layout import Layout, is_channels_first

HEAD_NAMES = ("classifier", "aux_classifier", "head", "heads", "fc", "AuxLogits", "aux1", "aux2")
BLOCK_NORMS = ("ln_1", "norm1", "layernorm_before")  # a transformer block's first LayerNorm: torchvision, timm, Hugging Face
NOT_FEATURES = (
    *(nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AvgPoolNd, nn.Identity, nn.LayerNorm, torchvision.ops.Permute),
    *(nn.Softmax, nn.modules.dropout._DropoutNd),  # attention matrices
)


def find_default_layer(model: nn.Module, size: int | Sequence[int] = 224, channels: int = 3) -> str:
    """Return the name of the last layer with a spatial extent before the head. Runs the model once on zeros.

    For a vision transformer (torchvision, timm, Hugging Face) it is the last block's first LayerNorm: where the head reads only
    the class token, the block's own output has a gradient of zero at all patch tokens. Raises ValueError if there is none.

    size: pixels per side of the input, (H, W), (L,) of a signal, or (D, H, W) of a volume. channels: of the input.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    maps: list[str] = []
    norms: list[str] = []

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or len(output) != count:  # the first axis must be the batch
            return
        is_norm = name.rpartition(".")[2] in BLOCK_NORMS and output.ndim == 3 and len(size) == 2
        is_map = output.ndim == len(size) + 2 and not isinstance(module, NOT_FEATURES)
        if is_norm or is_map:
            with contextlib.suppress(ValueError):  # no spatial extent
                Layout.infer(output.shape, size, is_channels_first(module, output))
                (norms if is_norm else maps).append(name)

    copy, count = make_eval_copy(model), 2
    prefix = _find_inner_model(copy)
    for name, module in copy.named_modules():
        if name and name.removeprefix(prefix).split(".")[0] not in HEAD_NAMES:
            module.register_forward_hook(partial(record, name))
    weight = next(model.parameters(), torch.zeros(1))
    with torch.no_grad():
        call_model(copy, torch.zeros(count, channels, *size, device=weight.device, dtype=weight.dtype))
    if not norms and not maps:
        raise ValueError(f"{type(model).__name__} has no layer with a spatial extent; give target_layer by name")
    return (norms or maps)[-1]


def _find_inner_model(model: nn.Module) -> str:
    """Return the prefix of the names inside wrappers, such as "module." or "1.": modules of which one child has all weights."""
    prefix = ""
    while len(inner := [name for name, child in model.named_children() if any(True for _ in child.parameters())]) == 1:
        prefix, model = f"{prefix}{inner[0]}.", model.get_submodule(inner[0])
    return prefix
