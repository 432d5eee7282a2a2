"""The command ``explain``: a row of panels per image, by SCAN, by the slots of a SCOUTER, or by another method."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from scanlib.cli.shared import METHODS, add_model_options, build_explainer, load_models, parse_class, validate_methods
from scanlib.data import read_image
from scanlib.explainers.base import prepare_inputs
from scanlib.layers import compute_logits
from scanlib.metrics import build_class_score, compute_auc, compute_removal_curves
from scanlib.models.zoo import CHECKPOINTS, Classifier
from scanlib.plots import overlay, plot_panels
from scanlib.scouter.model import BaseClassifier, Scouter
from scanlib.scouter.recipes import load_model
from scanlib.targets import LogProbability
from scanlib.training.checkpoint import check_writable

FIGURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp")  # formats that matplotlib writes
PHOTOS_DECODER = CHECKPOINTS / "efficientnet_lite0_decoder.pt"
Panels = tuple[list[list], list[str], list[str]]  # rows of panels, column titles, row titles


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: what to explain, how, and where the figure is saved."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    add_model_options(parser)
    parser.add_argument("--scouter", type=Path, help="file of a SCOUTER, saved by train scouter; with --method also of a base")
    parser.add_argument("--method", help=f"explain the classifier by another method: {', '.join(METHODS)}")
    parser.add_argument("--layer", help="layer of --method or --evidence; default: the last with a spatial extent")
    parser.add_argument("--class", dest="target", help="index or name of the class to explain; default: the predicted class")
    parser.add_argument(
        "--percentile", type=parse_percentiles, help="of SCAN's mask; 80,90,95: their mean; default: the decoder's"
    )
    parser.add_argument("--out", type=Path, default=Path("map.png"), help="file of the figure")
    parser.add_argument("--json", action="store_true", help="print classes, probabilities and metrics of the maps as JSON")


def parse_percentiles(text: str) -> list[float]:
    """Convert "80,90,95" to numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers in [0, 100], as 95 or 80,90,95, got {text!r}") from None


def run(options: argparse.Namespace) -> None:
    """Explain the images, save the figure, and print what each row shows."""
    if sum(map(bool, (options.decoder, options.scouter, options.model))) > 1:
        raise ValueError("--decoder, --scouter or --model: only one can be given, to choose what to explain")
    if not (options.decoder or options.scouter or options.model):
        options.decoder = PHOTOS_DECODER
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
    by_slots = options.scouter and not options.method
    if options.json and by_slots:
        raise ValueError("--json needs a --decoder or a --method: slots have no metrics of maps")
    rows, titles, names = _explain_by_slots(options) if by_slots else _explain_classifier(options)
    figure = plot_panels(rows, titles, names, size=2.2)
    figure.savefig(options.out, dpi=120, bbox_inches="tight")
    if options.json:
        return
    for path, name in zip(options.images, names, strict=True):
        print(f"{path}: {name}".replace("\n", "; "))
    print(f"{options.out}: {len(rows)} explained")


def _explain_classifier(options: argparse.Namespace) -> Panels:
    """Explain by ``--method``, or by the SCAN of ``--decoder`` beside Grad-CAM and the reconstruction."""
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
    of_score = "\nof log p" if options.log_probability else ""
    if scanner is None:
        maps = {options.method + of_score: build_explainer(options.method, classifier, options.layer)(images, targets).cpu()}
    else:
        percentiles = options.percentile or options.default_percentiles
        title, reading = "SCAN", f"\nP = {' '.join(f'{p:g}' for p in percentiles)}"
        heat, reconstruction = scanner(images, targets, percentiles)
        if options.evidence not in (None, "none"):
            title += f" x {options.evidence}"
            evidence = build_explainer(options.evidence, classifier, options.layer)
            heat = scanner.as_explainer(percentiles, evidence)(images, targets)
        cam = build_explainer("GradCAM", classifier)(images, targets)
        maps = {title + of_score + reading: heat.cpu(), f"GradCAM{of_score}": cam.cpu()}
    overlays = [[overlay(*each) for each in zip(images, heat, strict=True)] for heat in maps.values()]
    columns: dict = {"image": images, next(iter(maps)): next(iter(maps.values())), "overlay": overlays[0]}
    if scanner is not None:
        columns |= {f"GradCAM{of_score}": overlays[1], "reconstruction": reconstruction}
    ranked = [p.topk(min(3, len(p))).indices.tolist() for p in probabilities]
    listed = [dict.fromkeys([c, *best]) for c, best in zip(classes, ranked, strict=True)]
    names = [
        "\n".join(f"{classifier.classes[c]} {p[c]:.2f}" for c in each) for p, each in zip(probabilities, listed, strict=True)
    ]
    if options.json:
        score = build_class_score(classifier.model, classifier.preprocess, torch.tensor(classes))
        metrics = {title.split("\n")[0]: _measure_maps(score, images, heat) for title, heat in maps.items()}
        for i, path in enumerate(options.images):
            top = {classifier.classes[c]: round(float(probabilities[i, c]), 4) for c in listed[i]}
            found = {"image": str(path), "class": classifier.classes[classes[i]], "probabilities": top}
            print(json.dumps(found | {"maps": {title: each[i] for title, each in metrics.items()}}))
    return [list(row) for row in zip(*columns.values(), strict=True)], list(columns), names


def _measure_maps(score, images: Tensor, maps: Tensor) -> list[dict]:
    """Return metrics of each map (N, H, W): its peak (x, y) in pixels, its share above 0.5, deletion and insertion."""
    curves = compute_removal_curves(score, images, maps, steps=10, patch=max(4, images.shape[-1] // 14))
    areas = [compute_auc(curve).tolist() for curve in curves]
    peaks = [(index % maps.shape[-1], index // maps.shape[-1]) for index in maps.flatten(1).argmax(1).tolist()]
    rows = zip(peaks, (maps > 0.5).float().mean((1, 2)).tolist(), *areas, strict=True)
    return [{"peak": p, "share above 0.5": round(a, 4), "deletion": round(d, 4), "insertion": round(i, 4)} for p, a, d, i in rows]


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
