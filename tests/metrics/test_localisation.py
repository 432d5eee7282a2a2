import pytest
import torch
from hypothesis import given, settings, strategies as st

from scanlib.metrics.localisation import compute_energy_inside, compute_iou, compute_peak_inside, make_box_masks, rank_pixels


def test_known_values():
    maps = torch.tensor([[[0.5, 0.25], [0.25, 0.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    masks = torch.tensor([[[True, False], [True, False]]] * 3)
    assert compute_energy_inside(maps, masks).tolist() == [0.75, 0, 0]
    assert compute_peak_inside(maps, masks).tolist() == [1, 0, 0.5]  # all pixels of an empty map are peaks; half are inside
    assert compute_iou(torch.tensor([[[4.0, 3], [2, 1]]]), masks[:1]).tolist() == pytest.approx([1 / 3])
    assert compute_iou(masks.double(), masks).tolist() == [1, 1, 1]


def test_iou_of_constant_maps_is_chance_level():
    masks = torch.zeros(1, 20, 20, dtype=torch.bool)
    masks[:, :5] = True
    hits = [float(compute_iou(torch.ones(1, 20, 20), masks, seed)) for seed in range(40)]
    assert sum(hits) / 40 == pytest.approx(0.25**2 / (0.5 - 0.25**2), abs=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4))
def test_rank_pixels_sorts_by_order_only(seed, levels):
    maps = torch.randint(0, levels, (3, 4, 5), generator=torch.Generator().manual_seed(seed)).float()
    order = rank_pixels(maps, seed)
    assert torch.equal(order.sort(1).values, torch.arange(20).expand(3, -1))
    assert (maps.flatten(1).gather(1, order).diff(dim=1) <= 0).all()
    assert torch.equal(order, rank_pixels(maps.exp() * 3 - 1, seed))


def test_make_box_masks():
    masks = make_box_masks(torch.tensor([[1.0, 0, 3, 2], [-5, 2, 2, 9]]), (4, 5))
    assert masks.shape == (2, 4, 5) and masks.sum((1, 2)).tolist() == [4, 4]
    assert masks[0, :2, 1:3].all() and masks[1, 2:, :2].all()
    both = make_box_masks([[[1, 0, 3, 2], [0, 2, 2, 4]], [[0, 0, 1, 1]]], (4, 5))
    assert both.sum((1, 2)).tolist() == [8, 1] and torch.equal(both[0], masks.any(0))
    half_out = make_box_masks([[[1, 0, 3, 2], [7, 7, 9, 9]]], (4, 5))  # one of the two is inside
    assert torch.equal(half_out[0], masks[0])
    for boxes, message in (
        (torch.tensor([[0, 0, 2, 2], [7, 0, 9, 2]]), r"boxes .* inside the image of 4 x 5, got \[7, 0, 9, 2\] for image 1"),
        (torch.tensor([[2, 2, 1, 3]]), "got .* for image 0"),
        (torch.zeros(3), r"boxes must have shape \(N, 4\) .*, got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make_box_masks(boxes, (4, 5))


def test_make_box_masks_tests_the_middle_of_each_pixel():
    """The middles are at 0.5, 1.5, ...: x0 and y0 include a pixel whose middle they touch, x1 and y1 exclude it."""
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[:2, 1:3] = True
    for box in ([1.5, 0.5, 3.5, 2.5], [0.6, -0.4, 3.4, 2.4]):
        assert torch.equal(make_box_masks(torch.tensor([box]), (4, 5))[0], expected)


def test_maps_are_resized_and_wrong_input_raises():
    maps, masks = torch.rand(3, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool)
    with pytest.warns(UserWarning, match=r"maps of \(2, 2\) are resized to the images' size \(4, 4\)"):
        assert compute_energy_inside(torch.ones(3, 2, 2), masks).tolist() == [1, 1, 1]
    broken = maps.clone()
    broken[1, 0, 0] = float("nan")
    empty = masks.clone()
    empty[2] = False
    for measure in (compute_energy_inside, compute_peak_inside, compute_iou):
        with pytest.raises(ValueError, match=r"got NaN or infinite values in maps \[1\] of 3"):
            measure(broken, masks)
        with pytest.raises(ValueError, match=r"masks must not be empty, got no pixel in masks \[2\] of 3"):
            measure(maps, empty)
        with pytest.raises(ValueError, match=r"maps must have shape \(3, 4, 4\) for these images, got \(2, 4, 4\)"):
            measure(maps[:2], masks)
    with pytest.raises(ValueError, match=r"masks must be \(N, H, W\) bool, got shape \(3, 1, 4, 4\)"):
        compute_energy_inside(maps, masks[:, None])
    assert compute_iou(torch.ones(1, 4, 4, dtype=torch.bool), masks[:1]).tolist() == [1]  # any dtype
