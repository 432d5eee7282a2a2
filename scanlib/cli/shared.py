"""What the commands share: explainers by name, and what ``--decoder``, ``--class`` and ``--device`` stand for."""

import difflib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scanlib import explainers
from scanlib.explainers.base import Explainer
from scanlib.models.zoo import Classifier, load_classifier
from scanlib.scan import SCAN
from scanlib.training.checkpoint import load_checkpoint

METHODS = {  # every explainer that returns one map per image
    name: kind
    for name, kind in vars(explainers).items()
    if isinstance(kind, type) and issubclass(kind, Explainer) and kind not in (Explainer, explainers.DeepFeatureFactorization)
}


def check_methods(option: str, *names: str | None) -> None:
    """Refuse names that no method has; None stands for an option that was left out."""
    unknown = [name for name in names if name is not None and name not in METHODS]
    if unknown:
        raise ValueError(f"{option} {' '.join(unknown)}: not known; there are {', '.join(METHODS)}")


def build_explainer(name: str, model: nn.Module, preprocess: Callable[[Tensor], Tensor], layer: str | None = None) -> Explainer:
    """A method's explainer of a model; without a layer it finds its own."""
    return METHODS[name](model, layer or None, preprocess)


def load_trained_scan(options) -> tuple[Classifier, SCAN]:
    """The classifier and the SCAN that ``--decoder`` belongs to."""
    saved = load_checkpoint(options.decoder, ("identity", "notes"))
    notes, identity = saved["notes"], saved["identity"]
    if not (isinstance(identity, dict) and {"layer", "image_size", "mask_by"} <= set(identity)):
        raise ValueError(f"{options.decoder} does not say which layer it belongs to; train a new decoder")
    if not isinstance(notes, dict) or not isinstance(notes.get("model"), str):
        raise ValueError(
            f"{options.decoder} does not say which classifier it belongs to; explain in Python, with SCAN(...).load_decoder(path)"
        )
    target = load_classifier(notes["model"], options.weights or notes.get("weights", "DEFAULT"))
    size, mask_by = tuple(identity["image_size"]), identity["mask_by"]
    scanner = SCAN(target.model, identity["layer"], size, device=options.device, mask_by=mask_by)
    return target, scanner.set_preprocess(target.preprocess).load_decoder(options.decoder)


def parse_class(given: str | None, classes: list[str]) -> int | None:
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


def choose_device(options) -> torch.device:
    """What ``--device`` stands for."""
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
