"""How quickly the explorer answers: from a changed view to the new picture's bytes. `python benchmarks/explorer.py`

Writes benchmarks/EXPLORER.md. Signs at 64 px with what ships; ViT-Tiny at 224 px with random weights and an untrained decoder:
neither changes what is computed.
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


def signs() -> tuple[MapRenderer, list[str]]:
    target = load_classifier("signs_cnn")
    images = torch.stack([image for image, _ in Signs(6, seed=3)])
    scanner = SCAN(target.model, "layer4", (64, 64), device="cpu").set_preprocess(target.preprocess)
    scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    explainers = {"SCAN": {"layer4": scanner}, "Grad-CAM": GradCAM, "Layer-CAM": LayerCAM}
    layers = ["layer4", "layer3", "layer2"]
    return MapRenderer(target.model, images, explainers, preprocess=target.preprocess, layers=layers), layers


def vit_tiny() -> tuple[MapRenderer, list[str]]:
    torch.manual_seed(0)
    target = load_classifier("vit_tiny", None)
    images = torch.stack([image for image, _ in Signs(4, 224, seed=3)])
    layers, scans = [f"encoder.layers.encoder_layer_{block}" for block in (5, 8)], {}
    for layer in layers:
        scanner = SCAN(target.model, layer, (224, 224), device="cpu").set_preprocess(target.preprocess)
        scanner.set_dataset([(images[:1], torch.zeros(1).long())]).generate_decoder().compile().fit(1, verbose=False)
        scans[layer] = scanner
    relevance = AttentionRelevance(target.model, preprocess=target.preprocess)
    explainers = {"SCAN": scans, "Layer-CAM": LayerCAM, "relevance": relevance}
    return MapRenderer(target.model, images, explainers, preprocess=target.preprocess, layers=layers), layers


def measured(scene: MapRenderer, layers: list[str]) -> dict[str, list[float]]:
    """Milliseconds of each change, by its kind. Every view is new, so nothing is answered from memory that a user's would not."""
    pictures = range(len(scene.images))
    scene.render(View())
    changes = {
        "percentile": [{"percentile": step / 2} for step in range(0, 190, 2)],
        "opacity": [{"opacity": step / 50} for step in range(50)],
        "colours": [{"colormap": name, "opacity": o} for name in ("viridis", "cividis", "gray") for o in (0.31, 0.47, 0.61)],
        "class": [{"image": i, "target": c} for i, c in itertools.product(pictures, range(1, 9))],
        "layer": [{"image": i, "target": c, "layer": layers[1]} for i, c in itertools.product(pictures, range(1, 9))],
    }
    for image in pictures:
        scene.probabilities(image)
    found = {}
    for kind, views in changes.items():
        found[kind] = []
        for view in views:
            start = time.perf_counter()
            encode_png(scene.render(View(**view)))
            found[kind].append(1e3 * (time.perf_counter() - start))
    return found


def main() -> None:
    lines = ["| change | pictures | median, ms | 95th percentile, ms |", "|---|---|---|---|"]
    for name, (scene, layers) in (("Signs CNN, 64 px", signs()), ("ViT-Tiny, 224 px", vit_tiny())):
        for kind, times in measured(scene, layers).items():
            low, high = torch.tensor(times).quantile(torch.tensor([0.5, 0.95])).tolist()
            lines.append(f"| {kind} | {name} | {low:.0f} | {high:.0f} |")
    told = f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    text = "# The explorer's answer\n\nFrom a changed view to the new picture's bytes, without the way to the browser. "
    text += "SCAN and two more methods side by side.\n\n"
    text += "\n".join(lines) + f"\n\n{told}. One run of `python benchmarks/explorer.py`.\n"
    Path(__file__).with_name("EXPLORER.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
