"""What the commands share: explainers by name, and what ``--decoder``, ``--class`` and ``--device`` stand for."""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scanlib import attention, cams, fullgrad, perturbation
from scanlib.checkpoint import load_checkpoint
from scanlib.explainer import Explainer
from scanlib.models import Target, load_target
from scanlib.scan import SCAN

METHODS = {  # every explainer that is called alike
    name: kind
    for module in (cams, perturbation, fullgrad, attention)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Explainer) and kind.__module__ == module.__name__ and name[0] != "_"
}


def check_methods(option: str, *names: str | None) -> None:
    """Refuse names that no method has; None stands for an option that was left out."""
    unknown = [name for name in names if name is not None and name not in METHODS]
    if unknown:
        raise ValueError(f"{option} {' '.join(unknown)}: not known; there are {', '.join(METHODS)}")


def method(name: str, model: nn.Module, preprocess: Callable[[Tensor], Tensor], layer: str | None = None) -> Explainer:
    """A method's explainer of a model; without a layer it finds its own."""
    return METHODS[name](model, layer or None, preprocess)


def trained(options) -> tuple[Target, SCAN]:
    """The classifier and the SCAN that ``--decoder`` belongs to."""
    saved = load_checkpoint(options.decoder, ("identity", "notes"))
    notes, identity = saved["notes"], saved["identity"]
    if not (isinstance(identity, dict) and {"layer", "image_size", "mask_by"} <= set(identity)):
        raise ValueError(f"{options.decoder} does not say which layer it belongs to; train a new decoder")
    if not isinstance(notes, dict) or not isinstance(notes.get("model"), str):
        raise ValueError(
            f"{options.decoder} does not say which classifier it belongs to; explain in Python, with SCAN(...).load_decoder(path)"
        )
    target = load_target(notes["model"], options.weights or notes.get("weights", "DEFAULT"))
    size, mask_by = tuple(identity["image_size"]), identity["mask_by"]
    scanner = SCAN(target.model, identity["layer"], size, device=options.device, mask_by=mask_by)
    return target, scanner.set_preprocess(target.preprocess).load_decoder(options.decoder)


def class_number(given: str | None, classes: list[str]) -> int | None:
    """What ``--class`` stands for; None, the predicted class, stays None."""
    if given is None:
        return None
    if given.lstrip("-").isdigit():
        number = int(given)
        if not 0 <= number < len(classes):
            raise ValueError(f"class {number} is out of range: the model has classes 0..{len(classes) - 1}")
        return number
    if given not in classes:
        close = ", ".join(difflib.get_close_matches(given, classes, n=5)) or f"{classes[0]}, {classes[1]}, ..."
        raise ValueError(f"class {given!r} is not known; close matches: {close}")
    return classes.index(given)


def device_of(options) -> torch.device:
    """What ``--device`` stands for."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
