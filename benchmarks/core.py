"""SCAN training beside the straightforward way: time and peak memory an image, and the maps each gives on Signs.

    make bench          # or: python benchmarks/core.py; about 12 minutes on 2 CPU cores; writes benchmarks/RESULTS.md

The straightforward way is written here as one would at first, and as the public implementation works: image by image a gradient
through the whole model, a percentile in numpy, a two-dimensional blur; then a batch through a decoder of the published widths at
full resolution with transposed convolutions. Every measurement is a process of its own; only ratios of one run mean anything.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset

from scanlib import SCAN, Signs, load_classifier
from scanlib.decoders import PUBLISHED_WIDTHS
from scanlib.hooks import FeatureTap
from scanlib.layers import resolve_layer
from scanlib.loss import SelfConfidenceLoss
from scanlib.metrics import build_class_score, evaluate_maps, make_centre_maps, make_random_maps
from scanlib.models import Normalize

PUBLISHED = {"ch_per_lv": list(PUBLISHED_WIDTHS), "output_stride": 1, "upsampling": "transposed", "depth": 4}
BATCH = 16


def scene(case: str):
    """(model, layer, preprocess, image size) of a case."""
    if case == "cnn64":
        classifier = load_classifier("signs_cnn")
        return classifier.model, "layer4", classifier.preprocess, 64
    torch.manual_seed(0)
    if case == "resnet50":
        return torchvision.models.resnet50(weights=None).eval(), "layer4", Normalize(), 224
    model = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768).eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # else zero, and so every gradient
    return model, "encoder.layers.encoder_layer_11.ln_1", Normalize(), 224


# --- the straightforward way ---


def straightforward_batch(model, layer, preprocess, images, labels, cells, rng):
    """Masked features and blurred pictures, image by image; cells: of the feature grid, across."""
    kept, masked, blurred = {}, [], []
    handle = resolve_layer(model, layer)[1].register_forward_hook(lambda module, inputs, output: kept.update(features=output))
    for image, label in zip(images, labels, strict=True):
        x = image[None].clone().requires_grad_()
        score = model(preprocess(x))[0, label]
        features = kept["features"]
        gradient = torch.autograd.grad(score, features)[0].clamp_min(0)
        positives = gradient[gradient > 0].numpy()
        threshold = float(np.percentile(positives, rng.uniform(70, 100))) if len(positives) else 0.0
        masked.append(features.detach() * (gradient >= threshold))
        sigma = image.shape[-1] / cells
        kernel = int(2 * sigma) // 2 * 2 + 1
        blurred.append(torchvision.transforms.functional.gaussian_blur(image[None], kernel, sigma) / 127.5 - 1)
    handle.remove()
    return torch.cat(masked), torch.cat(blurred)


def straightforward(case: str, dataset: Dataset, epochs: int) -> tuple[SCAN, float]:
    """Train that way; returns a scanner that holds the decoder, and seconds an epoch."""
    model, layer, preprocess, size = scene(case)
    torch.manual_seed(0)
    scanner = SCAN(model, layer, (size, size), device="cpu").set_preprocess(preprocess)
    scanner.generate_decoder(**PUBLISHED)
    scanner.decoder.to(memory_format=torch.contiguous_format)  # as a module comes
    scanner.compile(6.0)
    optimizer, criterion = scanner.trainer.optimizer, SelfConfidenceLoss(6.0)
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(epochs):
        scanner.decoder.train()
        for images, labels in DataLoader(dataset, BATCH, shuffle=True):
            features, reference = straightforward_batch(model, layer, preprocess, images, labels, scanner.layout.grid[1], rng)
            optimizer.zero_grad()
            criterion(scanner.decoder(features), reference).backward()
            optimizer.step()
    scanner.decoder_state.is_trained = True  # as far as the scanner knows, nobody called fit
    return scanner, (time.perf_counter() - start) / epochs


# --- ours ---


def ours(case: str, dataset: Dataset, epochs: int, decoder: dict, amp: bool = False) -> tuple[SCAN, float]:
    """Train with scanlib; seconds an epoch, features included."""
    model, layer, preprocess, size = scene(case)
    torch.manual_seed(0)
    scanner = SCAN(model, layer, (size, size), device="cpu").set_preprocess(preprocess)
    scanner.set_dataset(DataLoader(dataset, BATCH, shuffle=True)).generate_decoder(**decoder)
    schedule = {"max_lr": 8e-3, "total_steps": epochs * -(-len(dataset) // BATCH)}
    scanner.compile(
        6.0, scheduler_class=torch.optim.lr_scheduler.OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step"
    )
    start = time.perf_counter()
    scanner.fit(epochs, False, amp=amp)
    return scanner, (time.perf_counter() - start) / epochs


# way: (how to train, epochs)
WAYS = {
    "straightforward": (straightforward, 1),
    "the same decoder, the rest ours": (lambda case, data, epochs: ours(case, data, epochs, PUBLISHED), 4),
    "the same decoder, amp=True": (lambda case, data, epochs: ours(case, data, epochs, PUBLISHED, amp=True), 4),
    "our defaults": (lambda case, data, epochs: ours(case, data, epochs, {}), 4),
    "our defaults, tokens folded": (lambda case, data, epochs: ours(case, data, epochs, {"is_Transformer": False}), 4),
    "our defaults, a single epoch": (lambda case, data, epochs: ours(case, data, epochs, {}), 1),
}


def peak_memory() -> float:
    """Largest resident size of this process so far, in MiB; NaN where the platform does not tell."""
    status = Path("/proc/self/status")  # Linux; getrusage would count what started this process, too
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def work(case: str, way: str, images: int) -> dict:
    """One measurement, in this process: ms an image and epoch, growth of peak memory."""
    data = list(Signs(images, size=64 if case == "cnn64" else 224))  # drawn beforehand
    warm = data[:BATCH] if case == "cnn64" else data[:2]
    with FeatureTap(*scene(case)[:2]) as tap:  # the first run of a model allocates and plans
        tap(torch.stack([image for image, _ in warm]) / 255)
    before = peak_memory()
    train, epochs = WAYS[way]
    _, seconds = train(case, data, epochs)
    return {"ms": 1000 * seconds / images, "MiB": peak_memory() - before}


def measure(case: str, way: str, images: int) -> dict:
    """One measurement, in a process of its own."""
    command = [sys.executable, __file__, "--work", case, way, str(images)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def speed_table() -> str:
    """Every way on both cases; the straightforward one before and after, the faster of the two counts."""
    lines = ["| case | way | ms an image and epoch | times faster | peak memory, MiB |", "|---|---|---|---|---|"]
    for case, name, few, many in (
        ("cnn64", "Signs CNN, 64 px", 256, 512),
        ("resnet50", "ResNet-50, 224 px", 16, 32),
        ("vit_tiny", "ViT-Tiny, 224 px", 16, 64),
    ):
        results = {}
        ways = [way for way in WAYS if case == "vit_tiny" or "tokens" not in way]
        for way in ways * 3:  # in turns
            result = measure(case, way, many if "defaults" in way else few)
            print(f"{name}: {way}: {result['ms']:.1f} ms", flush=True)
            results[way] = min(results.get(way, result), result, key=lambda r: r["ms"])
        slow = results["straightforward"]["ms"]
        for way, result in results.items():
            lines.append(f"| {name} | {way} | {result['ms']:.1f} | {slow / result['ms']:.1f} | {result['MiB']:.0f} |")
    return "\n".join(lines)


def quality_table(images: int, scenes: int) -> str:
    """Both ways trained on the same scenes, judged on fresh ones."""
    data = list(Signs(images))
    fresh, _, masks = map(list, zip(*Signs(scenes, seed=1, masks=True), strict=True))
    fresh, masks = torch.stack(fresh), torch.stack(masks)
    classifier = load_classifier("signs_cnn")
    with torch.no_grad():
        classes = classifier.model(classifier.preprocess(fresh)).argmax(1)
    score = build_class_score(classifier.model, classifier.preprocess, classes)
    lines = [
        "| map | epochs | seconds | energy inside | peak inside | IoU | deletion (low) | insertion (high) |",
        "|---" * 8 + "|",
    ]

    def add(name, epochs, seconds, maps):
        figures = " | ".join(f"{figure:.3f}" for figure in evaluate_maps(maps, masks, fresh, score).values())
        lines.append(f"| {name} | {epochs} | {seconds} | {figures} |")
        print(lines[-1], flush=True)

    for name, train, epochs in (("straightforward", straightforward, 2), ("ours", partial(ours, decoder={}), 4)):
        scanner, seconds = train("cnn64", data, epochs)
        add(name, epochs, round(seconds * epochs), scanner.as_explainer()(fresh, classes))
    add("random", "-", "-", make_random_maps(scenes, (64, 64)))
    add("centre prior", "-", "-", make_centre_maps(scenes, (64, 64)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=3, metavar=("CASE", "WAY", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        case, way, images = options.work
        print(json.dumps(work(case, way, int(images))))
        return
    images, scenes = 2000, 500
    machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}, torch {torch.__version__}"
    text = f"""# Benchmarks

`make bench`, {time.strftime("%Y-%m-%d")}, {machine}, seed 0. Only the ratios mean anything: timings of a shared machine wander by two.

## One epoch of SCAN training
Batches of {BATCH}. Straightforward: image by image, a full-resolution decoder of the published widths. Then that very decoder with
everything else ours, a quarter of four epochs; the same in bfloat16; our defaults, a quarter of four epochs, for tokens also with the
convolutional decoder; and a single epoch of our defaults, where nothing can be kept from an earlier one. Each the fastest of three;
memory is what training added to the peak of the process, features kept for later epochs included.

{speed_table()}

## The maps they give
{images} Signs scenes, alpha 6; the straightforward way for two epochs as published, ours for four; judged on {scenes} fresh scenes,
percentile 95.

{quality_table(images, scenes)}
"""
    (Path(__file__).parent / "RESULTS.md").write_text(text, "utf-8", newline="\n")
    print(text)


if __name__ == "__main__":
    main()
