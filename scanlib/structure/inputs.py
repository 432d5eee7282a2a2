"""Prepare images for a model: its device, its precision, its memory format. Call it with readable errors."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def return_unchanged(images: Tensor) -> Tensor:
    """Return the images: the preprocess of models that take them as they are."""
    return images


def prepare_inputs(model: nn.Module, preprocess: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Preprocess images in [0, 255] on the model's device, in the model's precision.

    Integers become float32 first: in uint8, 3 - 5 is 254. Raises ValueError for a preprocess that scales integers only, as
    torchvision's presets do.
    """
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    images = images if weight is None else images.to(weight.device)
    inputs = preprocess(images.clone() if images.is_floating_point() else images.float())  # it may write into its argument
    if type(preprocess).__module__.startswith("torchvision.transforms") and len(images) and _scales_integers(preprocess, images):
        raise ValueError(
            "preprocess must take float images in [0, 255], but this torchvision transform scales integers only; "
            "pass lambda images: transform(images / 255)"
        )
    return to_channels_last(inputs.to(torch.get_default_dtype() if weight is None else weight.dtype))


def _scales_integers(preprocess: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    image = images[:1].float().clamp(0, 255).round()
    with contextlib.suppress(TypeError, ValueError):  # it takes no integers
        return bool(preprocess(image).abs().max() > 10 * preprocess(image.to(torch.uint8)).float().abs().max().clamp_min(1))
    return False


def to_channels_last(inputs: Tensor) -> Tensor:
    """Convert image batches on the CPU to channels-last memory format, in which convolutions run faster."""
    is_image_batch = inputs.ndim == 4 and inputs.device.type == "cpu"
    return inputs.contiguous(memory_format=torch.channels_last) if is_image_batch else inputs


def call_model(model: nn.Module, inputs: Tensor) -> Any:
    """Call the model. Raises ValueError for inputs of another number of channels or another size than it takes."""
    try:
        return model(inputs)
    except (RuntimeError, AssertionError) as error:  # vision transformers assert their size
        text = str(error)
        if isinstance(error, AssertionError) or "Kernel size" in text or "Output size is too small" in text:
            what = "size"
        elif "channels" in text:
            what = "number of channels"
        else:
            raise
        reason = (str(error).splitlines() or ["an assertion failed"])[0]
        raise ValueError(f"images must have the {what} that the model takes, got {tuple(inputs.shape)}: {reason}") from error


def leave_inference_mode() -> contextlib.AbstractContextManager:
    """Switch inference mode off inside ``with``, if it is on: its tensors cannot take part in a graph."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


class KeepModes:
    """Inside ``with``, autograd's and attention's global modes may change; they are as before afterwards.

    torch's own contexts restore them too, unless Ctrl-C falls into the moment in which they do. It cannot fall into both.
    """

    def __enter__(self) -> None:
        self.is_recording = torch.is_grad_enabled()
        cuda = torch.backends.cuda
        self.kernels = [
            (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
            (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
            (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
            (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
        ]

    def __exit__(self, *exception) -> None:
        torch._C._set_grad_enabled(self.is_recording)
        for enable, was_enabled in self.kernels:
            enable(was_enabled)
