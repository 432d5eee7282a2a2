"""Tests of Collages: the masks are exact, and an item depends on its index, the seed and the options alone."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from scanlib.data import Collages

COLOURS = {"cat": (255, 0, 0), "great dane": (0, 255, 0), "lemon": (0, 0, 255)}


@pytest.fixture
def folders(tmp_path):
    """Cut-outs of one colour each, cat.png with a wide transparent border, and two grey backgrounds."""
    (tmp_path / "cut" / "lemon").mkdir(parents=True)
    (tmp_path / "back").mkdir()
    for name, path in (("cat", "cat.png"), ("great dane", "Great_Dane_2.png"), ("lemon", "lemon/first.png")):
        pixels = np.zeros((40, 60, 4), np.uint8)
        pixels[10:30, 10:40] = (*COLOURS[name], 255)
        Image.fromarray(pixels).save(tmp_path / "cut" / path)
    for value in (100, 120):
        Image.new("RGB", (90, 60), (value,) * 3).save(tmp_path / "back" / f"{value}.png")
    return tmp_path / "cut", tmp_path / "back"


@pytest.mark.parametrize("objects", [1, 2, 3])
def test_masks_are_the_pixels_of_the_objects(folders, objects):
    collages = Collages(*folders, 12, 64, objects=objects)
    assert collages.classes == ["cat", "great dane", "lemon"]
    for index in range(12):
        scene = collages.scene(index)
        assert scene.labels[0] == index % 3 and len(set(scene.labels)) == objects == len(scene.masks)
        assert scene.image.shape == (3, 64, 64) and scene.image.dtype == torch.float32 and scene.masks.dtype == torch.bool
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            colour = torch.tensor(COLOURS[collages.classes[label]]).view(3, 1, 1)
            distance = (scene.image - colour).abs().amax(0)
            assert (distance[mask] < 130).all() and (distance[~mask] > 90).all()  # half-covered pixels lie between
            assert (distance[mask] < 2).float().mean() > 0.6
        assert (scene.masks.sum(0) <= 1).all()
        outside = scene.image[:, ~scene.masks.any(0)]
        assert ((outside.median() - torch.tensor([100, 120])).abs() < 2).any()


def test_boxes_are_ordered_by_size_and_places_vary(folders):
    collages = Collages(*folders, 40, 100, objects=3)
    scenes = [collages.scene(i) for i in range(40)]
    for scene in scenes:
        boxes = []
        for mask in scene.masks:
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            boxes.append(int(rows[-1] - rows[0] + 1) * int(columns[-1] - columns[0] + 1))
        assert boxes == sorted(boxes, reverse=True)
        assert 0.1 < boxes[0] / 100**2 < 0.26
    centres = torch.stack([scene.masks[0].nonzero().float().mean(0) for scene in scenes])
    assert (centres.std(0) > 10).all()


def test_items_depend_on_seed_and_index_alone(folders):
    first, again, other = (Collages(*folders, 6, 32, seed, masks=True) for seed in (0, 0, 1))
    for a, b, c in zip(DataLoader(first, None, num_workers=2), again, other, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2]) and not torch.equal(a[0], c[0])
    assert torch.equal(Collages(*folders, 100, 32)[4][0], first[4][0]) and torch.equal(first[-1][0], first[5][0])
    with pytest.raises(IndexError, match=r"index must be in \[-6, 6\), got 6"):
        first[6]


def test_labels_are_indices_into_the_classes_of_the_model(folders):
    classes = ["Great Dane", "lemon", "tench", "cat"]
    assert [Collages(*folders, 6, 32, classes=classes)[i][1] for i in range(4)] == [0, 1, 3, 0]
    with pytest.raises(ValueError, match=r"cat.png must be named after one of classes, got 'cat'; close matches: cats"):
        Collages(*folders, 6, 32, classes=["Great Dane", "lemon", "cats"])


def test_files_may_be_lists(folders):
    cutouts, backgrounds = folders
    collages = Collages([cutouts / "cat.png"], [backgrounds / "100.png"], 3, 32)
    assert collages.classes == ["cat"] and collages[0][0].median() == 100
    with pytest.raises(FileNotFoundError, match=r"backgrounds must be a folder with images in it, or a list .*, got .*none.png"):
        Collages(cutouts, [backgrounds / "none.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"objects": 4}, "objects must be 1 or 2 or 3, got 4"),
    ],
)
def test_options_out_of_range_raise(folders, options, message):
    with pytest.raises(ValueError, match=message):
        Collages(*folders, **options)


def test_unsuitable_folders_raise(folders):
    cutouts, backgrounds = folders
    with pytest.raises(
        FileNotFoundError, match="cutouts must be a folder with images in it, or a list of image files, got .*none"
    ):
        Collages(cutouts / "none", backgrounds)
    with pytest.raises(ValueError, match="cutouts must have 2 classes for objects=2, got cat"):
        Collages([cutouts / "cat.png"], backgrounds, objects=2)
    Image.new("RGB", (9, 9)).save(cutouts / "opaque.png")
    with pytest.raises(ValueError, match="cutouts must be images with a transparent background, and .*opaque.png is not one"):
        Collages([cutouts / "opaque.png"], backgrounds)[0]
