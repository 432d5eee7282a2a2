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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

USUAL_PREFIX_TOKENS, MAX_PREFIX_TOKENS = 5, 16  # class, distillation and register tokens in front of the patch tokens


def resolve_layer(model: nn.Module, layer: str | int | nn.Module) -> tuple[str, nn.Module]:
    """Find a layer by name (``"layer4.1"``), by module, or by index into ``list(model.modules())[1:]``.

    Returns its dotted name and the module. Raises ValueError (unknown name or module, index out of range) and
    TypeError (anything else).
    """
    named = dict(list(model.named_modules())[1:])
    if isinstance(layer, str):
        named |= dict(list(model.named_modules(remove_duplicate=False))[1:])  # a shared module answers to each of its names
        if layer in named:
            return layer, named[layer]
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
    """How a layer arranges its features: ``kind`` is "BCHW", "BHWC" or "BTC" (tokens, ``prefix`` of them not patches)."""

    kind: str
    channels: int
    grid: tuple[int, int]
    prefix: int = 0

    @classmethod
    def infer(cls, shape: Sequence[int], image_size: tuple[int, int]) -> "Layout":
        """Read the layout off a feature shape and the (H, W) of the model's input.

        Of the two ways to read a 4-D shape, the one whose grid has the picture's aspect ratio is taken. Tokens are
        patches of a square p x p; what exceeds the (H // p) x (W // p) grid stands in front of them; of several such
        readings the one with up to 5 prefix tokens, then patches that tile the picture, is taken. Raises ValueError when
        there is no spatial extent.
        """
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
        return x if self.kind == "BCHW" else x.permute(0, 3, 1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Any layout -> (B, T, C); prefix tokens are kept."""
        if self.kind == "BTC":
            return x
        return (x.flatten(2).transpose(1, 2)) if self.kind == "BCHW" else x.flatten(1, 2)


Target = int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None


def class_indices(logits: Tensor, target, unknown: bool = False) -> Tensor:
    """One class index per image, (B,) int64, from None (predicted class), an int, or one class per image.

    unknown: let -1 mean "not known", and become the predicted class. Raises ValueError for a class out of range or a wrong
    count, TypeError for anything but integers.
    """
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


def target_scores(logits: Tensor, target: Target = None) -> Tensor:
    """The score of each image, (B,): the logit of a class, or what a callable makes of the image's row of outputs."""
    many = not callable(target) and isinstance(target, Sequence) and len(target) > 0 and all(map(callable, target))
    if callable(target) or many:
        functions = list(target) if many else [target] * len(logits)
        if len(functions) != len(logits):
            raise ValueError(f"target has {len(functions)} callables for {len(logits)} images; give one, or one per image")
        scores = [function(row) for function, row in zip(functions, logits, strict=True)]
        if not all(isinstance(score, Tensor) and score.numel() == 1 for score in scores):
            raise TypeError("target's callable must map an image's outputs (K,) to a scalar tensor, as `lambda row: row[3]`")
        return torch.stack([score.reshape(()) for score in scores])
    return logits.gather(1, class_indices(logits, target)[:, None])[:, 0]


def logits_of(output) -> Tensor:
    """Logits out of a tensor, a tuple, or an object with ``.logits`` (Inception, Hugging Face)."""
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}; wrap it so that it returns logits (B, K)")
    return output if output.ndim > 1 else output.reshape(-1, 1)  # a binary model with one output per image


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Put every module into eval mode, and back as each was, exceptions included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


class FeatureTap:
    """Capture a layer's output, and the gradient of any score at that layer.

    Args:
        model: any module whose output is (B, K) logits, a tuple led by them, or an object with ``.logits``.
        layer: name, module, or index into ``list(model.modules())[1:]``.

    A context manager: the hook is in place inside ``with`` and gone afterwards, exceptions included. The model runs in
    eval mode and gets its own modes back. One forward serves any number of targets. If the layer runs several times
    in one forward (a shared ReLU), the last run is kept.

    Attributes after a call: ``features`` (as the layer returned them, detached), ``logits``, ``layout``.
    """

    def __init__(self, model: nn.Module, layer: str | int | nn.Module):
        self.model = model
        self.name, self.layer = resolve_layer(model, layer)
        self.logits: Tensor | None = None
        self.layout: Layout | None = None
        self._leaf: Tensor | None = None
        self._handle = None
        self._running = False

    def __enter__(self) -> "FeatureTap":
        if self._handle is not None:
            raise RuntimeError("this FeatureTap is already open; make another for a second use")
        self._handle = self.layer.register_forward_hook(self._cut)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()
        self._handle = self._leaf = self.logits = None  # let the graph go

    def _cut(self, module, inputs, output):
        if not self._running:  # someone else runs the model while the tap is open
            return output
        tensor = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(tensor, Tensor):
            raise TypeError(f"layer {self.name!r} returns {type(tensor).__name__}; tap a layer that returns a tensor")
        # detach: nothing in front of the layer is recorded; clone: the layer's output may alias its input
        self._leaf = tensor.detach().clone().requires_grad_()
        torch.set_grad_enabled(True)  # record the tail only; __call__ restores the caller's mode
        passed_on = self._leaf.clone()  # an in-place operation behind the layer must not change the features
        if not isinstance(output, (tuple, list)):
            return passed_on
        rebuild = getattr(type(output), "_make", type(output))  # named tuples build themselves by _make
        return rebuild([passed_on, *output[1:]])

    def __call__(self, inputs: Tensor) -> Tensor:
        """Run the model on (B, 3, H, W), already preprocessed. Returns the logits (B, K), detached."""
        if self._handle is None:
            raise RuntimeError("FeatureTap is not active; use it as `with FeatureTap(model, layer) as tap: tap(inputs)`")
        self._leaf, self._running = None, True
        try:
            with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
                if inputs.is_inference():
                    inputs = inputs.clone()  # an inference tensor can not take part in a graph
                self.logits = logits_of(self.model(inputs))
        finally:
            self._running = False
        if self._leaf is None:
            raise RuntimeError(f"layer {self.name!r} did not run in the forward pass; tap a layer that the model calls")
        self.layout = Layout.infer(self._leaf.shape, tuple(inputs.shape[-2:]))
        return self.logits.detach()

    @property
    def features(self) -> Tensor:
        """The layer's output, detached, in the layer's own layout."""
        if self._leaf is None:
            raise RuntimeError("nothing captured; call the tap on a batch of inputs, and read it inside the `with`")
        return self._leaf.detach()

    def gradient(self, target: Target = None) -> Tensor:
        """d score / d features, shaped like ``features``.

        target: None (predicted class), a class, one class per image, or a callable (one, or one per image) from an
        image's output row (K,) to a scalar. Raises ValueError for a class out of range, a wrong count, or a score
        that does not depend on the layer at all (a side branch).
        """
        if self._leaf is None:
            raise RuntimeError("nothing captured; call the tap on a batch of inputs, and read it inside the `with`")
        with torch.inference_mode(False), torch.enable_grad():
            score = target_scores(self.logits, target).sum()  # images are independent in eval mode: one backward for all
            if score.requires_grad:
                (gradient,) = torch.autograd.grad(score, self._leaf, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    return gradient
        raise ValueError(
            f"the score does not depend on layer {self.name!r}; "
            "tap one on the way to the output, outside any no_grad of the model"
        )
