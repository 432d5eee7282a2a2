"""Figures of explanations: overlays, rows of panels, curves.

figure = plot_panels([[image, overlay(image, heat)]], titles=["image", "SCAN"])
figure.savefig("out.png")
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F


def to_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """Convert an image, (3, H, W) or (H, W, 3) in [0, 255], to (H, W, 3) uint8. Grey images (1, H, W) become grey RGB.

    Raises ValueError for another shape or number of channels, NaN or infinite values.
    """
    pixels = _to_numpy(image)
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3) and pixels.shape[-1] != 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] not in (1, 3):
        advice = "for other channels pass the three to look at, as image[[0, 1, 2]]"
        raise ValueError(f"image must be (3, H, W) or (1, H, W) in [0, 255], got {pixels.shape}; {advice}")
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if not np.isfinite(pixels).all():
        raise ValueError("image must hold finite pixels in [0, 255], got NaN or infinite values")
    return pixels.round().clip(0, 255).astype(np.uint8)


def _to_numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def apply_colormap(heat: Tensor | np.ndarray, colormap: str = "magma") -> np.ndarray:
    """Convert a map (H, W) in [0, 1] to (H, W, 3) uint8 with a colour map of matplotlib."""
    return to_pixels(255 * colormaps[colormap](_to_numpy(heat).clip(0, 1))[..., :3])


def overlay(image: Tensor | np.ndarray, heat: Tensor | np.ndarray, opacity: float = 0.5, colormap: str = "magma") -> np.ndarray:
    """Draw a map (h, w) in [0, 1] over an image in [0, 255], at the image's size: (H, W, 3) uint8.

    opacity: of the map, in [0, 1]; 0 gives the image alone. Raises ValueError out of this range.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be in [0, 1], got {opacity}")
    pixels = to_pixels(image).astype(np.float32)
    heat = torch.as_tensor(heat, dtype=torch.float32)[None, None]
    if heat.ndim != 4 or not heat.isfinite().all():
        raise ValueError(f"heat must be a finite map (h, w) in [0, 1], got shape {tuple(heat.shape[2:])} or NaN values")
    if heat.shape[2:] != pixels.shape[:2]:
        heat = F.interpolate(heat, size=pixels.shape[:2], mode="bilinear", align_corners=False)
    return to_pixels((1 - opacity) * pixels + opacity * apply_colormap(heat[0, 0], colormap))


def plot_panels(
    rows: Sequence[Sequence[Tensor | np.ndarray]],
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    size: float = 1.6,
    colormap: str = "magma",
) -> Figure:
    """Plot a grid of panels: images in [0, 255] as they are, maps (H, W) with a colour map on the range [0, 1].

    titles: one per column. row_titles: one per row. size: side of a panel in inches.
    """
    columns = max(map(len, rows))
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained")
    figure.set_size_inches(size * columns, size * len(rows) + 0.3)
    for axis in axes.flat:
        axis.axis("off")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            pixels = _to_numpy(panel) if np.ndim(panel) == 2 else to_pixels(panel)
            axes[r, c].imshow(pixels, cmap=colormap, vmin=0, vmax=1)  # the range is ignored for images
    for axis, title in zip(axes[0], titles, strict=False):
        axis.set_title(title, fontsize=9)
    for axis, title in zip(axes[:, 0], row_titles, strict=False):
        axis.text(-0.08, 0.5, title, rotation=90, va="center", ha="right", fontsize=9, transform=axis.transAxes)
    return figure


def format_predictions(logits: Tensor, classes: Sequence[str]) -> list[str]:
    """Return a title for each image from logits (N, K): the most probable class and, on a second line, its probability."""
    probabilities, best = logits.detach().float().softmax(1).max(1)
    return [f"{classes[c]}\n{p:.2f}" for p, c in zip(probabilities.tolist(), best.tolist(), strict=True)]


def plot_comparison(
    images: Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str] = (),
    size: float = 1.1,
    opacity: float = 0.55,
    colormap: str = "magma",
) -> Figure:
    """Plot images (N, 3, H, W) in [0, 255] in the first row, then the maps (N, h, w) in [0, 1] of one method per row over them.

    All maps have the range of the colour bar. titles: one per image, as of ``format_predictions``.
    """
    overlays = [[overlay(x, m, opacity, colormap) for x, m in zip(images, each, strict=True)] for each in maps.values()]
    figure = plot_panels([list(images), *overlays], titles, size=size)
    figure.set_size_inches(size * len(images) + 0.075 * max(map(len, maps)) + 0.6, size * (len(maps) + 1) + 0.5)  # with the names
    for axis, name in zip(figure.axes[:: len(images)], ["", *maps], strict=True):
        axis.text(-0.06, 0.5, name, ha="right", va="center", fontsize=8, transform=axis.transAxes)
    scale = plt.cm.ScalarMappable(Normalize(0, 1), colormap)
    figure.colorbar(scale, ax=figure.axes, fraction=0.02, pad=0.01, aspect=40)
    return figure


def overlay_concepts(image: Tensor | np.ndarray, maps: Tensor, opacity: float = 0.85, colormap: str = "tab10") -> np.ndarray:
    """Draw a factorization's maps (K, H, W) over an image: (H, W, 3) uint8, each pixel in the colour of its strongest concept."""
    values, strongest = maps.detach().cpu().float().max(0)
    alpha = opacity * values.clamp(0, 1).numpy()[..., None]
    return to_pixels((1 - alpha) * to_pixels(image) + alpha * 255 * get_concept_colours(len(maps), colormap)[strongest.numpy()])


def get_concept_colours(count: int, colormap: str = "tab10") -> np.ndarray:
    """Return one colour per concept, (count, 3) in [0, 1]."""
    colours = colormaps[colormap]
    return np.array([colours(i % colours.N if colours.N < 256 else i / max(count - 1, 1))[:3] for i in range(count)])


def plot_concepts(images: Tensor, found: Any, classes: Sequence[str], size: float = 1.3, colormap: str = "tab10") -> Figure:
    """Plot images, the concepts of a ``Factorization`` over them, and a legend with the classes that each concept supports."""
    overlays = [overlay_concepts(x, m, colormap=colormap) for x, m in zip(images, found.maps, strict=True)]
    figure = plot_panels([list(images), overlays], size=size)
    labels = found.labels(classes)
    handles = [plt.Line2D([], [], color=colour, lw=6) for colour in get_concept_colours(len(labels), colormap)]
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def plot_curves(
    series: Mapping[str, Sequence[float]], x: Sequence[float] | None = None, title: str = "", xlabel: str = "", ylabel: str = ""
) -> Figure:
    """Plot named curves on one axis, with colours for colour-blind readers. x: their positions; None numbers the values."""
    figure, axis = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    for (name, values), colour in zip(series.items(), colormaps["cividis"](np.linspace(0, 0.9, len(series))), strict=True):
        axis.plot(range(len(values)) if x is None else x, values, label=name, color=colour)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8)
    return figure


def draw_labelled_row(panels: Sequence[tuple[np.ndarray, Sequence[str]]], panel: int = 176) -> np.ndarray:
    """Draw images (h, w, 3) uint8 of any size, ``panel`` pixels each, below lines of text: (H, W, 3) uint8."""
    line_height, gap = 14, 6  # drawn by Pillow, because a figure of matplotlib takes about 0.1 s
    top = line_height * max(len(lines) for _, lines in panels) + 4
    canvas = Image.new("RGB", (len(panels) * (panel + gap), panel + top + 4), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for column, (pixels, lines) in enumerate(panels):
        left = column * (panel + gap) + gap // 2
        canvas.paste(ImageOps.contain(Image.fromarray(pixels), (panel, panel), Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(lines):
            draw.text((left, 2 + line_height * number), line, "dimgray" if number else "black", font)
    return np.asarray(canvas)


def plot_intervals(comparison: Any, metrics: Sequence[str] = (), width: float = 1.7) -> Figure:
    """Plot means and 95 % intervals of a ``Comparison``, one panel per metric (() plots all); baselines are grey."""
    metrics, names = list(metrics or comparison.better), list(comparison.values)
    figure, axes = plt.subplots(1, len(metrics), sharey=True, squeeze=False, layout="constrained")
    figure.set_size_inches(width * len(metrics) + 1.2, 0.19 * len(names) + 0.7)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for row, name in enumerate(names):
            colour = "0.6" if name in ("random", "centre prior", "ceiling") else colormaps["cividis"](0.15)
            axis.plot(comparison.interval(name, metric), [row, row], color=colour, lw=2)
            axis.plot(comparison.mean(name, metric), row, "o", color=colour, ms=4)
        axis.set_title(f"{metric} ({'high' if comparison.better[metric] > 0 else 'low'})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", lw=0.3)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    return figure
