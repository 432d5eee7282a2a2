"""Pictures of explanations, in numbers."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from scanlib.explainers.factorization import Factorization
from scanlib.plots import format_predictions, get_concept_colours, overlay, overlay_concepts, plot_comparison, plot_concepts


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def test_titles_tell_class_and_probability():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]]))
    assert format_predictions(logits, ["disc", "star", "heart"]) == ["disc\n0.70", "heart\n0.90"]


@pytest.mark.parametrize("size", [(20, 20), (31, 47)])
def test_overlay_takes_any_size_and_colour_map(size):
    image, heat = torch.full((3, *size), 100.0), torch.zeros(5, 7)
    for colormap in ("magma", "viridis", "jet"):
        expected = 0.5 * 100 + 0.5 * 255 * np.array(plt.colormaps[colormap](0.0)[:3])
        picture = overlay(image, heat, 0.5, colormap)
        assert picture.shape == (*size, 3) and np.abs(picture.astype(float) - expected).max() <= 1


def test_a_comparison_is_methods_down_and_images_across():
    images = torch.rand(3, 3, 16, 16) * 255
    maps = {"one": torch.rand(3, 16, 16), "other": torch.rand(3, 4, 4)}
    figure = plot_comparison(images, maps, ["a", "b", "c"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 9 and [axis.get_title() for axis in shown[:3]] == ["a", "b", "c"]
    assert [text.get_text() for axis in shown[::3] for text in axis.texts] == ["", "one", "other"]
    np.testing.assert_array_equal(shown[3].images[0].get_array(), overlay(images[0], maps["one"][0], 0.55))
    bar = next(axis for axis in figure.axes if not axis.images)
    assert bar.get_ylim() == (0, 1)  # one range for all


def test_concepts_have_their_colours():
    maps = torch.zeros(2, 4, 4)
    maps[0, :2], maps[1, 2:], maps[1, 0, 0] = 1.0, 0.5, 0.2
    picture = overlay_concepts(torch.zeros(3, 4, 4), maps, opacity=1.0)
    colours = get_concept_colours(2)
    np.testing.assert_allclose(picture[0, 0] / 255, colours[0], atol=0.01)  # the stronger one
    np.testing.assert_allclose(picture[3, 3] / 255, colours[1] / 2, atol=0.01)
    assert get_concept_colours(30).shape == (30, 3)


def test_a_legend_says_what_the_model_makes_of_each():
    found = Factorization(
        torch.rand(2, 2, 8, 8), torch.rand(2, 2, 4, 4), torch.rand(2, 5), torch.tensor([[5.0, 0, 0], [0, 0, 5]]), 0.1
    )
    figure = plot_concepts(torch.rand(2, 3, 8, 8) * 255, found, ["disc", "star", "heart"])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 2 and texts[0].startswith("disc 0.99") and texts[1].startswith("heart 0.99")
