"""Speed of the explainers that read the input, beside Captum and beside the runs they need; writes benchmarks/GRADIENTS.md.

python benchmarks/gradients.py          # five minutes on 2 CPU cores; needs the extra `peers`

All are called in turns, in one process, on the same model and images; the best time of each counts.
"""

import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import captum
import torch
import torchvision
from captum import attr
from torch import nn
from tqdm.auto import tqdm

import scanlib
from scanlib import load_classifier
from scanlib.models import Normalize

INTRODUCTION = """# Speed of the explainers that read the input

`python benchmarks/gradients.py`: {machine}, {date}, seed 0.
Four images a call, random weights except for Signs. *faster* is Captum's time over ours for the same work: the same number of
runs of the model, in batches of 32.

| model | method | scanlib, ms | Captum, ms | faster |
|---|---|---|---|---|
{captum}
*runs*: our time over the time of the runs of the model alone. For RISE these are forward passes. For
Libra they are one forward and one backward pass with the plain gradient, read at the same blocks.

| model | method | scanlib, ms | runs alone, ms | runs |
|---|---|---|---|---|
{runs}"""


def build_cases() -> dict[str, tuple[nn.Module, Callable, int]]:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768).eval()
    nn.init.normal_(vit.heads.head.weight, std=0.02)  # zero otherwise
    cnn, small_vit = load_classifier("signs_cnn"), load_classifier("signs_vit")
    return {
        "Signs CNN, 64 px": (cnn.model, cnn.preprocess, 64),
        "Signs ViT, 64 px": (small_vit.model, small_vit.preprocess, 64),
        "ViT-Tiny, 224 px": (vit, Normalize(), 224),
    }


def build_calls(model: nn.Module, preprocess: Callable, size: int) -> dict[str, tuple[Callable, Callable]]:
    """Return ours and Captum's call of each method."""
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    classes, patch, many = torch.tensor([0, 1, 2, 3]), size // 4, 40 if size < 100 else 8
    draws, x = images.flip(0), preprocess(images)
    squares = {"sliding_window_shapes": (3, patch, patch), "strides": (3, patch // 2, patch // 2)}

    def ours(name: str, **options) -> Callable:
        explainer = getattr(scanlib, name)(model, preprocess=preprocess, batch_size=32, **options)
        return lambda: explainer(images, classes, normalize=False)

    def theirs(method, **options) -> Callable:
        return lambda: method.attribute(preprocess(images).requires_grad_(), target=classes, **options)

    start = preprocess(torch.zeros_like(images))
    return {
        "Saliency": (ours("Saliency"), theirs(attr.Saliency(model))),
        "InputXGradient": (ours("InputXGradient"), theirs(attr.InputXGradient(model))),
        f"IntegratedGradients, {many} steps": (
            ours("IntegratedGradients", steps=many),
            theirs(attr.IntegratedGradients(model), baselines=start, n_steps=many, internal_batch_size=32),
        ),
        f"SmoothGrad, {many} samples": (
            ours("SmoothGrad", samples=many),
            theirs(attr.NoiseTunnel(attr.Saliency(model)), nt_samples=many, nt_samples_batch_size=8, stdevs=0.15),
        ),
        f"ExpectedGradients, {many} samples": (
            ours("ExpectedGradients", baselines=draws, samples=many),
            theirs(attr.GradientShap(model), baselines=preprocess(draws), n_samples=many),
        ),
        f"Occlusion, {patch} px, 49 squares": (
            ours("Occlusion", patch=patch, stride=patch // 2),
            theirs(attr.Occlusion(model), baselines=float(x.mean()), perturbations_per_eval=8, **squares),
        ),
    }


def build_runs(model: nn.Module, preprocess: Callable, size: int) -> dict[str, tuple[Callable, Callable]]:
    """Return ours and the bare runs of each method."""
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255
    classes = torch.tensor([0, 1, 2, 3])
    many = preprocess(images).repeat(8, 1, 1, 1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def run(count: int) -> None:
        for _ in range(count // 32):
            model(many)

    masks = 200 if size < 100 else 40
    rise = scanlib.RISE(model, preprocess=preprocess, masks=masks, batch_size=32)
    libra, plain = (scanlib.Libra(model, preprocess=preprocess, libra=on) for on in (True, False))
    return {
        f"RISE, {masks} masks": (lambda: rise(images, classes), lambda: run(4 * masks)),
        "Libra": (lambda: libra(images, classes), lambda: plain(images, classes)),
    }


def time_in_turns(pair: tuple[Callable, Callable], seconds: float = 3.0) -> tuple[float, float]:
    """Return the best time of each in milliseconds; at least three rounds."""
    best = [float("inf")] * 2
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for k, call in enumerate(pair):
            before = time.perf_counter()
            call()
            best[k] = min(best[k], 1000 * (time.perf_counter() - before))
        rounds += 1
    return best[0], best[1]


def main() -> None:
    warnings.filterwarnings("ignore")
    beside, runs = "", ""
    for case, (model, preprocess, size) in tqdm(build_cases().items()):
        model.requires_grad_(False)
        for name, pair in build_calls(model, preprocess, size).items():
            ours, theirs = time_in_turns(pair)
            beside += f"| {case} | {name} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |\n"
        for name, pair in build_runs(model, preprocess, size).items():
            ours, bare = time_in_turns(pair)
            runs += f"| {case} | {name} | {ours:.1f} | {bare:.1f} | {ours / bare:.2f} |\n"
    machine = (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, captum {captum.__version__}"
    )
    text = INTRODUCTION.format(machine=machine, date=time.strftime("%Y-%m-%d"), captum=beside, runs=runs)
    Path(__file__).with_name("GRADIENTS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
