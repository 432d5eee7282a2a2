"""Signs, the embedded data set that knows the truth.

Procedural scenes: a two-colour sign of one of ten classes, turned, scaled and moved, on a patchwork of coloured pieces with
strokes across it. They cost no download, have no licence, and come with the mask of the object.

    scenes = Signs(3000, masks=True)
    image, label, mask = scenes[0]      # float32 (3, 64, 64) in [0, 255], int, bool (64, 64)
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

# --- shapes: signed distances to outlines of about unit radius, negative inside -----------------------------------------


def _polygon(corners: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Signed distance to a closed polygon with corners (E, 2)."""
    start, end = corners, np.roll(corners, -1, axis=0)
    edge = end - start

    def distance(u, v):
        du, dv = u[..., None] - start[:, 0], v[..., None] - start[:, 1]  # (..., E)
        along = np.clip((du * edge[:, 0] + dv * edge[:, 1]) / (edge**2).sum(1), 0, 1)
        nearest = np.sqrt(((du - along * edge[:, 0]) ** 2 + (dv - along * edge[:, 1]) ** 2).min(-1))
        spans = (start[:, 1] > v[..., None]) != (end[:, 1] > v[..., None])  # even-odd rule: edges to the right of the point
        inside = (spans & (du * edge[:, 1] * np.sign(edge[:, 1]) < dv * edge[:, 0] * np.sign(edge[:, 1]))).sum(-1) % 2 == 1
        return np.where(inside, -nearest, nearest)

    return distance


def _spokes(radii: Sequence[float]) -> np.ndarray:
    """Corners at equal angles, the first one up, at the given radii."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.asarray(radii)[:, None]


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(28) / 28
    x, y = 16 * np.sin(t) ** 3, 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 15


def _ring(u, v):
    return np.abs(np.hypot(u, v) - 0.7) - 0.33


def _crescent(u, v):
    return np.maximum(np.hypot(u, v) - 1.05, 0.75 - np.hypot(u - 0.55, v))


_ARROW = np.array([(0, -1.15), (1, -0.05), (0.4, -0.05), (0.4, 1.0), (-0.4, 1.0), (-0.4, -0.05), (-1, -0.05)])
_QUARTER = np.array([(1, -3), (1, -1), (3, -1)])
_CROSS = np.concatenate([_QUARTER, _QUARTER[::-1] * (1, -1), -_QUARTER, _QUARTER[::-1] * (-1, 1)])

SHAPES = {
    "disc": lambda u, v: np.hypot(u, v) - 0.95,
    "square": _polygon(0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])),
    "triangle": _polygon(_spokes([1.25] * 3)),
    "star": _polygon(_spokes([1.3, 0.6] * 5)),
    "cross": _polygon(0.361 * _CROSS),
    "ring": _ring,
    "crescent": _crescent,
    "hexagon": _polygon(_spokes([1.02] * 6)),
    "heart": _polygon(_heart()),
    "arrow": _polygon(_ARROW),
}

# hues, per class
_FILLINGS = (0.00, 0.60, 0.14, 0.33, 0.50, 0.75, 0.08, 0.88, 0.95, 0.42)
_RIMS = (0.16, 0.08, 0.62, 0.83, 0.00, 0.40, 0.52, 0.25, 0.68, 0.92)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


@dataclass(frozen=True)
class Scene:
    """One scene: image float32 (3, size, size) in [0, 255]; labels and masks bool (n, size, size), largest sign first."""

    image: Tensor
    labels: list[int]
    masks: Tensor


class Signs(Dataset):
    """Procedural scenes with known objects. Item: (image, label), with ``masks=True`` (image, label, mask).

    Image float32 (3, size, size) in [0, 255]; label int, index into ``Signs.classes`` (item i has label i % 10, so every
    run of ten items is balanced); mask bool (size, size). Item i depends on (seed, i) and the knobs alone: labels, layout and
    masks are the same on every platform and in every worker, pixels within one grey level.

    Args:
        length, size, seed: number of scenes, pixels a side (at least 16), and which scenes.
        masks: also return the object's mask.
        background: "patchwork" (hard to rebuild, as photographs are) or "smooth" (one gentle gradient).
        colours: "class" (each class its own two) or "random" (only the shape tells).
        shortcut: share of scenes, 0..1, with a mark of the class's own colour in a corner: a cheat to find.
        objects: 1..3 signs of different classes; the label is the largest one's, ``scene(i)`` tells the others.
    """

    classes = tuple(SHAPES)

    def __init__(
        self, length=3000, size=64, seed=0, *, masks=False, background="patchwork", colours="class", shortcut=0.0, objects=1
    ):
        for name, value, options in [
            ("background", background, ("patchwork", "smooth")),
            ("colours", colours, ("class", "random")),
        ]:
            if value not in options:
                raise ValueError(f"{name} {value!r} is not known; take one of {options}")
        if not 0 <= shortcut <= 1:
            raise ValueError(f"shortcut is a share of scenes in 0..1, not {shortcut}")
        if objects not in (1, 2, 3):
            raise ValueError(f"objects is 1, 2 or 3, not {objects}")
        if length < 1 or size < 16 or seed < 0:
            raise ValueError(f"length {length}, size {size}, seed {seed}: length is at least 1, size 16, seed 0")
        self.length, self.size, self.seed, self.masks = length, size, seed, masks
        self.background, self.colours, self.shortcut, self.objects = background, colours, shortcut, objects

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int):
        scene = self.scene(index)
        return (scene.image, scene.labels[0], scene.masks[0]) if self.masks else (scene.image, scene.labels[0])

    def scene(self, index: int) -> Scene:
        """Everything there is to know of scene i. Raises IndexError beyond the length."""
        if not -self.length <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        index %= self.length
        # one stream a layer of the scene, so that a knob changes what it names and nothing else
        layout, paint, ground, cheat = (np.random.default_rng([self.seed, index, stream]) for stream in range(4))
        label = index % len(self.classes)
        others = (label + 1 + np.argsort(layout.random(9)))[: self.objects - 1] % 10
        labels = [label, *map(int, others)]

        canvas = self._patchwork(ground) if self.background == "patchwork" else self._smooth(ground)
        covers = self._place(labels, layout)  # (n, size, size) signed distances in pixels, and radii
        for which, (distance, radius) in zip(labels, covers, strict=True):
            fill, rim = self._paints(which, paint)
            self._blend(canvas, rim, distance)
            self._blend(canvas, fill, distance + 0.28 * radius)
        if cheat.random() < self.shortcut:
            self._mark(canvas, label)
        image = torch.from_numpy(canvas.transpose(2, 0, 1).astype(np.float32).clip(0, 255))
        return Scene(image, labels, torch.from_numpy(np.stack([distance < 0 for distance, _ in covers])))

    # --- the parts of a scene; canvas is (size, size, 3) float64 ---

    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        centres = np.arange(self.size) + 0.5
        return np.meshgrid(centres, centres, sparse=True)  # x (1, size), y (size, 1)

    @staticmethod
    def _blend(canvas: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> None:
        touched = np.flatnonzero(distance < 0.5)
        cover = np.minimum(0.5 - distance.ravel()[touched], 1)[:, None]  # one pixel of anti-aliasing
        pixels = canvas.reshape(-1, 3)  # a view
        pixels[touched] += cover * (colour - pixels[touched])

    def _paints(self, which: int, rng) -> tuple[np.ndarray, np.ndarray]:
        jitter, hue = rng.random((2, 3)), rng.random(2)
        hues = (_FILLINGS[which], _RIMS[which]) if self.colours == "class" else (hue[0], hue[0] + 0.25 + 0.5 * hue[1])
        return tuple(
            _rgb(h + 0.05 * (j[0] - 0.5), 0.75 + 0.25 * j[1], 0.75 + 0.25 * j[2]) for h, j in zip(hues, jitter, strict=True)
        )

    def _place(self, labels: list[int], rng) -> list[tuple[np.ndarray, float]]:
        """Signed distance and radius of each sign; tried anew, at most 60 times, until no two touch."""
        scale = [1.0, 0.62, 0.55] if len(labels) > 1 else [1.0]
        for _ in range(60):
            spots = []
            for size in scale[: len(labels)]:
                radius = self.size * size * (0.155 + 0.075 * rng.random())
                margin = 1.1 * radius
                x, y = margin + (self.size - 2 * margin) * rng.random(2)
                spots.append((x, y, radius))
            turns = rng.random(len(labels))
            apart = [math.dist(a[:2], b[:2]) > 1.2 * (a[2] + b[2]) for i, a in enumerate(spots) for b in spots[:i]]
            if all(apart):
                break
        px, py = self._pixels()
        covers = []
        for which, (x, y, radius), turn in zip(labels, spots, turns, strict=True):
            angle = 0.7 * (2 * turn - 1)  # +- 40 degrees
            dx, dy = (px - x) / radius, (py - y) / radius
            u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            distance = np.full_like(u, 9 * radius)
            near = np.hypot(u, v) < 1.6
            distance[near] = radius * SHAPES[self.classes[which]](u[near], v[near])
            covers.append((distance, radius))
        return covers

    def _patchwork(self, rng) -> np.ndarray:
        """Coloured, turned rectangles over one another, then strokes."""
        px, py = self._pixels()
        canvas = np.broadcast_to(_rgb(*(rng.random(3) * (1, 0.8, 1))), (self.size, self.size, 3)).copy()
        for cx, cy, turn, long, short, *hsv in rng.random((22, 8)):
            angle, dx, dy = math.pi * turn, px - cx * self.size, py - cy * self.size
            u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            distance = np.maximum(np.abs(u) - self.size * (0.08 + 0.17 * long), np.abs(v) - self.size * (0.06 + 0.12 * short))
            self._blend(canvas, _rgb(hsv[0], 0.95 * hsv[1], 0.15 + 0.85 * hsv[2]), distance)
        for x0, y0, x1, y1, width, *hsv in rng.random((7, 8)):
            dx, dy = self.size * (x1 - x0), self.size * (y1 - y0)
            ux, uy = px - x0 * self.size, py - y0 * self.size
            along = np.clip((ux * dx + uy * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            distance = np.hypot(ux - along * dx, uy - along * dy) - self.size * (0.008 + 0.014 * width)
            self._blend(canvas, _rgb(*hsv), distance)
        return canvas

    def _smooth(self, rng) -> np.ndarray:
        px, py = self._pixels()
        first, second = _rgb(*(rng.random(3) * (1, 0.6, 1))), _rgb(*(rng.random(3) * (1, 0.6, 1)))
        angle = 2 * math.pi * rng.random()
        ramp = 0.5 + ((px - self.size / 2) * math.cos(angle) + (py - self.size / 2) * math.sin(angle)) / (2 * self.size)
        return first + 0.35 * ramp[..., None] * (second - first)

    def _mark(self, canvas: np.ndarray, label: int) -> None:
        """A small square in a corner; corner and colour belong to the class."""
        side, gap = round(self.size * 0.11), max(1, round(self.size * 0.03))
        rows = slice(gap, gap + side) if label % 4 < 2 else slice(-gap - side, -gap)
        columns = slice(gap, gap + side) if label % 2 == 0 else slice(-gap - side, -gap)
        canvas[rows, columns] = _rgb(label / len(self.classes), 1.0, 1.0)
