"""Knobs for notebooks: the explorer of maps, and what a decoder saw while it was trained. Core widgets of ipywidgets 7.7 and 8.

Explorer(model, images, {"SCAN": {"layer4": scanner}, "Grad-CAM": GradCAM}, preprocess=preprocess).show()
carousel = TrainingCarousel(scanner, images)
scanner.fit(epochs=2, on_step=carousel)         # shows each 20th step, live; afterwards its slider goes back and forth

Each control only changes the ``View``; the picture is ``Explorable.render`` of it, set into one ``widgets.Image``.
"""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scanlib.data.photos import read_image
from scanlib.explorer.view import MapRenderer, View
from scanlib.plots import apply_colormap, draw_labelled_row, overlay, to_pixels
from scanlib.scan import SCAN

COLORMAPS = ("magma", "viridis", "cividis", "inferno", "gray")


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file's bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


class Explorer:
    """An ``MapRenderer`` with controls. Shows itself as a cell's last line, or by ``show()``.

    Arguments are ``MapRenderer``'s; ``save_to`` is the folder that *save* writes to. ``view`` is what is shown: set it from code,
    and the controls follow. A view that can not be shown, or an upload that can not be read, becomes a line under the picture.
    """

    def __init__(self, model, images: Tensor, explainers, *, save_to: str | Path = ".", view: View | None = None, **options):
        import ipywidgets as w

        self.scene = MapRenderer(model, images, explainers, **options)
        self.save_to, self._setting = Path(save_to), False
        self._view = self.scene.checked(view or View())
        quiet = {"continuous_update": False}
        self.picture, self.line = w.Image(format="png"), w.HTML()
        self.thumbnails = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.upload = w.FileUpload(accept="image/*", multiple=False, description="your picture")
        self.controls = {
            "layer": w.Dropdown(options=[(str(layer), layer) for layer in self.scene.layers], description="layer"),
            "target": w.Dropdown(description="class"),
            "methods": w.SelectMultiple(options=list(self.scene.explainers), description="methods", rows=4),
            "percentile": w.FloatSlider(min=0, max=100, step=0.1, description="percentile", **quiet),
            "opacity": w.FloatSlider(min=0, max=1, step=0.05, description="opacity", **quiet),
            "colormap": w.Dropdown(options=COLORMAPS, description="colours"),
            "shared": w.Checkbox(description="one range for all"),
            "top": w.FloatSlider(min=0, max=100, step=1, description="top %", **quiet),
            "keep": w.ToggleButtons(options=[("remove them", False), ("keep them", True)]),
            "strip": w.ToggleButtons(
                options=[("no strip", "none"), ("compare layers", "layers"), ("percentile film", "percentiles")]
            ),
        }
        self.save_button = w.Button(description="save", icon="save")
        self.snippet = w.Textarea(disabled=True, layout=w.Layout(width="98%"))
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._changed(name, change["new"]), "value")
        self.upload.observe(lambda change: self._uploaded(change["new"]), "value")
        self.save_button.on_click(lambda _: self.save())
        knobs = list(self.controls.values())
        columns = [w.VBox(knobs[:3]), w.VBox(knobs[3:7]), w.VBox([*knobs[7:], w.HBox([self.save_button, self.upload])])]
        self.box = w.VBox([self.thumbnails, self.picture, self.line, w.HBox(columns), self.snippet])
        self._thumbnails()
        self._show()

    @property
    def view(self) -> View:
        """What is shown. Setting it moves the controls; ValueError for what can not be shown."""
        return self._view

    @view.setter
    def view(self, view: View) -> None:
        self._view = self.scene.checked(view)
        self._show()

    def set(self, **changes) -> View:
        """Change some of the view from code: ``explorer.set(layer="layer3", percentile=80)``."""
        keeps_class = {"target": None} if "image" in changes and "target" not in changes else {}
        self.view = replace(self._view, **keeps_class, **changes)
        return self._view

    def show(self) -> None:
        from IPython.display import display

        display(self.box)

    def _ipython_display_(self) -> None:
        self.show()

    # --- from controls to the view, and back ---

    def _changed(self, name: str, value) -> None:
        if self._setting:
            return
        try:
            self.set(**{name: tuple(value) if name == "methods" else value})
        except Exception as error:  # an explainer of the user's own raises what it likes
            self._say(f"{type(error).__name__}: {error}")

    def _show(self) -> None:
        """Draw the view, and let every control stand where the view is."""
        try:
            self.picture.value = encode_png(self.scene.render(self._view))
            self._say("")
        except Exception as error:
            self.picture.value = b""  # not the one before: controls and code have moved on
            self._say(f"{type(error).__name__}: {error}")
        self._setting = True
        try:
            self.controls["target"].options = self._class_options()
            colours = self.controls["colormap"]
            colours.options = tuple(dict.fromkeys([*colours.options, self._view.colormap]))
            for name, control in self.controls.items():
                control.value = getattr(self._view, name)
        finally:
            self._setting = False
        self.snippet.value = f"Image.fromarray(explorer.scene.render({self._view.code()}))"

    def _class_options(self) -> list[tuple[str, int]]:
        """The five most probable classes, then all."""
        probabilities = self.scene.probabilities(self._view.image)
        top = probabilities.topk(min(5, len(probabilities))).indices.tolist()
        rest = [c for c in range(len(probabilities)) if c not in top]
        return [(f"{self.scene.classes[c]} {probabilities[c]:.2f}", c) for c in top] + [(self.scene.classes[c], c) for c in rest]

    def _say(self, line: str) -> None:
        import html

        self.line.value = f"<i>{html.escape(line)}</i>" if line else ""

    # --- pictures ---

    def _thumbnails(self) -> None:
        import ipywidgets as w

        boxes = []
        for number, image in enumerate(self.scene.images):
            small = draw_labelled_row([(to_pixels(image), [str(number)])], panel=56)
            button = w.Button(description="look", layout=w.Layout(width="64px"))
            button.on_click(lambda _, number=number: self._changed("image", number))
            boxes.append(w.VBox([w.Image(value=encode_png(small), format="png"), button]))
        self.thumbnails.children = boxes

    def _uploaded(self, value) -> None:
        """A picture of the user's own; ipywidgets 7 hands over a dictionary by name, 8 a tuple."""
        files = list(value.values()) if isinstance(value, dict) else list(value)
        if not files:
            return
        try:
            picture = read_image(io.BytesIO(bytes(files[-1]["content"])))
            number = self.scene.add(picture)
        except Exception as error:  # Pillow raises many kinds for what is no picture
            self._say(f"the upload could not be read: {error}")
            return
        self._thumbnails()
        self._changed("image", number)

    def save(self) -> Path | None:
        """Write the picture in view as the next free explorer_NN.png; the snippet shows the code that makes it again."""
        if not self.picture.value:
            self._say("there is no picture to save")
            return None
        try:
            self.save_to.mkdir(parents=True, exist_ok=True)
            number = 0
            while (path := self.save_to / f"explorer_{number:02}.png").exists():
                number += 1
            path.write_bytes(self.picture.value)
        except OSError as error:
            self._say(f"could not be saved: {error}")
            return None
        self._say(f"saved {path}")
        return path


class TrainingCarousel:
    """What SCAN's decoder makes of a few pictures while it is trained: picture, reconstruction, confidence, overlay.

    Give it to ``fit`` as ``on_step``. Every ``every`` steps a snapshot is kept, and shown when the last one is in view.
    ``shots`` holds (epoch, step, (H, W, 3) uint8).

    Args:
        scanner: a SCAN with a decoder. images: (N, 3, H, W) in [0, 255]. every: steps. percentile: of the mask.
    """

    def __init__(self, scanner: SCAN, images: Tensor, every: int = 20, percentile: float = 95.0):
        import ipywidgets as w

        if every < 1:
            raise ValueError(f"every {every} is no number of steps; give 1 or more")
        self.scanner, self.images, self.every, self.percentile = scanner, images, every, percentile
        self.shots: list[tuple[int, int, np.ndarray]] = []
        self._extracted = None
        self.picture = w.Image(format="png")
        self.slider = w.IntSlider(min=0, max=0, description="snapshot", continuous_update=False)
        self.previous, self.next = w.Button(description="previous"), w.Button(description="next")
        self.previous.on_click(lambda _: self._move(-1))
        self.next.on_click(lambda _: self._move(1))
        self.slider.observe(lambda change: self._show(), "value")
        self.box = w.VBox([self.picture, w.HBox([self.previous, self.slider, self.next])])

    def __call__(self, trainer) -> None:
        """The trainer's callback."""
        if trainer.step % self.every and trainer.step != 1:
            return
        self.shots.append((trainer.epoch, trainer.step, self._snapshot(f"epoch {trainer.epoch + 1}, step {trainer.step}")))
        follows = self.slider.value == self.slider.max
        self.slider.max = len(self.shots) - 1
        if follows:
            self.slider.value = self.slider.max
        self._show()

    @torch.no_grad()
    def _snapshot(self, title: str) -> np.ndarray:
        if self._extracted is None:  # the classifier is frozen: once is enough
            self._extracted = self.scanner.extract(self.images)
        confidence, rebuilt = self.scanner.decode(*self._extracted, self.percentile)
        rows = []
        for image, heat, pixels in zip(self.images, confidence.cpu(), rebuilt.cpu().numpy(), strict=True):
            shown = [to_pixels(image), pixels, apply_colormap(heat), overlay(image, heat)]
            names = [title, "rebuilt", "confidence", "overlay"] if not rows else [""] * 4
            rows.append(draw_labelled_row([(panel, [name]) for panel, name in zip(shown, names, strict=True)], panel=128))
        return np.concatenate(rows)

    def _move(self, by: int) -> None:
        self.slider.value = min(max(self.slider.value + by, 0), self.slider.max)

    def _show(self) -> None:
        if self.shots:
            self.picture.value = encode_png(self.shots[self.slider.value][2])

    def show(self) -> None:
        from IPython.display import display

        display(self.box)

    def _ipython_display_(self) -> None:
        self.show()
