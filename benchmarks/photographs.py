"""SCAN on photographs, with networks trained on ImageNet: settings in, figures out.

Nothing is downloaded. Three folders of yours:
- photographs: pictures (any names), 500 or more;
- boxes: boxes.tsv (file, wnid, x0, y0, x1, y1; tabs between) and the pictures it names under images/ (Tiny-ImageNet, validation);
- weights: squeezenet1_1.pth and vit_tiny_patch16_224.pth, state dicts as torchvision lays them out.

Which part a picture belongs to is a function of its file's name, fixed before anything was measured: settings are chosen on the
validation part, and the test part is for the one table at the end.
"""

import csv
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from scanlib.data import read_image
from scanlib.models import Normalize

SIZE = 224


def part_of(name: str) -> str:
    """ "test" (a fifth), "validation" (a fifth) or "train", by a checksum of the file's name."""
    return ("test", "test", "validation", "validation", *["train"] * 6)[zlib.crc32(name.encode()) % 10]


def photographs(folder: Path, part: str) -> Tensor:
    """(N, 3, 224, 224) uint8, in the order of their names."""
    names = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return torch.stack([read_image(path, SIZE).round().to(torch.uint8) for path in names if part_of(path.name) == part])


def boxed(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 224, 224) uint8, resized from 64 px, and their boxes (N, 4) as x0, y0, x1, y1 in pixels of 224."""
    with open(folder / "boxes.tsv", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if part_of(row["file"]) == part]
    images = torch.stack([read_image(folder / "images" / row["file"]) for row in rows])
    corners = [[int(row["x0"]), int(row["y0"]), int(row["x1"]) + 1, int(row["y1"]) + 1] for row in rows]  # the last pixel is in
    boxes = torch.tensor(corners) * SIZE / images.shape[-1]
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return images.round().clamp(0, 255).to(torch.uint8), boxes


def network(name: str, weights: Path) -> tuple[torch.nn.Module, str, Normalize]:
    """A network in eval mode, the layer SCAN reads, and its preprocessing."""
    if name == "squeezenet1_1":
        model, layer, preprocess = (
            torchvision.models.squeezenet1_1(weights=None),
            "features.12",
            Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        )
    else:
        model = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
        layer, preprocess = "encoder.layers.encoder_layer_10", Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    model.load_state_dict(torch.load(weights / f"{name}.pth", weights_only=True))
    return model.eval().requires_grad_(False), layer, preprocess
