"""Run only what lies behind a layer, on features of your own.

A method that asks "what if these features were different?" a thousand times need not run the front of the model a thousand times:

    with Tail(model, "layer4", inputs) as tail:     # inputs (1, 3, H, W): runs the model once, and remembers
        outputs = tail(features)                    # (n, C, h, w), in place of the layer's output -> (n, K)

In the first run every outermost module that ends before the layer begins is noted with its output. In the later ones these
modules hand that output out instead of computing it, and the layer hands out the given features.
"""

from collections import deque

import torch
from torch import Tensor, nn

from scanlib.hooks import Layout, evaluating, logits_of, resolve_layer


class Tail:
    """The part of a model behind a layer, for one input; a context manager, which leaves the model as it found it.

    model, layer: as for ``FeatureTap``. inputs: (1, ...), preprocessed. Where a layer runs several times in one forward, its last
    run counts. ``features``: the layer's own output, (1, ...), arranged as ``layout`` says; ``outputs``: the model's.
    """

    def __init__(self, model: nn.Module, layer, inputs: Tensor):
        self.model, (self.name, self.layer) = model, resolve_layer(model, layer)
        self.inputs, self._share = inputs, True

    def __enter__(self) -> "Tail":
        self._open: list[list] = []  # frames of the modules running now: [module, outputs of its finished children]
        self._recorded: list[tuple[nn.Module, object]] = []
        self._runs = 0
        handles = []
        try:
            for module in self.model.modules():
                handles += [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]
            with torch.no_grad(), evaluating(self.model):
                self.outputs = logits_of(self.model(self.inputs))
        finally:
            for handle in handles:
                handle.remove()
        if not self._runs:
            raise RuntimeError(f"layer {self.name!r} did not run in the forward pass; take a layer that the model calls")
        self.layout = Layout.infer(self.features.shape, tuple(self.inputs.shape[2:]))
        return self

    def __exit__(self, *exception) -> None:
        self._recorded, self.features, self.outputs = [], None, None

    def _begin(self, module, inputs):
        if module is self.layer:
            self._recorded = [call for _, calls in self._open for call in calls]  # finished, and inside nothing finished
        self._open.append([module, []])

    def _end(self, module, inputs, output):
        self._open.pop()
        if module is self.layer:
            self._runs, self.features = self._runs + 1, _first(output).clone()
        elif self._open:
            self._open[-1][1].append((module, _mapped(output, torch.clone)))  # clone: the model may go on in place

    def __call__(self, features: Tensor) -> Tensor:
        """The model's outputs for n versions of the layer's output, (n, ...) -> (n, K). No graph is recorded."""
        try:
            return self._run(features)
        except RuntimeError as error:
            if not self._share or "single memory location" not in str(error):
                raise
            self._share = False  # the model works in place on what it was handed, so each of the n needs a copy
            return self._run(features)

    def _run(self, features: Tensor) -> Tensor:
        count, runs = len(features), 0

        def many(x: Tensor) -> Tensor:
            x = x.expand(count, *x.shape[1:]) if x.ndim and len(x) == 1 else x
            return x if self._share else x.clone()

        def given(module, inputs, output):
            nonlocal runs
            runs += 1
            return _with_first(output, features.clone()) if runs == self._runs else output

        waiting: dict[nn.Module, deque] = {}
        for module, output in self._recorded:
            waiting.setdefault(module, deque()).append(output)
        before = {module: vars(module).get("forward") for module in waiting}
        handle = self.layer.register_forward_hook(given)
        try:
            for module, outputs in waiting.items():
                module.forward = _Remembered(module.forward, outputs, many)
            with torch.no_grad(), evaluating(self.model):
                return logits_of(self.model(many(self.inputs)))
        finally:
            handle.remove()
            for module, own in before.items():
                del module.forward
                if own is not None:
                    module.forward = own


class _Remembered:
    """A forward that hands out what it returned before, in order, and computes again when nothing is left."""

    def __init__(self, forward, outputs: deque, many):
        self.forward, self.outputs, self.many = forward, outputs, many

    def __call__(self, *args, **kwargs):
        return _mapped(self.outputs.popleft(), self.many) if self.outputs else self.forward(*args, **kwargs)


def _mapped(output, function):
    """The function on each tensor of an output that may be nested."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (tuple, list)):
        return getattr(type(output), "_make", type(output))([_mapped(entry, function) for entry in output])
    if isinstance(output, dict):
        return type(output)((key, _mapped(entry, function)) for key, entry in output.items())
    return output


def _first(output) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _with_first(output, features: Tensor):
    if isinstance(output, (tuple, list)):
        return getattr(type(output), "_make", type(output))([features, *output[1:]])
    return features
