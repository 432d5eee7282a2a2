"""The call every explainer answers, so that a comparison is a loop over a dictionary.

explainer = Method(model, target_layer=None, preprocess=None)
maps = explainer(images)                                # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
raw = explainer(images, target=3, normalize=False)      # (N, h, w), as computed, at feature resolution
"""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.layers import eval_mode
from scanlib.targets import Target


class Explainer:
    """What every method shares. A method says in ``_maps`` what it makes of preprocessed inputs.

    Args:
        model: put in eval mode for the call, and back; nothing about it is changed.
        target_layer: the layer, or layers, to read; what None takes is the method's business.
        preprocess: what turns images in [0, 255] into the model's input; None passes them on as they are.
    """

    differentiable = False  # whether the map's own gradient is wanted

    def __init__(self, model: nn.Module, target_layer=None, preprocess: Callable[[Tensor], Tensor] | None = None):
        self.model, self.target_layer = model, target_layer
        self.preprocess = preprocess or (lambda images: images)
        # channels of pictures, or None where the model takes signals or volumes
        self._channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        """Nothing to undo: hooks live for one call."""

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        """Images (N, 3, H, W) in [0, 255] -> maps (N, H, W) in [0, 1], on their device, negative values taken as 0; with
        normalize=False the raw maps (N, h, w) at feature resolution. Signals (N, C, L) and volumes (N, C, D, H, W) give maps of
        their own shape.

        target: None (predicted class), a class, one per image, or callables on an image's outputs. Raises ValueError for images
        of another shape or with NaN, and for a wrong count of classes.
        """
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable), eval_mode(self.model):
            inputs = self._inputs(images)
            maps = self._maps(inputs, target) if len(images) else torch.zeros(0, *images.shape[2:], device=images.device)
        self._one_each(maps, images)
        return (normalize_map(maps.relu(), images.shape[2:]) if normalize else maps).to(images.device)

    def _one_each(self, maps: Tensor, images: Tensor) -> None:
        if len(maps) != len(images):
            raise ValueError(
                f"{type(self).__name__} finds {len(maps)} maps for {len(images)} images: the first axis of target_layer's output "
                "is not the images'; take another layer, or give a reshape where the method has one"
            )

    def _inputs(self, images: Tensor) -> Tensor:
        """Checked, preprocessed, on the model's device, in its precision."""
        allowed = (1, 3, 4, self._channels)
        if (
            not isinstance(images, Tensor)
            or images.ndim < 3
            or (self._channels is not None and (images.ndim != 4 or images.shape[1] not in allowed))
        ):
            seen = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (N, 3, H, W), not {seen}; put [None] behind a single one")
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or infinite values; expected finite pixels in [0, 255]")
        inputs = prepare_inputs(self.model, self.preprocess, images)
        return inputs.clone() if inputs.is_inference() else inputs  # an inference tensor can not take part in a graph

    def _maps(self, inputs: Tensor, target: Target) -> Tensor:
        """Inputs (N, ...) -> raw maps (N, h, w)."""
        raise NotImplementedError


def prepare_inputs(model: nn.Module, preprocess: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Images in [0, 255] -> what the model takes, on its device and in its precision."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), images)
    inputs = preprocess(images.to(weight.device))
    return to_channels_last(inputs.to(weight.dtype) if weight.is_floating_point() else inputs)


def to_channels_last(inputs: Tensor) -> Tensor:
    """Pictures in the order in memory in which convolutions on the CPU run faster, by a fifth to a half: channels last."""
    pictures = inputs.ndim == 4 and inputs.device.type == "cpu"
    return inputs.contiguous(memory_format=torch.channels_last) if pictures else inputs


def choose_batch_size(images: Tensor, batch_size: int | None = None, model: nn.Module | None = None) -> int:
    """Pictures (N, C, H, W) a run: ``batch_size``, or where it is None up to 64, of no more pixels than 64 of 224 x 224.

    On the CPU 32 and 16: for larger features the system clears memory anew each time, and a picture takes up to twice as long.
    model: if it may be on another device than the images. Raises ValueError for less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is too small; give 1 or more, or None")
    device = images.device if model is None else next(model.parameters(), images).device
    most, of_224 = (32, 16) if device.type == "cpu" else (64, 64)
    return batch_size or max(1, min(most, of_224 * 224**2 // max(1, math.prod(images.shape[2:]))))


def at_least_float32(x: Tensor) -> Tensor:
    """Single precision or better: sums over many entries want it, whatever the model computes in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}  # by the number of axes


def resize_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), bilinearly; signals (B, l) and volumes (B, d, h, w) likewise."""
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    return F.interpolate(maps[:, None], size=tuple(size), mode=INTERPOLATION[maps.ndim - 1], align_corners=False)[:, 0]


def scale_to_unit_range(maps: Tensor) -> Tensor:
    """Each map (B, ...) stretched to [0, 1]; a constant map becomes 0."""
    axes = tuple(range(1, maps.ndim))
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)


def normalize_map(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), resized bilinearly and stretched to [0, 1] each; a constant map becomes 0."""
    return scale_to_unit_range(resize_map(maps, size))


def validate_maps(maps: Tensor, count: int, size: Sequence[int]) -> Tensor:
    """Maps to measure, (N, h, w) of any dtype -> (N, H, W) in single precision or better.

    Maps of another size than the pictures' are resized, and a warning says so. Raises ValueError for another count, NaN or
    infinity.
    """
    if maps.ndim != 3 or len(maps) != count:
        raise ValueError(f"maps have shape {tuple(maps.shape)}; for these images it must be {(count, *size)}")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    broken = (~maps.isfinite()).any((1, 2)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"maps {broken[:5]} of {count} hold NaN or infinite values; leave them out, or find out why")
    if tuple(maps.shape[1:]) != tuple(size):
        warnings.warn(f"maps of {tuple(maps.shape[1:])} are resized to the pictures' {tuple(size)}", stacklevel=3)
    return resize_map(maps, size)
