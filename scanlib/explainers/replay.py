"""Run only the part of a model behind a layer, on given features.

    with Replay(model, "layer4", inputs) as replay:         # inputs (N, 3, H, W): runs the model once
        outputs = replay(features, image=2)                 # (n, C, h, w) instead of the layer's output for image 2 -> (n, K)

The first run records the output of every outermost module that ends before the layer begins. Later runs return these outputs
instead of computing them, and the layer returns the given features.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from scanlib.hooks import FeatureTaps, check_finite
from scanlib.layers import Layout, make_eval_copy, resolve_layer
from scanlib.structure.outputs import run_copy_once


class Replay:
    """Replay a model from one layer on. It runs an eval copy of the model. Leaving the ``with`` frees the recorded outputs.

    Args:
        model, layer: as in ``FeatureTap``. If the layer runs several times in one forward pass, its last run counts.
        inputs: (N, ...), preprocessed.
        output, layout: as in ``FeatureTaps``.

    Attributes: ``features``, the layer's own output (N, ...), arranged as ``layout`` says; ``outputs``, the model's. If the
    recorded outputs do not reproduce ``outputs`` (a model that treats the images of a batch differently), every call runs the
    whole model.

    Raises RuntimeError if the layer does not run, TypeError if it does not return a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | int | nn.Module,
        inputs: Tensor,
        output: str | int | None = None,
        layout: str | Layout | None = None,
    ):
        self.inputs, self.output = inputs, output
        self.name = resolve_layer(model, layer)[0]
        self._copy = make_eval_copy(model)
        self._layer = self._copy.get_submodule(self.name)
        self._share = True
        self._stack: list[list] = []  # the modules running now: [module, outputs of its finished children]
        self._recorded: list[tuple[nn.Module, Any]] = []
        self._output: Any  # of the layer
        try:
            self.outputs = self._record()
        except RuntimeError as error:
            if "view size is not compatible" not in str(error) or inputs.is_contiguous():
                raise
            self.inputs = inputs.contiguous()  # the model needs channels first in memory
            self.outputs = self._record()
        if not self._runs:
            raise RuntimeError(f"layer {self.name!r} did not run in the forward pass; use a layer that the model calls")
        self.features = self._output[0] if isinstance(self._output, (tuple, list)) else self._output
        if not isinstance(self.features, Tensor):
            raise TypeError(f"layer {self.name!r} must return a tensor, got {type(self.features).__name__}")
        check_finite(self.features, f"layer {self.name!r} returns")
        self.layout = self._read_layout(model, layout)
        # else torch's fused encoder layers do not call forward
        self._layer.register_forward_hook(lambda *_: None)
        if not self._is_faithful():
            self._recorded = []

    def _record(self) -> Any:
        self._stack, self._runs, hooks = [], 0, []
        for module in self._copy.modules():
            hooks.append(module.register_forward_pre_hook(self._begin))
            hooks.append(module.register_forward_hook(self._end, prepend=True))  # before hooks that change the output
        try:
            with torch.no_grad():
                return run_copy_once(self._copy, self.inputs.clone(), self.output)
        finally:
            for hook in hooks:
                hook.remove()

    def _read_layout(self, model: nn.Module, layout: str | Layout | None) -> Layout:
        with FeatureTaps(model, [self.name], record=None, output=self.output, layout=layout) as taps:
            return taps.read_layout_of(self.name, self.features, self.inputs)

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *exception) -> None:
        self._recorded = []

    def _is_faithful(self) -> bool:
        """Return whether the last image's own features give its own outputs."""
        if not isinstance(self.outputs, Tensor):
            return False
        try:
            outputs, expected = self(self.features[-1:], len(self.inputs) - 1)[0], self.outputs[-1]
        except RuntimeError:  # incompatible shapes
            return False
        return bool(torch.allclose(outputs, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())))

    def _begin(self, module, inputs):
        if module is self._layer:
            self._recorded = [call for _, calls in self._stack for call in calls]  # the outermost finished modules
        self._stack.append([module, []])

    def _end(self, module, inputs, output):
        self._stack.pop()
        recorded = _map_tensors(torch.clone, output)  # clone: the model may change the output in place
        if module is self._layer:
            self._runs, self._output = self._runs + 1, recorded
            recorded = None  # an earlier run of the layer is computed again
        if self._stack:
            self._stack[-1][1].append((module, recorded))

    def __call__(self, features: Tensor, image: int = 0) -> Tensor:
        """Compute the model's outputs (n, K) for n versions (n, ...) of the layer's output for an image, without a graph."""
        try:
            return self._run(features, image)
        except RuntimeError as error:
            if not self._share or "single memory location" not in str(error):
                raise
            self._share = False  # the model changes a recorded output in place, so each version needs a copy
            return self._run(features, image)

    def _run(self, features: Tensor, image: int) -> Tensor:
        def expand(x: Tensor) -> Tensor:
            has_batch = x.ndim and len(x) == len(self.inputs)
            x = x[image : image + 1].expand(len(features), *x.shape[1:]) if has_batch else x
            return x if self._share and len(features) > 1 else x.clone()  # in-place changes of a single one raise no error

        waiting: dict[nn.Module, deque] = {}
        for module, output in self._recorded:
            waiting.setdefault(module, deque()).append(_map_tensors(expand, output))
        if not self._recorded:  # only the layer's last run is replaced
            waiting[self._layer] = deque([None] * (self._runs - 1))
        output, given = _map_tensors(expand, self._output), features.clone()
        output = _rebuild(output, [given, *output[1:]]) if isinstance(output, (tuple, list)) else given
        waiting.setdefault(self._layer, deque()).append(output)
        forwards = {module: module.forward for module in waiting}
        for module, outputs in waiting.items():
            module.forward = partial(_return_recorded, outputs, module.forward)
        try:
            with torch.no_grad():
                return run_copy_once(self._copy, expand(self.inputs), self.output)
        finally:
            for module, forward in forwards.items():
                module.forward = forward


def _return_recorded(outputs: deque, forward: Callable, *args, **kwargs) -> Any:
    """Return the next recorded output in place of a module's forward; compute where it is None or none is left."""
    output = outputs.popleft() if outputs else None
    return forward(*args, **kwargs) if output is None else output


def _map_tensors(function: Callable[[Tensor], Tensor], output: Any) -> Any:
    """Apply the function to each tensor of an output that may be nested."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (tuple, list)):
        return _rebuild(output, [_map_tensors(function, entry) for entry in output])
    if isinstance(output, dict):
        return type(output)((key, _map_tensors(function, entry)) for key, entry in output.items())
    return output


def _rebuild(sequence: Any, entries: list) -> Any:
    return getattr(type(sequence), "_make", type(sequence))(entries)  # named tuples are built by _make
