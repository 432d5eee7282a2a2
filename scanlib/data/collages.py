"""Collages, cut-out objects pasted on photographs: real images with known object masks.

collages = Collages("cutouts", "backgrounds", length=100, objects=2, classes=classifier.classes)
image, label = collages[0]          # float32 (3, 224, 224) in [0, 255], int
scene = collages.scene(0)           # scene.image, scene.labels, scene.masks (n, 224, 224)
"""

import difflib
import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageOps

from scanlib.data.photos import list_image_files, read_image, simplify_name
from scanlib.data.signs import Scene, SceneDataset


@functools.lru_cache(maxsize=512)
def _read_cutout(path: Path) -> Image.Image:
    """Read a cut-out, cropped to its visible pixels. Raises ValueError if it has no transparent or no visible ones."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGBA")
    visible = np.asarray(image.getchannel("A")) > 127
    if visible.all() or not visible.any():
        raise ValueError(f"cutouts must be images with a transparent background, and {path} is not one")
    return image.crop(Image.fromarray(visible).getbbox())


@dataclass(eq=False)
class Collages(SceneDataset):
    """Cut-out objects pasted on photographs. Item: (image, label), with ``masks=True`` (image, label, mask).

    The image is float32 (3, size, size) in [0, 255], the label an index into ``classes``, the mask bool (size, size). Item i has
    the class i % n of the n classes of the cut-outs. It depends only on seed, i, the options and the files. Objects are resized,
    mirrored and placed at random; they do not overlap unless there is no room. Raises FileNotFoundError if a folder is missing,
    ValueError for a class name that is not in ``classes`` and for an option that is out of range.

    Args:
        cutouts: folder or list of images with a transparent background. The class of a file is its name, or that of its folder
            below ``cutouts``. A number at the end does not count: "orange_2.png" is an orange.
        backgrounds: folder or list of photographs. A random part of one is the background. It should not show the classes.
        length, size, seed: number of images, their size in pixels, and which images to make.
        masks: also return the mask of the object.
        objects: 1, 2 or 3 of different classes. The label is that of the first, which has the largest box; ``scene(i)`` returns
            all.
        classes: class names of the model. By default, those of the cut-outs in sorted order.
    """

    cutouts: str | os.PathLike | Sequence[str | os.PathLike]
    backgrounds: str | os.PathLike | Sequence[str | os.PathLike]
    length: int = 100
    size: int = 224
    seed: int = 0
    _: KW_ONLY
    masks: bool = False
    objects: int = 1
    classes: Sequence[str] | None = None

    def __post_init__(self):
        for name, number, least in (("length", self.length, 1), ("size", self.size, 16), ("seed", self.seed, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if self.objects not in (1, 2, 3):
            raise ValueError(f"objects must be 1 or 2 or 3, got {self.objects!r}")
        self._photos = _list_files("backgrounds", self.backgrounds)
        self._files: dict[str, list[Path]] = {}
        for path in _list_files("cutouts", self.cutouts):
            is_nested = isinstance(self.cutouts, (str, os.PathLike)) and path.parent != Path(self.cutouts)
            name = path.parent.name if is_nested else path.stem
            self._files.setdefault(re.sub(r"[ \d]+$", "", simplify_name(name)), []).append(path)
        if len(self._files) < self.objects:
            raise ValueError(f"cutouts must have {self.objects} classes for objects={self.objects}, got {', '.join(self._files)}")
        if self.classes is None:
            self.classes = sorted(self._files)
        self._labels = dict(sorted((self._find_label(name), name) for name in self._files))

    def _find_label(self, name: str) -> int:
        names = [simplify_name(known) for known in self.classes or ()]
        if name not in names:
            close = ", ".join(difflib.get_close_matches(name, names, 3)) or f"{', '.join(names[:3])}, ..."
            raise ValueError(f"{self._files[name][0]} must be named after one of classes, got {name!r}; close matches: {close}")
        return names.index(name)

    def _make_scene(self, index: int) -> Scene:
        layout, backdrop = (np.random.default_rng([self.seed, index, stream]) for stream in range(2))
        known = list(self._labels)
        first = index % len(known)
        others = (first + 1 + np.argsort(layout.random(len(known) - 1)))[: self.objects - 1] % len(known)
        labels = [known[k] for k in (first, *others)]
        canvas = self._crop_background(backdrop)
        pasted = self._resize_objects(labels, layout)
        masks: list[np.ndarray] = []
        for cutout, corner in zip(pasted, self._choose_corners(pasted, layout), strict=True):
            canvas.paste(cutout, corner, cutout)
            cover = Image.new("L", canvas.size)
            cover.paste(cutout.getchannel("A"), corner)
            mask = np.asarray(cover) > 127
            masks = [earlier & ~mask for earlier in masks] + [mask]
        image = torch.from_numpy(np.array(canvas, dtype=np.float32)).permute(2, 0, 1).contiguous()
        return Scene(image, labels, torch.from_numpy(np.stack(masks)))

    def _crop_background(self, rng: Generator) -> Image.Image:
        path = self._photos[int(rng.integers(len(self._photos)))]
        photo = Image.fromarray(read_image(path).permute(1, 2, 0).numpy().round().astype(np.uint8))
        side = round(min(photo.size) * (0.6 + 0.4 * rng.random()))
        x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
        part = photo.crop((x, y, x + side, y + side)).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return ImageOps.mirror(part) if rng.random() < 0.5 else part

    def _resize_objects(self, labels: list[int], rng: Generator) -> list[Image.Image]:
        """Return one cut-out of each class. Its box covers a random share of the image, less for later ones."""
        resized = []
        for label, share in zip(labels, (0.36, 0.27, 0.2), strict=False):  # square root of the box's share
            files = self._files[self._labels[label]]
            cutout = _read_cutout(files[int(rng.integers(len(files)))])
            cutout = ImageOps.mirror(cutout) if rng.random() < 0.5 else cutout
            factor = self.size * share * (1 + 0.33 * rng.random()) / math.sqrt(cutout.width * cutout.height)
            factor = min(factor, 0.9 * self.size / max(cutout.size))
            shape = (max(1, round(cutout.width * factor)), max(1, round(cutout.height * factor)))
            resized.append(cutout.convert("RGBa").resize(shape, Image.Resampling.BICUBIC).convert("RGBA"))
        return resized

    def _choose_corners(self, cutouts: list[Image.Image], rng: Generator) -> list[tuple[int, int]]:
        """Return the upper left corner of each cut-out; draw again, up to 200 times, if two of them touch."""
        for _ in range(200):
            boxes = []
            for cutout in cutouts:
                x, y = (int(rng.integers(self.size - length + 1)) for length in cutout.size)
                boxes.append((x, y, x + cutout.width, y + cutout.height))
            pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
            if all(a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3] for a, b in pairs):
                break
        return [box[:2] for box in boxes]


def _list_files(argument: str, files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    """Return the image files of a folder or list. Raises FileNotFoundError, with the argument's name, if one is missing."""
    is_folder = isinstance(files, (str, os.PathLike))
    paths = list_image_files(Path(files)) if is_folder else [Path(file) for file in files]  # type: ignore[arg-type, union-attr]
    missing = [path for path in paths if not path.is_file()] if paths else [files]
    if missing:
        raise FileNotFoundError(f"{argument} must be a folder with images in it, or a list of image files, got {missing[0]}")
    return paths
