"""The CAM family beside TorchCAM and pytorch-grad-cam: time, peak memory, and whether the maps agree.

    make bench          # or: python benchmarks/peers.py; writes benchmarks/PEERS.md

Each method is called on the same model and images by every package that has it, in turns, in one process; the best of each
counts. Peak memory is measured in processes of their own. Only ratios of one run mean anything.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # a peer draws a bar for each call
warnings.filterwarnings("ignore")

import pytorch_grad_cam  # noqa: E402
import torch  # noqa: E402
import torchcam.methods  # noqa: E402
import torchcam.metrics  # noqa: E402
import torchvision  # noqa: E402
from core import peak_memory  # noqa: E402
from given_maps import GivenMaps  # noqa: E402
from pytorch_grad_cam.ablation_layer import AblationLayerVit  # noqa: E402
from pytorch_grad_cam.metrics import road as road_module  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget, ClassifierOutputTarget  # noqa: E402
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection  # noqa: E402
from torch import Tensor  # noqa: E402

import scanlib  # noqa: E402
import scanlib.metrics  # noqa: E402
from scanlib.explainers.base import (  # noqa: E402
    choose_batch_size,
    normalize_map,
    to_channels_last,
)
from scanlib.explainers.formulas import compute_first_component  # noqa: E402
from scanlib.hooks import FeatureTaps  # noqa: E402
from scanlib.metrics import build_class_score  # noqa: E402

WITH_GRADIENT = ("GradCAM", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "HiResCAM", "GradCAMElementWise")
OTHERS = ("EigenCAM", "EigenGradCAM", "KPCACAM", "FEM", "ShapleyCAM", "SmoothGradCAMPlusPlus", "FullGrad")
PERTURBATION = ("ScoreCAM", "ScoreCAM, amp=True", "SSCAM", "ISCAM", "AblationCAM")
CLASSES = "GradCAM, 10 classes of an image"
IN_TORCHCAM = {"GradCAMPlusPlus": "GradCAMpp", "SmoothGradCAMPlusPlus": "SmoothGradCAMpp"}
IN_GRAD_CAM = {"KPCACAM": "KPCA_CAM"}
WEIGHED = ("GradCAM", "LayerCAM", "EigenCAM", "FullGrad", CLASSES, "ScoreCAM", "AblationCAM")  # a process each takes its time
NAMES = {"cnn64": "Signs CNN, 64 px", "resnet18": "ResNet-18", "resnet50": "ResNet-50", "vit": "ViT-Tiny"}
SAMPLES = 2  # of SS-CAM and IS-CAM, everywhere: their papers' 35 and 10 cost the same a sample
KNOWN = {  # why maps differ; tests/explainers/test_cams_peers.py shows each
    ("GradCAMPlusPlus", "torchcam"): "it never divides",
    ("SmoothGradCAMPlusPlus", "torchcam"): "it keeps the last sample",
    ("ISCAM", "torchcam"): "its strengths add up",
    ("GradCAMPlusPlus", "grad-cam"): "its epsilon",
    ("FullGrad", "grad-cam"): "it stretches each channel",
    ("ScoreCAM", "grad-cam"): "it aligns corners",
    ("AblationCAM", "grad-cam"): "it ablates to min - 1e7 where features are negative",
    ("EigenCAM", "grad-cam"): "sign",
    ("EigenGradCAM", "grad-cam"): "sign",
    ("KPCACAM", "grad-cam"): "sign",
}


def scene(case: str):
    """(model, layer, images as the model takes them): eight of them, seeded."""
    torch.manual_seed(0)
    if case == "cnn64":
        classifier = scanlib.load_classifier("signs_cnn")
        scenes = torch.stack([image for image, _ in scanlib.Signs(8)])
        return classifier.model, "layer4", classifier.preprocess(scenes)
    images = torch.randn(8, 3, 224, 224)
    if case.startswith("resnet"):
        return getattr(torchvision.models, case)(weights=None).eval(), "layer4", images
    model = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768).eval()
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # else zero, and so every gradient
    return model, "encoder.layers.encoder_layer_11.ln_1", images


def fold(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (14, 14))


def count_of(method: str) -> int:
    """Images a call."""
    return 1 if method in (*PERTURBATION, CLASSES) else 4


def calls(case: str, method: str, model, layer: str, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Package -> a call that gives maps (N, H, W) in [0, 1], at the size of the images; those packages that have the method."""
    x, found = images[: count_of(method)], {}
    with torch.no_grad():
        classes = model(x).argmax(1).tolist()
    if method == CLASSES:
        every = list(range(10))
        found["scanlib"] = lambda: scanlib.GradCAM(model, layer).explain_classes(x, every)[0]
        one_by_one = {
            name: [calls_of(name, case, "GradCAM", model, layer, x, [k]) for k in every] for name in ("torchcam", "grad-cam")
        }
        return found | {name: (lambda each=each: torch.cat([call() for call in each])) for name, each in one_by_one.items()}
    arguments = () if method == "FullGrad" else (layer,)
    options = {"samples": SAMPLES} if method in ("SSCAM", "ISCAM") else {}
    options |= {"stretch": "before"} if method in PERTURBATION[:4] else {}
    method, _, amp = method.partition(", ")
    options |= {"amp": True} if amp else {}
    explainer = getattr(scanlib, method)(model, *arguments, **options)
    found["scanlib"] = lambda: explainer(x, classes)
    for name in ("torchcam", "grad-cam"):
        call = calls_of(name, case, method, model, layer, x, classes)
        if call is not None:
            found[name] = call
    return found


def calls_of(package: str, case: str, method: str, model, layer: str, x: Tensor, classes: list[int]):
    if package == "torchcam":
        kind = getattr(torchcam.methods, IN_TORCHCAM.get(method, method), None)
        if kind is None or (case == "vit" and method in ("SSCAM", "ISCAM", "ScoreCAM")):
            return None

        def call():
            options = {"num_samples": SAMPLES} if method in ("SSCAM", "ISCAM") else {}
            options |= {"reshape_transform": fold} if case == "vit" else {}
            torch.manual_seed(0)  # as ours, for those that draw noise
            with kind(model, layer, **options) as extractor:
                scores = model(x.clone().requires_grad_())
                maps = extractor(classes, scores, normalized=True)[0]
            return normalize_map(maps.detach(), x.shape[2:])

        return call
    kind = getattr(pytorch_grad_cam, IN_GRAD_CAM.get(method, method), None)
    if kind is None or (case == "vit" and method in ("FullGrad", "ShapleyCAM")):  # the latter fails there
        return None

    def call():
        options = {"reshape_transform": fold} if case == "vit" else {}
        if case == "vit" and method == "AblationCAM":
            options["ablation_layer"] = AblationLayerVit()
        layers = [] if method == "FullGrad" else [model.get_submodule(layer)]
        with kind(model=model, target_layers=layers, **options) as extractor:
            maps = extractor(input_tensor=x.clone(), targets=[ClassifierOutputTarget(k) for k in classes])
        return torch.from_numpy(maps)

    return call


def best_of(functions: dict[str, Callable], rounds: int = 4) -> tuple[dict[str, float], dict]:
    """Seconds of each, in turns, the best of up to ``rounds`` (one where a round takes long), and what each returned last."""
    seconds, results = {}, {}
    for turn in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        for name, function in functions.items():
            began = time.perf_counter()
            results[name] = function()
            spent = time.perf_counter() - began
            seconds[name] = spent if turn <= 1 else min(spent, seconds[name])
        if turn and time.perf_counter() - start > 8:
            break
    return seconds, results


def quietly(function: Callable):
    """Peers print."""
    with open(os.devnull, "w") as nowhere:
        stdout, sys.stdout = sys.stdout, nowhere
        try:
            return function()
        finally:
            sys.stdout = stdout


def memory(case: str, method: str, package: str) -> float:
    """Growth of the peak of a process of its own, MiB."""
    command = [sys.executable, __file__, "--work", case, method, package]
    return float(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))


def work(case: str, method: str, package: str) -> float:
    model, layer, images = scene(case)
    functions = calls(case, method, model, layer, images)
    with torch.no_grad():  # the first run of a model allocates and plans
        model(images[: count_of(method)])
    before = peak_memory()
    quietly(functions[package])
    return peak_memory() - before


def bare_runs(method: str, model, layer: str, images: Tensor) -> tuple[Callable, float]:
    """The runs of the model that a method is made of, whole and in single precision, as a call and how often it is due.

    One on the images; of SmoothGrad-CAM++ one a sample; of Score-CAM's family one for each channel and sample, in batches.
    """
    x, times = to_channels_last(images[: count_of(method)]), 4.0 if method == "SmoothGradCAMPlusPlus" else 1.0
    if method.startswith(("ScoreCAM", "SSCAM", "ISCAM")):
        with FeatureTaps(model, [layer], record=None) as taps:
            taps(x)
            runs = taps.layouts[0].to_maps(taps.features[0]).shape[1] * (1 if method.startswith("Score") else SAMPLES)
        x = to_channels_last(x.expand(choose_batch_size(x), -1, -1, -1))
        times = runs / len(x)

    def run():
        with torch.no_grad():
            return model(x)

    return run, times


def row(case: str, method: str) -> str | None:
    model, layer, images = scene(case)
    functions = calls(case, method, model, layer, images)
    if len(functions) == 1:
        return None
    runs, times = bare_runs(method, model, layer, images)
    seconds, results = quietly(partial(best_of, functions | {"runs": runs}))
    bare = times * seconds["runs"]
    peers = [name for name in functions if name != "scanlib"]
    agreement = []
    for name in peers:
        difference = float((results[name].reshape_as(results["scanlib"]) - results["scanlib"]).abs().max())
        why = KNOWN.get((method.partition(", ")[0], name), f"{difference:.2f}")
        agreement.append(f"{difference:.0e}" if difference < 1e-3 else f"no: {why}")
    ours, fastest = seconds["scanlib"], min(seconds[name] for name in peers)
    cells = [NAMES[case], method, f"{1000 * ours:.1f}"]
    cells += [f"{1000 * seconds[name]:.0f}" if name in peers else "-" for name in ("torchcam", "grad-cam")]
    cells += [f"**{fastest / ours:.2f}**", f"{fastest / bare:.1f}", f"{ours / bare:.1f}"]
    cells.append(", ".join(f"{name}: {text}" for name, text in zip(peers, agreement, strict=True)))
    return "| " + " | ".join(cells) + " |"


def memory_row(method: str) -> str:
    """Every package that has the method, on the ResNet-18."""
    packages = calls("resnet18", method, *scene("resnet18"))
    return (
        f"| {method} | "
        + " | ".join(
            f"{memory('resnet18', method, name):.0f}" if name in packages else "-" for name in ("scanlib", "torchcam", "grad-cam")
        )
        + " |"
    )


def component_row(channels: int, side: int) -> str:
    """First component alone, with nothing else around it."""
    A = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    functions = {"scanlib": lambda: compute_first_component(A), "grad-cam": lambda: get_2d_projection(A.numpy())}
    seconds, results = best_of(functions)
    ours, theirs = results["scanlib"][0], torch.from_numpy(results["grad-cam"][0])
    difference = min(float((ours - sign * theirs).abs().max()) for sign in (1, -1)) / float(ours.abs().max())
    times = f"{1000 * seconds['scanlib']:.2f} | {1000 * seconds['grad-cam']:.1f}"
    ratio = seconds["grad-cam"] / seconds["scanlib"]
    return f"| {channels} x {side} x {side} | {times} | **{ratio:.0f}** | {difference:.0e} |"


def metric_row(name: str, peer: str, case: str, images: Tensor, ours: Callable, theirs: Callable, model, runs: int) -> str:
    """One call of each, once the model has run; and ``runs`` bare runs of the model on all images."""
    with torch.no_grad():
        batches = to_channels_last(images).split(choose_batch_size(images))
        model(batches[0])
        began = time.perf_counter()
        for _ in range(runs):
            for batch in batches:
                model(batch)
        least = time.perf_counter() - began
    began = time.perf_counter()
    figures = ours()
    mine = time.perf_counter() - began
    expected = quietly(theirs)
    taken = time.perf_counter() - began - mine
    difference = float((figures - expected).abs().max())
    cells = [
        case,
        name,
        f"{mine:.2f}",
        peer,
        f"{taken:.2f}",
        f"**{taken / mine:.1f}**",
        f"{taken / least:.1f}",
        f"{difference:.0e}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    return "| " + " | ".join(cells) + " |"


def metric_rows() -> list[str]:
    """ROAD beside pytorch-grad-cam's, deletion and insertion beside torchcam's: given maps, noise off, so that figures agree."""
    road_module.NoisyLinearImputer.__init__.__defaults__ = (0.0, road_module.neighbors_weights)
    generator, rows = torch.Generator().manual_seed(0), []
    coarse = torch.rand(16, 4, 14, 14, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic")
    images, maps = (
        4 * smooth[:, :3] - 2 + 0.3 * torch.randn(16, 3, 224, 224, generator=generator),
        smooth[:, 3],
    )  # maps without ties
    torch.manual_seed(0)
    models = {"SmallResNet, 16 x 224 px": scanlib.SmallResNet().eval(), "ResNet-18, 16 x 224 px": scene("resnet18")[0]}
    for case, model in models.items():
        with torch.no_grad():
            classes = model(images).argmax(1)
        score = build_class_score(model, lambda x: x, classes)
        targets = [ClassifierOutputSoftmaxTarget(int(k)) for k in classes]

        def ours(score=score):
            morf, lerf = scanlib.metrics.compute_road(score, images, maps, noise=0)
            return (lerf - morf).mean(1) / 2

        def theirs(model=model, targets=targets):
            return torch.from_numpy(road_module.ROADCombined()(images, maps.numpy(), targets, model))

        def curves(score=score):
            found = scanlib.metrics.compute_removal_curves(score, images, maps, steps=16, fill=scanlib.metrics.fill_black)
            return torch.stack([scanlib.metrics.compute_auc(each).mean() for each in found])

        def curves_theirs(model=model):
            metric = torchcam.metrics.DeletionInsertionMetric(GivenMaps(model, maps), lambda logits: logits.softmax(-1), steps=16)
            metric.update(images)
            return torch.tensor(list(metric.summary().values()))

        rows.append(metric_row("deletion and insertion, 16 steps", "torchcam", case, images, curves, curves_theirs, model, 32))
        if case.startswith("Small"):
            rows.append(metric_row("ROAD combined, 9 percentiles", "grad-cam", case, images, ours, theirs, model, 19))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=3, metavar=("CASE", "METHOD", "PACKAGE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", help="methods to run, and print only; metrics for the metrics")
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(*options.work)))
        return
    if options.only == ["metrics"]:
        metric_rows()
        return
    rows = []
    for case in NAMES:
        perturbation = {"resnet50": (), "resnet18": ("ScoreCAM", "ScoreCAM, amp=True", "AblationCAM")}.get(case, PERTURBATION)
        methods = [*WITH_GRADIENT, *OTHERS, CLASSES, *perturbation]
        for method in methods if options.only is None else [m for m in methods if m in options.only]:
            line = row(case, method)
            if line is not None:
                rows.append(line)
                print(line, flush=True)
    if options.only is not None:
        return
    components = "\n".join(component_row(*shape) for shape in ((2048, 7), (512, 7), (256, 28), (192, 14)))
    metrics = "\n".join(metric_rows())
    weighed = "\n".join(map(memory_row, WEIGHED))
    table, machine = "\n".join(rows), f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchcam", "grad-cam"))
    text = f"""# Beside the peers

`make bench`, {time.strftime("%Y-%m-%d")}, {machine}, {versions}, seed 0. Only the ratios mean anything: timings of a shared
machine wander by two.

Four images a call (one for Score-CAM's family, Ablation-CAM and the ten classes), 224 px but for the Signs CNN, random
weights but for that. SS-CAM and IS-CAM with {SAMPLES} samples in all packages. `faster` is the quicker peer's time over ours.
`by runs` is what it would be if ours were nothing but the method's runs of the whole model in single precision, without
gradients: one on the same images, four of SmoothGrad-CAM++, of Score-CAM's family one for each channel and sample. `runs` is
our time over theirs. Where it is below 1, what lies behind the layer is not run, bfloat16 runs it, or the machine was quicker
just then. Agreement is the largest difference of the normalised maps; where they differ,
`tests/explainers/test_cams_peers.py` shows why.

| model | method | scanlib, ms | torchcam, ms | grad-cam, ms | faster | by runs | runs | agreement |
|---|---|---|---|---|---|---|---|---|
{table}

Asked were 1.3 x torchcam and 2.5 x grad-cam for Grad-CAM's family, 50 x for Ablation-CAM, 500 x for Eigen-CAM, 30 x for
Full-Grad, 1.5 x for Score-CAM's family, 5 x for ten classes. What falls short of that, why, and what could be tried:

- **Grad-CAM's family beside torchcam.** `by runs` says it: torchcam takes hardly longer than one run of the model, and so do
  we. Only a quicker run would help; batch norms folded into convolutions gave 8 % of it, not enough for what it
  would cost the reader.
- **Score-CAM's family.** The runs are all there is to it, for everyone. Fewer bits help (`amp=True`); so would trying
  channels in groups, which is another method.
- **Ablation-CAM on the Signs CNN** would have to be a single run of the model and nothing else. **On the ViT** every channel
  needs the last block anew for all tokens; keys and values change by one rank a channel, so that the class token's attention
  could be had in closed form, in a page of code for one layer of one architecture.
- **Full-Grad** needs a forward and a whole backward pass, two to three runs; the smaller the network, the less the
  peer wastes on resizing.
- **Eigen-CAM** as a whole is a run of the model, too. The component alone, below: of our time on 2048 x 7 x 7 the
  eigenvectors take two fifths, the Gram matrix one; each is a single call of LAPACK or BLAS, and the two together leave about
  450 x.

## The first principal component alone
Without the model: features of one image, `first_component` beside `get_2d_projection`; agreement up to sign, relative.

| features | scanlib, ms | grad-cam, ms | faster | agreement |
|---|---|---|---|---|
{components}

## Metrics
Of given maps without ties, noise off; the difference is the largest of an image's figure (of the means, for torchcam). `by runs`:
if ours were nothing but the runs of the model, removing and filling for nothing.

| model | metric | scanlib, s | peer | its s | faster | by runs | difference |
|---|---|---|---|---|---|---|---|
{metrics}

Asked were 1.5 x for deletion and 50 x for ROAD. Deletion is nothing but the runs of the model. Of ROAD they leave no more
than `by runs` on a CPU, even if filling in cost nothing; as it is, filling takes half of our time, and waits for memory (nine
steps of conjugate gradients on 50,000 pixels a picture). What could be tried is a GPU, which does both; the peer solves on
the CPU always.

## Peak memory
MiB that the call adds to the peak of a process of its own, in which the bare model ran on the same images before; ResNet-18, four
images or one as above.

| method | scanlib | torchcam | grad-cam |
|---|---|---|---|
{weighed}
"""
    (Path(__file__).parent / "PEERS.md").write_text(text, "utf-8", newline="\n")
    print(text)


def version(name: str) -> str:
    from importlib.metadata import version as installed

    return installed(name)


if __name__ == "__main__":
    main()
