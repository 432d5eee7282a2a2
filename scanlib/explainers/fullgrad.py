"""FullGrad: a score made of linear pieces is the input's contribution plus the contribution of every bias.

    y = <dy/dx, x> + sum over layers of <dy/d output, b>

The map is the magnitude of each contribution at its location.

    maps = FullGrad(model, preprocess=preprocess)(images)           # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

import math
import warnings
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, full_precision, resize_map
from scanlib.hooks import check_finite, differentiate
from scanlib.layers import Layout, make_eval_copy
from scanlib.structure.outputs import run_copy
from scanlib.targets import compute_scores
from scanlib.training.interrupts import delay_interrupts

NORMS = (nn.modules.batchnorm._BatchNorm, torchvision.ops.FrozenBatchNorm2d)  # with running statistics
BIASED_LAYERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(*NORMS, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention),
)
LINEAR_PIECES = (
    *(
        nn.modules.conv._ConvNd,
        *NORMS,
        nn.Linear,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.PReLU,
        nn.Hardtanh,
        nn.modules.dropout._DropoutNd,
    ),
    *(nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd),
    *(nn.modules.pooling._AdaptiveMaxPoolNd, nn.Flatten, nn.Identity, nn.Upsample, torchvision.ops.StochasticDepth),
)


def compute_implicit_bias(module: Any) -> Tensor | None:
    """Return what a layer in eval mode adds to a linear function of its input, (C,), or None if it adds nothing.

    In attention the weights of the values sum to 1, so it adds their projected bias and that of the projection.
    """
    if isinstance(module, nn.MultiheadAttention):
        if module.in_proj_bias is None:
            return None
        values = module.in_proj_bias[2 * module.embed_dim :]
        return (module.out_proj.weight @ values + module.out_proj.bias).detach()
    bias = module.bias
    if isinstance(module, NORMS) and module.running_mean is not None and module.running_var is not None:
        scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)
        bias = (0 if bias is None else bias) - module.running_mean * scale
    return None if bias is None or bias.ndim != 1 else bias.detach()


def infer_output_layout(module: Any, output: Tensor, size: tuple[int, ...], channels: int) -> Layout:
    """Return the layout of a layer's output for an input of ``size``. Raises ValueError if it has no grid over the image.

    Channels are last behind a Linear or LayerNorm, first behind other layers and behind a LayerNorm for maps (N, C, h, w).
    """
    shape = tuple(output.shape)
    if not isinstance(module, (nn.Linear, nn.LayerNorm, nn.MultiheadAttention)) or (
        output.ndim > 3 and shape[1] == channels != shape[-1]
    ):
        return Layout("BCHW", shape[1], shape[2:])
    if len(shape) == 3 and len(size) == 2:
        return Layout.infer(shape, size, is_channels_first=False)
    layout = Layout("BHWC", shape[-1], shape[1:-1])
    cell = [side / cells for side, cells in zip(size, layout.grid, strict=True)]
    if max(cell) > 1.25 * min(cell):
        raise ValueError("the output consists of windows, not of a grid over the image")
    return layout


class FullGrad(Explainer):
    """FullGrad (Srinivas, Fleuret 2019, Eq. 8): |G_x x| + sum over layers and channels of |b G_layer|, at the input's size.

    b is what the layer adds to a linear function: the bias, and for batch normalisation beta - mu gamma / sqrt(var + eps). For a
    network of linear pieces the signed terms, including the head's bias, sum to the score. Absolute values are summed over the
    channels before resizing. All layers with a spatial extent are read, so target_layer must be None.

    Each call compares the sum of the signed terms with the score. A difference is an error for a model whose modules are all
    linear in pieces: its forward adds a bias that no layer holds. For other models it is a warning.

    Raises ValueError for that, for models that split the image into windows and for norms with a built-in activation.
    """

    needs_gradient = True

    def __init__(self, model, target_layer=None, preprocess=None, **options):
        if target_layer is not None:
            raise ValueError(f"target_layer must be None for FullGrad, which reads every layer, got {target_layer!r}")
        super().__init__(model, None, preprocess, **options)

    def _compute_maps(self, inputs, target):
        totals: dict[tuple[int, ...], Tensor] = {}  # by grid
        signed = torch.zeros(len(inputs), dtype=torch.promote_types(inputs.dtype, torch.float32), device=inputs.device)
        size = tuple(inputs.shape[2:])

        def add(bias: Tensor, axis: int, layout: Layout | None, gradient: Tensor | None) -> None:
            if gradient is None:  # the score does not depend on the layer
                return
            gradient, bias = at_least_float32(gradient), at_least_float32(bias)
            with full_precision(gradient):
                places = [dim for dim in range(1, gradient.ndim) if dim != axis % gradient.ndim]
                signed.add_(((gradient.sum(places) if places else gradient) @ bias).to(signed.dtype))
                if layout is not None:
                    maps = layout.to_maps(gradient).abs()
                    term = (bias.abs()[None, None] @ maps.flatten(2)).reshape(len(maps), *layout.grid)
                    totals[layout.grid] = totals.get(layout.grid, 0) + term

        def watch(name: str, module: nn.Module, _, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            bias = compute_implicit_bias(module)
            if bias is None or not output.requires_grad:
                return
            layout, is_known = None, len(output) == len(inputs) and output.ndim < 3
            if not is_known:
                try:
                    layout = infer_output_layout(module, output, size, len(bias))
                    is_known = len(output) == len(inputs) and layout.channels == len(bias)
                except ValueError:
                    is_known = output.numel() == len(inputs) * len(bias)  # a single location, such as a class token
            # timm's norms with a built-in activation have an attribute `act`
            if not is_known or not isinstance(getattr(module, "act", None), (type(None), nn.Identity)):
                raise ValueError(f"FullGrad cannot locate the bias of layer {name!r} in the image; use GradCAM")
            if layout is not None and math.prod(layout.grid) == 1:
                layout = None
            axis = 1 if layout is None and output.shape[1] == len(bias) else -1 if layout is None else layout.channel_dim
            output.register_hook(partial(add, bias, axis, layout))  # unaffected by in-place operations on the output afterwards

        copy = make_eval_copy(self.model)
        for name, module in copy.named_modules():
            if isinstance(module, BIASED_LAYERS):
                module.register_forward_hook(partial(watch, name))
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            with delay_interrupts(), self._change_gradients():
                logits = run_copy(copy, inputs, self.output)
            scores = compute_scores(logits, target)
            (gradient,) = differentiate(scores.sum(), [inputs], allow_unused=True) if scores.requires_grad else (None,)
        if gradient is None:
            raise ValueError(
                "the score does not depend on the images by any gradient: the model runs under no_grad or its layers are "
                "quantized; use ScoreCAM"
            )
        products = at_least_float32(check_finite(gradient, "the gradient at the inputs holds") * inputs.detach())
        self._check_completeness(copy, signed + products.flatten(1).sum(1), scores.detach())
        return sum((resize_map(total, size) for total in totals.values()), products.abs().sum(1))

    def _check_completeness(self, copy: nn.Module, found: Tensor, scores: Tensor) -> None:
        """Compare the sum of all terms with the scores (N,)."""
        gap = (found - scores).abs() / torch.maximum(scores.abs(), found.abs()).clamp_min(1e-3)
        if float(gap.max()) < (0.01 if scores.dtype in (torch.float32, torch.float64) else 0.1):
            return
        worst = int(gap.argmax())
        message = f"the terms of FullGrad sum to {float(found[worst]):.4g}, the score is {float(scores[worst]):.4g}"
        leaves = [module for module in copy.modules() if not any(True for _ in module.children())]
        if all(isinstance(module, LINEAR_PIECES) for module in leaves):
            raise ValueError(f"{message}: the model adds a bias or a nonlinearity that no layer holds; use GradCAM")
        warnings.warn(f"{message}; they are equal for networks of linear pieces only", stacklevel=6)
