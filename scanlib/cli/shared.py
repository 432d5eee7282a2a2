"""What the commands share: the options that choose a classifier, explainers by name, and the values of ``--class``."""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path

from scanlib import explainers
from scanlib.explainers import DeepFeatureFactorization, ExpectedGradients, Explainer
from scanlib.explainers.weighted import SCANExplainer
from scanlib.models.zoo import Classifier, load_classifier, parse_weights
from scanlib.scan import SCAN
from scanlib.training.checkpoint import load_checkpoint

_OTHERS = (Explainer, DeepFeatureFactorization, ExpectedGradients, SCANExplainer)
METHODS = {  # explainers that need a model only, and return one map per image
    name: kind
    for name, kind in vars(explainers).items()
    if isinstance(kind, type) and issubclass(kind, Explainer) and kind not in _OTHERS
}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``explain`` and ``compare`` that choose a classifier, its SCAN, and what is explained."""
    parser.add_argument("--decoder", type=Path, help="file of a decoder, saved by train: chooses the classifier and adds SCAN")
    parser.add_argument(
        "--model", help="without --decoder: signs_cnn, signs_vit, efficientnet_lite0, vit_tiny, or any torchvision classifier"
    )
    parser.add_argument("--weights", help="path of a state dict, DEFAULT, or none; default: as in training, or DEFAULT")
    parser.add_argument(
        "--evidence",
        metavar="METHOD",
        help="with --decoder: the map of METHOD, weighted by SCAN's confidence; none for SCAN alone; default: the decoder's",
    )
    parser.add_argument(
        "--log-probability",
        action="store_true",
        help="explain the class's log-probability instead of its logit; set by a --decoder of it",
    )


def validate_methods(option: str, names: Sequence[str | None]) -> None:
    """Raise ValueError for unknown names. None, an option without a value, and "none" are allowed."""
    if unknown := [name for name in names if name and name not in ("none", *METHODS)]:
        raise ValueError(f"{option} must be among {', '.join(METHODS)}, got {' '.join(unknown)}")


def build_explainer(name: str, classifier: Classifier, layer: str | None = None) -> Explainer:
    """Build the explainer with this name; None lets the method choose the layer."""
    return METHODS[name](classifier.model, layer, classifier.preprocess)


def load_models(options: argparse.Namespace) -> tuple[Classifier, SCAN | None]:
    """Load the classifier of ``--decoder`` with its SCAN, or that of ``--model``.

    A decoder of the log-probability sets ``--log-probability``, so that all methods explain the same score. A decoder's notes may
    name the default of ``--evidence``, and the percentiles whose mean map is the default: ``options.default_percentiles``. Raises
    ValueError if the file does not name its layer or its classifier.
    """
    if not options.decoder:
        return load_classifier(options.model, parse_weights(options.weights or "DEFAULT")), None
    saved = load_checkpoint(options.decoder, ("identity", "notes"))
    notes, identity = saved["notes"], saved["identity"]
    if not (isinstance(identity, dict) and {"layer", "image_size", "mask_by", "score"} <= set(identity)):
        raise ValueError(f"--decoder must name its layer, and {options.decoder} does not; train a new decoder")
    if not isinstance(notes, dict) or not isinstance(notes.get("model"), str):
        way = "explain in Python with SCAN(...).load_decoder(path)"
        raise ValueError(f"--decoder must name its classifier, and {options.decoder} does not; {way}")
    weights = parse_weights(options.weights) if options.weights else notes.get("weights", "DEFAULT")
    if weights is None:
        raise ValueError(
            f"--weights must be those that {options.decoder} was trained for, got none; give the path of a state dict"
        )
    classifier = load_classifier(notes["model"], weights)
    options.log_probability |= identity["score"] == "log_probability"
    options.default_percentiles = notes.get("percentiles", [95.0])
    if options.evidence is None:
        options.evidence = notes.get("evidence")
        validate_methods(f"the evidence of {options.decoder}", [options.evidence])
    own = {"device": options.device, "mask_by": identity["mask_by"], "score": identity["score"]}
    scanner = SCAN(classifier.model, identity["layer"], tuple(identity["image_size"]), **own)
    return classifier, scanner.set_preprocess(classifier.preprocess).load_decoder(options.decoder)


def parse_class(text: str | None, classes: Sequence[str]) -> int | None:
    """Return the index of a class given by index or name; None, the predicted class, stays None."""
    if text is None:
        return None
    if re.fullmatch("-?[0-9]+", text):
        index = int(text)
        if not 0 <= index < len(classes):
            raise ValueError(f"--class must be in 0..{len(classes) - 1} for this model, got {index}")
        return index
    if text not in classes:
        close = ", ".join(difflib.get_close_matches(text, classes, n=5)) or f"{classes[0]}, {classes[1]}, ..."
        raise ValueError(f"--class {text!r} not found; close matches: {close}")
    return list(classes).index(text)
