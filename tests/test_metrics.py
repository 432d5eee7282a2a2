import pytest
import torch

from scanlib.metrics import (
    blurred,
    centre_maps,
    checkerboard,
    class_score,
    energy_inside,
    evaluate,
    iou_at_area,
    peak_inside,
    random_maps,
    removal_curves,
)


def test_localisation_by_hand():
    maps = torch.tensor([[[0.5, 0.25], [0.25, 0.0]], [[0.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    masks = torch.tensor([[[True, False], [True, False]]] * 3)
    assert energy_inside(maps, masks).tolist() == [0.75, 0, 0]
    assert peak_inside(maps, masks).tolist() == [1, 0, 0.5]  # an empty map's peak is everywhere, half of it inside
    assert iou_at_area(torch.tensor([[[4.0, 3], [2, 1]]]), masks[:1]).tolist() == pytest.approx([1 / 3])
    assert iou_at_area(masks.double(), masks).tolist() == [1, 1, 1]


def test_ties_give_chance_in_expectation():
    masks = torch.zeros(1, 20, 20, dtype=torch.bool)
    masks[:, :5] = True
    hits = [float(iou_at_area(torch.ones(1, 20, 20), masks, seed)) for seed in range(40)]
    assert sum(hits) / 40 == pytest.approx(0.25**2 / (0.5 - 0.25**2), abs=0.02)


def known_score(images, index):
    """The share of the first column that is white: deletion and insertion follow by hand."""
    return (images[:, :, :, 0] == 255).float().mean((1, 2))


def test_removal_by_hand():
    images = torch.zeros(1, 3, 4, 4)
    images[..., 0] = 255
    good = torch.zeros(1, 4, 4)
    good[..., 0] = torch.tensor([4.0, 3, 2, 1])
    deletion, insertion = removal_curves(known_score, images, good, steps=4)
    assert deletion.tolist() == [[1, 0, 0, 0, 0]] and insertion.tolist() == [[0, 1, 1, 1, 1]]
    deletion, insertion = removal_curves(known_score, images, -good, steps=4)
    assert deletion.tolist() == [[1, 1, 1, 1, 0]] and insertion.tolist() == [[0, 0, 0, 0, 1]]
    deletion, insertion = removal_curves(known_score, images, good, steps=16)
    assert deletion[0, :5].tolist() == [1, 0.75, 0.5, 0.25, 0]
    deletion, _ = removal_curves(known_score, images, good, steps=4, patch=2)
    assert deletion.tolist() == [[1, 0.5, 0, 0, 0]]


def test_removal_ranks_by_patches_fills_and_batches():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 8, 8) * 255, torch.rand(5, 8, 8)
    score = lambda x, i: x.mean((1, 2, 3)) + 1000 * i  # noqa: E731
    whole = removal_curves(score, images, maps, steps=4)
    torch.testing.assert_close(whole, removal_curves(score, images, maps, steps=4, batch_size=3))
    torch.testing.assert_close(whole, removal_curves(score, images, maps.exp(), steps=4))  # ranks only
    filled = removal_curves(score, images, maps, steps=1, fill=lambda x: torch.zeros_like(x))[0]
    torch.testing.assert_close(filled, torch.stack([images.mean((1, 2, 3)), torch.zeros(5)], 1) + 1000 * torch.arange(5)[:, None])
    with pytest.raises(ValueError, match=r"maps have shape \(3, 8, 8\); for these images it must be \(5, 8, 8\)"):
        removal_curves(score, images, maps[:3])
    with pytest.raises(ValueError, match="patch 3 does not divide the picture's 8x8"):
        removal_curves(score, images, maps, patch=3)


def test_baselines_and_fill():
    assert torch.equal(random_maps(2, (4, 6), 1), random_maps(2, (4, 6), 1)) and random_maps(2, (4, 6)).shape == (2, 4, 6)
    centre = centre_maps(2, (5, 7))
    assert centre.shape == (2, 5, 7) and centre[0].argmax() == 2 * 7 + 3 and centre.max() == 1
    flat = torch.full((1, 3, 16, 16), 80.0)
    torch.testing.assert_close(blurred(flat), flat)


def test_evaluate_collects_the_five():
    torch.manual_seed(0)
    images, maps = torch.rand(3, 3, 4, 4) * 255, torch.rand(3, 4, 4)
    masks = maps > 0.5
    score = lambda x, i: x.mean((1, 2, 3))  # noqa: E731
    figures = evaluate(maps, masks, images, score, steps=4)
    deletion, insertion = removal_curves(score, images, maps, steps=4)
    assert list(figures) == ["energy", "peak", "IoU", "deletion", "insertion"] and figures["IoU"] == 1 == figures["peak"]
    assert figures["deletion"] == pytest.approx(float(deletion.mean())) and figures["insertion"] == pytest.approx(
        float(insertion.mean())
    )


def test_class_score():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images, classes = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    index = torch.tensor([3, 0])
    expected = model(images[index] / 255).softmax(1)[torch.arange(2), classes[index]]
    torch.testing.assert_close(class_score(model, lambda x: x / 255, classes)(images[index], index), expected)


def test_checkerboard_by_hand():
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board, stripes, wide = (x + y) % 2, x % 2, x // 2 % 2
    ramp = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 4, dtype=torch.float64), size=(16, 16), mode="bilinear")[0, 0]
    maps = torch.stack([board, stripes, wide, torch.ones(16, 16), ramp]).double()
    assert checkerboard(maps).tolist()[:4] == pytest.approx([1, 1, 0, 0])
    assert checkerboard(maps, 4).tolist()[:4] == pytest.approx([1, 1, 1, 0])
    assert checkerboard(maps)[4] < 0.02
    half = (board.double() - 0.5) + 0.5 * torch.cos(x * 2 * torch.pi / 16) * 2**0.5  # equal variances: a half of each
    assert float(checkerboard(half[None])) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="period 3 does not divide a map of 16 x 16"):
        checkerboard(maps, 3)
    with pytest.raises(ValueError, match="period 0 does not divide"):
        checkerboard(maps, 0)
    assert checkerboard(board[None] > 0).tolist() == [1]
