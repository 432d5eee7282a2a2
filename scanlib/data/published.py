"""The data sets that SCOUTER was published on, read from the folders they come in.

digits = MNIST("data/downloads", train=True, size=260)          # torchvision downloads it
signs = ConText("data/downloads/con-text", train=True)          # root/JPEGImages/<class>/*.jpg
birds = CUB200("data/downloads/CUB_200_2011", train=False, classes=25, boxes=True)
image, label, box = birds[0]        # float32 (3, 260, 260) in [0, 255], int, (x1, y1, x2, y2) in pixels of that image
subset = ImageNetSubset("data/downloads/ILSVRC/Data/CLS-LOC", classes=10)   # root/train/<wnid>/*.JPEG, root/val/<wnid>/*.JPEG

All take the first ``classes`` classes, short side resized and the centre cropped. Data that is not there is a
FileNotFoundError that says which folder is expected, and where it comes from.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scanlib.data.photos import EXTENSIONS, read_image


class _Pictures(Dataset):
    """Files with labels. Item: (image float32 (3, size, size) in [0, 255], label int)."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], classes: Sequence[str], size: int):
        self.files, self.labels, self.classes, self.size = list(files), list(labels), list(classes), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple:
        return read_image(self.files[index], self.size), self.labels[index]


def _first(names: Sequence[str], count: int, root: Path) -> list[str]:
    if not 1 <= count <= len(names):
        raise ValueError(f"classes {count} is out of range: {root} has {len(names)}")
    return list(names[:count])


def _class_folders(root: Path, expected: str) -> list[str]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".") if root.is_dir() else []
    if not names:
        raise FileNotFoundError(f"no class folders in {root}; {expected}")
    return names


def _pictures_of(root: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / name).iterdir() if (root / name).is_dir() else ())
        if path.suffix.lower() in EXTENSIONS and path.name[0] != "."
    ]
    if not found:
        raise FileNotFoundError(f"no pictures in {root / classes[0]} and the {len(classes) - 1} folders beside it")
    files, labels = zip(*found, strict=True)
    return list(files), list(labels)


class MNIST(Dataset):
    """Digits, 60,000 to train on and 10,000 to test on, resized and made RGB; torchvision downloads them into root/MNIST/raw."""

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 10, download: bool = True):
        from torchvision import datasets

        try:
            data = datasets.MNIST(root, train, download=download)
        except Exception as error:  # offline, proxy, disk, broken files: urllib and torchvision raise many kinds
            raise FileNotFoundError(
                f"MNIST could not be had ({type(error).__name__}); put its four files, train-images-idx3-ubyte and so on, "
                f"into {Path(root) / 'MNIST' / 'raw'}"
            ) from error
        self.classes, self.size = _first([str(digit) for digit in range(10)], classes, Path(root)), size
        kept = data.targets < classes
        self.images, self.labels = data.data[kept], data.targets[kept].tolist()  # (n, 28, 28) uint8

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].float().expand(1, 3, -1, -1)
        image = torch.nn.functional.interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False)
        return image[0], self.labels[index]


class ConText(_Pictures):
    """Con-Text: photographs of shops, a folder a class; four fifths of every class, drawn by ``seed``, to train on.

    root: the folder of class folders, or the one with JPEGImages in it (Karaoglu et al., "Con-Text", ACM MM 2013).
    """

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 30, seed: int = 0):
        root = Path(root) / "JPEGImages" if (Path(root) / "JPEGImages").is_dir() else Path(root)
        names = _class_folders(
            root, "it must hold Con-Text's JPEGImages, a folder a class; ask for it on the data set's own page"
        )
        names = _first(names, classes, root)
        files, labels = _pictures_of(root, names)
        generator = torch.Generator().manual_seed(seed)
        kept = []
        for label in range(len(names)):
            own = [i for i, of in enumerate(labels) if of == label]
            order = torch.randperm(len(own), generator=generator).tolist()
            cut = round(0.8 * len(own))
            kept += sorted(own[i] for i in (order[:cut] if train else order[cut:]))
        super().__init__([files[i] for i in kept], [labels[i] for i in kept], names, size)


class ImageNetSubset(_Pictures):
    """The first classes of ImageNet by their wnid: root/train and root/val, a folder a class in both."""

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 10):
        folder = Path(root) / ("train" if train else "val")
        expected = (
            "it must hold ImageNet's pictures, a folder a wnid (n01440764, ...), in train and in val; it comes from "
            "image-net.org (ILSVRC2012), where val is to be sorted into folders"
        )
        names = _first(_class_folders(Path(root) / "train", expected), classes, Path(root) / "train")
        _class_folders(folder, expected)
        super().__init__(*_pictures_of(folder, names), names, size)


class CUB200(_Pictures):
    """CUB-200-2011, birds: the first classes, the official split; with ``boxes`` items are (image, label, box).

    box: float32 (4,), x1, y1, x2, y2 in pixels of the image given out, cut at its edge. root: CUB_200_2011, with images.txt and
    the other lists in it (Wah et al., Caltech, 2011).
    """

    LISTS = ("images", "image_class_labels", "train_test_split", "classes", "bounding_boxes")

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 25, *, boxes: bool = False):
        root = Path(root)
        missing = [name for name in (*(f"{name}.txt" for name in self.LISTS), "images") if not (root / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"no {missing[0]} in {root}; it must be CUB_200_2011, unpacked from CUB_200_2011.tgz, which Caltech publishes"
            )
        lists = {name: [line.split() for line in (root / f"{name}.txt").read_text().splitlines() if line] for name in self.LISTS}
        paths, of, split = ({row[0]: row[1] for row in lists[name]} for name in self.LISTS[:3])
        corners = {row[0]: [float(x) for x in row[1:]] for row in lists["bounding_boxes"]}
        names = _first([row[1] for row in lists["classes"]], classes, root)
        kept = [i for i in paths if int(of[i]) <= classes and (split[i] == "1") == train]
        if not kept:
            raise FileNotFoundError(f"no picture of the first {classes} classes is listed in {root / 'images.txt'}")
        super().__init__([root / "images" / paths[i] for i in kept], [int(of[i]) - 1 for i in kept], names, size)
        self.corners = [corners[i] for i in kept] if boxes else None  # x, y, width, height in the file's pixels

    def __getitem__(self, index: int) -> tuple:
        image, label = super().__getitem__(index)
        if self.corners is None:
            return image, label
        from PIL import Image

        with Image.open(self.files[index]) as picture:
            width, height = picture.size
        x, y, w, h = self.corners[index]
        scale = self.size / min(width, height)  # as read_image: short side resized, the centre cropped
        left, top = (width * scale - self.size) / 2, (height * scale - self.size) / 2
        box = torch.tensor([x * scale - left, y * scale - top, (x + w) * scale - left, (y + h) * scale - top])
        return image, label, box.clamp(0, self.size)
