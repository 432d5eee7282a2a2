"""The base class of all explainers, and how heat maps are resized and scaled to [0, 1].

explainer = GradCAM(model, target_layer=None, preprocess=preprocess)
maps = explainer(images)                                # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
raw = explainer(images, target=3, normalize=False)      # (N, h, w) at feature resolution
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.hooks import FeatureTaps, check_finite
from scanlib.layers import Layout, compute_logits, find_default_layer
from scanlib.structure.inputs import KeepModes, leave_inference_mode, prepare_inputs as prepare_inputs, return_unchanged
from scanlib.structure.libra import libra
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, check_count, is_callable_target, resolve_classes

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of spatial axes


class Explainer:
    """Base class of all explainers. A subclass implements ``_compute_maps``. The model is never changed, so that several threads
    may explain the same model at once, with one explainer or several.

    Args:
        model: module to explain; runs in eval mode, whatever mode it is in.
        target_layer: name, module or index of the layer to read; the meaning of None depends on the method.
        preprocess: function from images in [0, 255] to the model's input; None passes the images on.
        output: key or index of the output to explain, for models that return several; see ``get_logits``.
        layout: "BCHW", "BHWC", "BTC" or a ``Layout``: how the layer arranges its features, where it cannot be inferred.
        libra: True takes the gradients of LibraGrad, for methods that take gradients; see ``libra``.
    """

    differentiable = False  # whether the map keeps its autograd graph
    needs_gradient = False  # whether the method takes the score's gradient

    def __init__(
        self,
        model: nn.Module,
        target_layer=None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        output: str | int | None = None,
        layout: str | Layout | None = None,
        libra: bool = False,
    ):
        if libra and not self.needs_gradient:
            raise ValueError(f"libra must be False for {type(self).__name__}, which takes no gradient")
        self.model, self.target_layer = model, target_layer
        self.preprocess = preprocess or return_unchanged
        self.output, self.layout, self.libra = output, layout, libra
        self._default_layers: dict[tuple[int, ...], str] = {}  # by the shape of an input

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        """Do nothing: a call leaves nothing behind."""

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        """Explain a batch of images.

        Args:
            images: (N, C, H, W) or a single (C, H, W), in [0, 255]. A model without 2-d convolutions takes signals (N, C, L),
                volumes (N, C, D, H, W), and images in batches only.
            target: None (predicted class), a class, one class per image, or callables; see ``scanlib.targets``.
            normalize: True returns maps in [0, 1] at the images' size, with negative values set to 0. False returns the raw
                maps at feature resolution.

        Returns:
            (N, H, W) on the images' device, or (H, W) for a single image; (N, h, w) with normalize=False.

        Raises:
            ValueError: for images of another shape, a class out of range, a list of another length than N, and for NaN or
                infinite values in the images, the features, the gradients or the maps.
        """
        return self._run(images, lambda inputs: self._compute_maps(inputs, target), normalize)

    def _compute_maps(self, inputs: Tensor, target: Target) -> Tensor:
        """Compute raw maps (N, h, w) from preprocessed inputs (N, ...)."""
        raise NotImplementedError

    def _run(self, images: Tensor, compute: Callable[[Tensor], Tensor], normalize: bool) -> Tensor:
        """Apply ``compute`` to the preprocessed batch; handles single images, empty batches, eval mode and normalisation."""
        batch = self._validate_images(images)
        if not len(batch):
            return torch.zeros(0, *batch.shape[2:], device=images.device)
        with KeepModes(), leave_inference_mode(), torch.set_grad_enabled(self.differentiable):
            maps = compute(self._prepare(batch))
            if len(maps) != len(batch):
                raise ValueError(
                    f"{type(self).__name__} computed {len(maps)} maps for {len(batch)} images: the first axis of target_layer's "
                    "output is not the batch; use another layer, or pass reshape, if the method has that argument"
                )
            check_finite(maps, f"the maps of {self!r} hold")
            maps = self._normalize(maps, batch.shape[2:]) if normalize else maps
        return (maps if batch.ndim == images.ndim else maps[0]).to(images.device)

    def __repr__(self) -> str:
        layer = "" if self.target_layer is None else f", {self.target_layer!r}"
        return f"{type(self).__name__}({type(self.model).__name__}{layer})"

    def _compute_logits(self, inputs: Tensor) -> Any:
        return compute_logits(self.model, inputs, self.output)

    def _open_taps(self, layers: Sequence[str], **options) -> FeatureTaps:
        return FeatureTaps(self.model, layers, output=self.output, layout=self.layout, libra=self.libra, **options)

    def _change_gradients(self) -> contextlib.AbstractContextManager:
        """Open ``libra``, if it is asked for."""
        return libra(self.model) if self.libra else contextlib.nullcontext()

    def _normalize(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Resize and normalize maps (N, h, w), or (N, K, h, w) for K classes."""
        if maps.ndim == len(size) + 2:
            return self._normalize(maps.flatten(0, 1), size).unflatten(0, maps.shape[:2])
        return normalize_map(maps.relu(), size)

    def _validate_images(self, images: Tensor) -> Tensor:
        """Return images as a batch. Raise ValueError for a wrong shape and for NaN."""
        if isinstance(images, Tensor) and images.ndim == 3 and any(isinstance(m, nn.Conv2d) for m in self.model.modules()):
            images = images[None]
        if not isinstance(images, Tensor) or images.ndim < 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (N, 3, H, W) or (3, H, W), got {shape}")
        if images.ndim == 4 and images.shape[-1] in (1, 3, 4) and images.shape[1] > 16 and images.shape[2] > 16:
            raise ValueError(f"images must be (N, 3, H, W), channels first, got {tuple(images.shape)}; use images.movedim(-1, 1)")
        if not torch.isfinite(images).all():
            raise ValueError("images must be finite pixels in [0, 255], got NaN or infinite values")
        return images

    def _find_default_layer(self, inputs: Tensor) -> str:
        """Return the name of the last layer with a spatial extent for inputs of this size."""
        shape = tuple(inputs.shape[1:])
        if shape not in self._default_layers:
            self._default_layers[shape] = find_default_layer(self.model, shape[1:], shape[0])
        return self._default_layers[shape]

    def _prepare(self, images: Tensor) -> Tensor:
        inputs = prepare_inputs(self.model, self.preprocess, images)
        if not isinstance(inputs, Tensor) or inputs.ndim != images.ndim or len(inputs) != len(images):
            shape = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise ValueError(f"preprocess must return one input per image, for {tuple(images.shape)} it returns {shape}")
        check_finite(inputs, "the preprocessed images hold")
        return inputs.clone() if inputs.is_inference() else inputs  # an inference tensor cannot take part in a graph


class InputExplainer(Explainer):
    """Base class of the explainers that read no layer, but the input. Raw maps have the input's size.

    batch_size: inputs per run; None chooses it. target_layer must be None. See ``Explainer``.
    """

    def __init__(self, model: nn.Module, target_layer=None, preprocess=None, *, batch_size: int | None = None, **options):
        if target_layer is not None:
            raise ValueError(f"target_layer must be None for {type(self).__name__}, which reads the input, got {target_layer!r}")
        super().__init__(model, None, preprocess, **options)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        self.batch_size = batch_size

    def _choose_target(self, copy: nn.Module, inputs: Tensor, target: Target) -> Target:
        """Return the class of each image, so that changed images are explained for the class of the unchanged one."""
        check_count(target, len(inputs))
        if is_callable_target(target):
            return target
        with torch.no_grad():
            return resolve_classes(run_copy(copy, inputs, self.output), target)


def choose_batch_size(images: Tensor, batch_size: int | None = None, model: nn.Module | None = None) -> int:
    """Choose how many images (N, C, H, W) to run at once; ``batch_size`` if it is given.

    At most 64 images; on the CPU 32, or 16 of 224 x 224 pixels, because larger batches were up to twice as slow. Pass ``model``
    if it may be on another device than the images. Raises ValueError for a batch_size below 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
    device = images.device if model is None else next(model.parameters(), images).device
    most, most_at_224 = (32, 16) if device.type == "cpu" else (64, 64)
    return batch_size or max(1, min(most, most_at_224 * 224**2 // max(1, math.prod(images.shape[2:]))))


def full_precision(x: Tensor) -> torch.autocast:
    """Switch autocast off for sums over many entries; the model itself may run in it."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision and integers to float32; sums over many entries need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def resize_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, h, w) to (B, H, W) bilinearly; signals (B, l) and volumes (B, d, h, w) likewise."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode=INTERPOLATION[maps.ndim - 1], align_corners=False)[:, 0]


def scale_to_unit_range(maps: Tensor) -> Tensor:
    """Scale each map (B, ...) to [0, 1]; a constant map becomes 0."""
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def normalize_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, h, w) to (B, H, W) and scale each to [0, 1]; a constant map becomes 0."""
    return scale_to_unit_range(resize_map(maps, size))


def validate_maps(maps: Tensor, count: int, size: Sequence[int]) -> Tensor:
    """Check maps (N, h, w) before they are measured; return them as (N, H, W) in float32 or float64.

    Maps of another size are resized with a warning. Raises ValueError for another count, NaN or infinite values.
    """
    if maps.ndim != 3 or len(maps) != count:
        raise ValueError(f"maps must have shape {(count, *size)} for these images, got {tuple(maps.shape)}")
    maps = at_least_float32(maps)
    broken = (~maps.isfinite()).any((1, 2)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"maps must be finite, got NaN or infinite values in maps {broken[:5]} of {count}")
    if tuple(maps.shape[1:]) != tuple(size):
        warnings.warn(f"maps of {tuple(maps.shape[1:])} are resized to the images' size {tuple(size)}", stacklevel=3)
    return resize_map(maps, size)
