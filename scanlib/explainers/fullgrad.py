"""FullGrad: no layer left out. A score made of linear pieces is the input's share plus every bias's share, exactly.

    y = <dy/dx, x> + sum over layers of <dy/d output, b>

The map is the size of each share, where it stands.
"""

import math
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map
from scanlib.layers import Layout, get_logits
from scanlib.targets import compute_scores

NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)  # with statistics of their own
BIASED_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(*NORMS, nn.GroupNorm, nn.LayerNorm),
)


NONE = (type(None), nn.Identity)


def compute_implicit_bias(module: nn.Module) -> Tensor | None:
    """What a layer in eval mode adds to a linear map of its input, (C,), or None."""
    bias = module.bias
    if isinstance(module, NORMS) and module.running_mean is not None:
        scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)
        bias = (0 if bias is None else bias) - module.running_mean * scale
    return None if bias is None or bias.ndim != 1 else bias.detach()


def _layout(module: nn.Module, output: Tensor, size: tuple[int, ...]) -> Layout:
    """Channels stand last behind a Linear or a LayerNorm, first behind all else (and behind a LayerNorm made for maps).

    Raises ValueError for what is no grid over the picture.
    """
    shape = tuple(output.shape)
    if not isinstance(module, (nn.Linear, nn.LayerNorm)) or (output.ndim > 3 and shape[1] == len(module.bias) != shape[-1]):
        return Layout("BCHW", shape[1], shape[2:])
    if len(shape) == 3 and len(size) == 2:
        return Layout.infer(shape, size)
    layout = Layout("BHWC", shape[-1], shape[1:-1])
    cell = [side / cells for side, cells in zip(size, layout.grid, strict=True)]
    if max(cell) > 1.25 * min(cell):  # windows, not places
        raise ValueError("no grid over the picture")
    return layout


class FullGrad(Explainer):
    """FullGrad (Srinivas, Fleuret 2019, Eq. 8): |g_x x| + sum over layers and channels of |b g_layer|, at the input's size.

    b is what the layer adds to a linear map: the bias, and for batch normalisation beta - mu gamma / sqrt(var + eps). All layers
    with a spatial extent count, so there is no target_layer. For a network of linear pieces the signed terms, the head's own
    bias included, sum to the score. Absolute values are summed over the channels before anything is resized. Attention's own
    biases are not seen, and models that cut the picture into windows, or norms with an activation built in, are refused.
    """

    def __init__(self, model, target_layer=None, preprocess=None):
        if target_layer is not None:
            raise ValueError(f"target_layer {target_layer!r} has no meaning for FullGrad, which reads every layer; leave it out")
        super().__init__(model, None, preprocess)

    def _maps(self, inputs, target):
        totals: dict[tuple[int, ...], Tensor] = {}  # by grid
        size = tuple(inputs.shape[2:])

        def add(bias: Tensor, layout: Layout, gradient: Tensor) -> None:
            term = torch.einsum("nc...,c->n...", at_least_float32(layout.to_maps(gradient)).abs(), at_least_float32(bias).abs())
            totals[layout.grid] = totals[layout.grid] + term if layout.grid in totals else term

        def watch(name: str, module, _, output) -> None:
            bias = compute_implicit_bias(module)
            if bias is None or not output.requires_grad or output.ndim < 3:
                return
            try:
                layout = _layout(module, output, size)
                fits = len(output) == len(inputs) and layout.channels == len(bias)
            except ValueError:
                fits = output.numel() == len(inputs) * len(bias)  # a single place, as a class token's
                layout = None
            if not fits or not isinstance(getattr(module, "act", None), NONE):
                raise ValueError(f"FullGrad does not know where the bias of {name!r} acts on the picture; take GradCAM")
            if layout is not None and math.prod(layout.grid) > 1:
                # what the hook is given belongs to the output as it is now, whatever works on it in place afterwards
                output.register_hook(partial(add, bias, layout))

        handles = [
            m.register_forward_hook(partial(watch, name))
            for name, m in self.model.named_modules()
            if isinstance(m, BIASED_LAYERS)
        ]
        try:
            with torch.enable_grad():
                inputs = inputs.detach().requires_grad_()
                score = compute_scores(get_logits(self.model(inputs)), target).sum()
        finally:
            for handle in handles:
                handle.remove()
        (gradient,) = torch.autograd.grad(score, inputs)
        maps = at_least_float32(gradient * inputs.detach()).abs().sum(1)
        return sum((resize_map(total, size) for total in totals.values()), maps)
