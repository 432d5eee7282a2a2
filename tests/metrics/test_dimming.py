import pytest
import torch

from benchmarks.given_maps import GivenMaps
from scanlib.metrics import (
    build_class_score,
    compute_auc,
    compute_drop,
    compute_increase,
    compute_removal_curves,
    compute_win,
    fill_black,
    fill_mean,
    score_dimmed_images,
)


def brightness(images, index):
    """The mean pixel as a share of white."""
    return images.mean((1, 2, 3)) / 255


def test_by_hand():
    images = torch.full((3, 3, 4, 4), 204.0)  # a score of .8
    maps = torch.stack([torch.full((4, 4), share) for share in (1.0, 0.5, 0.0)])
    before, after = score_dimmed_images(brightness, images, maps)
    torch.testing.assert_close(before, torch.full((3,), 0.8))
    torch.testing.assert_close(after, torch.tensor([0.8, 0.4, 0.0]))
    assert compute_drop(before, after).tolist() == pytest.approx([0, 50, 100], abs=1e-4) and compute_increase(
        before, after
    ).tolist() == [0, 0, 0]
    darker = score_dimmed_images(lambda x, i: 1 - brightness(x, i), images, maps)
    assert compute_increase(*darker).tolist() == [0, 100, 100] and compute_drop(*darker).tolist() == pytest.approx(
        [0, 0, 0], abs=1e-4
    )
    kept = score_dimmed_images(brightness, images, maps, fill=fill_mean)
    torch.testing.assert_close(kept[1], kept[0])
    assert compute_win(torch.tensor([1.0, 2, 3]), torch.tensor([2.0, 2, 2])).tolist() == [100, 50, 0]
    assert compute_drop(torch.zeros(1), torch.zeros(1)).tolist() == [0]


def test_batches_and_one_image():
    torch.manual_seed(0)
    images, maps = torch.rand(5, 3, 4, 4) * 255, torch.rand(5, 4, 4)
    score = lambda x, i: x.mean((1, 2, 3)) + i  # noqa: E731
    torch.testing.assert_close(score_dimmed_images(score, images, maps), score_dimmed_images(score, images, maps, batch_size=2))
    assert score_dimmed_images(score, images[:1], maps[:1])[0].shape == (1,) and score_dimmed_images(score, images[:0], maps[:0])[
        1
    ].shape == (0,)


@pytest.fixture
def beside():
    """A model, images as it takes them, since torchcam dims those, and maps without ties."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 6, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 4)).eval()
    model[4].weight.data *= 20
    images, maps = torch.randn(8, 3, 16, 16), torch.linspace(0, 0.99, 8)[:, None, None] + 0.01 * torch.rand(8, 16, 16)
    return model, images, maps, build_class_score(model, lambda x: x, torch.tensor([2, 0] * 4))


def test_drop_and_increase_agree_with_torchcam(beside):
    metrics = pytest.importorskip("torchcam.metrics")
    model, images, maps, score = beside
    metric = metrics.ClassificationMetric(GivenMaps(model, maps), lambda logits: logits.softmax(-1))
    metric.update(images, [2, 0] * 4)
    theirs = metric.summary()
    before, after = score_dimmed_images(score, images, maps)
    assert 0 < theirs["conf_increase"] < 1 and theirs["avg_drop"] > 0.01
    assert float(compute_drop(before, after).mean()) == pytest.approx(100 * theirs["avg_drop"], rel=1e-5)
    assert float(compute_increase(before, after).mean()) == pytest.approx(100 * theirs["conf_increase"])


def test_deletion_and_insertion_agree_with_torchcam(beside):
    metrics = pytest.importorskip("torchcam.metrics")
    model, images, maps, score = beside
    metric = metrics.DeletionInsertionMetric(GivenMaps(model, maps), lambda logits: logits.softmax(-1), steps=16)
    metric.update(images, [2, 0] * 4)
    theirs = metric.summary()
    deletion, insertion = compute_removal_curves(score, images, maps, steps=16, fill=fill_black)
    assert float(compute_auc(deletion).mean()) == pytest.approx(theirs["deletion_auc"], rel=1e-5)
    assert float(compute_auc(insertion).mean()) == pytest.approx(theirs["insertion_auc"], rel=1e-5)
