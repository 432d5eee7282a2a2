import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from scanlib.data import SHAPES, Signs


def test_item_shapes_and_ranges():
    image, label = Signs(20)[13]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image.min() >= 0 and 1 < image.max() <= 255
    assert label == 3 and Signs.classes[label] == "star" and len(Signs.classes) == 10
    *_, mask = Signs(20, masks=True)[13]
    assert mask.shape == (64, 64) and mask.dtype == torch.bool and 0.03 < mask.float().mean() < 0.25


def test_scenes_are_the_same_on_every_platform():
    """The digest and the pixels are fixed: they must hold for every platform and version."""
    masks = np.packbits(np.stack([Signs(40, masks=True, objects=3)[i][2].numpy() for i in range(40)]))
    assert hashlib.sha256(masks.tobytes()).hexdigest()[:16] == "cceb4c16bcc1a273"
    image = Signs(3)[2][0]
    expected = torch.tensor(
        [
            [[62.4, 112.9, 191.1, 44.2], [44.2, 44.2, 51.1, 44.2], [78.9, 35.9, 142.4, 136.3], [44.2, 254.8, 44.2, 44.2]],
            [[139.0, 41.7, 198.6, 42.4], [42.4, 42.4, 27.6, 42.4], [83.9, 131.8, 164.0, 188.4], [42.4, 242.2, 42.4, 42.4]],
            [[107.7, 64.7, 39.4, 41.6], [41.6, 41.6, 20.0, 41.6], [77.3, 184.8, 223.2, 35.0], [41.6, 129.3, 41.6, 41.6]],
        ]
    )
    assert (image[:, ::21, ::21] - expected).abs().max() <= 1


def test_scenes_do_not_depend_on_workers_and_length():
    plain = [Signs(12)[i][0] for i in range(12)]
    loaded = torch.cat([images for images, _ in DataLoader(Signs(12), 4, num_workers=2)])
    torch.testing.assert_close(torch.stack(plain), loaded, rtol=0, atol=0)
    torch.testing.assert_close(Signs(5000)[11][0], plain[11], rtol=0, atol=0)


def test_each_option_changes_only_its_part_of_the_scene():
    image, _, mask = Signs(10, masks=True)[4]
    smooth, label, same = Signs(10, masks=True, background="smooth")[4]
    assert label == 4 and torch.equal(mask, same) and not torch.equal(image, smooth)
    inside = mask & (torch.nn.functional.max_pool2d((~mask)[None].float(), 3, 1, 1)[0] == 0)  # without the blended edge
    torch.testing.assert_close(image[:, inside], smooth[:, inside], rtol=0, atol=1e-3)
    recoloured, _, same = Signs(10, masks=True, colours="random")[4]
    outside = ~mask & (torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] == 0)
    assert torch.equal(mask, same)
    torch.testing.assert_close(image[:, outside], recoloured[:, outside], rtol=0, atol=1e-3)
    assert not torch.allclose(image[:, inside], recoloured[:, inside])
    other_seed, label = Signs(10, seed=1)[4]
    assert label == 4 and not torch.equal(image, other_seed)


def test_shortcut_marks_a_share_of_scenes_and_depends_on_the_class():
    plain, with_shortcut = Signs(200), Signs(200, shortcut=0.5)
    marked = [(i, (plain[i][0] - with_shortcut[i][0]).abs().sum(0) > 0) for i in range(200)]
    marks = {}
    for i, changed in marked:
        if changed.any():
            row, column = changed.nonzero().amin(0)
            marks.setdefault(i % 10, []).append(with_shortcut[i][0][:, row, column])
    share = sum(bool(changed.any()) for _, changed in marked) / 200
    assert 0.4 < share < 0.6
    assert all((colour - colours[0]).abs().max() <= 1 for colours in marks.values() for colour in colours)
    assert len({tuple(colours[0].tolist()) for colours in marks.values()}) == 10


def test_objects_do_not_touch_and_the_label_is_that_of_the_largest():
    for i in range(30):
        scene = Signs(30, objects=3).scene(i)
        assert len(set(scene.labels)) == 3 and scene.labels[0] == i % 10
        assert scene.masks.shape == (3, 64, 64) and scene.masks.sum(0).max() == 1
    areas = torch.stack([Signs(50, objects=3).scene(i).masks.sum((1, 2)) for i in range(50)]).float().mean(0)
    assert areas[0] > 2 * areas[1] and areas[0] > 2 * areas[2]


@settings(max_examples=20, deadline=None)
@given(st.integers(16, 100), st.integers(0, 10**6), st.integers(0, 999), st.sampled_from([1, 2, 3]))
def test_any_scene_is_valid(size, seed, index, objects):
    image, label, mask = Signs(1000, size, seed, masks=True, objects=objects)[index]
    assert image.shape == (3, size, size) and torch.isfinite(image).all() and image.min() >= 0 and image.max() <= 255
    assert mask.any() and not mask.all() and label == index % 10


def test_shapes_are_signed_distances():
    """The slope near the outline is at most 1."""
    u, v = np.meshgrid(np.linspace(-1.6, 1.6, 321), np.linspace(-1.6, 1.6, 321))
    for name, shape in SHAPES.items():
        distance = shape(u, v)
        assert 0.1 < (distance < 0).mean() < 0.36, name
        slope = np.hypot(*np.gradient(distance, 0.01))
        assert slope[np.abs(distance) < 0.05].max() < 1.05, name
    square = SHAPES["square"](np.array([0.0, 0.85, 1.85]), np.zeros(3))
    np.testing.assert_allclose(square, [-0.85, 0, 1], atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "plain"}, "background must be 'patchwork' or 'smooth', got 'plain'"),
        ({"colours": "grey"}, "colours must be 'class' or 'random', got 'grey'"),
        ({"shortcut": 2}, r"shortcut must be a share of the scenes in \[0, 1\], got 2"),
        ({"objects": 4}, "objects must be 1 or 2 or 3, got 4"),
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_signs_raises_for_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Signs(**{"length": 10, **options})


@pytest.mark.parametrize("index", [10, -11])
def test_scene_raises_for_an_index_out_of_range(index):
    with pytest.raises(IndexError, match=rf"index must be in \[-10, 10\), got {index}"):
        Signs(10)[index]


def test_shortcut_is_drawn_for_every_class_at_the_smallest_size():
    for i in range(10):
        assert not torch.equal(Signs(10, size=16)[i][0], Signs(10, size=16, shortcut=1.0)[i][0])
