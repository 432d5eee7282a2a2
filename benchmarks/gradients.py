"""Gradient maps with and without LibraGrad on the Signs vision transformer; writes benchmarks/GRADIENTS.md.

python benchmarks/gradients.py [--count 500]      # two minutes on a GPU
"""

import argparse
import platform
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scanlib import (
    AttentionRelevance,
    ExpectedGradients,
    HiResCAM,
    InputXGradient,
    IntegratedGradients,
    LeGrad,
    Libra,
    Saliency,
    Signs,
    SmoothGrad,
    compare,
    load_classifier,
)
from scanlib.targets import LogProbability

INTRODUCTION = """# Gradients with and without LibraGrad

`python benchmarks/gradients.py`: the shipped vision transformer for Signs, {count} scenes that training never used (seed 987),
their true class. Machine: {machine}.

{table}
The next table asks whether a map answers for the class that was asked: {count} scenes with two signs (seed 4321). *b in b* and
*b in a*: share of the map of the smaller sign's class on the smaller and on the larger sign. *b denser*: share of the scenes
where that map has more density on the smaller sign. *absent in a*: share of the map of a class that is not there on the larger
sign. A random map and the centre prior know no class.

| map | b in b (high) | b in a (low) | b denser (high) | absent in a (low) |
|---|---|---|---|---|
"""


def explain(explainer, images: Tensor, classes: Tensor, log: bool = False) -> Tensor:
    """Compute maps in batches; log explains log p instead of the logit."""
    maps = []
    for batch, chosen in zip(images.split(50), classes.split(50), strict=True):
        maps.append(explainer(batch, [LogProbability(each) for each in chosen.tolist()] if log else chosen))
    return torch.cat(maps)


def share(maps: Tensor, masks: Tensor) -> Tensor:
    """Return the share of each map inside its mask."""
    return (maps * masks).sum((1, 2)) / maps.sum((1, 2)).clamp_min(1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    count = parser.parse_args().count
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier = load_classifier("signs_vit")
    model, preprocess = classifier.model.to(device), classifier.preprocess
    draws = torch.stack([image for image, _ in Signs(100, seed=5)]).float().to(device)
    methods = {
        "attention relevance": AttentionRelevance(model, preprocess=preprocess),
        "attention relevance, Libra": AttentionRelevance(model, preprocess=preprocess, libra=True),
        "LeGrad": LeGrad(model, preprocess=preprocess),
        "LeGrad, Libra": LeGrad(model, preprocess=preprocess, libra=True),
        "HiResCAM, block 1": HiResCAM(model, "encoder.layers.encoder_layer_0", preprocess),
        "HiResCAM, block 1, Libra": HiResCAM(model, "encoder.layers.encoder_layer_0", preprocess, libra=True),
        "Saliency": Saliency(model, preprocess=preprocess),
        "Saliency, Libra": Saliency(model, preprocess=preprocess, libra=True),
        "SmoothGrad, 25": SmoothGrad(model, preprocess=preprocess),
        "input x gradient": InputXGradient(model, preprocess=preprocess),
        "input x gradient, Libra": InputXGradient(model, preprocess=preprocess, libra=True),
        "Integrated Gradients, 50": IntegratedGradients(model, preprocess=preprocess),
        "Expected Gradients, 100": ExpectedGradients(model, preprocess=preprocess, baselines=draws),
        "sum over blocks, plain gradient": Libra(model, preprocess=preprocess, libra=False),
        "Libra": Libra(model, preprocess=preprocess),
    }
    explainers = {
        name: (lambda images, target, method=method: explain(method, images, target)) for name, method in methods.items()
    }
    explainers["Libra of log p"] = lambda images, target: explain(methods["Libra"], images, target, log=True)
    images, labels, masks = map(list, zip(*Signs(count, seed=987, masks=True), strict=True))
    images, labels = torch.stack(images).float().to(device), torch.tensor(labels).to(device)
    masks = torch.stack(masks).bool().to(device)
    table = compare(model, images, explainers, masks=masks, preprocess=preprocess, target=labels, patch=4)

    pairs = Signs(count, seed=4321, objects=2)
    scenes = [pairs.scene(index) for index in range(count)]
    images = torch.stack([scene.image for scene in scenes]).float().to(device)
    first, second = (torch.stack([scene.masks[k] for scene in scenes]).bool().to(device) for k in (0, 1))
    others = [[(label + 5) % 10 for label in scene.labels] for scene in scenes]
    absent = [
        next(x % 10 for x in range(a, a + 10) if x % 10 not in scene.labels) for (a, _), scene in zip(others, scenes, strict=True)
    ]
    smaller = torch.tensor([scene.labels[1] for scene in scenes]).to(device)
    random = torch.rand(images[:, 0].shape, generator=torch.Generator().manual_seed(0)).to(device)
    place = torch.linspace(-1, 1, images.shape[-1], device=device).square()
    centre = (-(place[:, None] + place) * 2).exp().expand_as(random)
    rows = []
    for name, explainer in tqdm(explainers.items(), desc="two signs"):
        maps, missing = explainer(images, smaller), explainer(images, torch.tensor(absent).to(device))
        rows.append((name, maps, missing))
    lines = []
    for name, maps, missing in [*rows, ("random", random, random), ("centre prior", centre, centre)]:
        density = [(maps * masks).sum((1, 2)) / masks.sum((1, 2)) for masks in (second, first)]
        values = [share(maps, second), share(maps, first), (density[0] > density[1]).float(), share(missing, first)]
        lines.append(f"| {name} | " + " | ".join(f"{float(each.mean()):.3f}" for each in values) + " |\n")
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    machine += f", torch {torch.__version__}"
    text = INTRODUCTION.format(count=count, machine=machine, table=table) + "".join(lines)
    Path(__file__).with_name("GRADIENTS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
