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
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

USUAL_PREFIX_TOKENS, MAX_PREFIX_TOKENS = 5, 16  # class, distillation and register tokens in front of the patch tokens


def resolve_layer(model: nn.Module, layer: str | int | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by name (``"layer4.1"``), by module, or by index into ``list(model.modules())[1:]``.

    Returns its dotted name and the module. Raises ValueError (unknown name or module, index out of range) and
    TypeError (anything else).
    """
    if isinstance(layer, str) and layer:
        with contextlib.suppress(AttributeError):
            return layer, model.get_submodule(layer)
    named = dict(list(model.named_modules())[1:])
    if isinstance(layer, str):
        close = difflib.get_close_matches(layer, named, n=5, cutoff=0.5) or list(dict(model.named_children()))
        raise ValueError(f"target_layer {layer!r} not found; close matches: {', '.join(close)}")
    if isinstance(layer, nn.Module):
        for name, module in named.items():
            if module is layer:
                return name, module
        raise ValueError(f"target_layer {type(layer).__name__} is not part of the model; take one of model.named_modules()")
    if isinstance(layer, int) and not isinstance(layer, bool):
        if -len(named) <= layer < len(named):
            return list(named.items())[layer]
        raise ValueError(f"target_layer {layer} is out of range: this model has layers 0..{len(named) - 1}")
    raise TypeError(f"target_layer must be a name, a module or an index, not {type(layer).__name__}")


@dataclass(frozen=True)
class Layout:
    """How a layer arranges its features: ``kind`` is "BCHW", "BHWC" or "BTC" (tokens, ``prefix`` of them not patches).

    "BCHW" stands for channels first, whatever the number of axes: signals and volumes have grids (l,) and (d, h, w).
    """

    kind: str
    channels: int
    grid: tuple[int, ...]
    prefix: int = 0

    @classmethod
    def infer(cls, shape: Sequence[int], image_size: tuple[int, ...]) -> "Layout":
        """Read the layout off a feature shape and the (H, W) of the model's input; (L,) of a signal, (D, H, W) of a volume.

        Of the two ways to read a 4-D shape, the one whose grid has the picture's aspect ratio is taken. Tokens are
        patches of a square p x p; what exceeds the (H // p) x (W // p) grid stands in front of them; of several such
        readings the one with up to 5 prefix tokens, then patches that tile the picture, is taken. Raises ValueError when
        there is no spatial extent.
        """
        if len(image_size) != 2:
            if len(shape) == len(image_size) + 2:  # channels first, but for a grid that fits the input better from behind
                first, last = cls("BCHW", shape[1], tuple(shape[2:])), cls("BHWC", shape[-1], tuple(shape[1:-1]))
                skews = [
                    [math.log(size / cells) for size, cells in zip(image_size, way.grid, strict=True)] for way in (first, last)
                ]
                layout = last if max(skews[1]) - min(skews[1]) < max(skews[0]) - min(skews[0]) - 1e-6 else first
                if math.prod(layout.grid) > 1:
                    return layout
            raise ValueError(f"the layer has no spatial extent: it returns {tuple(shape)} for an input of {tuple(image_size)}")
        height, width = image_size
        if len(shape) == 4:
            skew = lambda h, w: abs(math.log(h * width / (w * height)))  # noqa: E731
            if skew(shape[1], shape[2]) < skew(shape[2], shape[3]) - 1e-6:
                layout = cls("BHWC", shape[3], (shape[1], shape[2]))
            else:
                layout = cls("BCHW", shape[1], (shape[2], shape[3]))
            if layout.grid != (1, 1):
                return layout
        elif len(shape) == 3:
            fits = []
            for patch in range(1, max(height, width) + 1):
                h, w = height // patch, width // patch
                prefix = shape[1] - h * w
                if h * w > 1 and 0 <= prefix <= MAX_PREFIX_TOKENS:
                    # a usual number of prefix tokens first, then patches that tile the picture, then few prefix tokens
                    fits.append((prefix > USUAL_PREFIX_TOKENS, height % patch + width % patch > 0, prefix, (h, w)))
            if fits:
                *_, prefix, grid = min(fits)
                return cls("BTC", shape[2], grid, prefix)
        raise ValueError(
            f"the layer has no spatial extent: it returns {tuple(shape)} for a {height}x{width} input; take one that returns "
            "(B, C, h, w), (B, h, w, C) or patch tokens (B, T, C), before pooling and flattening"
        )

    @property
    def channel_dim(self) -> int:
        return 1 if self.kind == "BCHW" else -1

    def to_maps(self, x: Tensor) -> Tensor:
        """Any layout -> (B, C, h, w); prefix tokens are dropped."""
        if self.kind == "BTC":
            x = x[:, self.prefix :].unflatten(1, self.grid)
        return x if self.kind == "BCHW" else x.movedim(-1, 1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Any layout -> (B, T, C); prefix tokens are kept."""
        if self.kind == "BTC":
            return x
        return (x.flatten(2).transpose(1, 2)) if self.kind == "BCHW" else x.flatten(1, -2)


Target = int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None


def is_callables(target: Target) -> bool:
    """Is the target a callable, or a sequence of them?"""
    return callable(target) or (isinstance(target, Sequence) and len(target) > 0 and all(map(callable, target)))


def of_images(target: Target, which: Tensor) -> Target:
    """The part of a target that belongs to these images, given by their indices: of one per image those, else all of it."""
    if isinstance(target, Tensor) and target.ndim:
        return target[which.to(target.device)]
    return [target[i] for i in which.tolist()] if isinstance(target, (list, tuple)) else target


def class_indices(logits: Tensor, target, unknown: bool = False) -> Tensor:
    """One class index per image, (B,) int64, from None (predicted class), an int, or one class per image.

    unknown: let -1 mean "not known", and become the predicted class. Raises ValueError for a class out of range or a wrong
    count, TypeError for anything but integers.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model returns {seen}, no logits (B, K); give a callable as target, see scanlib.targets")
    count, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        index = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target {target!r} is no class; give an index, one per image, or callables") from error
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"target must hold class indices (integers), not {index.dtype}")
    if index.ndim == 0:
        index = index.expand(count)
    if index.shape != (count,):
        has = f"{index.numel()} classes" if index.ndim == 1 else f"shape {tuple(index.shape)}"
        raise ValueError(f"target has {has} for {count} images; give one class, or a flat list with one per image")
    lowest = -1 if unknown else 0
    for extreme in (index.max(), index.min()) if index.numel() else ():
        if not lowest <= int(extreme) < classes:
            raise ValueError(f"target class {int(extreme)} is out of range: the model has classes 0..{classes - 1}")
    return torch.where(index < 0, logits.argmax(1), index.long())


def target_scores(outputs, target: Target = None) -> Tensor:
    """The score of each image, (B,): the logit of a class, or what a callable makes of the image's own output.

    outputs: (B, K) logits; for callables anything with an entry for each image, as maps (B, K, H, W) or a list of detections.
    """
    if is_callables(target):
        functions = [target] * len(outputs) if callable(target) else list(target)
        if len(functions) != len(outputs):
            raise ValueError(f"target has {len(functions)} callables for {len(outputs)} images; give one, or one per image")
        scores = [function(row) for function, row in zip(functions, outputs, strict=True)]
        if not all(isinstance(score, Tensor) and score.numel() == 1 for score in scores):
            raise TypeError("target's callable must map an image's outputs (K,) to a scalar tensor, as `lambda row: row[3]`")
        return torch.stack([score.reshape(()) for score in scores])
    return outputs.gather(1, class_indices(outputs, target)[:, None])[:, 0]


def logits_of(output):
    """What scores are made of: logits (B, K) out of a tensor, a tuple led by one, an object with ``.logits`` (Inception, Hugging
    Face), or a dictionary with "out" (segmentation); a list of dictionaries, one per image (detection), stays as it is."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    if isinstance(output, (tuple, list)) and len(output) and isinstance(output[0], Mapping):
        return list(output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}; wrap it so that it returns logits (B, K)")
    return output if output.ndim > 1 else output.reshape(-1, 1)  # a binary model with one output per image


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Put every module into eval mode, and back as each was, exceptions included."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


class FeatureTaps:
    """Capture the outputs of several layers in one forward, and the gradient of any score at each of them.

    Args:
        model: any module whose output ``logits_of`` understands.
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
            with torch.inference_mode(False), torch.set_grad_enabled(self.graph == "whole"), evaluating(self.model):
                if inputs.is_inference():
                    inputs = inputs.clone()  # an inference tensor can not take part in a graph
                # fused attention has no second derivative
                with sdpa_kernel(SDPBackend.MATH) if self.twice else contextlib.nullcontext():
                    self.logits = logits_of(self.model(inputs))
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
        captured = self.captured
        with torch.inference_mode(False), torch.enable_grad():
            score = target_scores(self.logits, target).sum()  # images are independent in eval mode: one backward for all
            gradients = [None] * len(captured)
            if score.requires_grad:
                gradients = torch.autograd.grad(score, captured, retain_graph=True, create_graph=self.twice, allow_unused=True)
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"the score does not depend on layer {name!r}; "
                    "tap one on the way to the output, outside any no_grad of the model"
                )
        return list(gradients)


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
