"""What limits SCAN on photographs with a ViT: its mask, its decoder, or the pictures it learnt from? On the validation part.

- an oracle: how far the class's probability falls when one square alone is blurred, square by square, 196 runs of the network a
  picture, in the very squares and with the very fill that deletion uses;
- the oracle in the mask: an entry counts by its gradient times the oracle's word on its place, as many entries kept as ever. If
  the map gains much less than the oracle is ahead, the decoder is the limit;
- fewer pictures: decoders that learnt from an eighth and a half of them, in as many steps.

Folders as in photographs.py. One seed, so that small differences mean nothing: those of seeds are in PHOTOGRAPHS.md.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

import torch
import torch.nn.functional as F
from photographs import SIZE, Bench, Setting, View, add_folders, maps_of
from torch import Tensor
from tqdm import tqdm

from scanlib.metrics import Comparison, compute_auc, compute_removal_curves, fill_blur, make_centre_maps, make_random_maps

NETWORK, RIVAL = "vit_tiny_patch16_224", "AttentionRelevance"
SETTING, PERCENTILES, PATCH = Setting(NETWORK), (80, 90, 95, 98), 16


@torch.no_grad()
def occlusion(view: View) -> Tensor:
    """How far the class's probability falls when a square of 16 px alone is blurred: (N, 14, 14); below 0 where it rises."""
    side = SIZE // PATCH
    holes = F.interpolate(torch.eye(side * side).view(-1, 1, side, side), scale_factor=PATCH).bool()
    falls = []
    for number, image in enumerate(tqdm(view.images, "occlusion")):
        index = torch.tensor([number])
        pictures = torch.where(holes, fill_blur(image[None]), image)
        scores = torch.cat([view.score(some, index.expand(len(some))) for some in pictures.split(49)])
        falls.append((view.score(image[None], index) - scores).view(side, side))
    return torch.stack(falls)


def oracle_masked(scanner, view: View, falls: Tensor) -> Tensor:
    """SCAN's confidence, its mask weighed by the oracle."""
    maps = []
    for images, classes, fall in zip(*(each.split(32) for each in (view.images, view.classes, falls)), strict=True):
        features, scores = scanner.extract(images, classes)
        word = F.interpolate(fall[:, None].relu(), size=scores.shape[-2:], mode="area")
        word = word / word.amax((2, 3), keepdim=True).clamp_min(1e-12) + 1e-6  # none becomes 0: as many entries are kept
        maps.append(scanner.decode(features, scores * word, PERCENTILES)[0])
    return torch.cat(maps)


def rows(bench: Bench) -> Iterator[tuple[str, Tensor]]:
    """A name and the maps of the photographs, one after the other."""
    view = bench.views["whole"]
    yield "random", make_random_maps(len(view.images), (SIZE, SIZE))
    yield "centre prior", make_centre_maps(len(view.images), (SIZE, SIZE))
    yield RIVAL, maps_of(bench.explainer(RIVAL), view.images, view.classes)
    falls = occlusion(view)
    yield "the oracle", falls.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    for share in (1, 0.5, 0.125):
        scanner = bench.decoder(replace(SETTING, share=share), seed=0)
        yield f"SCAN, {share:g} of the pictures", maps_of(scanner.as_explainer(PERCENTILES), view.images, view.classes)
        if share == 1:
            yield "SCAN, masked by the oracle", oracle_masked(scanner, view, falls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    bench = Bench(NETWORK, parser.parse_args(), "validation")
    view, found = bench.views["whole"], Comparison({}, {"deletion": -1, "insertion": 1}, {}, {})
    found.note = (
        f"{NETWORK}, validation, {len(view.images)} photographs, predicted class, {PATCH}-px patches, blur, 9 steps, seed 0; "
        f"± is half the bootstrap 95 % interval over the pictures; {date.today()}, torch {torch.__version__}"
    )
    for row, maps in rows(bench):
        curves = compute_removal_curves(view.score, view.images, maps, steps=9, patch=PATCH, fill=fill_blur)
        found.values[row] = dict(zip(found.better, map(compute_auc, curves), strict=True))
        print(row, {key: round(float(value.mean()), 3) for key, value in found.values[row].items()}, flush=True)
    print(f"\n{found}")


if __name__ == "__main__":
    main()
