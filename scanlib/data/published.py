"""The data sets of the SCOUTER paper, read from the folders in which they are published.

digits = MNIST("data/downloads", train=True, size=260)          # torchvision downloads it
shops = ConText("data/downloads/con-text", train=True)          # root/JPEGImages/<class>/*.jpg
birds = CUB200("data/downloads/CUB_200_2011", train=False, classes=25, boxes=True)
image, label, box = birds[0]        # float32 (3, 260, 260) in [0, 255], int, (x1, y1, x2, y2) in pixels of that image
subset = ImageNetSubset("data/downloads/ILSVRC/Data/CLS-LOC", classes=10)   # root/train/<wnid>/*.JPEG, root/val/<wnid>/*.JPEG

All use the first ``classes`` classes, resize the short side to ``size`` pixels and crop the centre. They raise FileNotFoundError
if the data is missing; the message says which folder is expected and where the data comes from.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2.functional import resize

from scanlib.data.photos import ImageFiles, list_image_files


def _select_first(names: Sequence[str], count: int, root: Path) -> list[str]:
    if not 1 <= count <= len(names):
        raise ValueError(f"classes must be in 1..{len(names)}, the number of classes in {root}, got {count}")
    return list(names[:count])


def _list_class_folders(root: Path, expected: str) -> list[str]:
    names = sorted(path.name for path in root.glob("[!.]*") if path.is_dir())
    if not names:
        raise FileNotFoundError(f"class folders not found in {root}; {expected}")
    return names


def _list_images(root: Path, classes: Sequence[str], expected: str) -> tuple[list[Path], list[int]]:
    images = [(path, label) for label, name in enumerate(classes) for path in list_image_files(root / name)]
    if not images:
        raise FileNotFoundError(f"images not found in {root / classes[0]} and {len(classes) - 1} folders beside it; {expected}")
    return [path for path, _ in images], [label for _, label in images]


class MNIST(datasets.MNIST):
    """60,000 digits for training and 10,000 for testing, resized and in RGB; torchvision downloads them to root/MNIST/raw."""

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 10, download: bool = True):
        try:
            super().__init__(root, train, download=download)
        except Exception as error:  # offline, proxy, disk, damaged files: urllib and torchvision raise many kinds
            hint = f"put its four files, train-images-idx3-ubyte and so on, into {self.raw_folder}"
            raise FileNotFoundError(f"MNIST could not be downloaded or read ({type(error).__name__}); {hint}") from error
        self.classes, self.size = _select_first(list("0123456789"), classes, Path(root)), size
        selected = self.targets < classes
        self.data: Tensor = self.data[selected]  # (n, 28, 28) uint8
        self.labels = self.targets[selected].tolist()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.data[index].float().repeat(3, 1, 1)
        return resize(image, [self.size, self.size], antialias=False), self.labels[index]


class ConText(ImageFiles):
    """Con-Text, photographs of shops, one folder per class (Karaoglu et al., "Con-Text", ACM MM 2013).

    The training part is four fifths of every class, drawn by ``seed``; the test part is the rest. root: the folder of class
    folders, or the one that contains JPEGImages.
    """

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 30, seed: int = 0):
        root = Path(root) / "JPEGImages" if (Path(root) / "JPEGImages").is_dir() else Path(root)
        expected = "root must be the folder with Con-Text's JPEGImages, one folder per class; request it on the data set's page"
        names = _select_first(_list_class_folders(root, expected), classes, root)
        files, labels = _list_images(root, names, expected)
        generator = torch.Generator().manual_seed(seed)
        selected = []
        for label in range(len(names)):
            members = [i for i, other in enumerate(labels) if other == label]
            order = torch.randperm(len(members), generator=generator).tolist()
            cut = round(0.8 * len(members))
            selected += sorted(members[i] for i in (order[:cut] if train else order[cut:]))
        super().__init__([files[i] for i in selected], [labels[i] for i in selected], names, size)


class ImageNetSubset(ImageFiles):
    """The first classes of ImageNet in the order of their wnids, from root/train or root/val, one folder per class in both."""

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 10):
        expected = "root must have ILSVRC2012 (image-net.org) in train/n01440764, val/n01440764, ...; sort val into such folders"
        root = Path(root)
        names = _select_first(_list_class_folders(root / "train", expected), classes, root / "train")
        super().__init__(*_list_images(root / ("train" if train else "val"), names, expected), names, size)


class CUB200(ImageFiles):
    """CUB-200-2011, photographs of birds (Wah et al., Caltech, 2011): the first classes, with the official split.

    With ``boxes`` an item is (image, label, box), where box is float32 (4,): x1, y1, x2, y2 in pixels of the returned image,
    clipped to it. root: the folder CUB_200_2011, with images.txt and the other lists.
    """

    LISTS = ("images", "image_class_labels", "train_test_split", "classes", "bounding_boxes")

    def __init__(self, root: str | os.PathLike, train: bool = True, size: int = 260, classes: int = 25, *, boxes: bool = False):
        root = Path(root)
        missing = [name for name in (*(f"{name}.txt" for name in self.LISTS), "images") if not (root / name).exists()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} not found in {root}; root must be the folder of Caltech's CUB_200_2011.tgz")
        lists = {name: [line.split() for line in (root / f"{name}.txt").read_text().splitlines() if line] for name in self.LISTS}
        paths, labels, split = (dict(lists[name]) for name in self.LISTS[:3])
        file_boxes = {row[0]: [float(x) for x in row[1:]] for row in lists["bounding_boxes"]}
        names = _select_first([row[1] for row in lists["classes"]], classes, root)
        selected = [i for i in paths if int(labels[i]) <= classes and (split[i] == "1") == train]
        super().__init__([root / "images" / paths[i] for i in selected], [int(labels[i]) - 1 for i in selected], names, size)
        self.file_boxes = [file_boxes[i] for i in selected] if boxes else None  # x, y, width, height in pixels of the file

    def __getitem__(self, index: int) -> tuple:
        image, label = super().__getitem__(index)
        if self.file_boxes is None:
            return image, label
        with Image.open(self.files[index]) as file:
            width, height = file.size
        x, y, w, h = self.file_boxes[index]
        scale = self.size / min(width, height)  # as read_image resizes and crops
        left, top = (width * scale - self.size) / 2, (height * scale - self.size) / 2
        box = torch.tensor([x * scale - left, y * scale - top, (x + w) * scale - left, (y + h) * scale - top])
        return image, label, box.clamp(0, self.size)
