"""Deletion and insertion on a folder of photographs: a trained decoder beside CAMs, attention maps and both baselines.

    python benchmarks/photographs.py FOLDER --decoder decoder.pt [--weights PATH] [--patch 16] [--percentile 95]

Prints a Markdown table; each picture's explained class is the predicted one. The pictures must not have been trained on.
"""

import argparse
import time

import torch

from scanlib import SCAN, AttentionRelevance, AttentionRollout, FeatureTap, LeGrad, PhotoFolder, grad_cam, layer_cam, load_target
from scanlib.checkpoint import load_checkpoint
from scanlib.maps import stretched
from scanlib.metrics import blurred, centre_maps, class_score, random_maps, removal_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--decoder", required=True)
    parser.add_argument("--weights")
    parser.add_argument("--patch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--percentile", type=float, nargs="+", default=[95.0])
    options = parser.parse_args()

    saved = load_checkpoint(options.decoder, ("identity", "notes"))
    target = load_target(saved["notes"]["model"], options.weights or saved["notes"]["weights"])
    size = tuple(saved["identity"]["image_size"])
    scanner = SCAN(target.model, saved["identity"]["layer"], size, mask_by=saved["identity"]["mask_by"], device="cpu")
    scanner.set_preprocess(target.preprocess).load_decoder(options.decoder)
    images = torch.stack([image for image, _ in PhotoFolder(options.folder, size[0])])

    with FeatureTap(target.model, target.layer) as tap:  # the CAMs' usual layer, the last one
        classes = tap(target.preprocess(images)).argmax(1)
        features, gradient = tap.layout.to_maps(tap.features), tap.layout.to_maps(tap.gradient(classes))
    maps = {
        "Grad-CAM": stretched(grad_cam(features, gradient), size),
        "Layer-CAM": stretched(layer_cam(features, gradient), size),
    }
    if tap.layout.kind == "BTC":
        for method in (AttentionRollout, AttentionRelevance, LeGrad):
            explain = method(target.model, preprocess=target.preprocess)
            parts = zip(images.split(20), classes.split(20), strict=True)
            maps[method.__name__] = torch.cat([explain(part, chosen) for part, chosen in parts])
    for percentile in options.percentile:
        maps[f"SCAN, P = {percentile:g}"] = scanner.explain(images, classes, percentile)
    maps |= {"random": random_maps(len(images), size), "centre prior": centre_maps(len(images), size)}

    score = class_score(target.model, target.preprocess, classes)
    model, date = saved["notes"]["model"], time.strftime("%Y-%m-%d")
    print(f"{len(images)} photographs, {model}, {scanner.layer_name}, {options.patch}-px patches, blur fill, {date}\n")
    print("| map | deletion (low) | insertion (high) |\n|---|---|---|")
    for name, heat in maps.items():
        deletion, insertion = removal_curves(
            score, images, heat, steps=options.steps, patch=options.patch, fill=blurred, batch_size=50
        )
        print(f"| {name} | {deletion.mean():.3f} | {insertion.mean():.3f} |", flush=True)


if __name__ == "__main__":
    main()
