"""FullGrad: a score made of linear pieces is the input's contribution plus the contribution of every bias.

    y = <dy/dx, x> + sum over layers of <dy/d output, b>

The map is the magnitude of each contribution at its location.

    maps = FullGrad(model, preprocess=preprocess)(images)           # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map
from scanlib.layers import Layout, get_logits
from scanlib.targets import compute_scores

NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)  # with running statistics
BIASED_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(*NORMS, nn.GroupNorm, nn.LayerNorm),
)


def compute_implicit_bias(module: Any) -> Tensor | None:
    """Return what a layer in eval mode adds to a linear function of its input, (C,), or None if it adds nothing."""
    bias = module.bias
    if isinstance(module, NORMS) and module.running_mean is not None and module.running_var is not None:
        scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)
        bias = (0 if bias is None else bias) - module.running_mean * scale
    return None if bias is None or bias.ndim != 1 else bias.detach()


def _infer_layout(module: Any, output: Tensor, size: tuple[int, ...]) -> Layout:
    """Return the layout of a layer's output for an input of ``size``. Raises ValueError if it has no grid over the image.

    Channels are last behind a Linear or LayerNorm, first behind other layers and behind a LayerNorm for maps (N, C, h, w).
    """
    shape = tuple(output.shape)
    if not isinstance(module, (nn.Linear, nn.LayerNorm)) or (output.ndim > 3 and shape[1] == len(module.bias) != shape[-1]):
        return Layout("BCHW", shape[1], shape[2:])
    if len(shape) == 3 and len(size) == 2:
        return Layout.infer(shape, size)
    layout = Layout("BHWC", shape[-1], shape[1:-1])
    cell = [side / cells for side, cells in zip(size, layout.grid, strict=True)]
    if max(cell) > 1.25 * min(cell):
        raise ValueError("the output consists of windows, not of a grid over the image")
    return layout


class FullGrad(Explainer):
    """FullGrad (Srinivas, Fleuret 2019, Eq. 8): |G_x x| + sum over layers and channels of |b G_layer|, at the input's size.

    b is what the layer adds to a linear function: the bias, and for batch normalisation beta - mu gamma / sqrt(var + eps). For a
    network of linear pieces the signed terms, including the head's bias, sum to the score. Absolute values are summed over the
    channels before resizing. All layers with a spatial extent are read, so target_layer must be None. The biases inside attention
    are left out. Raises ValueError for models that split the image into windows and for norms with a built-in activation.
    """

    def __init__(self, model, target_layer=None, preprocess=None):
        if target_layer is not None:
            raise ValueError(f"target_layer must be None for FullGrad, which reads every layer, got {target_layer!r}")
        super().__init__(model, None, preprocess)

    def _compute_maps(self, inputs, target):
        totals: dict[tuple[int, ...], Tensor] = {}  # by grid
        size = tuple(inputs.shape[2:])

        def add(bias: Tensor, layout: Layout, gradient: Tensor) -> None:
            term = torch.einsum("nc...,c->n...", at_least_float32(layout.to_maps(gradient)).abs(), at_least_float32(bias).abs())
            totals[layout.grid] = totals.get(layout.grid, 0) + term

        def watch(name: str, module: nn.Module, _, output: Tensor) -> None:
            bias = compute_implicit_bias(module)
            if bias is None or not output.requires_grad or output.ndim < 3:
                return
            try:
                layout = _infer_layout(module, output, size)
                is_known = len(output) == len(inputs) and layout.channels == len(bias)
            except ValueError:
                is_known = output.numel() == len(inputs) * len(bias)  # a single location, such as a class token
                layout = None
            # timm's norms with a built-in activation have an attribute `act`
            if not is_known or not isinstance(getattr(module, "act", None), (type(None), nn.Identity)):
                raise ValueError(f"FullGrad cannot locate the bias of layer {name!r} in the image; use GradCAM")
            if layout is not None and math.prod(layout.grid) > 1:
                output.register_hook(partial(add, bias, layout))  # unaffected by in-place operations on the output afterwards

        with ExitStack() as hooks, torch.enable_grad():
            for name, module in self.model.named_modules():
                if isinstance(module, BIASED_LAYERS):
                    hooks.enter_context(module.register_forward_hook(partial(watch, name)))
            inputs = inputs.detach().requires_grad_()
            score = compute_scores(get_logits(self.model(inputs)), target).sum()
        (gradient,) = torch.autograd.grad(score, inputs)
        maps = at_least_float32(gradient * inputs.detach()).abs().sum(1)
        return sum((resize_map(total, size) for total in totals.values()), maps)
