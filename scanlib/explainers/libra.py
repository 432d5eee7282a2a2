"""Libra: input times LibraGrad's gradient, summed over the inputs of all blocks.

    map = sum over blocks l, channels c of x_lc * dy/dx_lc          gradients as in ``libra``
        + sum over layers m, channels c of b_mc * dy/dz_mc          with biases=True; z_m is the output of layer m

It needs one forward and one backward pass, and no training. Within ``libra`` the products of every block, prefix tokens and
biases included, add up to the score. Mehri, Baghshah, Pilehvar 2025, arXiv 2411.16760 (FullGrad+, with and without biases).

    maps = Libra(model, preprocess=preprocess)(images)              # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map
from scanlib.explainers.fullgrad import BIASED_LAYERS, compute_implicit_bias, infer_output_layout
from scanlib.hooks import FeatureTap, check_finite, differentiate
from scanlib.layers import make_eval_copy, resolve_layer
from scanlib.structure.default_layer import HEAD_NAMES
from scanlib.structure.inputs import leave_inference_mode
from scanlib.structure.layout import read_layout
from scanlib.structure.libra import libra as libra
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, compute_scores
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
        biases: True adds the contribution of the biases of all layers, where it has a location in the image.
        libra: False takes the plain gradient, to compare with.

    Inputs without a spatial extent are left out. Inputs of a coarser grid are resized to the finest, so that their sum stays.

    Raises ValueError if no block's input has a spatial extent that the score depends on. See ``Explainer``.
    """

    needs_gradient = True

    def __init__(
        self,
        model: nn.Module,
        target_layer=None,
        preprocess: Callable | None = None,
        *,
        biases: bool = False,
        libra: bool = True,
        **options,
    ):
        super().__init__(model, target_layer, preprocess, libra=libra, **options)
        self.biases = biases
        layers = target_layer if isinstance(target_layer, (list, tuple)) else [target_layer]
        self.blocks = find_blocks(model) if target_layer is None else [resolve_layer(model, layer)[0] for layer in layers]
        if not self.blocks:
            raise ValueError(
                f"{type(model).__name__} has no blocks; pass target_layer, a block or a list of blocks, or use another mask_by"
            )

    def _compute_maps(self, inputs: Tensor, target) -> Tensor:
        of_biases: list[Tensor] = []
        with torch.enable_grad():
            start = inputs.detach().clone().requires_grad_()
            tensors, logits = self._record_inputs(start, of_biases if self.biases else None)
            score = compute_scores(logits, target).sum()
            names = list(tensors)
            ends = [*(tensors[name] for name in names), *([start] if self.biases else [])]
            found = differentiate(score, ends, allow_unused=True) if score.requires_grad else ()
        return self.sum_products(inputs, tensors, dict(zip(names, found, strict=False)), of_biases)

    def sum_products(self, inputs: Tensor, tensors: dict, gradients: dict, of_biases: Sequence[Tensor] = ()) -> Tensor:
        """Return the sum (N, h, w) of the blocks' inputs times the gradients there, and of the maps of the biases.

        tensors, gradients: by the name of the block; None for the gradient of an input that the score does not depend on.
        """
        products = {
            name: at_least_float32(tensors[name].detach()) * check_finite(gradient, f"the gradient at block {name!r} holds")
            for name, gradient in gradients.items()
            if gradient is not None
        }
        maps: list[Tensor] = []
        for name, product in products.items():
            try:
                layout = read_layout(self.model, name, tensors[name], inputs, partial(self._run_to, name), self.layout)
            except ValueError:
                continue  # no spatial extent
            maps.append(layout.to_maps(product).sum(1))
        if not maps:
            seen = ", ".join(self.blocks[:3])
            raise ValueError(f"no input of {seen} has a spatial extent and a gradient; pass target_layer, or use another mask_by")
        size = max((each.shape[1:] for each in maps), key=math.prod)
        maps += of_biases
        total = torch.zeros(len(inputs), *size, dtype=maps[0].dtype, device=maps[0].device)
        for each in maps:
            total += resize_map(each, size).to(total.dtype) * (math.prod(each.shape[1:]) / math.prod(size))
        return total

    def _record_inputs(self, inputs: Tensor, of_biases: list[Tensor] | None = None) -> tuple[dict[str, Tensor], Any]:
        """Run a copy of the model. Return the first tensor that each block gets, and the logits.

        of_biases: gets a map (N, h, w) of each bias when the score is differentiated.
        """
        copy = make_eval_copy(self.model)
        tensors = self.watch_inputs(copy, len(inputs))
        if of_biases is not None:
            for module in copy.modules():
                if isinstance(module, BIASED_LAYERS):
                    module.register_forward_hook(partial(_watch_bias, of_biases, inputs))
        with delay_interrupts(), self._change_gradients():
            logits = run_copy(copy, inputs, self.output)
        return tensors, logits

    def watch_inputs(self, copy: nn.Module, count: int) -> dict[str, Tensor]:
        """Return a dictionary that gets each block's first tensor, by the block's name, when the copy runs ``count`` images."""
        tensors: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, arguments: tuple, named: dict) -> None:
            given = next((each for each in (*arguments, *named.values()) if isinstance(each, Tensor)), None)
            if given is not None and len(given) == count and given.ndim > 2 and given.is_floating_point():
                tensors[name] = given

        for name in self.blocks:
            copy.get_submodule(name).register_forward_pre_hook(partial(record, name), with_kwargs=True)
        return tensors

    @torch.no_grad()
    def _run_to(self, name: str, inputs: Tensor) -> Tensor:
        return self._record_inputs(inputs)[0][name]


class LibraTap(FeatureTap):
    """``FeatureTap`` with LibraGrad's gradient that also computes the map of ``Libra``, in one forward and one backward pass.

    Creating it, or reading the map, raises ValueError for a model whose blocks ``Libra`` does not find.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module, **options):
        super().__init__(model, layer, **options | {"record": "all", "libra": True})
        self._explainer = Libra(model, output=self.output)
        self._block_inputs: dict[str, Tensor] = {}
        self._count = 0

    def __call__(self, inputs: Tensor) -> Any:
        with leave_inference_mode():  # a frozen model records nothing unless the input requires a gradient
            start = inputs.detach().clone().requires_grad_()
        self._count = len(start)
        return super().__call__(start)

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._block_inputs = {}

    def _add_hooks(self, copy: nn.Module) -> None:
        super()._add_hooks(copy)
        self._block_inputs = self._explainer.watch_inputs(copy, self._count)

    @property
    def features(self) -> Tensor:
        return super().features.detach()

    def gradient_and_relevance(self, target: Target = None) -> tuple[Tensor, Tensor]:
        """Compute ``gradient`` and the raw map of ``Libra`` (B, h, w), float32 or better. target: see ``gradients``."""
        names = list(self._block_inputs)
        gradient, *others = self._compute_gradients([*self.captured, *self._block_inputs.values()], target)
        if gradient is None:
            raise self._no_gradient_error(self.name)
        assert self._inputs is not None
        of_blocks = dict(zip(names, others, strict=True))
        return gradient, self._explainer.sum_products(self._inputs, self._block_inputs, of_blocks)


def _watch_bias(maps: list[Tensor], inputs: Tensor, module: nn.Module, _, output: Any) -> None:
    """Add the map of the bias of a layer to ``maps``, once the gradient at its output is known."""
    output, bias = output[0] if isinstance(output, tuple) else output, compute_implicit_bias(module)
    if bias is None or not output.requires_grad or len(output) != len(inputs):
        return
    try:
        layout = infer_output_layout(module, output, tuple(inputs.shape[2:]), len(bias))
    except ValueError:
        return  # no location in the image
    if layout.channels == len(bias) and math.prod(layout.grid) > 1:
        contribute = partial(torch.einsum, "c,nc...->n...", at_least_float32(bias))
        output.register_hook(lambda gradient: maps.append(contribute(at_least_float32(layout.to_maps(gradient)))))
