"""Libra: input times LibraGrad's gradient, summed over the inputs of all blocks.

    map = sum over blocks l, channels c of x_lc * dy/dx_lc          gradients as in ``libra``

It needs one forward and one backward pass, and no training. Within ``libra`` the products of every block, prefix tokens and
biases included, add up to the score. Mehri, Baghshah, Pilehvar 2025, arXiv 2411.16760 (FullGrad+ without the biases).

    maps = Libra(model, preprocess=preprocess)(images)              # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map
from scanlib.hooks import check_finite, differentiate
from scanlib.layers import make_eval_copy, resolve_layer
from scanlib.structure.default_layer import HEAD_NAMES
from scanlib.structure.layout import read_layout
from scanlib.structure.libra import libra as libra
from scanlib.structure.outputs import run_copy
from scanlib.targets import compute_scores
from scanlib.training.interrupts import delay_interrupts

CONTAINERS = (nn.Sequential, nn.ModuleList)


def find_blocks(model: nn.Module) -> list[str]:
    """Return the names of a model's blocks: the modules with weights that Sequential and ModuleList hold, outside the head.

    A block has modules of its own. If there is none, the convolutions are returned.
    """

    def search(module: nn.Module, prefix: str, inside: bool) -> list[str]:
        found = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if name in HEAD_NAMES or not any(True for _ in child.parameters()):
                continue
            if isinstance(child, CONTAINERS):
                found += search(child, f"{path}.", True)
            elif inside and any(True for _ in child.children()):
                found.append(path)
            else:
                found += search(child, f"{path}.", False)
        return found

    return search(model, "", False) or [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]


class Libra(Explainer):
    """Input times gradient, summed over the blocks' inputs, with the gradients of LibraGrad.

    Args:
        target_layer: the blocks whose inputs are read, as a name, module, index or a list of them. None reads the blocks of
            ``find_blocks``.
        libra: False takes the plain gradient, to compare with.

    Inputs without a spatial extent are left out. Inputs of a coarser grid are resized to the finest, so that their sum stays.

    Raises ValueError if no block's input has a spatial extent that the score depends on. See ``Explainer``.
    """

    needs_gradient = True

    def __init__(self, model: nn.Module, target_layer=None, preprocess: Callable | None = None, *, libra: bool = True, **options):
        super().__init__(model, target_layer, preprocess, libra=libra, **options)
        layers = target_layer if isinstance(target_layer, (list, tuple)) else [target_layer]
        self.blocks = find_blocks(model) if target_layer is None else [resolve_layer(model, layer)[0] for layer in layers]
        if not self.blocks:
            raise ValueError(f"{type(model).__name__} has no blocks; pass target_layer, a block or a list of blocks")

    def _compute_maps(self, inputs: Tensor, target) -> Tensor:
        with torch.enable_grad():
            tensors, logits = self._record_inputs(inputs.detach().clone().requires_grad_())
            score = compute_scores(logits, target).sum()
            names = list(tensors)
            found = differentiate(score, [tensors[name] for name in names], allow_unused=True) if score.requires_grad else ()
        products = {
            name: at_least_float32(tensors[name].detach()) * check_finite(gradient, f"the gradient at block {name!r} holds")
            for name, gradient in zip(names, found, strict=False)
            if gradient is not None
        }
        maps = []
        for name, product in products.items():
            try:
                layout = read_layout(self.model, name, tensors[name], inputs, partial(self._run_to, name), self.layout)
            except ValueError:
                continue  # no spatial extent
            maps.append(layout.to_maps(product).sum(1))
        if not maps:
            seen = ", ".join(self.blocks[:3])
            raise ValueError(f"no input of {seen} has a spatial extent and a gradient; pass target_layer")
        size = max((each.shape[1:] for each in maps), key=math.prod)
        total = torch.zeros(len(inputs), *size, dtype=maps[0].dtype, device=maps[0].device)
        for each in maps:
            total += resize_map(each, size) * (math.prod(each.shape[1:]) / math.prod(size))
        return total

    def _record_inputs(self, inputs: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Run a copy of the model. Return the first tensor that each block gets, and the logits."""
        tensors: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, arguments: tuple, named: dict) -> None:
            given = next((each for each in (*arguments, *named.values()) if isinstance(each, Tensor)), None)
            if given is not None and len(given) == len(inputs) and given.ndim > 2 and given.is_floating_point():
                tensors[name] = given

        copy = make_eval_copy(self.model)
        for name in self.blocks:
            copy.get_submodule(name).register_forward_pre_hook(partial(record, name), with_kwargs=True)
        with delay_interrupts(), self._change_gradients():
            logits = run_copy(copy, inputs, self.output)
        return tensors, logits

    @torch.no_grad()
    def _run_to(self, name: str, inputs: Tensor) -> Tensor:
        return self._record_inputs(inputs)[0][name]
