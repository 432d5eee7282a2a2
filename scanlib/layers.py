"""Find a layer of a model, and run the model on images without changing either.

name, layer = resolve_layer(model, "layer4")
logits = compute_logits(model, inputs)                                          # (N, K), in eval mode
"""

import contextlib
import difflib

from torch import nn

from scanlib.structure.default_layer import HEAD_NAMES as HEAD_NAMES, find_default_layer as find_default_layer
from scanlib.structure.eval_copy import make_eval_copy as make_eval_copy
from scanlib.structure.layout import Layout as Layout
from scanlib.structure.outputs import compute_logits as compute_logits, get_logits as get_logits


def resolve_layer(model: nn.Module, layer: str | int | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by name (``"layer4.1"``), by module, or by index into ``list(model.modules())[1:]``.

    Returns its dotted name and the module. Raises ValueError for an unknown name or module or an index out of range, TypeError
    for anything else.
    """
    named = dict(list(model.named_modules())[1:])
    if isinstance(layer, str):
        if layer in named:
            return layer, named[layer]
        with contextlib.suppress(AttributeError):  # a second name of a shared module, or a compiled model's inner name
            layer = model.get_submodule(layer) if layer else layer
    if isinstance(layer, str):
        inside = [name for name in named if name.endswith(f".{layer}")][:1]  # of a wrapper, such as DataParallel
        close = inside or difflib.get_close_matches(layer, named, n=5, cutoff=0.5) or list(dict(model.named_children()))
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
