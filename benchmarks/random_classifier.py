"""Does SCAN find objects by itself? Decoders of a classifier with random weights; writes benchmarks/RANDOM_CLASSIFIER.md.

python benchmarks/random_classifier.py       # 3 minutes on one CPU core

A random classifier has no evidence for any class. A map of it that lies on the sign comes from the decoder, not from the model.
Only the CNN is measured: the head of torchvision's ViT starts at zero, so a random one has no gradient.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch

from scanlib import SCAN, Libra, Signs, load_classifier, metrics
from scanlib.models import CHECKPOINTS

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "data" / "cache" / "random_classifier"
SEVERAL = (80, 85, 90, 95, 98)

TEXT = """# SCAN of a random classifier

`python benchmarks/random_classifier.py`: {machine}, {date}. The CNN for Signs with random weights, and decoders
trained for it like the shipped ones, seed 0. {count} scenes (seed 987), the class of the sign. Energy: the share of the map on
the sign. ± is half the bootstrap 95 % interval over the images.

| map | trained weights: energy | random weights: energy | random weights: peak | random weights: IoU |
|---|---|---|---|---|
{rows}"""


def load_scanner(weights: str | None, recipe: str, options: dict) -> SCAN:
    """Return SCAN with the shipped decoder, or with one trained for random weights."""
    torch.manual_seed(0)
    classifier = load_classifier("signs_cnn", weights)
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, device="cpu", **options)
    path = CHECKPOINTS / f"{recipe}.pt"
    if weights is None:
        path = CACHE / f"{recipe}.pt"
        if not path.exists():
            sys.path.insert(0, str(ROOT / "data"))
            from make_checkpoints import RECIPES

            CACHE.mkdir(parents=True, exist_ok=True)
            RECIPES[recipe](path=path, weights=None)
    return scanner.set_preprocess(classifier.preprocess).load_decoder(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="test scenes; default: 200")
    count = parser.parse_args().count
    columns = zip(*Signs(count, seed=987, masks=True), strict=True)
    images, labels, masks = (torch.stack(list(map(torch.as_tensor, each))) for each in columns)
    maps: dict[str, list] = {}
    for weights in ("DEFAULT", None):
        before = load_scanner(weights, "signs_cnn_decoder", {})
        after = load_scanner(weights, "signs_cnn_class_decoder", {"mask_by": "libra", "score": "log_probability"})
        libra = Libra(after.model, preprocess=after.preprocess)
        explainers = {
            "SCAN, gradient, logit, P 95": before.as_explainer(95),
            "SCAN, libra, log p, five P": after.as_explainer(SEVERAL),
            "SCAN, libra, log p, five P, x Libra": after.as_explainer(SEVERAL, evidence=libra),
            "Libra": libra,
        }
        for name, explain in explainers.items():
            maps.setdefault(name, []).append(explain(images, labels))
    maps["random"] = [metrics.make_random_maps(count, (64, 64))] * 2
    maps["centre prior"] = [metrics.make_centre_maps(count, (64, 64))] * 2
    rows = []
    for name, (trained, random) in maps.items():
        figures = [metrics.compute_energy_inside(trained, masks), metrics.compute_energy_inside(random, masks)]
        figures += [metrics.compute_peak_inside(random, masks), metrics.compute_iou(random, masks)]
        values = {str(k): each for k, each in enumerate(figures)}
        found = metrics.Comparison({name: values}, dict.fromkeys(values, 1), {}, {})
        cells = []
        for key in values:
            low, high = found.interval(name, key)
            cells.append(f"{found.mean(name, key):.3f} ± {(high - low) / 2:.3f}")
        rows.append(f"| {name} | " + " | ".join(cells) + " |\n")
    machine = f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = TEXT.format(machine=machine, date=time.strftime("%Y-%m-%d"), count=count, rows="".join(rows))
    path = Path(__file__).with_name("RANDOM_CLASSIFIER.md")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
