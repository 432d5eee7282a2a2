"""Tap one layer of a frozen model: what flowed there, and what the score owes to it.

``FeatureTap`` hooks a layer, keeps its output F, and differentiates any score y_c with respect to F. Only the part
of the model *behind* the layer is recorded: the hook cuts the graph (``output.detach()``) and starts a new one from
there, the "detached tail". So it works on frozen parameters and under ``torch.no_grad``, costs no backward pass through
the front, and never writes a ``.grad``.

    with FeatureTap(model, "layer4") as tap:
        logits = tap(inputs)                    # (B, K)
        features = tap.features                 # (B, C, h, w), as the layer returned it
        gradient = tap.gradient(target=3)       # the same shape: d logits[:, 3] / d features
        maps = tap.layout.to_maps(gradient)     # (B, C, h, w), whatever the layer's layout
"""

import contextlib
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scanlib.layers import Layout, eval_mode, get_logits, resolve_layer
from scanlib.targets import Target, compute_scores


class FeatureTaps:
    """Capture the outputs of several layers in one forward, and the gradient of any score at each of them.

    Args:
        model: any module whose output ``get_logits`` understands.
        layers: names, modules, or indices into ``list(model.modules())[1:]``.
        graph: what to record. "tail": from the first of the layers on, nothing in front of it. "whole": everything, down to
            inputs and weights. None: nothing, features only.
        twice: let the gradients be differentiated again.

    A context manager: the hooks are in place inside ``with`` and gone afterwards, exceptions included. The model runs in
    eval mode and gets its own modes back. One forward serves any number of targets. If a layer runs several times
    in one forward (a shared ReLU), the last run is kept.

    Attributes after a call, each a list in the order of the layers: ``features`` (as the layers returned them; detached, but for
    graph="whole"), ``captured`` (the same, as they stand in the graph), ``layouts``; and ``logits``, the model's outputs.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str | int | nn.Module], *, graph: str | None = "tail", twice: bool = False
    ):
        self.model, self.graph, self.twice = model, graph, twice
        resolved = [resolve_layer(model, layer) for layer in layers]
        self.names, self.layers = [name for name, _ in resolved], [layer for _, layer in resolved]
        self.logits: Tensor | None = None
        self._input_size: tuple[int, ...] = ()
        self._captured: dict[int, Tensor] = {}
        self._handles: list | None = None
        self._running = False

    def __enter__(self):
        if self._handles is not None:
            raise RuntimeError(f"this {type(self).__name__} is already open; make another for a second use")
        self._handles = [layer.register_forward_hook(partial(self._capture, i)) for i, layer in enumerate(self.layers)]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._captured, self.logits = None, {}, None  # let the graph go

    def _capture(self, index, module, inputs, output):
        if not self._running:  # someone else runs the model while the tap is open
            return output
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {self.names[index]!r} returns {type(tensor).__name__}; tap a layer that returns a tensor")
        if self.graph is None:
            self._captured[index] = tensor.detach().clone()  # clone: it may be an input, or be worked on in place
            return output
        if tensor.requires_grad and torch.is_grad_enabled():  # behind another of the layers, or the whole graph is kept
            captured = tensor.clone() if any(tensor is given for given in inputs) else tensor
        else:  # cut: nothing in front of the layer is recorded
            captured = tensor.detach().clone().requires_grad_()
            torch.set_grad_enabled(True)  # record the tail only; __call__ restores the caller's mode
        self._captured[index] = captured
        passed_on = captured.clone()  # an in-place operation behind the layer must not change the features
        if not isinstance(output, (tuple, list)):
            return passed_on
        rebuild = getattr(type(output), "_make", type(output))  # named tuples build themselves by _make
        return rebuild([passed_on, *output[1:]])

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the model on (B, 3, H, W), already preprocessed. Returns its outputs, (B, K) logits as a rule, detached."""
        if self._handles is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} is not active; use it as `with {name}(model, layer) as tap: tap(inputs)`")
        self._captured, self._running = {}, True
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(self.graph == "whole"), eval_mode(self.model):
                if inputs.is_inference():
                    inputs = inputs.clone()  # an inference tensor can not take part in a graph
                # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if self.twice else contextlib.nullcontext():
                    self.logits = get_logits(self.model(inputs))
        finally:
            self._running = False
        for index, name in enumerate(self.names):
            if index not in self._captured:
                raise RuntimeError(f"layer {name!r} did not run in the forward pass; tap a layer that the model calls")
        self._input_size = tuple(inputs.shape[2:])
        return self.logits.detach() if isinstance(self.logits, Tensor) else self.logits

    @property
    def layouts(self) -> list[Layout]:
        return [Layout.infer(tensor.shape, self._input_size) for tensor in self.captured]

    @property
    def captured(self) -> list[Tensor]:
        if not self._captured:
            raise RuntimeError("nothing captured; call the tap on a batch of inputs, and read it inside the `with`")
        return [self._captured[index] for index in range(len(self.names))]

    @property
    def features(self) -> list[Tensor]:
        return [tensor if self.graph == "whole" else tensor.detach() for tensor in self.captured]

    def gradients(self, target: Target = None) -> list[Tensor]:
        """d score / d features, one for each layer, shaped like its features; part of a graph themselves with ``twice``.

        target: None (predicted class), a class, one class per image, or a callable (one, or one per image) from an
        image's output row (K,) to a scalar. Raises ValueError for a class out of range, a wrong count, or a score
        that does not depend on a layer at all (a side branch).
        """
        gradients = self._gradients(self.captured, target)
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise self._unread(name)
        return gradients

    def _gradients(self, tensors: Sequence[Tensor], target: Target) -> list[Tensor | None]:
        """The score's gradient at any tensors of the run; None where it does not depend on one."""
        with torch.inference_mode(False), torch.enable_grad():
            score = compute_scores(self.logits, target).sum()  # images are independent in eval mode: one backward for all
            asked = [tensor for tensor in tensors if tensor.requires_grad] if score.requires_grad else []
            options = {"retain_graph": True, "create_graph": self.twice, "allow_unused": True}
            found = torch.autograd.grad(score, asked, **options) if asked else ()
        by_tensor = dict(zip(map(id, asked), found, strict=True))
        return [by_tensor.get(id(tensor)) for tensor in tensors]

    def _unread(self, name: str) -> ValueError:
        advice = "tap one on the way to the output, outside any no_grad of the model"
        return ValueError(f"the score does not depend on layer {name!r}; {advice}")


class FeatureTap(FeatureTaps):
    """Capture one layer's output, and the gradient of any score at that layer: ``FeatureTaps`` for a single layer.

    Attributes after a call: ``features`` (as the layer returned them, detached), ``logits``, ``layout``.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module):
        super().__init__(model, [layer])
        self.name, self.layer = self.names[0], self.layers[0]
        self.layout: Layout | None = None

    def __call__(self, inputs: Tensor) -> Tensor:
        """``FeatureTaps``'s, and a layer without a spatial extent is refused at once."""
        logits = super().__call__(inputs)
        self.layout = self.layouts[0]
        return logits

    @property
    def features(self) -> Tensor:
        """The layer's output, detached, in the layer's own layout."""
        return super().features[0]

    def gradient(self, target: Target = None) -> Tensor:
        """d score / d features, shaped like ``features``; see ``FeatureTaps.gradients``."""
        return self.gradients(target)[0]
