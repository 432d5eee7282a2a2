"""Run a model in eval mode on a copy of its inputs, and find the logits in what it returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from scanlib.structure.eval_copy import make_eval_copy
from scanlib.structure.inputs import call_model


def compute_logits(model: nn.Module, inputs: Tensor, output: str | int | None = None) -> Any:
    """Run the model on inputs (N, ...) in eval mode and return its logits; see ``get_logits``.

    The model's own mode and the inputs stay as they are, even if the model writes into its input.
    """
    is_training = any(module.training for module in model.modules())
    return run_copy(make_eval_copy(model) if is_training else model, inputs, output)


def run_copy(copy: nn.Module, inputs: Tensor, output: str | int | None = None) -> Any:
    """Run an eval copy on a clone of the inputs and return its logits. Raises ValueError for NaN among them."""
    try:
        return run_copy_once(copy, inputs.clone(), output)
    except RuntimeError as error:
        if "view size is not compatible" in str(error) and not inputs.is_contiguous():
            return run_copy_once(copy, inputs.contiguous().clone(), output)  # the model needs channels first in memory
        raise


def run_copy_once(copy: nn.Module, inputs: Tensor, output: str | int | None = None) -> Any:
    """Run an eval copy on these very inputs, which the model may change; see ``run_copy``."""
    outputs = call_model(copy, inputs)
    logits = get_logits(outputs, len(inputs), output)
    if isinstance(logits, Tensor) and logits.detach().isnan().any():
        raise ValueError("the model's logits hold NaN; check its weights and the inputs, or use float32")
    return logits


def get_logits(outputs: Any, count: int | None = None, output: str | int | None = None) -> Any:
    """Return the part of a model's output that scores are computed from.

    Logits (B, K) come from a tensor, a tuple whose first entry is one, an object with ``.logits`` (Inception, Hugging Face), or
    a dictionary with "logits" or "out" (segmentation). A list of dictionaries, one per image (detection), is returned as it is.

    count: the number of images; (K,) for a single image, from a model that squeezes its output, becomes (1, K).
    output: key or index of the entry to take from a dictionary, a tuple or an object with several outputs.

    Raises ValueError for an unknown ``output`` and for logits of another number of images, TypeError for any other output.
    """
    chosen: Any = outputs
    if output is not None:
        try:
            chosen = outputs[output] if not isinstance(output, str) or isinstance(outputs, Mapping) else getattr(outputs, output)
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"output {output!r} not found; the model returns {_describe_outputs(outputs)}") from None
    else:
        chosen = getattr(chosen, "logits", chosen)
        if isinstance(chosen, Mapping):
            chosen = chosen.get("logits", chosen.get("out"))
        if isinstance(chosen, (tuple, list)) and len(chosen) and isinstance(chosen[0], Mapping):
            return list(chosen)
        chosen = chosen[0] if isinstance(chosen, (tuple, list)) and len(chosen) else chosen
    if not isinstance(chosen, Tensor):
        advice = "choose one with output=..., or wrap the model so that it does"
        raise TypeError(f"the model must return logits (B, K), got {_describe_outputs(outputs)}; {advice}")
    if count == 1 and (chosen.ndim == 0 or len(chosen) != 1):
        chosen = chosen[None]  # the model has dropped the batch axis
    if count is not None and (chosen.ndim == 0 or len(chosen) != count):
        raise ValueError(f"the model must return logits (B, K) for {count} images, got {tuple(chosen.shape)}")
    return chosen if chosen.ndim > 1 else chosen.reshape(-1, 1)  # a binary model with one output per image


def _describe_outputs(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"a dictionary with the keys {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (tuple, list)):
        return f"a {type(outputs).__name__} of {len(outputs)} entries"
    return type(outputs).__name__
