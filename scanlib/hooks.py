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
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scanlib.layers import Layout, make_eval_copy, resolve_layer
from scanlib.structure.inputs import KeepModes, leave_inference_mode
from scanlib.structure.layout import read_layout
from scanlib.structure.libra import libra
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, compute_scores


def check_finite(x: Tensor, what: str) -> Tensor:
    """Return the tensor. Raises ValueError if it holds NaN or infinite values; ``what`` begins the message."""
    if not torch.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))) and not torch.isfinite(x).all():
        raise ValueError(f"{what} NaN or infinite values; check the model's weights and the inputs, or use float32")
    return x


def differentiate(score: Tensor, tensors: Sequence[Tensor], **options) -> tuple[Tensor | None, ...]:
    """Call torch.autograd.grad. Raises ValueError if there is no gradient, or gradient checkpointing hides it."""
    try:
        return torch.autograd.grad(score, tensors, **options)
    except RuntimeError as error:
        if "not have been used" in str(error) or "does not require grad" in str(error):
            reason = "by any gradient: the model runs it under no_grad, or is quantized"
            raise ValueError(f"the score does not depend on the layer {reason}; use another layer or ScoreCAM") from error
        if "checkpoint" not in str(error).lower():
            raise
        raise ValueError("the model uses gradient checkpointing, which hides its layers; turn it off to explain it") from error


class FeatureTaps:
    """Outputs of several layers in one forward pass, and the gradient of any score at each of them.

    A context manager. Each call runs an eval copy of the model (``make_eval_copy``), so hooks and modes never reach the model
    itself. One forward pass serves any number of targets. If a layer runs several times, its last output is kept. Use one tap per
    thread.

    Args:
        model: a module whose output ``get_logits`` accepts.
        layers: names, modules, or indices into ``list(model.modules())[1:]``.
        record: the part of the autograd graph to keep. "after": from the first of these layers on. "all": from the inputs and
            weights on. None: nothing, for features without gradients.
        create_graph: whether the gradients can be differentiated again.
        output: the entry of the model's output to explain, if it returns several; see ``get_logits``.
        layout: "BCHW", "BHWC", "BTC" or a ``Layout``, for layers whose layout cannot be inferred.
        libra: whether gradients are those of LibraGrad; see ``libra``.

    Attributes after a call, each a list in the order of the layers: ``features`` (as the layers returned them; detached unless
    record="all"), ``captured`` (the same, part of the graph), ``layouts``. And ``logits``, the model's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str | int | nn.Module],
        record: str | None = "after",
        create_graph: bool = False,
        output: str | int | None = None,
        layout: str | Layout | None = None,
        libra: bool = False,
    ):
        if record not in ("after", "all", None):
            raise ValueError(f"record must be 'after', 'all' or None, got {record!r}")
        self.model, self.record, self.create_graph, self.output, self.layout_given = model, record, create_graph, output, layout
        self.libra = libra
        resolved = [resolve_layer(model, layer) for layer in layers]
        self.names, self.layers = [name for name, _ in resolved], [layer for _, layer in resolved]
        self.logits: Any = None
        self._inputs: Tensor | None = None
        self._captured: dict[int, Tensor] = {}
        self._layouts: list[Layout] | None = None
        self._is_open = False

    def __enter__(self):
        if self._is_open:
            raise RuntimeError(f"this {type(self).__name__} is already open; create another one for a second use")
        self._is_open = True
        return self

    def __exit__(self, *exception) -> None:
        self._is_open, self._captured, self.logits, self._inputs = False, {}, None, None  # free the graph

    def _capture(self, captured: dict[int, Tensor], index: int, module: nn.Module, inputs: tuple, output: Any) -> Any:
        """Keep the layer's output, and return what the model continues with."""
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {self.names[index]!r} returns {type(tensor).__name__}; use a layer that returns a tensor")
        if self.record is None:
            captured[index] = tensor.detach().clone()  # the model may change the tensor in place
            return output
        if tensor.requires_grad and torch.is_grad_enabled():  # part of a recorded graph already
            kept = tensor.clone() if any(tensor is given for given in inputs) else tensor
        else:
            kept = tensor.detach().clone().requires_grad_()
            torch.set_grad_enabled(True)  # record from here on; __call__ restores the caller's mode
        captured[index] = kept
        passed_on = kept.clone()  # an in-place operation after the layer must not change the features
        if not isinstance(output, (tuple, list)):
            return passed_on
        rebuild = getattr(type(output), "_make", type(output))  # for named tuples
        return rebuild([passed_on, *output[1:]])

    def __call__(self, inputs: Tensor) -> Any:
        """Run the model on preprocessed inputs (B, 3, H, W). Returns its outputs, detached; (B, K) for a classifier.

        Raises ValueError for NaN or infinite features and NaN logits, RuntimeError if a layer does not run.
        """
        if not self._is_open:
            name = type(self).__name__
            raise RuntimeError(f"{name} is not active; use it as `with {name}(model, layer) as tap: tap(inputs)`")
        self._captured, self._layouts = {}, None
        with KeepModes(), leave_inference_mode(), torch.set_grad_enabled(self.record == "all"):
            copy = make_eval_copy(self.model)
            self._add_hooks(copy)
            # fused attention has no second derivative
            with sdpa_kernel(SDPBackend.MATH) if self.create_graph else contextlib.nullcontext(), self._change_gradients():
                self.logits = run_copy(copy, inputs, self.output)
        for index, name in enumerate(self.names):
            if index not in self._captured:
                raise RuntimeError(f"layer {name!r} did not run in the forward pass; use a layer that the model calls")
            check_finite(self._captured[index], f"layer {name!r} returns")
        self._inputs = inputs.detach()
        return self.logits.detach() if isinstance(self.logits, Tensor) else self.logits

    def _add_hooks(self, copy: nn.Module) -> None:
        for index, name in enumerate(self.names):
            copy.get_submodule(name).register_forward_hook(partial(self._capture, self._captured, index))

    def _change_gradients(self) -> contextlib.AbstractContextManager:
        return libra(self.model) if self.libra else contextlib.nullcontext()

    @property
    def input_size(self) -> tuple[int, ...]:
        """(H, W) of the last call's inputs."""
        return () if self._inputs is None else tuple(self._inputs.shape[2:])

    @property
    def layouts(self) -> list[Layout]:
        if self._layouts is None:
            assert self._inputs is not None
            features = zip(self.names, self.captured, strict=True)
            self._layouts = [self.read_layout_of(name, tensor, self._inputs) for name, tensor in features]
        return self._layouts

    def read_layout_of(self, name: str, features: Tensor, inputs: Tensor) -> Layout:
        """Return how the output of a layer for these inputs is arranged. Raises ValueError if its first axis is not the batch."""
        if len(features) != len(inputs):
            raise ValueError(
                f"layer {name!r} returns {tuple(features.shape)} for {len(inputs)} images: its first axis is not the batch; "
                "use another layer, or pass reshape, if the method has that argument"
            )

        def run(inputs: Tensor) -> Tensor:
            with FeatureTaps(self.model, [name], record=None, output=self.output) as taps:
                taps(inputs)
                return taps.captured[0]

        return read_layout(self.model, name, features, inputs, run, self.layout_given)

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
            gradients.append(check_finite(gradient, f"the gradient at layer {name!r} holds"))
        return gradients

    def _compute_gradients(self, tensors: Sequence[Tensor], target: Target) -> list[Tensor | None]:
        """Differentiate the score by any tensors of the run; None where it does not depend on one."""
        with leave_inference_mode(), torch.enable_grad():
            score = compute_scores(self.logits, target).sum()  # in eval mode images are independent: one backward for all
            wanted = [tensor for tensor in tensors if tensor.requires_grad and score.requires_grad]
            if not wanted:
                return [None] * len(tensors)
            found = iter(differentiate(score, wanted, retain_graph=True, create_graph=self.create_graph, allow_unused=True))
        return [next(found) if tensor.requires_grad else None for tensor in tensors]

    def _no_gradient_error(self, name: str) -> ValueError:
        return ValueError(f"the score does not depend on layer {name!r}, or the model runs it under no_grad; use another layer")


class FeatureTap(FeatureTaps):
    """Output of one layer, and the gradient of any score there: ``FeatureTaps`` for a single layer.

    Attributes after a call: ``features`` (the layer's output, in its own layout, detached), ``logits``, ``layout``.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module, **options):
        super().__init__(model, [layer], **options)
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
        """Return ``gradient`` and no relevance; ``RelevanceTap`` and ``LibraTap`` return both."""
        return self.gradient(target), None
