import copy

import pytest
import torch

from benchmarks.given_maps import GivenMaps
from scanlib.explainers.base import choose_batch_size
from scanlib.metrics import (
    build_class_score,
    compute_auc,
    compute_drop,
    compute_energy_inside,
    compute_increase,
    compute_removal_curves,
    compute_win,
    evaluate_maps,
    fill_black,
    fill_blur,
    fill_imputed,
    fill_mean,
    make_centre_maps,
    make_random_maps,
    order_patches_greedily,
    score_dimmed_images,
)
from scanlib.metrics.removal import rank_locations


def known_score(images, index):
    """Return the share of the first column that is white."""
    return (images[:, :, :, 0] == 255).float().mean((1, 2))


@pytest.fixture
def column():
    """Return an image whose first column is white, and a map of that column that falls from top to bottom."""
    images, good = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4)
    images[..., 0] = 255
    good[..., 0] = torch.tensor([4.0, 3, 2, 1])
    return images, good


def test_curves_known_values(column):
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


def test_steps_are_rounded():
    """Of 16 pixels, 3 steps remove 5.33 and 10.67: 5 and 11."""
    images, maps = torch.full((1, 3, 4, 4), 255.0), torch.arange(16.0).view(1, 4, 4)
    removed = lambda x, i: (x[:, 0] == 0).sum((1, 2)).float()  # noqa: E731
    deletion, insertion = compute_removal_curves(removed, images, maps, steps=3, fill=fill_black)
    assert deletion.tolist() == [[0, 5, 11, 16]] and insertion.tolist() == [[16, 11, 5, 0]]


def test_patches_are_cut_at_the_edge():
    maps = torch.zeros(1, 5, 7)
    maps[0, 4, 6] = 1
    ranks, total = rank_locations(maps, patch=3)
    assert total == 6 and ranks.shape == (1, 5, 7) and sorted(ranks.unique().tolist()) == list(range(6))
    assert (ranks[0, 3:, 6] == 0).all() and (ranks == 0).sum() == 2  # the corner's square has two pixels
    assert (ranks[0, :3, :3] == ranks[0, 0, 0]).all()


def test_reversed_insertion_removes_the_least_relevant_first(column):
    images, _ = column
    maps = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    insertion = compute_removal_curves(known_score, images, maps, steps=16)[1]
    least_first = compute_removal_curves(known_score, images, -maps, steps=16)[0]
    assert torch.equal(insertion.flip(1), least_first)


def test_deletion_of_perfect_random_constant_and_inverted_maps(column):
    images, good = column

    def delete(maps, seed=0):
        return compute_auc(compute_removal_curves(known_score, images, maps, steps=16, seed=seed)[0]).item()

    chance = sum(delete(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(s))) for s in range(200)) / 200
    constant = sum(delete(torch.ones(1, 4, 4), s) for s in range(200)) / 200
    assert delete(good) == 0.125 and delete(-good) == 0.875  # 16 steps: 1, .75, .5, .25, 0, ...; and 1 until the last four
    assert delete(good) < chance < delete(-good)
    assert chance == pytest.approx(0.5, abs=0.03) and constant == pytest.approx(
        0.5, abs=0.03
    )  # on average a column is reached half-way
    tied = (good > 0).float()  # the order of the four ties does not matter
    assert {delete(tied, s) for s in range(5)} == {0.125}


def test_batch_size():
    many, model = torch.rand(100, 1, 2, 2), torch.nn.Linear(1, 1)
    assert [choose_batch_size(torch.rand(1, 3, side, side)) for side in (64, 224, 448, 2000)] == [32, 16, 4, 1]
    assert choose_batch_size(many) == choose_batch_size(many, model=model) == 32 and choose_batch_size(many, 500) == 500
    assert [choose_batch_size(torch.empty(1, 3, side, side, device="meta")) for side in (64, 448, 1792)] == [64, 16, 1]
    assert choose_batch_size(torch.rand(1, 3, 448, 448), model=model.to("meta")) == 16
    assert choose_batch_size(torch.empty(2, 3, 9, 0), 1) == 1
    sizes, images = [], torch.rand(5, 3, 64, 64)
    compute_removal_curves(lambda x, i: sizes.append(len(x)) or x.mean((1, 2, 3)), images, images[:, 0], steps=10)
    assert sizes == [32, 32, 32, 4]  # five images, twenty steps
    with pytest.raises(ValueError, match="batch_size must be at least 1 or None, got 0"):
        compute_removal_curves(lambda x, i: x.mean((1, 2, 3)), many, many[:, 0], batch_size=0)


def test_curves_depend_on_order_and_fill_but_not_on_the_batch():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 8, 8) * 255, torch.rand(5, 8, 8)
    score = lambda x, i: x.mean((1, 2, 3)) + 1000 * i  # noqa: E731
    whole = compute_removal_curves(score, images, maps, steps=4)
    torch.testing.assert_close(whole, compute_removal_curves(score, images, maps, steps=4, batch_size=3))
    torch.testing.assert_close(whole, compute_removal_curves(score, images, maps.exp(), steps=4))  # only ranks count
    filled = compute_removal_curves(score, images, maps, steps=1, fill=fill_black)[0]
    torch.testing.assert_close(filled, torch.stack([images.mean((1, 2, 3)), torch.zeros(5)], 1) + 1000 * torch.arange(5)[:, None])
    kept = compute_removal_curves(score, images, maps, steps=1, fill=fill_mean)[0]
    torch.testing.assert_close(kept[:, 0], kept[:, 1])  # the mean does not change
    one = compute_removal_curves(score, images[:1], maps[:1], steps=4)
    torch.testing.assert_close(one[0], whole[0][:1])
    assert compute_removal_curves(score, images[:0], maps[:0])[0].shape == (0, 11)
    imputed = compute_removal_curves(score, images, maps, steps=4, fill=lambda x: fill_imputed(x, noise=0))[0]
    assert (imputed - whole[0]).abs()[:, 1:4].max() > 0.1 and torch.equal(imputed[:, 0], whole[0][:, 0])


def test_curves_raise_for_wrong_input():
    images, maps = torch.rand(5, 3, 8, 8), torch.rand(5, 8, 8)
    score = lambda x, i: x.mean((1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match=r"maps must have shape \(5, 8, 8\) for these images, got \(3, 8, 8\)"):
        compute_removal_curves(score, images, maps[:3])
    for patch in (0, 9):
        with pytest.raises(ValueError, match=f"patch must be from 1 to 8 pixels for images of 8 x 8, got {patch}"):
            compute_removal_curves(score, images, maps, patch=patch)
    with pytest.raises(ValueError, match="maps must be finite, got NaN"):
        compute_removal_curves(score, images, maps / 0 * 0)
    with pytest.warns(UserWarning, match="resized"):
        compute_removal_curves(score, images, maps[:, ::2, ::2])


def test_baselines_and_fills():
    assert torch.equal(make_random_maps(2, (4, 6), 1), make_random_maps(2, (4, 6), 1))
    assert make_random_maps(2, (4, 6)).shape == (2, 4, 6)
    centre = make_centre_maps(2, (5, 7))
    assert centre.shape == (2, 5, 7) and centre[0].argmax() == 2 * 7 + 3 and centre.max() == 1
    flat = torch.full((1, 3, 16, 16), 80.0)
    torch.testing.assert_close(fill_blur(flat), flat)
    torch.testing.assert_close(fill_mean(flat), flat)
    half = torch.zeros(1, 3, 16, 16)
    half[..., 8:] = 255
    blurred = fill_blur(half)  # bicubic resizing exceeds [0, 255] next to the edge
    assert blurred.min() == 0 and blurred.max() == 255 and ((blurred > 0) & (blurred < 255)).any()


def test_evaluate_maps_returns_means_of_five_metrics():
    torch.manual_seed(0)
    images, maps = torch.rand(3, 3, 4, 4) * 255, torch.rand(3, 4, 4)
    masks = maps > 0.5
    score = lambda x, i: x.mean((1, 2, 3))  # noqa: E731
    means = evaluate_maps(maps, masks, images, score, steps=4)
    deletion, insertion = (float(compute_auc(curves).mean()) for curves in compute_removal_curves(score, images, maps, steps=4))
    assert list(means) == ["energy", "peak", "IoU", "deletion", "insertion"] and means["IoU"] == 1 == means["peak"]
    assert means["energy"] == pytest.approx(float(compute_energy_inside(maps, masks).mean()))
    assert means["deletion"] == pytest.approx(deletion) and means["insertion"] == pytest.approx(insertion)


class Model(torch.nn.Module):
    """Linear classifier that returns logits or probabilities."""

    def __init__(self, probabilities=False):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.probabilities = torch.nn.Linear(12, 3), probabilities

    def forward(self, x):
        logits = self.head(x.flatten(1))
        return logits.softmax(1) if self.probabilities else logits


def test_class_score_from_logits_and_from_probabilities():
    images, classes, index = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1]), torch.tensor([3, 0])
    expected = Model()(images[index] / 255).softmax(1)[torch.arange(2), classes[index]]
    torch.testing.assert_close(build_class_score(Model(), lambda x: x / 255, classes)(images[index], index), expected)
    with pytest.warns(UserWarning, match="the model returns probabilities"):
        found = build_class_score(Model(probabilities=True), lambda x: x / 255, classes)(images[index], index)
    torch.testing.assert_close(found, expected)


def test_class_score_runs_in_eval_mode_and_does_not_change_the_model():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).train()
    before = copy.deepcopy(model.state_dict())
    images, index = torch.rand(5, 3, 4, 4) * 255, torch.arange(5)
    score = build_class_score(model, lambda x: x / 255, torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        batch, single = score(images, index), score(images[:1], index[:1])
    torch.testing.assert_close(batch[:1], single)  # no batch statistics
    torch.testing.assert_close(model.state_dict(), before)
    assert model.training and model[1].training


def test_class_score_of_half_precision_and_integers():
    model, images = Model().bfloat16(), torch.randint(0, 256, (3, 3, 2, 2), dtype=torch.uint8)
    score = build_class_score(model, lambda x: x / 255, torch.tensor([0, 1, 2]))
    deletion, _ = compute_removal_curves(score, images, torch.rand(3, 2, 2), steps=2)
    assert deletion.dtype == torch.float32 and deletion.isfinite().all()
    with pytest.raises(ValueError, match="model must return logits .* got a single output"):
        build_class_score(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1)), lambda x: x / 255, [0, 0, 0])(
            images, torch.arange(3)
        )


def brightness(images, index):
    """Return the mean pixel as a share of white."""
    return images.mean((1, 2, 3)) / 255


def test_dimmed_scores_known_values():
    images = torch.full((3, 3, 4, 4), 204.0)  # a score of .8
    maps = torch.stack([torch.full((4, 4), share) for share in (1.0, 0.5, 0.0)])
    before, after = score_dimmed_images(brightness, images, maps)
    torch.testing.assert_close(before, torch.full((3,), 0.8))
    torch.testing.assert_close(after, torch.tensor([0.8, 0.4, 0.0]))
    assert compute_drop(before, after).tolist() == pytest.approx([0, 50, 100], abs=1e-4)
    assert compute_increase(before, after).tolist() == [0, 0, 0]
    darker = score_dimmed_images(lambda x, i: 1 - brightness(x, i), images, maps)
    assert compute_increase(*darker).tolist() == [0, 100, 100]
    assert compute_drop(*darker).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    kept = score_dimmed_images(brightness, images, maps, fill=fill_mean)
    torch.testing.assert_close(kept[1], kept[0])
    assert compute_win(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 2])).tolist() == [100, 50, 0]
    assert compute_drop(torch.zeros(1), torch.zeros(1)).tolist() == [0]


def test_dimmed_scores_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 4, 4) * 255, torch.rand(5, 4, 4)
    score = lambda x, i: x.mean((1, 2, 3)) + i  # noqa: E731
    torch.testing.assert_close(score_dimmed_images(score, images, maps), score_dimmed_images(score, images, maps, batch_size=2))
    assert score_dimmed_images(score, images[:1], maps[:1])[0].shape == (1,)
    assert score_dimmed_images(score, images[:0], maps[:0])[1].shape == (0,)


@pytest.fixture
def torchcam_scene():
    """Return a model, its preprocessed images, which torchcam dims, maps without ties, and the score."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 4)).eval()
    model[4].weight.data *= 20
    images, maps = torch.randn(8, 3, 16, 16), torch.linspace(0, 0.99, 8)[:, None, None] + 0.01 * torch.rand(8, 16, 16)
    return model, images, maps, build_class_score(model, lambda x: x, torch.tensor([2, 0] * 4))


def test_drop_and_increase_agree_with_torchcam(torchcam_scene):
    metrics = pytest.importorskip("torchcam.metrics")
    model, images, maps, score = torchcam_scene
    metric = metrics.ClassificationMetric(GivenMaps(model, maps), lambda logits: logits.softmax(-1))
    metric.update(images, [2, 0] * 4)
    theirs = metric.summary()
    before, after = score_dimmed_images(score, images, maps)
    assert 0 < theirs["conf_increase"] < 1 and theirs["avg_drop"] > 0.01
    assert float(compute_drop(before, after).mean()) == pytest.approx(100 * theirs["avg_drop"], rel=1e-5)
    assert float(compute_increase(before, after).mean()) == pytest.approx(100 * theirs["conf_increase"])


def test_deletion_and_insertion_agree_with_torchcam(torchcam_scene):
    metrics = pytest.importorskip("torchcam.metrics")
    model, images, maps, score = torchcam_scene
    metric = metrics.DeletionInsertionMetric(GivenMaps(model, maps), lambda logits: logits.softmax(-1), steps=16)
    metric.update(images, [2, 0] * 4)
    theirs = metric.summary()
    deletion, insertion = compute_removal_curves(score, images, maps, steps=16, fill=fill_black)
    assert float(compute_auc(deletion).mean()) == pytest.approx(theirs["deletion_auc"], rel=1e-5)
    assert float(compute_auc(insertion).mean()) == pytest.approx(theirs["insertion_auc"], rel=1e-5)


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        compute_removal_curves(
            lambda images, indices: images.mean((1, 2, 3)), torch.rand(1, 3, 4, 4), torch.rand(1, 4, 4), steps=0
        )


def test_greedy_order_of_known_weights():
    """The score is a weighted sum of patches: the greedy order is that of the weights, and it is the best one."""
    weights = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1).double() + 1
    images = torch.ones(3, 3, 8, 8, dtype=torch.float64)

    def score(changed, index):
        shown = changed[:, 0, ::2, ::2].flatten(1)
        return (shown * weights[index]).sum(1) / weights.sum(1)[index]

    maps, runs = order_patches_greedily(score, images, 2, fill=fill_black, floor=0)
    assert torch.equal(maps[:, ::2, ::2].flatten(1).argsort(1), weights.argsort(1))
    assert maps.amin() == 0 and maps.amax() == 1 and runs.tolist() == [1 + 16 * 17 // 2 + 16] * 3
    for options in ({"per_round": 4, "floor": 0}, {"per_round": 3, "floor": 0.5}, {"batch_size": 5}):
        again, fewer = order_patches_greedily(score, images, 2, fill=fill_black, **options)
        assert (torch.equal(again, maps) and (fewer < runs).all()) or "batch_size" in options  # no patch changes another's effect


def test_greedy_order_finds_two_patches_that_replace_each_other():
    def score(changed, index):  # either of both patches is enough: alone neither lowers the score
        return torch.maximum(changed[:, 0, 0, 0], 0.9 * changed[:, 0, 6, 6]) + 0.01 * changed[:, 0, 4, 0]

    maps, _ = order_patches_greedily(score, torch.ones(1, 3, 8, 8), 2, fill=fill_black)
    order = maps[0, ::2, ::2].flatten().argsort(descending=True).tolist()
    assert order[:2] == [0, 15]
    deletion, _ = compute_removal_curves(score, torch.ones(1, 3, 8, 8), maps, patch=2, steps=16, fill=fill_black)
    torch.testing.assert_close(deletion[0, :3], torch.tensor([1.01, 0.91, 0.01]))


def test_greedy_order_refuses_wrong_arguments_and_takes_images_without_a_score():
    with pytest.raises(ValueError, match="per_round must be at least 1"):
        order_patches_greedily(known_score, torch.zeros(1, 3, 4, 4), 2, per_round=0)
    maps, _ = order_patches_greedily(known_score, torch.zeros(2, 3, 5, 4), 2)
    assert maps.shape == (2, 5, 4) and maps.isfinite().all() and maps.amax() == 1
