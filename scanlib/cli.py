"""The command line: train a decoder or a SCOUTER, explain pictures, compare explainers.

python -m scanlib train --model squeezenet1_1 --layer features.12 --data photos --out decoder.pt
python -m scanlib train scouter --preset signs-negative --out negative.pt
python -m scanlib explain cat.jpg dog.jpg --decoder decoder.pt --percentile 95 --out map.png
python -m scanlib explain sign.png --scouter negative.pt
python -m scanlib explain cat.jpg --model resnet50 --method GradCAM
python -m scanlib compare photos --decoder decoder.pt --methods GradCAM LayerCAM ScoreCAM --out table.md
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, random_split

from scanlib import attention, cams, cli_scouter, fullgrad, perturbation
from scanlib.checkpoint import load_checkpoint
from scanlib.comparison import METRICS, compare
from scanlib.data import PhotoFolder, Signs, read_image
from scanlib.explainer import Explainer, prepared
from scanlib.hooks import evaluating, logits_of
from scanlib.masking import MASKS
from scanlib.metrics import black, blurred, imputed, mean_colour
from scanlib.models import Target, load_target, named_weights
from scanlib.plots import overlay
from scanlib.scan import SCAN
from scanlib.scouter import Scouter
from scanlib.scouter_recipes import load_trained

FILLS = {"mean": mean_colour, "blur": blurred, "black": black, "road": imputed}
METHODS = {  # every explainer that is called alike
    name: kind
    for module in (cams, perturbation, fullgrad, attention)
    for name, kind in vars(module).items()
    if isinstance(kind, type) and issubclass(kind, Explainer) and kind.__module__ == module.__name__ and name[0] != "_"
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a bad argument or file ends it with one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"] and arguments[1:2] not in (["decoder"], ["scouter"]):
        arguments.insert(1, "decoder")
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"scanlib {options.name}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m scanlib", description="SCAN: see what a vision model saw.")
    commands = parser.add_subparsers(dest="name", required=True)

    kinds = commands.add_parser("train", help="train a decoder (the default), or a SCOUTER").add_subparsers(required=True)
    scouter = kinds.add_parser("scouter", help="train a SCOUTER, or the base it starts from")
    scouter.set_defaults(command=cli_scouter.train_command)
    cli_scouter.add_options(scouter)
    train = kinds.add_parser(
        "decoder",
        help="train SCAN's decoder for one layer of a classifier",
        epilog="`train scouter --help` for SCOUTER",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(command=train_command)
    train.add_argument("--model", required=True, help="signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    train.add_argument("--weights", default="DEFAULT", help="a state dict's path, DEFAULT, or none for random weights")
    train.add_argument("--layer", help="target layer by name; left out, the model's default layer")
    train.add_argument("--data", required=True, help="a folder of pictures (flat, or one folder a class), or signs")
    train.add_argument("--out", required=True, type=Path, help="where the decoder goes; a killed run goes on from OUT.run")
    train.add_argument("--epochs", type=int, default=4)
    train.add_argument("--batch-size", type=int, default=16)
    train.add_argument("--learning-rate", type=float, default=8e-3, help="peak of the one-cycle schedule")
    train.add_argument("--alpha", type=float, default=4.0, help="the map should cover 1 / (1 + alpha) of the picture")
    train.add_argument("--mask-by", choices=MASKS, default="gradient", help="what the percentile ranks")
    train.add_argument(
        "--percentiles", type=float, nargs=2, default=(70, 100), metavar=("LOW", "HIGH"), help="drawn from while training"
    )
    train.add_argument(
        "--widths", type=int, nargs="+", help="decoder widths at strides 4, 8, 16, 32; left out, they fit the layer"
    )
    train.add_argument("--decoder-kind", choices=("convolutional", "transformer"), help="left out, it fits the layer")
    train.add_argument("--output-stride", type=int, help="picture pixels per decoded pixel; left out, 4x the feature grid")
    train.add_argument("--upsampling", choices=("bilinear", "transposed"), help="left out, it fits the decoder")
    train.add_argument("--image-size", type=int, help="pixels a side; left out, the model's own")
    train.add_argument("--scenes", type=int, default=3000, help="number of scenes with --data signs")
    train.add_argument("--validation", type=float, default=0.1, help="share of the pictures kept for validation")
    train.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")
    train.add_argument("--amp", action="store_true", help="bfloat16 autocast")

    explain = commands.add_parser(
        "explain", help="draw map, overlay and reconstruction", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    explain.set_defaults(command=explain_command)
    explain.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    explain.add_argument("--decoder", type=Path, help="what train wrote")
    explain.add_argument("--scouter", type=Path, help="what train scouter wrote, of either sign; a base with --method")
    explain.add_argument("--model", help="with --method: signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    explain.add_argument("--weights", help="the classifier's weights, if they moved since training")
    explain.add_argument("--method", help=f"explain the classifier by another method: {', '.join(METHODS)}")
    explain.add_argument("--layer", help="of the method, or of the evidence; left out, the last with a spatial extent")
    explain.add_argument("--class", dest="target", help="class to explain, by number or name; left out, the predicted one")
    explain.add_argument("--percentile", type=percentiles, default="95", help="SCAN's; of several, as 80,90,95, the mean")
    explain.add_argument("--evidence", choices=METHODS, metavar="METHOD", help="multiply SCAN's map by this method's")
    explain.add_argument("--out", type=Path, default=Path("map.png"))
    explain.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")

    table = commands.add_parser(
        "compare", help="measure explainers and both baselines", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    table.set_defaults(command=compare_command)
    table.add_argument("data", help="a folder of pictures that no decoder was trained on, or signs")
    table.add_argument("--decoder", type=Path, help="what train wrote; its SCAN joins in, and its classifier is taken")
    table.add_argument("--model", help="without --decoder: signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    table.add_argument("--weights", help="a state dict's path, or DEFAULT; left out, those of the decoder's classifier")
    table.add_argument("--methods", nargs="+", default=["GradCAM", "LayerCAM"], help=f"out of {', '.join(METHODS)}")
    table.add_argument("--metrics", nargs="+", help=f"out of {', '.join(METRICS)}")
    table.add_argument("--percentiles", type=float, nargs="+", default=[95.0], help="SCAN's, a row each")
    table.add_argument("--evidence", choices=METHODS, metavar="METHOD", help="SCAN's mean map times this method's joins in")
    table.add_argument("--patch", type=int, default=16, help="side in pixels of what is removed at once")
    table.add_argument("--fill", choices=FILLS, default="mean", help="what takes its place")
    table.add_argument("--steps", type=int, default=10, help="of deletion and insertion")
    table.add_argument("--limit", type=int, default=500, help="at most so many pictures")
    table.add_argument("--batch-size", type=int, default=32)
    table.add_argument("--seed", type=int, default=0)
    table.add_argument("--out", type=Path, help="a .md or .csv to write as well")
    table.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")
    return parser


def _scanner(target: Target, layer: str, image_size, mask_by: str, device) -> SCAN:
    return SCAN(target.model, layer, image_size, device=device, mask_by=mask_by).set_preprocess(target.preprocess)


class _Unlabelled(Dataset):
    """A data set whose labels mean nothing to the model."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index][0], -1


def train_command(options) -> None:
    """Train, save the decoder, and say so."""
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation {options.validation} is no share of the pictures; give 0 up to, not including, 1")
    if options.epochs < 1 or options.learning_rate <= 0:
        raise ValueError(f"--epochs {options.epochs}, --learning-rate {options.learning_rate}: both must be positive")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; give the file to write, as {options.out / 'decoder.pt'}")
    weights = named_weights(options.weights)
    target = load_target(options.model, weights)
    size = (options.image_size, options.image_size) if options.image_size else target.image_size
    if options.data == "signs":
        data = Signs(options.scenes, size[0])
        if target.classes != list(Signs.classes):
            data = _Unlabelled(data)
    else:
        data = PhotoFolder(options.data, size[0], target.classes)
    kept = round(options.validation * len(data))
    train, validation = random_split(data, [len(data) - kept, kept], torch.Generator().manual_seed(options.seed))

    torch.manual_seed(options.seed)
    layer = options.layer or target.layer
    scanner = _scanner(target, layer, size, options.mask_by, options.device)
    loader = DataLoader(train, options.batch_size, shuffle=True, num_workers=options.workers)
    scanner.set_dataset(loader, tuple(options.percentiles))
    if kept:
        scanner.set_validation_dataset(DataLoader(validation, options.batch_size, num_workers=options.workers))
    transformer = options.decoder_kind and options.decoder_kind == "transformer"
    scanner.generate_decoder(transformer, options.widths, output_stride=options.output_stride, upsampling=options.upsampling)
    layer = scanner.layer_name  # it may have moved
    schedule = {"max_lr": options.learning_rate, "total_steps": max(1, options.epochs * len(loader))}
    scanner.compile(
        options.alpha, scheduler_class=torch.optim.lr_scheduler.OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step"
    )
    run = options.out.with_name(options.out.name + ".run")
    scanner.fit(options.epochs, checkpoint=run, seed=options.seed, amp=options.amp)
    where = str(Path(weights).resolve()) if weights not in (None, "DEFAULT") else weights
    scanner.save_decoder(options.out, notes={"model": options.model, "weights": where, "layer": layer})
    run.unlink(missing_ok=True)
    print(f"{options.out}: decoder of {options.model}, layer {layer}, from {len(train)} pictures")


def explain_command(options) -> None:
    """One row a picture, with what the explainer says of it."""
    from scanlib.plots import panels

    if sum(map(bool, (options.decoder, options.scouter, options.model))) != 1:
        raise ValueError("--decoder, --scouter or --model: one of them says what to explain")
    if options.method and options.method not in METHODS:
        raise ValueError(f"--method {options.method}: not known; there are {', '.join(METHODS)}")
    if options.evidence and (options.method or not options.decoder):
        raise ValueError("--evidence weighs SCAN's map; give a --decoder, and no --method")
    if options.decoder and not options.method:
        rows, titles, names = _by_scan(options)
    elif options.scouter and not options.method:
        rows, titles, names = _by_scouter(options)
    elif options.method:
        rows, titles, names = _by_method(options)
    else:
        raise ValueError("--model: give a --method too, or a --decoder")
    figure = panels(rows, titles, names, size=2.2)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=120)
    for path, name in zip(options.images, names, strict=True):
        print(f"{path}: {name}".replace("\n", "; "))
    print(f"{options.out}: {len(rows)} explained")


def percentiles(text: str) -> list[float]:
    """80,90,95 -> its numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give one in 0..100, or several, as 80,90,95") from None


def _read(options, size: int) -> torch.Tensor:
    return torch.stack([read_image(path, size) for path in options.images])


def _named(model, preprocess, images, target_class: int | None, classes: list[str]) -> list[str]:
    """Of each picture the class that is explained, and its probability."""
    with torch.no_grad(), evaluating(model):
        probabilities = logits_of(model(prepared(model, preprocess, images))).softmax(1).cpu()
    shown = probabilities.argmax(1) if target_class is None else torch.full((len(images),), target_class)
    return [f"{classes[c]} {probabilities[i, c]:.2f}" for i, c in enumerate(shown.tolist())]


def _by_scan(options):
    target, scanner = _trained(options)
    images, target_class = _read(options, scanner.image_size[0]), _class_number(options.target, target.classes)
    confidence, reconstruction = scanner(images, target_class, options.percentile)
    if options.evidence:
        place = {"target_layer": options.layer} if options.layer else {}
        evidence = METHODS[options.evidence](target.model, preprocess=target.preprocess, **place)
        confidence = scanner.explain(images, target_class, options.percentile, evidence=evidence)
    rows = [
        [image, heat, overlay(image, heat), rebuilt]
        for image, heat, rebuilt in zip(images, confidence, reconstruction, strict=True)
    ]
    names = _named(target.model, target.preprocess, images, target_class, target.classes)
    title = f"confidence, P = {' '.join(f'{p:g}' for p in options.percentile)}"
    if options.evidence:
        title += f",\nby {options.evidence}, stretched"
    return rows, ["picture", title, "overlay", "reconstruction"], names


def _by_scouter(options):
    model, recipe = load_trained(options.scouter)
    if not isinstance(model, Scouter):
        raise ValueError(f"--scouter {options.scouter} is a base without slots; give a --method, as GradCAM")
    images = _read(options, recipe.image_size)
    return cli_scouter.explained(model.to(_device(options)), images, _class_number(options.target, model.classes), model.classes)


def _by_method(options):
    if options.scouter:
        trained, recipe = load_trained(options.scouter)
        model, preprocess, classes, size = cli_scouter.base_of(trained), trained.preprocess, trained.classes, recipe.image_size
    else:
        target = (
            _trained(options)[0] if options.decoder else load_target(options.model, named_weights(options.weights or "DEFAULT"))
        )
        model, preprocess, classes, size = target.model, target.preprocess, target.classes, target.image_size[0]
    images, target_class = _read(options, size), _class_number(options.target, classes)
    place = {"target_layer": options.layer} if options.layer else {}
    maps = METHODS[options.method](model.to(_device(options)), preprocess=preprocess, **place)(images, target_class).cpu()
    rows = [[image, heat, overlay(image, heat)] for image, heat in zip(images, maps, strict=True)]
    return rows, ["picture", options.method, "overlay"], _named(model, preprocess, images, target_class, classes)


def _device(options) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _trained(options) -> tuple[Target, SCAN]:
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
    scanner = _scanner(target, identity["layer"], tuple(identity["image_size"]), identity["mask_by"], options.device)
    return target, scanner.load_decoder(options.decoder)


def compare_command(options) -> None:
    """One row an explainer, both baselines with them; the explained class is the predicted one."""
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise ValueError(f"--methods {' '.join(unknown)}: not known; there are {', '.join(METHODS)}")
    if options.out and options.out.suffix not in (".md", ".csv"):
        raise ValueError(f"--out {options.out}: give a .md or a .csv")
    if bool(options.decoder) == bool(options.model):
        raise ValueError("--decoder or --model: one of them, and not both, says which classifier to explain")
    if options.evidence and not options.decoder:
        raise ValueError("--evidence weighs SCAN's map; give a --decoder")
    if options.limit < 1:
        raise ValueError(f"--limit {options.limit}: give 1 or more")
    explainers, masks = {}, None
    if options.decoder:
        target, scanner = _trained(options)
        size = scanner.image_size
        explainers |= {f"SCAN, P = {p:g}": partial(scanner.explain, percentile=p) for p in options.percentiles}
        if options.evidence:
            evidence = METHODS[options.evidence](target.model, preprocess=target.preprocess)
            weighed = partial(scanner.explain, percentile=options.percentiles, evidence=evidence)
            explainers[f"SCAN x {options.evidence}, P = {'-'.join(f'{p:g}' for p in options.percentiles)}"] = weighed
    else:
        target = load_target(options.model, named_weights(options.weights or "DEFAULT"))
        size = target.image_size
    device = _device(options)
    target.model.to(device)
    explainers |= {name: METHODS[name](target.model, preprocess=target.preprocess) for name in options.methods}
    if options.data == "signs":
        scenes = Signs(options.limit, size[0], seed=1, masks=True)
        images, masks = (torch.stack(column) for column in list(zip(*scenes, strict=True))[::2])
    else:
        photographs = PhotoFolder(options.data, size[0])
        images = torch.stack([photographs[i][0] for i in range(min(options.limit, len(photographs)))])
    found = compare(
        target.model,
        images.to(device),
        explainers,
        options.metrics,
        masks=masks,
        preprocess=target.preprocess,
        patch=options.patch,
        fill=FILLS[options.fill],
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        (found.to_csv if options.out.suffix == ".csv" else found.to_markdown)(options.out)
    print(found)


def _class_number(given: str | None, classes: list[str]) -> int | None:
    if given is None:
        return None
    if given.lstrip("-").isdigit():
        number = int(given)
        if not 0 <= number < len(classes):
            raise ValueError(f"class {number} is out of range: the model has classes 0..{len(classes) - 1}")
        return number
    if given not in classes:
        import difflib

        close = ", ".join(difflib.get_close_matches(given, classes, n=5)) or f"{classes[0]}, {classes[1]}, ..."
        raise ValueError(f"class {given!r} is not known; close matches: {close}")
    return classes.index(given)
