"""The command line of comparisons: a row an explainer, both baselines with them, on a folder of pictures.

python -m scanlib compare photos --decoder decoder.pt --methods GradCAM LayerCAM ScoreCAM --out table.md
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from scanlib.cli.shared import METHODS, build_explainer, check_methods, choose_device, load_trained_scan
from scanlib.data import PhotoFolder, Signs
from scanlib.metrics import fill_black, fill_blur, fill_imputed, fill_mean
from scanlib.metrics.compare import METRICS, compare
from scanlib.models.zoo import load_classifier, parse_weights
from scanlib.targets import against_others

FILLS = {"mean": fill_mean, "blur": fill_blur, "black": fill_black, "road": fill_imputed}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to compare, by which figures, and on what."""
    parser.add_argument("data", help="a folder of pictures that no decoder was trained on, or signs")
    parser.add_argument("--decoder", type=Path, help="what train wrote; its SCAN joins in, and its classifier is taken")
    parser.add_argument("--model", help="without --decoder: signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    parser.add_argument("--weights", help="a state dict's path, or DEFAULT; left out, those of the decoder's classifier")
    parser.add_argument("--methods", nargs="+", default=["GradCAM", "LayerCAM"], help=f"out of {', '.join(METHODS)}")
    parser.add_argument("--metrics", nargs="+", help=f"out of {', '.join(METRICS).replace('%', '%%')}")
    parser.add_argument("--percentiles", type=float, nargs="+", default=[95.0], help="SCAN's, a row each")
    parser.add_argument("--evidence", metavar="METHOD", help="this method's map, weighed by SCAN's mean one, joins in")
    parser.add_argument("--log-probability", action="store_true", help="explain the classes' log-probabilities, not logits")
    parser.add_argument("--patch", type=int, default=16, help="side in pixels of what is removed at once")
    parser.add_argument("--fill", choices=FILLS, default="mean", help="what takes its place")
    parser.add_argument("--steps", type=int, default=10, help="of deletion and insertion")
    parser.add_argument("--limit", type=int, default=500, help="at most so many pictures")
    parser.add_argument("--batch-size", type=int, help="pictures a run; left out, what is quick on the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a .md or .csv to write as well")
    parser.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")


def compare_command(options) -> None:
    """One row an explainer, both baselines with them; the explained class is the predicted one."""
    check_methods("--methods", *options.methods)
    check_methods("--evidence", options.evidence)
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
        target, scanner = load_trained_scan(options)
        size = scanner.image_size
        explainers |= {f"SCAN, P = {p:g}": partial(scanner.explain, percentile=p) for p in options.percentiles}
        if options.evidence:
            evidence = build_explainer(options.evidence, target.model, target.preprocess)
            weighed = partial(scanner.explain, percentile=options.percentiles, evidence=evidence)
            explainers[f"SCAN x {options.evidence}, P = {'-'.join(f'{p:g}' for p in options.percentiles)}"] = weighed
    else:
        target = load_classifier(options.model, parse_weights(options.weights or "DEFAULT"))
        size = target.image_size
    device = choose_device(options)
    target.model.to(device)
    explainers |= {name: build_explainer(name, target.model, target.preprocess) for name in options.methods}
    if options.log_probability:
        explainers = {f"{name}, log p": against_others(explain) for name, explain in explainers.items()}
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
