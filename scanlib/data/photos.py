"""PhotoFolder, a user's own pictures; broken files are named, never fatal.

photos = PhotoFolder("holiday", size=224)
image, label = photos[0]            # float32 (3, 224, 224) in [0, 255], int (-1: not known)
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def read_image(path: str | os.PathLike, size: int | None = None) -> Tensor:
    """Read one picture, float32 (3, H, W) in [0, 255]; with ``size``, short side resized to it and the centre cropped.

    Rotated as its EXIF tag says; grey, palette and alpha become RGB. Raises OSError when it can not be read.
    """
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
        if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: scale, since converting would clip
            deep = np.asarray(picture, dtype=np.float32)
            picture = Image.fromarray((deep / (257 if deep.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8))
        picture = picture.convert("RGB")
        if size is not None:
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1).contiguous()


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ")


def _pictures_below(root: Path) -> list[Path]:
    """Picture files in a folder and its folders, sorted; hidden ones left out, links followed, each folder once."""
    files, seen = [], set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if os.path.realpath(folder) in seen:
            inner.clear()
            continue
        seen.add(os.path.realpath(folder))
        pictures = (name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith("."))
        files += [Path(folder) / name for name in pictures]
    return sorted(files)


class PhotoFolder(Dataset):
    """Your own pictures, in class folders (``root/cat/1.jpg``) or all in one folder. Item: (image, label).

    Image float32 (3, size, size) in [0, 255], short side resized and the centre cropped; label int, -1 when not known, which SCAN
    reads as "the predicted class". Every file is decoded once on construction; files that can not be read are left out, counted
    and named in a warning, and listed in ``skipped``.

    Args:
        root: the folder. size: pixels a side.
        classes: the model's class names. Given, a folder's label is its name's index there (-1 if it is no such name);
            left out, folders are numbered in sorted order.

    Raises FileNotFoundError when root is no folder, ValueError when nothing in it can be read.
    """

    def __init__(self, root: str | os.PathLike, size: int = 224, classes: Sequence[str] | None = None):
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder at {root}; give one that holds pictures, or one folder of pictures per class")
        files = _pictures_below(root)
        folders = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
        self.classes = list(classes) if classes is not None else folders
        index = {name: number for number, name in reversed(list(enumerate(self.classes)))}
        if classes is not None:  # "Great_White_Shark" is "great white shark"
            index |= {_plain(name): number for name, number in index.items() if _plain(name) not in index}
            strange = [name for name in folders if name not in index and _plain(name) not in index]
            if strange:
                warnings.warn(
                    f"{len(strange)} folders in {root} name no class of the model, so their labels are not known: {strange[:3]}",
                    stacklevel=2,
                )

        def label(path):
            folder = path.relative_to(root).parts[0]
            return index.get(folder, index.get(_plain(folder), -1)) if path.parent != root else -1

        self.size = size
        faults = self._check(files)
        self.skipped = [path for path, fault in zip(files, faults, strict=True) if fault]
        self.files = [path for path, fault in zip(files, faults, strict=True) if not fault]
        self.labels = [label(path) for path in self.files]
        if self.skipped:
            names = ", ".join(path.name for path in self.skipped[:5]) + (", ..." if len(self.skipped) > 5 else "")
            warnings.warn(
                f"{len(self.skipped)} of {len(files)} pictures in {root} can not be read and are left out: {names}", stacklevel=2
            )
        if not self.files:
            raise ValueError(f"no readable picture in {root}; looked for {', '.join(EXTENSIONS)}, in it and in its folders")

    def _check(self, files: list[Path]) -> list[str]:
        """What is wrong with each file, or ""; decoding is the only test that finds truncated ones."""
        from tqdm.auto import tqdm

        def fault(path):
            try:
                read_image(path, 8)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return ""

        with ThreadPoolExecutor() as pool:
            return list(tqdm(pool.map(fault, files), total=len(files), desc="reading pictures", disable=len(files) < 200))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_image(self.files[index], self.size), self.labels[index]
