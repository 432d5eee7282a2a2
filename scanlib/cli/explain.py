"""The command ``explain``: a row of panels per image, by SCAN, by the slots of a SCOUTER, or by another method."""

import argparse
from pathlib import Path

import torch

from scanlib.cli.shared import METHODS, add_model_options, build_explainer, load_models, parse_class, validate_methods
from scanlib.data import read_image
from scanlib.explainers.base import prepare_inputs
from scanlib.layers import compute_logits
from scanlib.models.zoo import Classifier
from scanlib.plots import overlay, plot_panels
from scanlib.scouter.model import BaseClassifier, Scouter
from scanlib.scouter.recipes import load_model
from scanlib.targets import LogProbability
from scanlib.training.checkpoint import check_writable

FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")  # formats that matplotlib writes
Panels = tuple[list[list], list[str], list[str]]  # rows of panels, column titles, row titles


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what to explain, how, and where the figure is saved."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    add_model_options(parser)
    parser.add_argument("--scouter", type=Path, help="file of a SCOUTER, saved by train scouter; with --method also of a base")
    parser.add_argument("--method", help=f"explain the classifier by another method: {', '.join(METHODS)}")
    parser.add_argument("--layer", help="layer of --method or --evidence; default: the last with a spatial extent")
    parser.add_argument("--class", dest="target", help="index or name of the class to explain; default: the predicted class")
    parser.add_argument("--percentile", type=parse_percentiles, default="95", help="of SCAN's mask; 80,90,95: their mean map")
    parser.add_argument("--out", type=Path, default=Path("map.png"), help="file of the figure")


def parse_percentiles(text: str) -> list[float]:
    """Convert "80,90,95" to numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers in [0, 100], as 95 or 80,90,95, got {text!r}") from None


def run(options: argparse.Namespace) -> None:
    """Explain the images, save the figure, and print what each row shows."""
    if sum(map(bool, (options.decoder, options.scouter, options.model))) != 1:
        raise ValueError("--decoder, --scouter or --model: exactly one must be given, to choose what to explain")
    if options.out.is_dir() or options.out.suffix.lower() not in FIGURES:
        raise ValueError(f"--out must be a file that ends in {', '.join(FIGURES)}, got {str(options.out)!r}")
    check_writable(options.out)
    validate_methods("--method", [options.method])
    validate_methods("--evidence", [options.evidence])
    if options.model and not options.method:
        raise ValueError("--model needs a --method; to explain by SCAN give a --decoder instead")
    if options.evidence and (options.method or not options.decoder):
        raise ValueError("--evidence needs a --decoder and no --method: it is weighted by SCAN's confidence")
    if options.layer and not (options.method or options.evidence):
        raise ValueError("--layer needs a --method or --evidence: a decoder and slots belong to the layer they were trained for")
    if options.log_probability and options.scouter and not options.method:
        raise ValueError("--log-probability needs a --decoder or a --method: slots explain logits")
    explain = _explain_by_slots if options.scouter and not options.method else _explain_classifier
    rows, titles, names = explain(options)
    figure = plot_panels(rows, titles, names, size=2.2)
    figure.savefig(options.out, dpi=120)
    for path, name in zip(options.images, names, strict=True):
        print(f"{path}: {name}".replace("\n", "; "))
    print(f"{options.out}: {len(rows)} explained")


def _explain_classifier(options: argparse.Namespace) -> Panels:
    """Explain by ``--method``, or by the SCAN of ``--decoder``, whose reconstructions are another column."""
    if options.scouter:
        model, recipe = load_model(options.scouter)
        network = model.model if isinstance(model, BaseClassifier) else model
        classifier = Classifier(network, model.preprocess, recipe.layer or "", model.classes, (recipe.image_size,) * 2)
        scanner = None
    else:
        classifier, scanner = load_models(options)
        scanner = None if options.method else scanner
    classifier.model.to(options.device)
    size = classifier.image_size if scanner is None else scanner.image_size
    images = torch.stack([read_image(path, size[0]) for path in options.images])
    target = parse_class(options.target, classifier.classes)
    with torch.no_grad():
        inputs = prepare_inputs(classifier.model, classifier.preprocess, images)
        probabilities = compute_logits(classifier.model, inputs).softmax(1).cpu()
    classes = probabilities.argmax(1).tolist() if target is None else [target] * len(images)
    targets = [LogProbability(c) for c in classes] if options.log_probability else classes
    reconstruction = {}
    if scanner is None:
        title, maps = options.method, build_explainer(options.method, classifier, options.layer)(images, targets)
    else:
        title = f"confidence, P = {' '.join(f'{p:g}' for p in options.percentile)}"
        maps, reconstruction["reconstruction"] = scanner(images, targets, options.percentile)
        if options.evidence:
            title += f",\nby {options.evidence}, normalized"
            evidence = build_explainer(options.evidence, classifier, options.layer)
            maps = scanner.as_explainer(options.percentile, evidence)(images, targets)
    if options.log_probability:
        title += ",\nof log p"
    maps = maps.cpu()
    overlays = [overlay(image, heat) for image, heat in zip(images, maps, strict=True)]
    columns = {"image": images, title: maps, "overlay": overlays} | reconstruction
    names = [f"{classifier.classes[c]} {p[c]:.2f}" for p, c in zip(probabilities, classes, strict=True)]
    return [list(row) for row in zip(*columns.values(), strict=True)], list(columns), names


def _explain_by_slots(options: argparse.Namespace) -> Panels:
    """Explain by the slots of ``--class``, or of the classes with the highest and the lowest logit."""
    scouter, recipe = load_model(options.scouter)
    if not isinstance(scouter, Scouter):
        raise ValueError(f"--scouter must have slots, got the base {options.scouter}; give a --method, as GradCAM")
    scouter.to(options.device)
    images = torch.stack([read_image(path, recipe.image_size) for path in options.images])
    target = parse_class(options.target, scouter.classes)
    with torch.no_grad():
        slots = scouter.attend(prepare_inputs(scouter, scouter.preprocess, images))
    logits, areas, maps = slots.logits.cpu(), slots.attention.mean((2, 3, 4)).cpu(), scouter.compute_all_maps(images)
    side = "for" if scouter.sign > 0 else "against"
    if target is None:
        classes, titles = [logits.argmax(1).tolist(), logits.argmin(1).tolist()], ["the highest logit", "the lowest logit"]
    else:
        classes, titles = [[target] * len(images)], [scouter.classes[target]]
    rows, names = [], []
    for i, (image, shown) in enumerate(zip(images, zip(*classes, strict=True), strict=True)):
        rows.append([image, *(panel for c in shown for panel in (maps[i, c], overlay(image, maps[i, c])))])
        names.append("\n".join(f"{scouter.classes[c]} {logits[i, c]:.1f}, area {areas[i, c]:.3f}" for c in shown))
    return rows, ["image", *(text for title in titles for text in (f"{side} {title}", "overlay"))], names
