"""What makes SCAN's map depend on the class: an ablation on scenes of Signs; writes benchmarks/CLASS_<CNN or VIT>.md.

python benchmarks/class_evidence.py cnn      # 25 minutes each on one CPU core
python benchmarks/class_evidence.py vit

The decoders are kept in data/cache/class_evidence and trained if they are not there.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import scanlib
from scanlib import SCAN, Libra, Signs, compare, load_classifier, metrics
from scanlib.explainers import explain_log_probability, scale_to_unit_range, weight_by_confidence
from scanlib.models import CHECKPOINTS

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "data" / "cache" / "class_evidence"
ONE_SIGN = ("energy", "peak", "IoU", "deletion", "insertion", "absent energy")
TWO_SIGNS = ("energy", "energy in other", "asked denser", "other correlation")
SEVERAL = (80, 85, 90, 95, 98)
# recipe of data/make_checkpoints.py, mask_by, score, seeds; the last one is the recommended setting
SETTINGS = {
    "cnn": [
        ("decoder", "gradient", "logit", (0, 1, 2)),
        ("decoder", "gradient", "log_probability", (0,)),
        ("decoder", "position", "log_probability", (0,)),
        ("class_decoder", "gradient", "logit", (0,)),
        ("class_decoder", "libra", "logit", (0,)),
        ("class_decoder", "libra", "log_probability", (0, 1, 2)),
    ],
    "vit": [
        ("decoder", "relevance", "logit", (0, 1, 2)),
        ("decoder", "relevance", "log_probability", (0,)),
        ("class_decoder", "libra", "logit", (0,)),
        ("class_decoder", "libra", "log_probability", (0, 1, 2)),
    ],
}
BEST_LAYERS = {"cnn": {"target_layer": "layer2"}, "vit": {"target_layer": "encoder.layers.encoder_layer_1", "libra": True}}

TEXT = """# Which class? The {kind} for Signs

`python benchmarks/class_evidence.py {short}`: {machine}, {date}. The shipped classifier. SCAN: what the masks rank by, the score
whose gradient they use, and how the decoder is read. Rows of seeds 0-2 are the mean of three decoders, image by image.
*absent energy*: the share of the map of a class that is not there on the sign.{changes}

{one}
The mean of the map of an absent class over the mean of the map of the true class, neither normalized: {mass} (SCAN, libra, log p,
P 95, seeds 0, 1, 2; 200 scenes).

{spread}

## Two signs

{pairs} scenes with two signs (seed 4321). The smaller sign's class:

{smaller}
The larger sign's class:

{larger}
"""

CHANGES = """ The decoders of "libra" and of "gradient, bilinear" upsample
bilinearly and are trained on percentiles of 90 to 100. The others have transposed convolutions and percentiles of 70 to 100."""


def train(name: str, mask_by: str, score: str, seed: int) -> Path:
    """Return the file of a decoder. Train it if it is not there."""
    shipped = {"signs_cnn_decoder": "gradient", "signs_vit_decoder": "relevance"}
    if (mask_by, score, seed) == (shipped.get(name), "logit", 0):
        return CHECKPOINTS / f"{name}.pt"
    path = CACHE / f"{name}_{mask_by}_{score}_{seed}.pt"
    if not path.exists():
        sys.path.insert(0, str(ROOT / "data"))
        from make_checkpoints import RECIPES

        CACHE.mkdir(parents=True, exist_ok=True)
        RECIPES[name](mask_by=mask_by, score=score, seed=seed, path=path)
    return path


def list_explainers(short: str, classifier) -> dict[str, list[Callable]]:
    """Return the explainers of each row: one, or one for each seed."""
    model, own = classifier.model, {"preprocess": classifier.preprocess}
    libra = Libra(model, **own)
    libra_of_log_p, rows = explain_log_probability(libra), {}
    for recipe, mask_by, score, seeds in SETTINGS[short]:
        scanners = []
        for seed in seeds:
            scanner = SCAN(model, classifier.layer, classifier.image_size, device="cpu", mask_by=mask_by, score=score)
            path = train(f"signs_{short}_{recipe}", mask_by, score, seed)
            scanners.append(scanner.set_preprocess(classifier.preprocess).load_decoder(path))
        is_control = (recipe, mask_by) == ("class_decoder", "gradient")
        name = f"SCAN, {mask_by}{', bilinear' * is_control}, {'log p' if score != 'logit' else 'logit'}"
        rows[f"{name}, P 95"] = [scanner.as_explainer(95) for scanner in scanners]
        if len(seeds) > 1:
            rows[f"{name}, five P"] = [scanner.as_explainer(SEVERAL) for scanner in scanners]
    rows["SCAN, libra, log p, five P, x Libra"] = [scanner.as_explainer(SEVERAL, evidence=libra) for scanner in scanners]

    def weight_by_centre(images: Tensor, target: Tensor, normalize: bool = True) -> Tensor:
        centre = metrics.make_centre_maps(len(images), images.shape[2:])
        maps = weight_by_confidence(libra_of_log_p(images, target, normalize=False).relu(), centre)
        return scale_to_unit_range(maps) if normalize else maps

    def square(images: Tensor, target: Tensor) -> Tensor:
        return libra_of_log_p(images, target).square()

    rows["centre prior x Libra, log p"] = [weight_by_centre]
    rows["Libra, log p, squared"] = [square]
    rows["Libra, log p"] = [libra_of_log_p]
    rows["Libra"] = [libra]
    rows["GradCAM, log p"] = [explain_log_probability(scanlib.GradCAM(model, **own, **BEST_LAYERS[short]))]
    if short == "vit":
        rows["attention relevance, libra"] = [scanlib.AttentionRelevance(model, **own, libra=True)]
    return rows


def compare_rows(rows: dict[str, list[Callable]], run: Callable) -> tuple[metrics.Comparison, dict[str, list[dict]]]:
    """Compare all explainers and average those of a row. Return also the means of each explainer."""
    names = {f"{row}, seed {k}": row for row, explainers in rows.items() for k in range(len(explainers))}
    flat = {name: rows[row][int(name.rsplit(" ", 1)[1])] for name, row in names.items()}
    found, means = run(flat), {}
    for row, explainers in rows.items():
        of_row = [found.values.pop(f"{row}, seed {k}") for k in range(len(explainers))]
        means[row] = [{key: float(values.nanmean()) for key, values in each.items()} for each in of_row]
        label = f"{row}, seeds 0-2" if len(explainers) > 1 else row
        found.values[label] = {key: torch.stack([each[key] for each in of_row]).mean(0) for key in of_row[0]}
    for name in ("random", "centre prior"):  # last
        found.values[name] = found.values.pop(name)
    found.milliseconds = {}
    return found, means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classifier", choices=("cnn", "vit"))
    parser.add_argument("--count", type=int, default=500, help="scenes with one sign; default: 500")
    parser.add_argument("--pairs", type=int, default=300, help="scenes with two signs; default: 300")
    arguments = parser.parse_args()
    short, count, pairs = arguments.classifier, arguments.count, arguments.pairs
    classifier = load_classifier(f"signs_{short}")
    rows = list_explainers(short, classifier)

    images, labels, masks = zip(*Signs(count, seed=987, masks=True), strict=True)
    images, labels, masks = torch.stack(images).float(), torch.tensor(labels), torch.stack(masks).bool()
    scenes = [Signs(pairs, seed=4321, objects=2).scene(index) for index in range(pairs)]
    both = torch.stack([scene.image for scene in scenes]).float()
    kinds = torch.tensor([scene.labels for scene in scenes])
    areas = [torch.stack([scene.masks[k] for scene in scenes]).bool() for k in (0, 1)]
    absent = metrics.draw_absent_classes(labels, 10)
    own = {"preprocess": classifier.preprocess, "patch": 4}
    one = partial(compare, classifier.model, images, metrics=ONE_SIGN, target=labels, masks=masks, absent_classes=absent, **own)
    table, means = compare_rows(rows, lambda each: one(explainers=each))
    of_pairs = {}
    for name, asked in (("larger", 0), ("smaller", 1)):
        given = {"target": kinds[:, asked], "other_classes": kinds[:, 1 - asked]}
        given |= {"masks": areas[asked], "other_masks": areas[1 - asked], **own}
        run = partial(compare, classifier.model, both, metrics=TWO_SIGNS, **given)
        of_pairs[name] = compare_rows(rows, lambda each, run=run: run(explainers=each))[0].to_markdown()

    mass = []
    for explainer in rows["SCAN, libra, log p, P 95"]:
        low, high = (float(explainer(images[:200], k[:200], normalize=False).mean()) for k in (absent, labels))
        mass.append(f"{low / high:.2f}")
    spread = [
        "Highest less lowest of the three seeds' means:",
        "",
        "| map | " + " | ".join(ONE_SIGN) + " |",
        "| --- |" + " --- |" * len(ONE_SIGN),
    ]
    for row, each in means.items():
        if len(each) > 1:
            ranges = [max(m[key] for m in each) - min(m[key] for m in each) for key in ONE_SIGN]
            spread.append(f"| {row} | " + " | ".join(f"{value:.3f}" for value in ranges) + " |")
    text = TEXT.format(
        kind="CNN" if short == "cnn" else "vision transformer",
        short=short,
        machine=f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}",
        date=time.strftime("%Y-%m-%d"),
        one=table.to_markdown(),
        mass=", ".join(mass),
        changes=CHANGES if short == "cnn" else "",
        spread="\n".join(spread),
        pairs=pairs,
        **of_pairs,
    )
    path = Path(__file__).with_name(f"CLASS_{short.upper()}.md")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
