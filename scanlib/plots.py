"""Pictures of explanations: overlays, rows of panels, curves. matplotlib loads when a function is called.

figure = plot_panels([[image, overlay(image, heat)]], titles=["picture", "SCAN"])
figure.savefig("out.png")
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_pixels(image: Tensor | np.ndarray) -> np.ndarray:
    """(3, H, W) or (H, W, 3) in [0, 255] -> (H, W, 3) uint8."""
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.shape[0] == 3 and pixels.shape[-1] != 3:
        pixels = pixels.transpose(1, 2, 0)
    return pixels.round().clip(0, 255).astype(np.uint8)


def apply_colormap(heat: Tensor | np.ndarray, colormap: str = "magma") -> np.ndarray:
    """Heat map (H, W) in [0, 1] -> (H, W, 3) uint8 in any matplotlib colour map."""
    import matplotlib

    values = heat.detach().cpu().numpy() if isinstance(heat, Tensor) else np.asarray(heat)
    return (matplotlib.colormaps[colormap](values.clip(0, 1))[..., :3] * 255).round().astype(np.uint8)


def overlay(image: Tensor | np.ndarray, heat: Tensor | np.ndarray, opacity: float = 0.5, colormap: str = "magma") -> np.ndarray:
    """The heat map (h, w) in [0, 1], resized, over the picture in [0, 255]: (H, W, 3) uint8. opacity 0 is the picture alone."""
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity {opacity} is out of range; give 0..1")
    pixels = to_pixels(image).astype(np.float32)
    heat = torch.as_tensor(heat, dtype=torch.float32).detach().cpu()
    if heat.shape != pixels.shape[:2]:
        heat = heat[None, None]
        heat = torch.nn.functional.interpolate(heat, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0, 0]
    return to_pixels((1 - opacity) * pixels + opacity * apply_colormap(heat, colormap))


def plot_panels(
    rows: Sequence[Sequence],
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    size: float = 1.6,
    colormap: str = "magma",
):
    """A grid of panels, one row per inner sequence: pictures as they are, (H, W) maps on one shared range, [0, 1]. Returns
    the figure.

    titles stand above the columns, row_titles left of the rows; size is a panel's side in inches.
    """
    import matplotlib.pyplot as plt

    columns = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(size * columns, size * len(rows) + 0.3), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            is_map = np.ndim(panel) == 2
            values = panel.detach().cpu().numpy() if isinstance(panel, Tensor) and is_map else panel
            axes[r, c].imshow(values if is_map else to_pixels(panel), cmap=colormap, vmin=0, vmax=1)
            if r == 0 and c < len(titles):
                axes[r, c].set_title(titles[c], fontsize=9)
        if r < len(row_titles):
            axes[r, 0].text(
                -0.08, 0.5, row_titles[r], rotation=90, va="center", ha="right", fontsize=9, transform=axes[r, 0].transAxes
            )
    return figure


def format_predictions(logits: Tensor, classes: Sequence[str]) -> list[str]:
    """A title for each image: its likeliest class and, below, the softmax's probability; logits (N, K)."""
    best = logits.detach().float().softmax(1).max(1)
    return [f"{classes[k]}\n{p:.2f}" for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def plot_comparison(
    images: Tensor,
    maps: dict[str, Tensor],
    titles: Sequence[str] = (),
    size: float = 1.1,
    opacity: float = 0.55,
    colormap: str = "magma",
):
    """Methods down, images across: the pictures (N, 3, H, W) in [0, 255], then each method's maps (N, h, w) in [0, 1] over them,
    all on one range, which the bar shows. Returns the figure.

    titles: one per image, as ``format_predictions`` gives them.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    rows = [list(images)] + [
        [overlay(x, m, opacity, colormap) for x, m in zip(images, each, strict=True)] for each in maps.values()
    ]
    figure = plot_panels(rows, titles, size=size)
    figure.set_size_inches(size * len(images) + 0.075 * max(map(len, maps)) + 0.6, size * len(rows) + 0.5)  # room for the names
    for axis, name in zip(figure.axes[:: len(images)], ["", *maps], strict=True):
        axis.text(-0.06, 0.5, name, ha="right", va="center", fontsize=8, transform=axis.transAxes)
    scale = plt.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colormap)
    figure.colorbar(scale, ax=figure.axes, fraction=0.02, pad=0.01, aspect=40)
    return figure


def overlay_concepts(image: Tensor | np.ndarray, maps: Tensor, opacity: float = 0.85, colormap: str = "tab10") -> np.ndarray:
    """A factorization's maps (k, H, W) over a picture: each pixel takes on the colour of its strongest concept, the more the
    stronger that is. (H, W, 3) uint8."""
    values, strongest = maps.detach().cpu().float().max(0)
    cover = opacity * values.clamp(0, 1).numpy()[..., None]
    return to_pixels((1 - cover) * to_pixels(image) + cover * 255 * get_concept_colours(len(maps), colormap)[strongest.numpy()])


def get_concept_colours(count: int, colormap: str = "tab10") -> np.ndarray:
    """A colour for each concept, (count, 3) in [0, 1]."""
    import matplotlib

    colours = matplotlib.colormaps[colormap]
    return np.array([colours(i % colours.N if colours.N < 256 else i / max(count - 1, 1))[:3] for i in range(count)])


def plot_concepts(images: Tensor, found, classes: Sequence[str], size: float = 1.3, colormap: str = "tab10"):
    """Pictures, a ``Factorization``'s concepts over them, and a legend: what the model makes of each. Returns the figure."""
    import matplotlib.pyplot as plt

    figure = plot_panels(
        [list(images), [overlay_concepts(x, m, colormap=colormap) for x, m in zip(images, found.maps, strict=True)]], size=size
    )
    handles = [plt.Line2D([], [], color=colour, lw=6) for colour in get_concept_colours(len(found.concepts), colormap)]
    figure.legend(handles, found.labels(classes), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def plot_curves(
    series: dict[str, Sequence[float]], x: Sequence[float] | None = None, title: str = "", xlabel: str = "", ylabel: str = ""
):
    """Named curves in one axis, colour-blind safe. Returns the figure."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.2, 2.8), layout="constrained")
    for (name, values), colour in zip(series.items(), plt.colormaps["cividis"](np.linspace(0, 0.9, len(series))), strict=True):
        axis.plot(range(len(values)) if x is None else x, values, label=name, color=colour)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.legend(fontsize=8)
    return figure


def draw_labelled_row(panels: Sequence[tuple[np.ndarray, list[str]]], panel: int = 176) -> np.ndarray:
    """Pictures (h, w, 3) uint8 of any size side by side, ``panel`` pixels each, with lines of text above: (H, W, 3) uint8. By
    Pillow, since a figure would take a tenth of a second."""
    from PIL import Image, ImageDraw, ImageFont

    line_height = 14
    top = line_height * max(len(lines) for _, lines in panels) + 4
    canvas = Image.new("RGB", (len(panels) * (panel + 6), panel + top + 4), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for place, (pixels, lines) in enumerate(panels):
        left = place * (panel + 6) + 3
        height, width = pixels.shape[:2]
        scale = panel / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        canvas.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (left, top))
        for number, line in enumerate(lines):
            draw.text((left, 2 + line_height * number), line, "dimgray" if number else "black", font)
    return np.asarray(canvas)


def plot_intervals(found, metrics: Sequence[str] = (), width: float = 1.7):
    """A ``Comparison`` at a glance: means and 95 % intervals, one panel a metric; baselines grey. Returns the figure."""
    import matplotlib.pyplot as plt

    metrics, names = list(metrics or found.better), list(found.values)
    size = (width * len(metrics) + 1.2, 0.19 * len(names) + 0.7)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        for place, name in enumerate(names):
            colour = "0.6" if name in ("random", "centre prior") else plt.colormaps["cividis"](0.15)
            low, high = found.interval(name, metric)
            axis.plot([low, high], [place, place], color=colour, lw=2)
            axis.plot(found.mean(name, metric), place, "o", color=colour, ms=4)
        axis.set_title(f"{metric} ({'high' if found.better[metric] > 0 else 'low'})", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", lw=0.3)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0, 0].invert_yaxis()
    return figure
