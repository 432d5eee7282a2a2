"""Widgets for notebooks: the explorer of maps, and snapshots of a decoder during training. Core widgets of ipywidgets 7.7 and 8.

Explorer(model, images, {"SCAN": {"layer4": scanner.as_explainer()}}, preprocess=preprocess).show()
carousel = TrainingCarousel(scanner, images)
scanner.fit(epochs=2, on_step=carousel)         # shows every 20th step; afterwards its slider goes through the snapshots
"""

import html
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ipywidgets as w
import numpy as np
import torch
from IPython.display import display
from PIL import Image
from torch import Tensor, nn

from scanlib.data.photos import read_image
from scanlib.explorer.view import ImageExplainer, MapRenderer, View
from scanlib.plots import apply_colormap, draw_labelled_row, overlay, to_pixels
from scanlib.scan import SCAN
from scanlib.trainer import Trainer

COLORMAPS = ("magma", "viridis", "cividis", "inferno", "gray")


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 3) uint8 as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


class DisplayedBox:
    """Base class of objects whose widget ``box`` is displayed as a cell's last line or by ``show()``."""

    box: w.VBox

    def show(self) -> None:
        display(self.box)

    _ipython_display_ = show


class Explorer(DisplayedBox):
    """A ``MapRenderer`` with controls. An error of an explainer or an upload becomes a line under the figure.

    model, images, explainers, preprocess, classes, layers: as for ``MapRenderer``. save_to: folder for saved figures. view: the
    first view. Set the attribute ``view``, or call ``set``, to change it from code; the controls follow.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        explainers: Mapping[str, ImageExplainer | Mapping[str, ImageExplainer]],
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
        save_to: str | Path = ".",
        view: View | None = None,
    ):
        self.renderer = MapRenderer(model, images, explainers, preprocess=preprocess, classes=classes, layers=layers)
        self.save_to, self._is_updating = Path(save_to), False
        self.picture, self.message = w.Image(format="png"), w.HTML()
        self.thumbnails = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.controls = {
            "layer": w.Dropdown(options=[(layer or "default", layer) for layer in self.renderer.layers], description="layer"),
            "target": w.Dropdown(description="class"),
            "methods": w.SelectMultiple(options=list(self.renderer.explainers), description="methods", rows=4),
            "percentile": w.FloatSlider(min=0, max=100, step=0.1, description="percentile", continuous_update=False),
            "opacity": w.FloatSlider(min=0, max=1, step=0.05, description="opacity", continuous_update=False),
            "colormap": w.Dropdown(options=COLORMAPS, description="colours"),
            "shared": w.Checkbox(description="one range for all"),
            "top": w.FloatSlider(min=0, max=100, step=1, description="top %", continuous_update=False),
            "keep": w.ToggleButtons(options=[("remove them", False), ("keep them", True)]),
            "strip": w.ToggleButtons(
                options=[("no strip", "none"), ("compare layers", "layers"), ("percentile film", "percentiles")]
            ),
        }
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._change(name, change["new"]), "value")
        upload = w.FileUpload(accept="image/*", multiple=False, description="your image")
        upload.observe(lambda change: self._add_upload(change["new"]), "value")
        save = w.Button(description="save", icon="save")
        save.on_click(lambda _: self.save())
        self.snippet = w.Textarea(disabled=True, layout=w.Layout(width="98%"))
        controls = list(self.controls.values())
        columns = [controls[:3], controls[3:7], [*controls[7:], w.HBox([save, upload])]]
        self.box = w.VBox([self.thumbnails, self.picture, self.message, w.HBox([w.VBox(c) for c in columns]), self.snippet])
        self._update_thumbnails()
        self.view = view or View()

    @property
    def view(self) -> View:
        """The view that is shown. Setting it moves the controls; raises ValueError for a view out of range."""
        return self._view

    @view.setter
    def view(self, view: View) -> None:
        self._view = self.renderer.validate(view)  # before anything changes
        self._update()

    def set(self, **changes: Any) -> View:
        """Change fields of the view: ``explorer.set(layer="layer3", percentile=80)``. A new image shows its predicted class."""
        if "image" in changes:
            changes = {"target": None} | changes
        self.view = View(**vars(self._view) | changes)
        return self._view

    def _change(self, name: str, value: Any) -> None:
        if self._is_updating:
            return
        try:
            self.set(**{name: tuple(value) if name == "methods" else value})
        except Exception as error:
            self._show_message(f"{type(error).__name__}: {error}")

    def _update(self) -> None:
        self._show_message("")
        try:
            self.picture.value = encode_png(self.renderer.render(self._view))
        except Exception as error:  # an explainer of the user's own may raise anything
            self.picture.value = b""  # the old figure is not of this view
            self._show_message(f"{type(error).__name__}: {error}")
        self._is_updating = True
        try:
            self.controls["target"].options = self._list_classes()
            self.controls["colormap"].options = tuple(dict.fromkeys([*COLORMAPS, self._view.colormap]))
            for name, control in self.controls.items():
                control.value = getattr(self._view, name)
        finally:
            self._is_updating = False
        self.snippet.value = f"Image.fromarray(explorer.renderer.render({self._view.to_code()}))"

    def _list_classes(self) -> list[tuple[str, int]]:
        """List (label, class): the five most probable classes with their probabilities, then the others."""
        probabilities, names = self.renderer.compute_probabilities(self._view.image), self.renderer.classes
        top = probabilities.topk(min(5, len(names))).indices.tolist()
        return [(f"{names[c]} {probabilities[c]:.2f}", c) for c in top] + [(n, c) for c, n in enumerate(names) if c not in top]

    def _show_message(self, message: str) -> None:
        self.message.value = f"<i>{html.escape(message)}</i>" if message else ""

    def _update_thumbnails(self) -> None:
        old, boxes = self.thumbnails.children, []
        for index, image in enumerate(self.renderer.images):
            thumbnail = draw_labelled_row([(to_pixels(image), [str(index)])], panel=56)
            button = w.Button(description="look", layout=w.Layout(width="64px"))
            button.on_click(lambda _, index=index: self._change("image", index))
            boxes.append(w.VBox([w.Image(value=encode_png(thumbnail), format="png"), button]))
        self.thumbnails.children = boxes
        for box in old:  # a widget lives until it is closed
            for widget in (*box.children, box):
                widget.close()

    def _add_upload(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """Add an uploaded image and show it. ipywidgets 7 gives a dictionary by file name, ipywidgets 8 a tuple."""
        files = list(value.values() if isinstance(value, Mapping) else value)
        if not files:
            return
        try:
            index = self.renderer.add_image(read_image(io.BytesIO(bytes(files[-1]["content"]))))
        except Exception as error:  # Pillow raises many kinds for a file that is no image
            self._show_message(f"the upload cannot be read: {error}")
            return
        self._update_thumbnails()
        self._change("image", index)

    def save(self) -> Path | None:
        """Save the figure as the next free explorer_NN.png and return its path; on failure show why and return None."""
        if not self.picture.value:
            self._show_message("there is no figure to save")
            return None
        try:
            self.save_to.mkdir(parents=True, exist_ok=True)
            paths = (self.save_to / f"explorer_{number:02}.png" for number in itertools.count())
            path = next(path for path in paths if not path.exists())
            path.write_bytes(self.picture.value)
        except OSError as error:
            self._show_message(f"the figure cannot be saved: {error}")
            return None
        self._show_message(f"saved {path}")
        return path


class TrainingCarousel(DisplayedBox):
    """Snapshots of SCAN's decoder during training: image, reconstruction, confidence and overlay, a row per image.

    Pass it to ``fit`` as ``on_step``. ``snapshots`` holds (epoch, step, (H, W, 3) uint8).

    scanner: a SCAN with a decoder. images: (N, 3, H, W) in [0, 255]. every: number of steps between snapshots; raises ValueError
    below 1. percentile: of the mask, in [0, 100].
    """

    def __init__(self, scanner: SCAN, images: Tensor, every: int = 20, percentile: float = 95.0):
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.scanner, self.images, self.every, self.percentile = scanner, images, every, percentile
        self.snapshots: list[tuple[int, int, np.ndarray]] = []
        self.picture = w.Image(format="png")
        self.slider = w.IntSlider(min=0, max=0, description="snapshot", continuous_update=False)
        self.slider.observe(lambda _: self._update(), "value")
        self.previous, self.next = w.Button(description="previous"), w.Button(description="next")
        self.previous.on_click(lambda _: self._move(-1))
        self.next.on_click(lambda _: self._move(1))
        self.box = w.VBox([self.picture, w.HBox([self.previous, self.slider, self.next])])

    def __call__(self, trainer: Trainer) -> None:
        """Take a snapshot at the first and at every ``every``-th step; called by the trainer."""
        if trainer.step % self.every and trainer.step != 1:
            return
        pixels = self._draw(f"epoch {trainer.epoch + 1}, step {trainer.step}")
        self.snapshots.append((trainer.epoch, trainer.step, pixels))
        is_last_shown = self.slider.value == self.slider.max  # else the reader has moved back
        self.slider.max = len(self.snapshots) - 1
        if is_last_shown:
            self.slider.value = self.slider.max
        self._update()

    @cached_property
    def _features(self) -> tuple[Tensor, Tensor]:
        return self.scanner.extract(self.images)  # the model is frozen

    @torch.no_grad()
    def _draw(self, title: str) -> np.ndarray:
        confidence, reconstruction = self.scanner.decode(*self._features, self.percentile)
        rows, names = [], [title, "rebuilt", "confidence", "overlay"]
        for image, heat, pixels in zip(self.images, confidence.cpu(), reconstruction.cpu().numpy(), strict=True):
            panels = [to_pixels(image), pixels, apply_colormap(heat), overlay(image, heat)]
            rows.append(draw_labelled_row([(panel, [name]) for panel, name in zip(panels, names, strict=True)], panel=128))
            names = [""] * 4  # only the first row is labelled
        return np.concatenate(rows)

    def _move(self, by: int) -> None:
        self.slider.value += by  # the slider stops at its ends

    def _update(self) -> None:
        if self.snapshots:
            self.picture.value = encode_png(self.snapshots[self.slider.value][2])
