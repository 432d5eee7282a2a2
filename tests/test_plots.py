"""Figures of explanations, checked by their numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from scanlib.explainers.factorization import Factorization
from scanlib.plots import (
    format_predictions,
    get_concept_colours,
    overlay,
    overlay_concepts,
    plot_comparison,
    plot_concepts,
    to_pixels,
)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_format_predictions():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]))
    assert format_predictions(logits, ["disc", "star", "heart"]) == ["disc\n0.70", "heart\n0.90"]


@pytest.mark.parametrize("size", [(20, 20), (31, 47)])
def test_overlay_takes_any_size_and_colour_map(size):
    image, heat = torch.full((3, *size), 100.0), torch.zeros(5, 7)
    for colormap in ("magma", "viridis", "jet"):
        expected = 0.5 * 100 + 0.5 * 255 * np.array(plt.colormaps[colormap](0.0)[:3])
        pixels = overlay(image, heat, 0.5, colormap)
        assert pixels.shape == (*size, 3) and np.abs(pixels.astype(float) - expected).max() <= 1
    with pytest.raises(ValueError, match=r"opacity must be in \[0, 1\], got 2"):
        overlay(image, heat, 2)


def test_comparison_has_a_row_per_method_and_a_column_per_image():
    images = torch.rand(3, 3, 16, 16) * 255
    maps = {"one": torch.rand(3, 16, 16), "other": torch.rand(3, 4, 4)}
    figure = plot_comparison(images, maps, ["a", "b", "c"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 9 and [axis.get_title() for axis in shown[:3]] == ["a", "b", "c"]
    assert [text.get_text() for axis in shown[::3] for text in axis.texts] == ["", "one", "other"]
    np.testing.assert_array_equal(shown[3].images[0].get_array(), overlay(images[0], maps["one"][0], 0.55))
    bar = next(axis for axis in figure.axes if not axis.images)
    assert bar.get_ylim() == (0, 1)  # all maps have the same range


def test_overlay_concepts_draws_the_strongest_concept():
    maps = torch.zeros(2, 4, 4)
    maps[0, :2], maps[1, 2:], maps[1, 0, 0] = 1.0, 0.5, 0.2
    pixels = overlay_concepts(torch.zeros(3, 4, 4), maps, opacity=1.0)
    colours = get_concept_colours(2)
    np.testing.assert_allclose(pixels[0, 0] / 255, colours[0], atol=0.01)  # the stronger one
    np.testing.assert_allclose(pixels[3, 3] / 255, colours[1] / 2, atol=0.01)
    assert get_concept_colours(30).shape == (30, 3)


def test_legend_of_concepts_names_their_classes():
    found = Factorization(
        torch.rand(2, 2, 8, 8), torch.rand(2, 2, 4, 4), torch.rand(2, 5), torch.tensor([[5.0, 0, 0], [0, 0, 5]]), 0.1
    )
    figure = plot_concepts(torch.rand(2, 3, 8, 8) * 255, found, ["disc", "star", "heart"])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 2 and texts[0].startswith("disc 0.99") and texts[1].startswith("heart 0.99")


def test_grey_images_are_drawn_and_other_channels_raise():
    grey = torch.arange(12.0).view(1, 3, 4) * 20
    assert np.array_equal(to_pixels(grey), np.repeat((np.arange(12).reshape(3, 4, 1) * 20).astype(np.uint8), 3, 2))
    assert overlay(grey, torch.zeros(3, 4)).shape == (3, 4, 3)
    for channels in (2, 4, 11):
        with pytest.raises(ValueError, match=rf"image must be \(3, H, W\) or \(1, H, W\) .*, got \({channels}, 24, 40\)"):
            overlay(torch.rand(channels, 24, 40), torch.zeros(24, 40))
    with pytest.raises(ValueError, match="NaN"):
        to_pixels(torch.full((3, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="heat must be a finite map"):
        overlay(grey, torch.full((3, 4), torch.nan))
