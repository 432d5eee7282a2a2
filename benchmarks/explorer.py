"""Measure the explorer's response time: from a changed view to the bytes of the new figure. `python benchmarks/explorer.py`

Writes benchmarks/EXPLORER.md. Signs at 64 px with the shipped models; ViT-Tiny at 224 px with random weights and decoders of one
step: neither changes what is computed.
"""

import itertools
import platform
import time
from pathlib import Path

import torch

from scanlib import SCAN, AttentionRelevance, GradCAM, LayerCAM, Signs, load_classifier
from scanlib.explorer import MapRenderer, View
from scanlib.explorer.widgets import encode_png
from scanlib.models import CHECKPOINTS


def build_signs_renderer() -> MapRenderer:
    classifier = load_classifier("signs_cnn")
    model, preprocess = classifier.model, classifier.preprocess
    images = torch.stack([image for image, _ in Signs(6, seed=3)])
    scanner = SCAN(model, "layer4", (64, 64), device="cpu").set_preprocess(preprocess)
    scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    layers = ["layer4", "layer3", "layer2"]
    explainers = {
        "SCAN": {"layer4": scanner.as_explainer()},
        "Grad-CAM": {layer: GradCAM(model, layer, preprocess) for layer in layers},
        "Layer-CAM": {layer: LayerCAM(model, layer, preprocess) for layer in layers},
    }
    return MapRenderer(model, images, explainers, preprocess=preprocess)


def build_vit_renderer() -> MapRenderer:
    torch.manual_seed(0)
    classifier = load_classifier("vit_tiny", None)
    model, preprocess = classifier.model, classifier.preprocess
    images = torch.stack([image for image, _ in Signs(4, 224, seed=3)])
    layers, scans = [f"encoder.layers.encoder_layer_{block}" for block in (5, 8)], {}
    for layer in layers:
        scanner = SCAN(model, layer, (224, 224), device="cpu").set_preprocess(preprocess)
        scanner.set_dataset([(images[:1], torch.zeros(1).long())]).generate_decoder().compile().fit(1, verbose=False)
        scans[layer] = scanner.as_explainer()
    explainers = {
        "SCAN": scans,
        "Layer-CAM": {layer: LayerCAM(model, layer, preprocess) for layer in layers},
        "relevance": AttentionRelevance(model, preprocess=preprocess),
    }
    return MapRenderer(model, images, explainers, preprocess=preprocess)


def measure(renderer: MapRenderer) -> dict[str, list[float]]:
    """Return the milliseconds of each change, by kind. Every view is new, so that no figure comes from the cache."""
    indices = range(len(renderer.images))
    renderer.render(View())
    changes = {
        "percentile": [{"percentile": step / 2} for step in range(0, 190, 2)],
        "opacity": [{"opacity": step / 50} for step in range(50)],
        "colours": [{"colormap": name, "opacity": o} for name in ("viridis", "cividis", "gray") for o in (0.31, 0.47, 0.61)],
        "class": [{"image": i, "target": c} for i, c in itertools.product(indices, range(1, 9))],
        "layer": [{"image": i, "target": c, "layer": renderer.layers[1]} for i, c in itertools.product(indices, range(1, 9))],
    }
    for image in indices:
        renderer.compute_probabilities(image)
    times: dict[str, list[float]] = {}
    for kind, views in changes.items():
        times[kind] = []
        for view in views:
            start = time.perf_counter()
            encode_png(renderer.render(View(**view)))
            times[kind].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    lines = ["| change | images | median, ms | 95th percentile, ms |", "|---|---|---|---|"]
    for name, renderer in (("Signs CNN, 64 px", build_signs_renderer()), ("ViT-Tiny, 224 px", build_vit_renderer())):
        for kind, times in measure(renderer).items():
            low, high = torch.tensor(times).quantile(torch.tensor([0.5, 0.95])).tolist()
            lines.append(f"| {kind} | {name} | {low:.0f} | {high:.0f} |")
    machine = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    text = (
        "# Response time of the explorer\n\nFrom a changed view to the bytes of the new figure, without the way to the browser. "
    )
    text += "SCAN and two other methods side by side.\n\n"
    text += "\n".join(lines) + f"\n\n{machine}. One run of `python benchmarks/explorer.py`.\n"
    Path(__file__).with_name("EXPLORER.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
