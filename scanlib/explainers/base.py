"""The base class of all explainers, and how heat maps are resized and scaled to [0, 1].

explainer = GradCAM(model, target_layer=None, preprocess=preprocess)
maps = explainer(images)                                # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
raw = explainer(images, target=3, normalize=False)      # (N, h, w) at feature resolution
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.layers import eval_mode, find_default_layer, to_channels_last as to_channels_last
from scanlib.targets import Target

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of spatial axes


class Explainer:
    """Base class of all explainers. A subclass implements ``_compute_maps``. The model is unchanged after a call.

    Args:
        model: module to explain; runs in eval mode.
        target_layer: name, module or index of the layer to read; the meaning of None depends on the method.
        preprocess: function from images in [0, 255] to the model's input; None passes the images on.
    """

    differentiable = False  # whether the map keeps its autograd graph

    def __init__(self, model: nn.Module, target_layer=None, preprocess: Callable[[Tensor], Tensor] | None = None):
        self.model, self.target_layer = model, target_layer
        self.preprocess = preprocess or (lambda images: images)
        self._default_layers: dict[tuple[int, ...], str] = {}  # by the shape of an input
        # channels of an image; None for models of signals or volumes
        self._channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        """Do nothing: hooks exist only during a call."""

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        """Explain a batch of images.

        Args:
            images: (N, 3, H, W) or a single (3, H, W), in [0, 255]. A model without 2-d convolutions takes signals (N, C, L),
                volumes (N, C, D, H, W), and images in batches only.
            target: None (predicted class), a class, one class per image, or callables; see ``scanlib.targets``.
            normalize: True returns maps in [0, 1] at the images' size, with negative values set to 0. False returns the raw
                maps at feature resolution.

        Returns:
            (N, H, W) on the images' device, or (H, W) for a single image; (N, h, w) with normalize=False.

        Raises:
            ValueError: for images of another shape, images with NaN, a class out of range, or a list of another length than N.
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
        with self._evaluation():
            maps = compute(self._prepare(batch))
            if len(maps) != len(batch):
                raise ValueError(
                    f"{type(self).__name__} computed {len(maps)} maps for {len(batch)} images: the first axis of target_layer's "
                    "output is not the batch; use another layer, or pass reshape, if the method has that argument"
                )
            maps = self._normalize(maps, batch.shape[2:]) if normalize else maps
        return (maps if batch.ndim == images.ndim else maps[0]).to(images.device)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Run the model in eval mode outside inference mode, with gradients only for differentiable maps."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable), eval_mode(self.model):
            yield

    def _normalize(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Resize and normalize maps (N, h, w), or (N, K, h, w) for K classes."""
        if maps.ndim == len(size) + 2:
            return self._normalize(maps.flatten(0, 1), size).unflatten(0, maps.shape[:2])
        return normalize_map(maps.relu(), size)

    def _validate_images(self, images: Tensor) -> Tensor:
        """Return images as a batch. Raise ValueError for a wrong shape and for NaN."""
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if isinstance(images, Tensor) and images.ndim == 3 and self._channels is not None:
            images = images[None]
        is_image = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] in (1, 3, 4, self._channels)
        is_other = isinstance(images, Tensor) and images.ndim >= 3 and self._channels is None
        if not is_image and not is_other:
            raise ValueError(f"images must be a tensor (N, 3, H, W) or (3, H, W), got {shape}")
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
        return inputs.clone() if inputs.is_inference() else inputs  # an inference tensor cannot take part in a graph


def prepare_inputs(model: nn.Module, preprocess: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Preprocess images in [0, 255] on the model's device, in the model's precision."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    inputs = preprocess(images.to(weight.device))
    return to_channels_last(inputs.to(weight.dtype) if weight.is_floating_point() else inputs)


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
