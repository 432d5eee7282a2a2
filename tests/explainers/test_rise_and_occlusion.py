import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scanlib import RISE, Occlusion
from scanlib.targets import LogProbability


class Product(nn.Module):
    """Logits w_k . tanh(x): neither linear nor symmetric."""

    def __init__(self, size=(3, 12, 10)):
        super().__init__()
        self.head = nn.Linear(torch.Size(size).numel(), 4).double()

    def forward(self, x):
        return self.head(x.flatten(1).tanh())


def scale(images):
    return images / 255 - 0.25


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Product().eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 255


@torch.no_grad()
def test_rise_equals_a_loop_over_masks(model, images):
    explainer = RISE(model, preprocess=scale, masks=30, cells=4, probability=0.3, seed=2, batch_size=7)
    found = explainer(images, target=[0, 1, 2], normalize=False)
    grid, shifts = explainer._draw_masks((12, 10))
    expected = torch.zeros(3, 12, 10, dtype=torch.float64)
    for cells, (dy, dx) in zip(grid.double(), shifts.tolist(), strict=True):
        whole = F.interpolate(cells[None, None], size=(5 * 3, 5 * 3), mode="bilinear", align_corners=False)[0, 0]
        mask = whole[dy : dy + 12, dx : dx + 10]
        for i in range(3):
            expected[i] += model((scale(images[i]) * mask)[None]).softmax(1)[0, i] * mask
    torch.testing.assert_close(found, expected / (30 * 0.3))


def test_rise_draws_cells_with_the_chance_asked_for_and_shifts_below_a_cell(model):
    grid, shifts = RISE(model, masks=2000, cells=7, probability=0.3)._draw_masks((224, 100))
    assert grid.shape == (2000, 8, 8) and abs(float(grid.double().mean()) - 0.3) < 0.01
    assert shifts.amin(0).tolist() == [0, 0] and shifts.amax(0).tolist() == [31, 14]


def test_rise_finds_the_pixels_that_decide():
    class Corner(nn.Module):
        def forward(self, x):
            inside = x[:, :, :8, :8].mean((1, 2, 3)) - 0.5
            return torch.stack([inside, -inside], 1) * 4

    images = torch.full((2, 3, 32, 32), 255.0)
    maps = RISE(Corner(), preprocess=lambda x: x / 255, masks=500)(images, target=0)
    assert maps[:, :8, :8].mean() > 2 * maps[:, 16:, 16:].mean()


def test_rise_takes_what_a_callable_target_returns(model, images):
    options = {"preprocess": scale, "masks": 20, "cells": 3}
    raw = RISE(model, **options)(images, target=1, normalize=False)
    same = RISE(model, **options)(images, target=lambda logits: logits.softmax(-1)[..., 1], normalize=False)
    torch.testing.assert_close(raw, same, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("batch_size", [None, 5])
@torch.no_grad()
def test_occlusion_of_a_linear_model_is_known(images, batch_size):
    model = nn.Sequential(nn.Flatten(), nn.Linear(360, 4, dtype=torch.float64)).eval()
    found = Occlusion(model, preprocess=scale, patch=2, stride=2, batch_size=batch_size)(images, target=2, normalize=False)
    change = (images / 255 - 0.5) * model[1].weight[2].view(3, 12, 10)
    patches = F.avg_pool2d(change.sum(1, keepdim=True), 2) * 4
    torch.testing.assert_close(found, patches.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0])


@pytest.mark.parametrize("patch, stride", [(4, 2), (5, 3), (3, 3), (12, 5)])
def test_occlusion_agrees_with_captum(patch, stride):
    captum = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    model, images = Product((3, 12, 13)).eval(), torch.rand(2, 3, 12, 13, dtype=torch.float64) * 255
    found = Occlusion(model, preprocess=scale, patch=patch, stride=stride, fill=63.75)(images, target=1, normalize=False)
    windows = {"sliding_window_shapes": (3, patch, patch), "strides": (3, stride, stride)}
    expected = captum.Occlusion(model).attribute(scale(images), target=1, baselines=0, **windows)
    torch.testing.assert_close(found, expected[:, 0].double())


def test_occlusion_explains_the_class_of_the_unchanged_image(model, images):
    found = Occlusion(model, preprocess=scale)(images, normalize=False)
    classes = model(scale(images)).argmax(1)
    assert torch.equal(found, Occlusion(model, preprocess=scale)(images, classes, normalize=False))
    several = [LogProbability(k) for k in classes.tolist()]
    assert not torch.equal(found, Occlusion(model, preprocess=scale)(images, several, normalize=False))


@pytest.mark.parametrize("method", [RISE, Occlusion])
def test_signals_and_volumes_have_maps_of_their_size(method):
    for size in ((20,), (6, 8, 10)):
        model = nn.Sequential(nn.Flatten(), nn.Linear(2 * torch.Size(size).numel(), 3)).eval()
        options = {"masks": 10} if method is RISE else {"patch": 2}
        maps = method(model, **options)(torch.rand(2, 2, *size) * 255)
        assert maps.shape == (2, *size) and maps.isfinite().all()


@pytest.mark.parametrize(
    "method, options, message",
    [
        (RISE, {"masks": 0}, "masks and cells must be at least 1"),
        (RISE, {"probability": 0}, "probability must be above 0"),
        (RISE, {"target_layer": "head"}, "target_layer must be None"),
        (RISE, {"batch_size": 0}, "batch_size must be at least 1"),
        (RISE, {"libra": True}, "libra must be False for RISE"),
        (Occlusion, {"patch": 0}, "patch must be at least 1"),
        (Occlusion, {"patch": 99}, "patch must be from stride"),
        (Occlusion, {"patch": 2, "stride": 3}, "patch must be from stride"),
    ],
)
def test_wrong_arguments_are_named(model, images, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(model, preprocess=scale, **options)(images)


def test_rise_refuses_the_probability_of_a_single_output():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).eval()
    with pytest.raises(ValueError, match="target must be a callable for a model with a single output"):
        RISE(model, masks=4)(torch.rand(1, 3, 8, 8), 0)
    maps = RISE(model, masks=40)(torch.rand(2, 3, 8, 8), lambda output: output[0])
    assert (maps.flatten(1).amax(1) == 1).all()


def test_rise_takes_scores_that_are_negative_everywhere():
    class Corner(nn.Module):
        def forward(self, x):
            return x[:, :, :8, :8].mean((1, 2, 3))[:, None] - 2

    images = torch.full((1, 3, 32, 32), 255.0)
    (found,) = RISE(Corner(), preprocess=lambda x: x / 255, masks=3000)(images, lambda output: output[0])
    assert found.amax() == 1 and found[:8, :8].mean() > found[16:, 16:].mean() + 0.1
