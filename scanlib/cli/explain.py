"""The command line of explanations: a row a picture, by SCAN, by a SCOUTER's slots, or by any method of a classifier.

python -m scanlib explain cat.jpg dog.jpg --decoder decoder.pt --percentile 95 --out map.png
python -m scanlib explain sign.png --scouter negative.pt
python -m scanlib explain cat.jpg --model resnet50 --method GradCAM
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scanlib.cli.shared import METHODS, build_explainer, check_methods, choose_device, load_trained_scan, parse_class
from scanlib.data import read_image
from scanlib.explainers.base import prepare_inputs
from scanlib.layers import eval_mode, get_logits
from scanlib.models.zoo import load_classifier, parse_weights
from scanlib.plots import overlay, plot_panels
from scanlib.scouter.model import Scouter
from scanlib.scouter.recipes import load_trained
from scanlib.targets import log_probability


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to explain, by what, and where the figure goes."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    parser.add_argument("--decoder", type=Path, help="what train wrote")
    parser.add_argument("--scouter", type=Path, help="what train scouter wrote, of either sign; a base with --method")
    parser.add_argument("--model", help="with --method: signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    parser.add_argument("--weights", help="the classifier's weights, if they moved since training")
    parser.add_argument("--method", help=f"explain the classifier by another method: {', '.join(METHODS)}")
    parser.add_argument("--layer", help="of the method, or of the evidence; left out, the last with a spatial extent")
    parser.add_argument("--class", dest="target", help="class to explain, by number or name; left out, the predicted one")
    parser.add_argument("--log-probability", action="store_true", help="explain the class's log-probability, not its logit")
    parser.add_argument("--percentile", type=parse_percentiles, default="95", help="SCAN's; of several, as 80,90,95, the mean")
    parser.add_argument("--evidence", metavar="METHOD", help="this method's map, weighed by SCAN's confidence")
    parser.add_argument("--out", type=Path, default=Path("map.png"))
    parser.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")


def parse_percentiles(text: str) -> list[float]:
    """80,90,95 -> its numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give one in 0..100, or several, as 80,90,95") from None


def explain_command(options) -> None:
    """One row a picture, with what the explainer says of it."""
    if sum(map(bool, (options.decoder, options.scouter, options.model))) != 1:
        raise ValueError("--decoder, --scouter or --model: one of them says what to explain")
    check_methods("--method", options.method)
    check_methods("--evidence", options.evidence)
    if options.evidence and (options.method or not options.decoder):
        raise ValueError("--evidence weighs SCAN's map; give a --decoder, and no --method")
    if options.log_probability and options.scouter and not options.method:
        raise ValueError("--log-probability is not for slots, which explain logits; leave it out, or give a --method")
    if options.decoder and not options.method:
        rows, titles, names = _by_scan(options)
    elif options.scouter and not options.method:
        rows, titles, names = _by_scouter(options)
    elif options.method:
        rows, titles, names = _by_method(options)
    else:
        raise ValueError("--model: give a --method too, or a --decoder")
    figure = plot_panels(rows, titles, names, size=2.2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    for path, name in zip(options.images, names, strict=True):
        print(f"{path}: {name}".replace("\n", "; "))
    print(f"{options.out}: {len(rows)} explained")


def _read(options, size: int) -> torch.Tensor:
    return torch.stack([read_image(path, size) for path in options.images])


@torch.no_grad()
def _probabilities(model, preprocess, images) -> Tensor:
    with eval_mode(model):
        return get_logits(model(prepare_inputs(model, preprocess, images))).softmax(1).cpu()


def _named(model, preprocess, images, target_class: int | None, classes: list[str]) -> list[str]:
    """Of each picture the class that is explained, and its probability."""
    probabilities = _probabilities(model, preprocess, images)
    shown = probabilities.argmax(1) if target_class is None else torch.full((len(images),), target_class)
    return [f"{classes[c]} {probabilities[i, c]:.2f}" for i, c in enumerate(shown.tolist())]


def _asked(options, model, preprocess, images, target_class: int | None):
    """The target: a class, None for the predicted ones, or with ``--log-probability`` their scores."""
    if not options.log_probability:
        return target_class
    if target_class is not None:
        return log_probability(target_class)
    return [log_probability(c) for c in _probabilities(model, preprocess, images).argmax(1).tolist()]


def _by_scan(options):
    target, scanner = load_trained_scan(options)
    images, target_class = _read(options, scanner.image_size[0]), parse_class(options.target, target.classes)
    asked = _asked(options, target.model, target.preprocess, images, target_class)
    confidence, reconstruction = scanner(images, asked, options.percentile)
    if options.evidence:
        evidence = build_explainer(options.evidence, target.model, target.preprocess, options.layer)
        confidence = scanner.explain(images, asked, options.percentile, evidence=evidence)
    rows = [
        [image, heat, overlay(image, heat), rebuilt]
        for image, heat, rebuilt in zip(images, confidence, reconstruction, strict=True)
    ]
    names = _named(target.model, target.preprocess, images, target_class, target.classes)
    title = f"confidence, P = {' '.join(f'{p:g}' for p in options.percentile)}"
    if options.evidence:
        title += f",\nby {options.evidence}, stretched"
    if options.log_probability:
        title += ",\nof log p"
    return rows, ["picture", title, "overlay", "reconstruction"], names


def _by_scouter(options):
    model, recipe = load_trained(options.scouter)
    if not isinstance(model, Scouter):
        raise ValueError(f"--scouter {options.scouter} is a base without slots; give a --method, as GradCAM")
    images = _read(options, recipe.image_size)
    return _by_slots(model.to(choose_device(options)), images, parse_class(options.target, model.classes), model.classes)


def _by_slots(scouter: Scouter, images: Tensor, target: int | None, names: Sequence[str]):
    """Rows of a figure, its column and its row titles: each picture's predicted class and the one with the lowest logit, or the
    target."""
    with torch.no_grad():
        slots = scouter.attend(prepare_inputs(scouter, scouter.preprocess, images))
    logits, areas, maps = slots.logits.cpu(), slots.attention.mean((2, 3, 4)).cpu(), scouter.heat_maps(images)
    side = "for" if scouter.sign > 0 else "against"
    if target is None:
        shown, titles = [logits.argmax(1), logits.argmin(1)], [f"{side} the highest logit", f"{side} the lowest"]
    else:
        shown, titles = [torch.full((len(images),), target)], [f"{side} {names[target]}"]
    rows, said = [], []
    for i, image in enumerate(images):
        classes = [int(chosen[i]) for chosen in shown]
        rows.append([image, *(panel for c in classes for panel in (maps[i, c], overlay(image, maps[i, c])))])
        said.append("\n".join(f"{names[c]} {logits[i, c]:.1f}, area {areas[i, c]:.3f}" for c in classes))
    return rows, ["picture", *(text for title in titles for text in (title, "overlay"))], said


def _by_method(options):
    if options.scouter:
        saved, recipe = load_trained(options.scouter)
        model, preprocess, classes, size = _base_of(saved), saved.preprocess, saved.classes, recipe.image_size
    else:
        target = (
            load_trained_scan(options)[0]
            if options.decoder
            else load_classifier(options.model, parse_weights(options.weights or "DEFAULT"))
        )
        model, preprocess, classes, size = target.model, target.preprocess, target.classes, target.image_size[0]
    images, target_class = _read(options, size), parse_class(options.target, classes)
    explainer = build_explainer(options.method, model.to(choose_device(options)), preprocess, options.layer)
    maps = explainer(images, _asked(options, model, preprocess, images, target_class)).cpu()
    rows = [[image, heat, overlay(image, heat)] for image, heat in zip(images, maps, strict=True)]
    title = f"{options.method}, of log p" if options.log_probability else options.method
    return rows, ["picture", title, "overlay"], _named(model, preprocess, images, target_class, classes)


def _base_of(model: nn.Module) -> nn.Module:
    """The plain classifier in what ``load_trained`` gave; a Scouter is its own."""
    return model if isinstance(model, Scouter) else model.model
