"""Read a layer's features in a frozen model, and the gradient of a score at that layer.

``FeatureTap`` hooks a layer, keeps its output F, and differentiates any score y_c with respect to F. The hook detaches F from
the layers before it and passes a copy on, so autograd records only what is after the layer. This works with frozen parameters
and under ``torch.no_grad``, needs no backward pass through the layers before, and never writes a ``.grad``.

    with FeatureTap(model, "layer4") as tap:
        logits = tap(inputs)                    # (B, K)
        features = tap.features                 # (B, C, h, w), as the layer returned it
        gradient = tap.gradient(target=3)       # the same shape: d logits[:, 3] / d features
        maps = tap.layout.to_maps(gradient)     # any layout -> (B, C, h, w)
"""

import contextlib
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scanlib.layers import Layout, eval_mode, get_logits, resolve_layer
from scanlib.targets import Target, compute_scores


class FeatureTaps:
    """Outputs of several layers in one forward pass, and the gradient of any score at each of them.

    A context manager: the hooks exist only inside ``with``. The model runs in eval mode and gets its own modes back, also after
    an exception. One forward pass serves any number of targets. If a layer runs several times, its last output is kept.

    Args:
        model: a module whose output ``get_logits`` accepts.
        layers: names, modules, or indices into ``list(model.modules())[1:]``.
        record: the part of the autograd graph to keep. "after": from the first of these layers on. "all": from the inputs and
            weights on. None: nothing, for features without gradients.
        create_graph: whether the gradients can be differentiated again.

    Attributes after a call, each a list in the order of the layers: ``features`` (as the layers returned them; detached unless
    record="all"), ``captured`` (the same, part of the graph), ``layouts``. And ``logits``, the model's outputs.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str | int | nn.Module], record: str | None = "after", create_graph: bool = False
    ):
        if record not in ("after", "all", None):
            raise ValueError(f"record must be 'after', 'all' or None, got {record!r}")
        self.model, self.record, self.create_graph = model, record, create_graph
        resolved = [resolve_layer(model, layer) for layer in layers]
        self.names, self.layers = [name for name, _ in resolved], [layer for _, layer in resolved]
        self.logits: Any = None
        self._input_size: tuple[int, ...] = ()
        self._captured: dict[int, Tensor] = {}
        self._hooks, self._is_open = contextlib.ExitStack(), False
        self._thread: int | None = None  # in which the tap runs the model

    def __enter__(self):
        if self._is_open:
            raise RuntimeError(f"this {type(self).__name__} is already open; create another one for a second use")
        self._is_open = True
        for index, layer in enumerate(self.layers):
            self._hooks.enter_context(layer.register_forward_hook(partial(self._capture, index)))
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.close()
        self._is_open, self._captured, self.logits = False, {}, None  # free the graph

    def _capture(self, index: int, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """Keep the layer's output, and return what the model continues with."""
        if self._thread != threading.get_ident():  # not this tap's run of the model
            return output
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {self.names[index]!r} returns {type(tensor).__name__}; use a layer that returns a tensor")
        if self.record is None:
            self._captured[index] = tensor.detach().clone()  # the model may change the tensor in place
            return output
        if tensor.requires_grad and torch.is_grad_enabled():  # part of a recorded graph already
            captured = tensor.clone() if any(tensor is given for given in inputs) else tensor
        else:
            captured = tensor.detach().clone().requires_grad_()
            torch.set_grad_enabled(True)  # record from here on; __call__ restores the caller's mode
        self._captured[index] = captured
        passed_on = captured.clone()  # an in-place operation after the layer must not change the features
        if not isinstance(output, (tuple, list)):
            return passed_on
        rebuild = getattr(type(output), "_make", type(output))  # for named tuples
        return rebuild([passed_on, *output[1:]])

    def __call__(self, inputs: Tensor) -> Any:
        """Run the model on preprocessed inputs (B, 3, H, W). Returns its outputs, detached; (B, K) for a classifier."""
        if not self._is_open:
            name = type(self).__name__
            raise RuntimeError(f"{name} is not active; use it as `with {name}(model, layer) as tap: tap(inputs)`")
        self._captured, self._thread = {}, threading.get_ident()
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(self.record == "all"), eval_mode(self.model):
                if inputs.is_inference():
                    inputs = inputs.clone()  # an inference tensor cannot take part in a graph
                # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if self.create_graph else contextlib.nullcontext():
                    self.logits = get_logits(self.model(inputs))
        finally:
            self._thread = None
        for index, name in enumerate(self.names):
            if index not in self._captured:
                raise RuntimeError(f"layer {name!r} did not run in the forward pass; use a layer that the model calls")
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
    def features(self) -> Any:
        return [tensor if self.record == "all" else tensor.detach() for tensor in self.captured]

    def gradients(self, target: Target = None) -> list[Tensor]:
        """Compute d score / d features for each layer, shaped like its features.

        target: None (predicted class), a class, one class per image, or callables; see ``scanlib.targets``. Raises ValueError
        for a class out of range, a wrong count, or a layer that does not influence the score.
        """
        gradients = []
        for name, gradient in zip(self.names, self._compute_gradients(self.captured, target), strict=True):
            if gradient is None:
                raise self._no_gradient_error(name)
            gradients.append(gradient)
        return gradients

    def _compute_gradients(self, tensors: Sequence[Tensor], target: Target) -> list[Tensor | None]:
        """Differentiate the score by any tensors of the run; None where it does not depend on one."""
        with torch.inference_mode(False), torch.enable_grad():
            score = compute_scores(self.logits, target).sum()  # in eval mode images are independent: one backward for all
            wanted = [tensor for tensor in tensors if tensor.requires_grad and score.requires_grad]
            if not wanted:
                return [None] * len(tensors)
            found = iter(torch.autograd.grad(score, wanted, retain_graph=True, create_graph=self.create_graph, allow_unused=True))
        return [next(found) if tensor.requires_grad else None for tensor in tensors]

    def _no_gradient_error(self, name: str) -> ValueError:
        return ValueError(f"the score does not depend on layer {name!r}, or the model runs it under no_grad; use another layer")


class FeatureTap(FeatureTaps):
    """Output of one layer, and the gradient of any score there: ``FeatureTaps`` for a single layer.

    Attributes after a call: ``features`` (the layer's output, in its own layout, detached), ``logits``, ``layout``.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module):
        super().__init__(model, [layer])
        self.name, self.layer = self.names[0], self.layers[0]

    def __call__(self, inputs: Tensor) -> Any:
        """Run the model as ``FeatureTaps`` does. Raises ValueError for a layer without a spatial extent."""
        logits = super().__call__(inputs)
        self.layout = self.layouts[0]
        return logits

    @property
    def features(self) -> Tensor:
        return super().features[0]

    def gradient(self, target: Target = None) -> Tensor:
        """Compute d score / d features, shaped like ``features``; see ``FeatureTaps.gradients``."""
        return self.gradients(target)[0]

    def gradient_and_relevance(self, target: Target = None) -> tuple[Tensor, Tensor | None]:
        """Return ``gradient`` and no relevance; ``RelevanceTap`` returns both."""
        return self.gradient(target), None
