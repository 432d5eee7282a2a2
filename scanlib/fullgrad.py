"""FullGrad: no layer left out. A score made of linear pieces is the input's share plus every bias's share, exactly.

    y = <dy/dx, x> + sum over layers of <dy/d output, b>

The map is the size of each share, where it stands.
"""

import contextlib
from functools import partial

import torch
from torch import Tensor, nn

from scanlib.explainer import Explainer, exact
from scanlib.hooks import Layout, logits_of, target_scores
from scanlib.maps import resized

BIASED = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
)


def implicit_bias(module: nn.Module) -> Tensor | None:
    """What a layer in eval mode adds to a linear map of its input, (C,), or None."""
    bias = module.bias
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        scale = torch.rsqrt(module.running_var + module.eps) * (1 if module.weight is None else module.weight)
        bias = (0 if bias is None else bias) - module.running_mean * scale
    return None if bias is None or bias.ndim != 1 else bias.detach()


class FullGrad(Explainer):
    """FullGrad (Srinivas, Fleuret 2019, Eq. 8): |g_x x| + sum over layers and channels of |b g_layer|, at the input's size.

    b is what the layer adds to a linear map: the bias, and for batch normalisation beta - mu gamma / sqrt(var + eps). All layers
    with a spatial extent count, so there is no target_layer. For a network of linear pieces the signed terms, the head's own
    bias included, sum to the score. Absolute values are summed over the channels before anything is resized.
    """

    def __init__(self, model, target_layer=None, preprocess=None):
        if target_layer is not None:
            raise ValueError(f"target_layer {target_layer!r} has no meaning for FullGrad, which reads every layer; leave it out")
        super().__init__(model, None, preprocess)

    def _maps(self, inputs, target):
        totals: dict[tuple[int, ...], Tensor] = {}  # by grid
        size = tuple(inputs.shape[2:])

        def add(bias: Tensor, layout: Layout, gradient: Tensor) -> None:
            term = torch.einsum("nc...,c->n...", exact(layout.to_maps(gradient)).abs(), exact(bias).abs())
            totals[layout.grid] = totals[layout.grid] + term if layout.grid in totals else term

        def watch(module, _, output):
            bias = implicit_bias(module)
            if bias is not None and output.requires_grad:
                with contextlib.suppress(ValueError):  # no spatial extent
                    # what the hook is given belongs to the output as it is now, whatever works on it in place afterwards
                    output.register_hook(partial(add, bias, Layout.infer(output.shape, size)))

        handles = [module.register_forward_hook(watch) for module in self.model.modules() if isinstance(module, BIASED)]
        try:
            with torch.enable_grad():
                inputs = inputs.detach().requires_grad_()
                score = target_scores(logits_of(self.model(inputs)), target).sum()
        finally:
            for handle in handles:
                handle.remove()
        (gradient,) = torch.autograd.grad(score, inputs)
        maps = exact(gradient * inputs.detach()).abs().sum(1)
        return sum((resized(total, size) for total in totals.values()), maps)
