"""PhotoFolder, the images in a folder of yours. Files that cannot be read are skipped and named in a warning.

photos = PhotoFolder("holiday", size=224)
image, label = photos[0]            # float32 (3, 224, 224) in [0, 255], int (-1: unknown)
"""

import math
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),
    *(".avif", ".heic", ".heif"),  # HEIC needs the package pillow-heif
)
MAX_PIXELS = 64_000_000  # of a file; a small file may claim any size


def read_image(file: str | os.PathLike | BinaryIO, size: int | None = None, *, fast: bool = False) -> Tensor:
    """Read one image as float32 (3, H, W) in [0, 255].

    With ``size``, resize the short side to ``size`` pixels and crop the centre. The image is rotated as its EXIF tag says; grey,
    palette and transparent images become RGB. With ``fast`` a JPEG file is decoded at a half, a quarter or an eighth of its size
    if that is not smaller, which changes pixels a little. Raises OSError if the file cannot be read or has more than
    ``MAX_PIXELS``.

    Deep greyscale (16 and 32 bits, floating point) is scaled by the smallest range that holds its values: [0, 1] for floating
    point, [0, 255], [0, 1023], [0, 4095], [0, 16383] or [0, 65535]; else, and with negative values, from its minimum to its
    maximum.
    """
    name = file if isinstance(file, (str, os.PathLike)) else getattr(file, "name", "the file")
    if isinstance(file, (str, os.PathLike)) and Path(file).exists() and not Path(file).is_file():
        raise OSError(f"{name} is not a file, so it cannot be read as an image")
    try:
        with Image.open(file) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{opened.width} x {opened.height} pixels")
            if fast and size is not None:
                opened.draft(None, (size, size))  # JPEG only
            pixels = _convert_to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError:
        raise
    except Image.DecompressionBombError as error:
        limit = f"more than {MAX_PIXELS / 1e6:.0f} million pixels"
        raise OSError(f"{name} has {limit} ({' '.join(str(error).split())}); make it smaller first") from error
    except Exception as error:  # Pillow's plugins raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{name} cannot be read as an image ({reason})") from error
    if size is not None:
        pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(pixels, dtype=np.float32)).permute(2, 0, 1).contiguous()


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; transparent images lie on white."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits per pixel: scale, because convert() would clip
        image = Image.fromarray(_scale_to_bytes(np.asarray(image)))
    return image.convert("RGB")


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Scale deep greyscale (H, W) to uint8; see ``read_image``."""
    if not np.isfinite(values).all():
        raise OSError("the image holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    ranges = [1.0] if values.dtype.kind == "f" else []
    top = next((top for top in (*ranges, 255, 1023, 4095, 16383, 65535) if high <= top), None)
    if low < 0 or top is None:
        return ((values - low) * (255 / max(high - low, 1e-12))).round().clip(0, 255).astype(np.uint8)
    return (values * (255 / top)).round().clip(0, 255).astype(np.uint8)


def simplify_name(name: str) -> str:
    """Return a name to compare: "Great_White_Shark" becomes "great white shark"."""
    return name.lower().replace("_", " ").replace("-", " ")


def list_image_files(root: Path) -> list[Path]:
    """Return the image files below a folder, sorted; skip hidden ones, follow links, and visit each folder once.

    Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        if isinstance(error, FileNotFoundError):
            return
        raise OSError(
            f"the folder {error.filename} cannot be read ({error.strerror}); make it readable or move it away"
        ) from error

    files, visited = list[Path](), set[str]()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        files += [Path(folder) / name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(files)


def _find_fault(path: Path) -> str:
    """Return why a file cannot be read as an image; "" if it can."""
    try:
        read_image(path, 8, fast=True)  # only decoding finds truncated files
    except OSError as error:
        hint = "install pillow-heif and call its register_heif_opener()" if path.suffix.lower() in (".heic", ".heif") else ""
        return hint or str(error.__cause__ or error)[:100]
    return ""


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

    A label of -1 means unknown, and SCAN then explains the predicted class. Raises FileNotFoundError if ``root`` is not a folder,
    OSError for a folder that cannot be read, ValueError if there is no readable image.

    Args:
        root, size: the folder, and the image size in pixels.
        check: decode every file once. Files that cannot be read are skipped, named in a warning, and listed in ``skipped``. False
            reads no file; one that cannot be read then raises OSError, with its name, when it is used.
        classes: class names of the model. A folder's label is then the index of its name in ``classes``, or -1 if the name is not
            in ``classes``. By default, the folders with image files are numbered in sorted order, also those whose
            files cannot be read.
    """

    def __init__(self, root: str | os.PathLike, size: int = 224, classes: Sequence[str] | None = None, *, check: bool = True):
        from tqdm.auto import tqdm

        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root must be a folder of images, or of one folder of images per class, got {root}")
        files = list_image_files(root)
        folders = sorted({path.relative_to(root).parts[0] for path in files if path.parent != root})
        classes = folders if classes is None else classes
        numbered = list(enumerate(classes))[::-1]  # reversed, so that the first of equal names counts
        index = {simplify_name(name): number for number, name in numbered} | {name: number for number, name in numbered}
        labels = {name: index.get(name, index.get(simplify_name(name), -1)) for name in folders}
        if unknown := [name for name in folders if labels[name] < 0]:
            message = f"{len(unknown)} folders in {root} are not in classes, so their labels are unknown (-1): {unknown[:3]}"
            warnings.warn(message, stacklevel=2)

        with ThreadPoolExecutor(4) as pool:
            unchecked = files if check else []
            checks = tqdm(pool.map(_find_fault, unchecked), total=len(unchecked), desc="reading images", disable=len(files) < 200)
            faults = dict.fromkeys(files, "") | dict(zip(unchecked, checks, strict=True))
        self.skipped = [path for path in files if faults[path]]
        kept = [path for path in files if not faults[path]]
        super().__init__(kept, [labels.get(path.relative_to(root).parts[0], -1) for path in kept], classes, size)
        if self.skipped:
            names = ", ".join(f"{path.name} ({faults[path]})" for path in self.skipped[:5])
            names += ", ..." if len(self.skipped) > 5 else ""
            message = f"{len(self.skipped)} of {len(files)} images in {root} cannot be read and are skipped: {names}"
            warnings.warn(message, stacklevel=2)
        filled = {path.relative_to(root).parts[0] for path in kept}
        if kept and (empty := [name for name in folders if name not in filled]):
            warnings.warn(f"{len(empty)} folders in {root} have no readable image: {', '.join(empty[:5])}", stacklevel=2)
        if not kept:
            raise ValueError(f"root must have a readable image ({', '.join(EXTENSIONS)}) in it or in its folders, got {root}")


class RandomParts(Dataset):
    """The items of a data set, and then random parts of their images, until there are ``count`` items. Item: (image, label).

    A part covers at least 35 % of the image, is mirrored or not, and is resized to the image's size. An item depends on its index
    alone. Raises ValueError if the data set is empty.
    """

    def __init__(self, data: Dataset, count: int):
        if len(data) == 0:  # type: ignore[arg-type]
            raise ValueError("data must have at least one image, got none")
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        if not -self.count <= index < self.count:
            raise IndexError(f"index must be in [{-self.count}, {self.count}), got {index}")
        index %= self.count
        image, label = self.data[index % len(self.data)]  # type: ignore[arg-type]
        if index < len(self.data):  # type: ignore[arg-type]
            return image, label
        rng = np.random.default_rng(index)
        height, width = (max(1, round(length * math.sqrt(rng.uniform(0.35, 1)))) for length in image.shape[1:])
        top, left = (int(rng.integers(length - part + 1)) for length, part in zip(image.shape[1:], (height, width), strict=True))
        part = image[:, top : top + height, left : left + width]
        part = part.flip(2) if rng.random() < 0.5 else part
        return F.interpolate(part[None], image.shape[1:], mode="bilinear", antialias=True)[0], label
