"""Tests of benchmarks/photographs.py: the split of the images, the boxes, the views and the settings must not change."""

import math
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import Setting, boxed, corners, frozen, part_of, photographs, scored, views

PARTS = ("test", "test", "validation", "validation", "train", "train", "train", "train", "train", "train")


def save_image(path, value, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def test_file_name_determines_the_part():
    names = {crc32(f"{number}.jpg".encode()) % 10: f"{number}.jpg" for number in range(200)}
    assert tuple(part_of(names[rest]) for rest in range(10)) == PARTS
    assert part_of("0000_n01440764_tench.jpg") == "train" and part_of("a.jpg") == "validation" and part_of("4.jpg") == "test"
    parts = [part_of(f"{number}.jpg") for number in range(2000)]
    shares = {part: parts.count(part) / 2000 for part in ("train", "validation", "test")}
    assert abs(shares["train"] - 0.6) < 0.05 and abs(shares["validation"] - 0.2) < 0.05 and abs(shares["test"] - 0.2) < 0.05


def test_parts_do_not_overlap(tmp_path):
    for number in range(30):
        save_image(tmp_path / f"{number}.jpg", number * 8, 256)
    seen = [photographs(tmp_path, part)[:, 0, 0, 0].tolist() for part in ("train", "validation", "test")]
    assert sum(map(len, seen)) == 30 and len({value for part in seen for value in part}) == 30


def test_boxes_are_in_pixels_of_the_resized_image(tmp_path):
    names = [f"{number}.png" for number in range(20)]
    for number, name in enumerate(names):
        save_image(tmp_path / "images" / name, number)
    lines = ["file\twnid\tx0\ty0\tx1\ty1", *(f"{name}\tn0\t0\t32\t{number}\t63" for number, name in enumerate(names))]
    (tmp_path / "boxes.tsv").write_text("\n".join(lines) + "\n")
    images, boxes = boxed(tmp_path, "train")
    numbers = [number for number, name in enumerate(names) if part_of(name) == "train"]
    assert images.shape == (len(numbers), 3, 224, 224) and images[:, 0, 0, 0].tolist() == numbers
    assert boxes.tolist() == [[0, 112, 3.5 * (number + 1), 224] for number in numbers]  # the last pixel is included


def test_views_are_seeded_and_start_with_the_images():
    images = torch.randint(256, (3, 3, 224, 224), dtype=torch.uint8)
    found = views(images, 2)
    assert found.shape == (9, 3, 224, 224) and found.dtype == torch.uint8
    assert torch.equal(found[:3], images) and torch.equal(found, views(images, 2))
    assert not torch.equal(found[3:6], found[6:])


def test_setting_name_lists_the_changed_values():
    assert Setting("squeezenet1_1").name == "gradient 70-100"
    assert Setting("squeezenet1_1", "position", (93, 97), epochs=1).name == "position 93-97, epochs 1"


def test_corners_crop_images_and_boxes():
    images = torch.zeros(16, 3, 100, 100, dtype=torch.uint8)
    images[:, 0, :50, :50], images[:, 1, :50, 50:], images[:, 2, 50:, :50] = 200, 200, 200  # red, green, blue, black
    quarter = torch.tensor([[10.0, 10, 30, 30]]).repeat(16, 1)  # in the red quarter
    cut, boxes = corners(images, quarter, share=0.5)
    assert cut.shape == images.shape and cut.dtype == torch.uint8
    assert (cut == cut[:, :, :1, :1]).all() and len(
        torch.unique(cut[:, :, 0, 0], dim=0)
    ) == 4  # one colour per image; all four occur
    red = cut[:, 0, 0, 0] == 200
    assert (boxes[red] == torch.tensor([20.0, 20, 60, 60])).all()
    assert ((boxes[~red, 2:] - boxes[~red, :2]) <= 0).any(1).all()  # boxes outside are empty
    assert torch.equal(corners(images)[0], corners(images)[0]) and corners(images)[1] is None


def test_lists_become_tuples_and_scores_are_found_by_name():
    assert frozen([1, [2, [3, "x"]]]) == (1, (2, (3, "x"))) and frozen("log p") == "log p"
    explain = lambda images, classes: classes  # noqa: E731
    assert scored(explain, "") is explain
    (asked,) = scored(explain, "log p")(None, torch.tensor([1]))
    assert float(asked(torch.tensor([0.0, 0.0]))) == pytest.approx(math.log(0.5))
