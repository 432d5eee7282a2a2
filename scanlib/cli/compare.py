"""The command ``compare``: measure explainers and two baselines on a folder of images, one row per explainer."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scanlib.cli.shared import METHODS, add_model_options, build_explainer, load_models, validate_methods
from scanlib.data import PhotoFolder, Signs
from scanlib.explainers.weighted import explain_log_probability
from scanlib.metrics import fill_black, fill_blur, fill_imputed, fill_mean
from scanlib.metrics.compare import METRICS, compare
from scanlib.metrics.removal import Fill
from scanlib.training.checkpoint import check_writable

FILLS: dict[str, Fill] = {"mean": fill_mean, "blur": fill_blur, "black": fill_black, "road": fill_imputed}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: explainers, metrics and data."""
    parser.add_argument("data", help="a folder of images that no decoder was trained on, or signs")
    add_model_options(parser)
    parser.add_argument("--methods", nargs="+", default=["GradCAM", "LayerCAM"], help=f"of {', '.join(METHODS)}")
    parser.add_argument("--metrics", nargs="+", help=f"of {', '.join(METRICS).replace('%', '%%')}; default: the usual ones")
    parser.add_argument("--percentiles", type=float, nargs="+", help="of SCAN's mask, a row for each; default: the decoder's")
    parser.add_argument("--patch", type=int, default=16, help="side in pixels of the patches that are removed")
    parser.add_argument("--fill", choices=FILLS, default="mean", help="what replaces removed patches")
    parser.add_argument("--steps", type=int, default=10, help="number of steps of deletion and insertion")
    parser.add_argument("--limit", type=int, default=500, help="maximum number of images, spread evenly over the folder")
    parser.add_argument("--batch-size", type=int, help="images per batch; default: chosen for the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table to this .md or .csv file")


def run(options: argparse.Namespace) -> None:
    """Compare the explainers on the predicted classes, print the table, and write it to ``--out``."""
    validate_methods("--methods", options.methods)
    validate_methods("--evidence", [options.evidence])
    if options.out and options.out.suffix not in (".md", ".csv"):
        raise ValueError(f"--out must be a .md or .csv file, got {options.out}")
    if options.out:
        check_writable(options.out)
    if bool(options.decoder) == bool(options.model):
        raise ValueError("--decoder or --model: exactly one must be given, to choose the classifier")
    if options.evidence and not options.decoder:
        raise ValueError("--evidence needs a --decoder: it is weighted by SCAN's confidence")
    if options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    classifier, scanner = load_models(options)
    classifier.model.to(options.device)
    explainers: dict[str, Callable[..., Tensor]] = {}
    if scanner is not None:
        together = options.percentiles or options.default_percentiles
        for percentiles in [[p] for p in options.percentiles or ()] or [together]:
            explainers[f"SCAN, P = {_join(percentiles)}"] = scanner.as_explainer(percentiles)
        if options.evidence not in (None, "none"):
            weighted = scanner.as_explainer(together, build_explainer(options.evidence, classifier))
            explainers[f"SCAN x {options.evidence}, P = {_join(together)}"] = weighted
    explainers |= {name: build_explainer(name, classifier) for name in options.methods}
    if options.log_probability:
        explainers = {f"{name}, log p": explain_log_probability(explainer) for name, explainer in explainers.items()}
    size = classifier.image_size if scanner is None else scanner.image_size
    images, masks = _load_images(options.data, size[0], options.limit)
    table = compare(
        classifier.model,
        images.to(options.device),
        explainers,
        options.metrics,
        masks=masks,
        preprocess=classifier.preprocess,
        patch=options.patch,
        fill=FILLS[options.fill],
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    print(table)
    if options.out:
        (table.to_csv if options.out.suffix == ".csv" else table.to_markdown)(options.out)


def _join(percentiles: Sequence[float]) -> str:
    return "-".join(f"{p:g}" for p in percentiles)


def _load_images(data: str, size: int, limit: int) -> tuple[Tensor, Tensor | None]:
    """Load images (N, 3, size, size), and the masks of Signs. Of a folder with more images every k-th is taken."""
    if data == "signs":
        signs = Signs(limit, size, seed=1)
        scenes = [signs.scene(i) for i in range(limit)]
        return torch.stack([scene.image for scene in scenes]), torch.stack([scene.masks[0] for scene in scenes])
    photos = PhotoFolder(data, size)
    count = min(limit, len(photos))
    return torch.stack([photos[i * len(photos) // count][0] for i in range(count)]), None  # files are sorted by class
