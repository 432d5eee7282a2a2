"""Run only what lies behind a layer, on features of your own.

A method that asks "what if these features were different?" a thousand times need not run the front of the model a thousand times:

    with Replay(model, "layer4", inputs) as tail:     # inputs (N, 3, H, W): runs the model once, and remembers
        outputs = tail(features, image=2)           # (n, C, h, w), in place of the layer's output for that image -> (n, K)

In the first run every outermost module that ends before the layer begins is noted with its output. In the later ones these
modules hand that output out instead of computing it, and the layer hands out the given features.
"""

from collections import deque

import torch
from torch import Tensor, nn

from scanlib.layers import Layout, eval_mode, get_logits, resolve_layer


class Replay:
    """The part of a model behind a layer; a context manager, which leaves the model as it found it.

    model, layer: as for ``FeatureTap``. inputs: (N, ...), preprocessed. Where a layer runs several times in one forward, its last
    run counts. ``features``: the layer's own output, (N, ...), arranged as ``layout`` says; ``outputs``: the model's.

    Once it is tried whether the remembered outputs lead to the model's own; if not (a front that treats the images of a batch
    differently), the front runs again each time.
    """

    def __init__(self, model: nn.Module, layer, inputs: Tensor):
        self.model, (self.name, self.layer) = model, resolve_layer(model, layer)
        self.inputs, self._share = inputs, True

    def __enter__(self) -> "Replay":
        self._open: list[list] = []  # frames of the modules running now: [module, outputs of its finished children]
        self._recorded: list[tuple[nn.Module, object]] = []
        self._runs = 0
        handles = []
        try:
            for module in self.model.modules():
                handles.append(module.register_forward_pre_hook(self._begin))
                handles.append(module.register_forward_hook(self._end, prepend=True))  # in front of hooks that change the output
            with torch.no_grad(), eval_mode(self.model):
                self.outputs = get_logits(self.model(self.inputs))
        finally:
            for handle in handles:
                handle.remove()
        if not self._runs:
            raise RuntimeError(f"layer {self.name!r} did not run in the forward pass; take a layer that the model calls")
        self.features = self._output[0] if isinstance(self._output, (tuple, list)) else self._output
        if not isinstance(self.features, Tensor):
            kind = type(self.features).__name__
            raise TypeError(f"layer {self.name!r} returns {kind}; take a layer that returns a tensor")
        self.layout = Layout.infer(self.features.shape, tuple(self.inputs.shape[2:]))
        if not self._faithful():
            self._recorded = []
        return self

    def __exit__(self, *exception) -> None:
        self._recorded, self._output, self.features, self.outputs = [], None, None, None

    def _faithful(self) -> bool:
        """Do the last image's own features give its own outputs?"""
        if not isinstance(self.outputs, Tensor):
            return False
        try:
            outputs, expected = self(self.features[-1:], len(self.inputs) - 1)[0], self.outputs[-1]
        except RuntimeError:  # shapes
            return False
        return bool(torch.allclose(outputs, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max())))

    def _begin(self, module, inputs):
        if module is self.layer:
            self._recorded = [call for _, calls in self._open for call in calls]  # finished, and inside nothing finished
        self._open.append([module, []])

    def _end(self, module, inputs, output):
        self._open.pop()
        kept = _mapped(output, torch.clone)  # clone: the model may go on in place
        if module is self.layer:
            self._runs, self._output = self._runs + 1, kept
            kept = None  # an earlier run of the layer is computed again
        if self._open:
            self._open[-1][1].append((module, kept))

    def __call__(self, features: Tensor, image: int = 0) -> Tensor:
        """The model's outputs for n versions of the layer's output for an image, (n, ...) -> (n, K). No graph is recorded."""
        try:
            return self._run(features, image)
        except RuntimeError as error:
            if not self._share or "single memory location" not in str(error):
                raise
            self._share = False  # the model works in place on what it was handed, so each of the n needs a copy
            return self._run(features, image)

    def _run(self, features: Tensor, image: int) -> Tensor:
        def many(x: Tensor) -> Tensor:
            of_images = x.ndim and len(x) == len(self.inputs)
            x = x[image : image + 1].expand(len(features), *x.shape[1:]) if of_images else x
            return x if self._share and len(features) > 1 else x.clone()  # a single one could be written to

        waiting: dict[nn.Module, deque] = {}
        for module, output in self._recorded:
            waiting.setdefault(module, deque()).append(_mapped(output, many))
        if not self._recorded:  # nothing is remembered: earlier runs of the layer come as they are
            waiting[self.layer] = deque([None] * (self._runs - 1))
        waiting.setdefault(self.layer, deque()).append(_with_first(_mapped(self._output, many), features.clone()))
        before = {module: vars(module).get("forward") for module in waiting}
        hook = self.layer.register_forward_hook(lambda *_: None)  # torch's fused encoder layers would not ask for the forward
        try:
            for module, outputs in waiting.items():
                module.forward = _Remembered(module.forward, outputs)
            with torch.no_grad(), eval_mode(self.model):
                return get_logits(self.model(many(self.inputs)))
        finally:
            hook.remove()
            for module, own in before.items():
                del module.forward
                if own is not None:
                    module.forward = own


class _Remembered:
    """A forward that hands out given outputs in order, and computes where there is None or nothing left."""

    def __init__(self, forward, outputs: deque):
        self.forward, self.outputs = forward, outputs

    def __call__(self, *args, **kwargs):
        output = self.outputs.popleft() if self.outputs else None
        return self.forward(*args, **kwargs) if output is None else output


def _mapped(output, function):
    """The function on each tensor of an output that may be nested."""
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (tuple, list)):
        return getattr(type(output), "_make", type(output))([_mapped(entry, function) for entry in output])
    if isinstance(output, dict):
        return type(output)((key, _mapped(entry, function)) for key, entry in output.items())
    return output


def _with_first(output, features: Tensor):
    if isinstance(output, (tuple, list)):
        return getattr(type(output), "_make", type(output))([features, *output[1:]])
    return features
