"""PhotoFolder, the images in a folder of yours. Files that cannot be read are skipped and named in a warning.

photos = PhotoFolder("holiday", size=224)
image, label = photos[0]            # float32 (3, 224, 224) in [0, 255], int (-1: unknown)
"""

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def read_image(file: str | os.PathLike | BinaryIO, size: int | None = None) -> Tensor:
    """Read one image as float32 (3, H, W) in [0, 255].

    With ``size``, resize the short side to ``size`` pixels and crop the centre. The image is rotated as its EXIF tag says; grey,
    palette and transparent images become RGB. Raises OSError if the file cannot be read.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel: scale, because convert() would clip
            values = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1).contiguous()


def _simplify_name(name: str) -> str:  # "Great_White_Shark" -> "great white shark"
    return name.lower().replace("_", " ").replace("-", " ")


def list_image_files(root: Path) -> list[Path]:
    """Return the image files below a folder, sorted; skip hidden ones, follow links, and visit each folder once."""
    files, visited = list[Path](), set[str]()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        files += [Path(folder) / name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(files)


def _is_readable(path: Path) -> bool:
    try:
        read_image(path, 8)  # only decoding finds truncated files
    except Exception:  # Pillow's plugins raise many kinds
        return False
    return True


class ImageFiles(Dataset):
    """Image files with labels. Item: (image, label).

    The image is float32 (3, size, size) in [0, 255], its short side resized and its centre cropped; the label is an int.
    """

    def __init__(self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], size: int):
        self.files, self.labels, self.classes, self.size = list(files), list(labels), list(classes), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        return read_image(self.files[index], self.size), self.labels[index]


class PhotoFolder(ImageFiles):
    """Images of one folder, or of one folder per class (``root/cat/1.jpg``). Item: (image, label), as of ``ImageFiles``.

    A label of -1 means unknown, and SCAN then explains the predicted class. The constructor decodes every file once. It skips
    files that cannot be read, names them in a warning, and lists them in ``skipped``. Raises FileNotFoundError if ``root`` is not
    a folder, ValueError if it has no readable image.

    Args:
        root, size: the folder, and the image size in pixels.
        classes: class names of the model. A folder's label is then the index of its name in ``classes``, or -1 if the name is not
            in ``classes``. By default, folders are numbered in sorted order.
    """

    def __init__(self, root: str | os.PathLike, size: int = 224, classes: Sequence[str] | None = None):
        from tqdm.auto import tqdm

        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a folder of images, or of one folder of images per class, got {root}")
        files = list_image_files(root)
        folders = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
        classes = folders if classes is None else classes
        numbered = list(enumerate(classes))[::-1]  # reversed, so that the first of equal names counts
        index = {_simplify_name(name): number for number, name in numbered} | {name: number for number, name in numbered}
        labels = {name: index.get(name, index.get(_simplify_name(name), -1)) for name in folders}
        if unknown := [name for name in folders if labels[name] < 0]:
            message = f"{len(unknown)} folders in {root} are not in classes, so their labels are unknown (-1): {unknown[:3]}"
            warnings.warn(message, stacklevel=2)

        with ThreadPoolExecutor() as pool:
            checks = tqdm(pool.map(_is_readable, files), total=len(files), desc="reading images", disable=len(files) < 200)
            readable = dict(zip(files, checks, strict=True))
        self.skipped = [path for path in files if not readable[path]]
        kept = [path for path in files if readable[path]]
        super().__init__(kept, [labels.get(path.relative_to(root).parts[0], -1) for path in kept], classes, size)
        if self.skipped:
            names = ", ".join(path.name for path in self.skipped[:5]) + (", ..." if len(self.skipped) > 5 else "")
            message = f"{len(self.skipped)} of {len(files)} images in {root} cannot be read and are skipped: {names}"
            warnings.warn(message, stacklevel=2)
        if not kept:
            raise ValueError(f"root must have a readable image ({', '.join(EXTENSIONS)}) in it or in its folders, got {root}")
