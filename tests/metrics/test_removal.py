import copy

import pytest
import torch

from scanlib.explainers.base import choose_batch_size
from scanlib.metrics import (
    build_class_score,
    compute_auc,
    compute_energy_inside,
    compute_removal_curves,
    evaluate_maps,
    fill_black,
    fill_blur,
    fill_imputed,
    fill_mean,
    make_centre_maps,
    make_random_maps,
)
from scanlib.metrics.removal import rank_locations


def known_score(images, index):
    """The share of the first column that is white: deletion and insertion follow by hand."""
    return (images[:, :, :, 0] == 255).float().mean((1, 2))


@pytest.fixture
def column():
    """A picture whose first column is white, and a map that knows it, from the top down."""
    images, good = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)
    images[..., 0] = 255
    good[..., 0] = torch.tensor([4.0, 3, 2, 1])
    return images, good


def test_by_hand(column):
    images, good = column
    deletion, insertion = compute_removal_curves(known_score, images, good, steps=4)
    assert deletion.tolist() == [[1, 0, 0, 0, 0]] and insertion.tolist() == [[0, 1, 1, 1, 1]]
    assert compute_auc(deletion).tolist() == [0.125] and compute_auc(insertion).tolist() == [0.875]
    deletion, insertion = compute_removal_curves(known_score, images, -good, steps=4)
    assert deletion.tolist() == [[1, 1, 1, 1, 0]] and insertion.tolist() == [[0, 0, 0, 0, 1]]
    deletion, insertion = compute_removal_curves(known_score, images, good, steps=16)
    assert deletion[0, :5].tolist() == [1, 0.75, 0.5, 0.25, 0]
    deletion, _ = compute_removal_curves(known_score, images, good, steps=4, patch=2)
    assert deletion.tolist() == [[1, 0.5, 0, 0, 0]]


def test_patches_are_cut_at_the_edge_where_they_do_not_fit():
    maps = torch.zeros(1, 5, 7)
    maps[0, 4, 6] = 1
    place, total = rank_locations(maps, patch=3)
    assert total == 6 and place.shape == (1, 5, 7) and sorted(place.unique().tolist()) == list(range(6))
    assert (place[0, 3:, 6] == 0).all() and (place == 0).sum() == 2  # two pixels are left of the corner's
    assert (place[0, :3, :3] == place[0, 0, 0]).all()


def test_negative_is_insertion_backwards(column):
    images, _ = column
    maps = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    insertion = compute_removal_curves(known_score, images, maps, steps=16)[1]
    least_first = compute_removal_curves(known_score, images, -maps, steps=16)[0]
    assert torch.equal(insertion.flip(1), least_first)


def test_perfect_random_constant_and_inverted_order_as_they_must(column):
    images, good = column
    flat = torch.ones(1, 4, 4)
    of = lambda maps, seed=0: compute_auc(compute_removal_curves(known_score, images, maps, steps=16, seed=seed)[0]).item()  # noqa: E731
    chance = sum(of(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(s))) for s in range(200)) / 200
    constant = sum(of(flat, s) for s in range(200)) / 200
    assert of(good) == 0.125 and of(-good) == 0.875  # 16 steps: 1, .75, .5, .25, 0, ...; and 1 until the last four
    assert of(good) < chance < of(-good)
    assert chance == pytest.approx(0.5, abs=0.03) and constant == pytest.approx(0.5, abs=0.03)  # a column is met half-way
    tied = (good > 0).float()  # the four tie: whatever their order, the same
    assert {of(tied, s) for s in range(5)} == {0.125}


def test_pictures_a_run():
    many, model = torch.rand(100, 1, 2, 2), torch.nn.Linear(1, 1)
    assert [choose_batch_size(torch.rand(1, 3, side, side)) for side in (64, 224, 448, 2000)] == [32, 16, 4, 1]
    assert choose_batch_size(many) == choose_batch_size(many, model=model) == 32 and choose_batch_size(many, 500) == 500
    assert [choose_batch_size(torch.empty(1, 3, side, side, device="meta")) for side in (64, 448, 1792)] == [64, 16, 1]
    assert choose_batch_size(torch.rand(1, 3, 448, 448), model=model.to("meta")) == 16
    assert choose_batch_size(torch.empty(2, 3, 9, 0), 1) == 1
    seen, pictures = [], torch.rand(5, 3, 64, 64)
    compute_removal_curves(lambda x, i: seen.append(len(x)) or x.mean((1, 2, 3)), pictures, pictures[:, 0], steps=10)
    assert seen == [32, 32, 32, 4]  # five pictures, twenty states
    with pytest.raises(ValueError, match="batch_size 0 is too small"):
        compute_removal_curves(lambda x, i: x.mean((1, 2, 3)), many, many[:, 0], batch_size=0)


def test_ranks_patches_fills_and_batches():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 8, 8) * 255, torch.rand(5, 8, 8)
    score = lambda x, i: x.mean((1, 2, 3)) + 1000 * i  # noqa: E731
    whole = compute_removal_curves(score, images, maps, steps=4)
    torch.testing.assert_close(whole, compute_removal_curves(score, images, maps, steps=4, batch_size=3))
    torch.testing.assert_close(whole, compute_removal_curves(score, images, maps.exp(), steps=4))  # ranks only
    filled = compute_removal_curves(score, images, maps, steps=1, fill=fill_black)[0]
    torch.testing.assert_close(filled, torch.stack([images.mean((1, 2, 3)), torch.zeros(5)], 1) + 1000 * torch.arange(5)[:, None])
    kept = compute_removal_curves(score, images, maps, steps=1, fill=fill_mean)[0]
    torch.testing.assert_close(kept[:, 0], kept[:, 1])  # the mean stays the mean
    one = compute_removal_curves(score, images[:1], maps[:1], steps=4)
    torch.testing.assert_close(one[0], whole[0][:1])
    assert compute_removal_curves(score, images[:0], maps[:0])[0].shape == (0, 11)
    around = compute_removal_curves(score, images, maps, steps=4, fill=lambda x: fill_imputed(x, noise=0))[0]
    assert (around - whole[0]).abs()[:, 1:4].max() > 0.1 and torch.equal(around[:, 0], whole[0][:, 0])


def test_bad_input():
    images, maps = torch.rand(5, 3, 8, 8), torch.rand(5, 8, 8)
    score = lambda x, i: x.mean((1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match=r"maps have shape \(3, 8, 8\); for these images it must be \(5, 8, 8\)"):
        compute_removal_curves(score, images, maps[:3])
    for patch in (0, 9):
        with pytest.raises(ValueError, match=f"patch {patch} does not fit a picture of 8 x 8"):
            compute_removal_curves(score, images, maps, patch=patch)
    with pytest.raises(ValueError, match="hold NaN"):
        compute_removal_curves(score, images, maps / 0 * 0)
    with pytest.warns(UserWarning, match="resized"):
        compute_removal_curves(score, images, maps[:, ::2, ::2])


def test_baselines_and_fills():
    assert torch.equal(make_random_maps(2, (4, 6), 1), make_random_maps(2, (4, 6), 1)) and make_random_maps(2, (4, 6)).shape == (
        2,
        4,
        6,
    )
    centre = make_centre_maps(2, (5, 7))
    assert centre.shape == (2, 5, 7) and centre[0].argmax() == 2 * 7 + 3 and centre.max() == 1
    flat = torch.full((1, 3, 16, 16), 80.0)
    torch.testing.assert_close(fill_blur(flat), flat)
    torch.testing.assert_close(fill_mean(flat), flat)


def test_evaluate_collects_the_five():
    torch.manual_seed(0)
    images, maps = torch.rand(3, 3, 4, 4) * 255, torch.rand(3, 4, 4)
    masks = maps > 0.5
    score = lambda x, i: x.mean((1, 2, 3))  # noqa: E731
    figures = evaluate_maps(maps, masks, images, score, steps=4)
    deletion, insertion = (float(compute_auc(curves).mean()) for curves in compute_removal_curves(score, images, maps, steps=4))
    assert list(figures) == ["energy", "peak", "IoU", "deletion", "insertion"] and figures["IoU"] == 1 == figures["peak"]
    assert figures["energy"] == pytest.approx(float(compute_energy_inside(maps, masks).mean()))
    assert figures["deletion"] == pytest.approx(deletion) and figures["insertion"] == pytest.approx(insertion)


class Model(torch.nn.Module):
    """Logits, or, asked for, what a softmax makes of them."""

    def __init__(self, probabilities=False):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.probabilities = torch.nn.Linear(12, 3), probabilities

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return logits.softmax(1) if self.probabilities else logits


def test_class_score_of_logits_and_of_probabilities():
    images, classes, index = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1]), torch.tensor([3, 0])
    expected = Model()(images[index] / 255).softmax(1)[torch.arange(2), classes[index]]
    torch.testing.assert_close(build_class_score(Model(), lambda x: x / 255, classes)(images[index], index), expected)
    with pytest.warns(UserWarning, match="the model returns probabilities"):
        found = build_class_score(Model(probabilities=True), lambda x: x / 255, classes)(images[index], index)
    torch.testing.assert_close(found, expected)


def test_class_score_leaves_a_training_model_as_it_was():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).train()
    before = copy.deepcopy(model.state_dict())
    images, index = torch.rand(5, 3, 4, 4) * 255, torch.arange(5)
    score = build_class_score(model, lambda x: x / 255, torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        together, alone = score(images, index), score(images[:1], index[:1])
    torch.testing.assert_close(together[:1], alone)  # no statistics of the batch
    torch.testing.assert_close(model.state_dict(), before)
    assert model.training and model[1].training


def test_half_precision_and_integers():
    model, images = Model().bfloat16(), torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8)
    score = build_class_score(model, lambda x: x / 255, torch.tensor([0, 1, 2]))
    deletion, _ = compute_removal_curves(score, images, torch.rand(3, 2, 2), steps=2)
    assert deletion.dtype == torch.float32 and deletion.isfinite().all()
    with pytest.raises(ValueError, match="single output"):
        build_class_score(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1)), lambda x: x / 255, [0, 0, 0])(
            images, torch.arange(3)
        )
