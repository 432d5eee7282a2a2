"""Which pictures to train SCAN's decoder on, for EfficientNet-Lite0; writes benchmarks/TRAINING_PICTURES.md.

python benchmarks/training_pictures.py --photographs FOLDER --boxes FOLDER     # folders as in photographs.py; an hour, 1 core

Each decoder sees 2,000 pictures, and takes as many steps. Photographs are cropped and mirrored at random until there are as many.
The maps are judged on the photographs and boxes of another part, which no decoder was trained on.
"""

import argparse
import platform
import sys
import time
from functools import partial
from pathlib import Path

import torch
from photographs import SIZE, Bench, View, boxed, maps_of, photographs
from torch import Tensor
from torchvision.transforms import v2

from scanlib import GradCAM, Signs, load_classifier
from scanlib.data import Collages, PhotoFolder
from scanlib.explainers import explain_log_probability
from scanlib.metrics import (
    Comparison,
    compute_auc,
    compute_energy_inside,
    compute_removal_curves,
    fill_blur,
    fill_mean,
    make_centre_maps,
    make_random_maps,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "data"))
from make_checkpoints import train_photos_decoder  # noqa: E402

SHIPPED, CUTOUTS = ROOT / "data" / "photographs", ROOT / "data" / "cutouts"
BACKGROUNDS = [SHIPPED / f"{name}.jpg" for name in ("aloe", "building", "lake", "palace", "rocket", "tower", "town", "tree")]
COUNT, BATCH, EPOCHS, SEVERAL = 2000, 32, 11, (80, 85, 90, 95, 98)
BETTER = {"deletion, blur": -1, "insertion, blur": 1, "deletion, mean": -1, "insertion, mean": 1, "energy": 1}


def crop(images: Tensor, count: int = COUNT) -> Tensor:
    """Return ``count`` random parts of the images (N, 3, 224, 224), each of 35 % or more, mirrored or not."""
    change = v2.Compose([v2.RandomResizedCrop(SIZE, scale=(0.35, 1), antialias=True), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.stack([change(images[i % len(images)]) for i in range(count)])


def draw(scenes, count: int = COUNT) -> Tensor:
    """Return the images of a data set of scenes, uint8."""
    return torch.stack([scenes.scene(i).image.round().to(torch.uint8) for i in range(count)])


def list_training_sets(folder: Path) -> dict[str, partial]:
    """Return what to train on, as functions that return (2000, 3, 224, 224) uint8."""

    def read_own(number: int) -> Tensor:
        return crop(photographs(folder, "train")[:number])

    def read_shipped(count: int = COUNT) -> Tensor:
        return crop(torch.stack([image for image, _ in PhotoFolder(SHIPPED, SIZE)]).to(torch.uint8), count)

    def make_collages(count: int = COUNT) -> Tensor:
        return draw(Collages(CUTOUTS, BACKGROUNDS, count, objects=2), count)

    return {
        **{f"{number} photographs": partial(read_own, number) for number in (20, 100, 290)},
        "the 20 that ship": partial(read_shipped),
        "collages of those": partial(make_collages),
        "Signs": lambda: draw(Signs(COUNT, SIZE)),
        "Signs, three in each": lambda: draw(Signs(COUNT, SIZE, objects=3)),
        "half Signs, half the 20": lambda: torch.cat([draw(Signs(COUNT // 2, SIZE), COUNT // 2), read_shipped(COUNT // 2)]),
        "half 100 photographs, half Signs": lambda: torch.cat([read_own(100)[::2], draw(Signs(COUNT // 2, SIZE), COUNT // 2)]),
    }


def measure(explain, view: View) -> dict[str, Tensor]:
    """Return deletion and insertion with two fills, and the energy in the boxes, image by image."""
    maps = maps_of(explain, view.images, view.classes)
    found = {"energy": compute_energy_inside(maps_of(explain, view.boxed, view.boxed_classes), view.masks)}
    for name, fill in (("blur", fill_blur), ("mean", fill_mean)):
        curves = compute_removal_curves(view.score, view.images, maps, steps=9, patch=16, fill=fill)
        found |= {f"{way}, {name}": compute_auc(curve) for way, curve in zip(("deletion", "insertion"), curves, strict=True)}
    return found


def main() -> None:
    """Train and measure all, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--boxes", type=Path, required=True)
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    options = parser.parse_args()
    classifier = load_classifier("efficientnet_lite0")
    bench = Bench.__new__(Bench)  # only its view is needed
    bench.model, bench.preprocess = classifier.model.requires_grad_(False), classifier.preprocess
    view = bench.view(photographs(options.photographs, options.part), *boxed(options.boxes, options.part))
    cam = GradCAM(classifier.model, preprocess=classifier.preprocess)
    table = Comparison({}, BETTER, {}, {})

    def add(name: str, explain) -> None:
        table.values[name] = measure(explain, view)
        print(name, {key: round(float(value.mean()), 3) for key, value in table.values[name].items()}, flush=True)

    add("random", lambda x, k: make_random_maps(len(x), (SIZE, SIZE)))
    add("centre prior", lambda x, k: make_centre_maps(len(x), (SIZE, SIZE)))
    add("Grad-CAM, log p", explain_log_probability(cam))
    for name, make in list_training_sets(options.photographs).items():
        scanner = train_photos_decoder(make())
        add(f"SCAN, {name}", scanner.as_explainer(SEVERAL))
        add(f"SCAN x Grad-CAM, {name}", scanner.as_explainer(SEVERAL, evidence=cam))
    table.note = (
        f"{options.part} part: {len(view.images)} photographs, {len(view.boxed)} with boxes, predicted class; patches of 16 px "
        f"in 9 steps; one seed; ± is half the bootstrap 95 % interval over the images; {time.strftime('%Y-%m-%d')}, "
        f"torch {torch.__version__}, {platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    path = ROOT / "benchmarks" / "TRAINING_PICTURES.md"
    about = "Which pictures to train SCAN's decoder on, for EfficientNet-Lite0. By `python benchmarks/training_pictures.py`: "
    about += "each decoder sees 2,000 pictures."
    path.write_text(f"# What to train on\n\n{about}\n\n{table.to_markdown()}\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
