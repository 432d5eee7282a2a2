"""Libra, Expected Gradients, RISE and the ceiling on photographs, in the protocol of photographs.py; prints two tables a network.

python benchmarks/photographs_rivals.py --photographs FOLDER --boxes FOLDER --weights FOLDER      # an hour on 2 CPU cores

All rows: deletion and insertion of the predicted class, patches of 16 px, 9 steps, fill blur. RISE and the ceiling take many runs
of the model, so they are measured on the first photographs only, and the other rows once more on the same ones.
"""

import argparse
import time
from datetime import date

import torch
from photographs import Bench, add_folders, maps_of, photographs
from torch import Tensor
from tqdm.auto import tqdm

import scanlib
from scanlib.explainers import explain_log_probability
from scanlib.metrics import Comparison, compute_auc, compute_removal_curves, fill_blur, make_centre_maps, make_random_maps
from scanlib.metrics.removal import order_patches_greedily

FEW, MASKS, SAMPLES, PER_ROUND = 30, 1000, 30, 8
MEASURES = {"deletion, blur": -1, "insertion, blur": 1}


def list_rows(bench: Bench) -> dict:
    own = {"preprocess": bench.preprocess}
    draws = photographs(bench.folders.photographs, "train")[:50].float()
    rows = {
        "random": lambda x, k: make_random_maps(len(x), (224, 224)),
        "centre prior": lambda x, k: make_centre_maps(len(x), (224, 224)),
        "GradCAM": scanlib.GradCAM(bench.model, **own),
        "sum over blocks, plain gradient": scanlib.Libra(bench.model, **own, libra=False),
    }
    if bench.name.startswith("vit"):
        rows["AttentionRelevance"] = scanlib.AttentionRelevance(bench.model, **own)
        rows["AttentionRelevance, libra"] = scanlib.AttentionRelevance(bench.model, **own, libra=True)
        rows["Libra"] = scanlib.Libra(bench.model, **own)
        rows["Libra, log p"] = explain_log_probability(rows["Libra"])
    else:  # a CNN of ReLU layers: libra changes nothing
        rows["sum over blocks, log p"] = explain_log_probability(rows["sum over blocks, plain gradient"])
    rows[f"ExpectedGradients, {SAMPLES} samples"] = scanlib.ExpectedGradients(
        bench.model, **own, baselines=draws, samples=SAMPLES
    )
    return rows  # the slowest last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_folders(parser)
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    parser.add_argument("--networks", nargs="+", default=["squeezenet1_1", "vit_tiny_patch16_224"])
    options = parser.parse_args()
    for name in options.networks:
        started, bench = time.time(), Bench(name, options, options.part)
        view, whole, first = bench.views["whole"], Comparison({}, MEASURES, {}, {}), Comparison({}, MEASURES, {}, {})

        def measure(maps: Tensor, view=view) -> dict[str, Tensor]:
            curves = compute_removal_curves(view.score, view.images[: len(maps)], maps, steps=9, patch=16, fill=fill_blur)
            return dict(zip(MEASURES, map(compute_auc, curves), strict=True))

        for row, explain in tqdm(list_rows(bench).items(), name):
            whole.values[row] = measure(maps_of(explain, view.images, view.classes))
            first.values[row] = {key: value[:FEW] for key, value in whole.values[row].items()}
            means = ", ".join(f"{key} {whole.mean(row, key):.3f}" for key in MEASURES)
            tqdm.write(f"{row}: {means}")
        note = f"{options.part} part, predicted class, {date.today()}, torch {torch.__version__}, CPU"
        whole.note = f"{len(view.images)} photographs; {note}; ± is half the bootstrap 95 % interval over the images"
        print(f"\n## {name}\n\n{whole}", flush=True)
        rise = scanlib.RISE(bench.model, preprocess=bench.preprocess, masks=MASKS)
        first.values[f"RISE, {MASKS} masks"] = measure(maps_of(rise, view.images[:FEW], view.classes[:FEW]))
        search = order_patches_greedily(view.score, view.images[:FEW], 16, per_round=PER_ROUND, fill=fill_blur, progress=True)
        first.values["ceiling"], runs = measure(search[0]), float(search[1].float().mean())
        first.note = f"the first {FEW} of them; ceiling: greedy order, {PER_ROUND} patches per round, {runs:.0f} runs per image"
        print(f"{first}\n{time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
