"""Signs, procedural scenes with known object masks.

Each scene shows a two-colour sign of one of ten classes. The sign is rotated, scaled and shifted, on a background of coloured
rectangles and strokes. The data set needs no download and no licence.

scenes = Signs(3000, masks=True)
image, label, mask = scenes[0]      # float32 (3, 64, 64) in [0, 255], int, bool (64, 64)
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset

# a signed distance to an outline of about unit radius, at coordinates (u, v); negative inside
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _build_polygon(corners: np.ndarray) -> Shape:  # corners (E, 2)
    start, end = corners, np.roll(corners, -1, axis=0)
    edge = end - start

    def compute_distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        du, dv = u[..., None] - start[:, 0], v[..., None] - start[:, 1]  # (..., E)
        along = np.clip((du * edge[:, 0] + dv * edge[:, 1]) / (edge**2).sum(1), 0, 1)
        nearest = np.sqrt(((du - along * edge[:, 0]) ** 2 + (dv - along * edge[:, 1]) ** 2).min(-1))
        spans = (start[:, 1] > v[..., None]) != (end[:, 1] > v[..., None])  # even-odd rule: edges to the right of the point
        inside = (spans & (du * edge[:, 1] * np.sign(edge[:, 1]) < dv * edge[:, 0] * np.sign(edge[:, 1]))).sum(-1) % 2 == 1
        return np.where(inside, -nearest, nearest)

    return compute_distance


def _compute_corners(radii: Sequence[float]) -> np.ndarray:
    """Return corners (E, 2) at equal angles and the given radii; the first one is at the top."""
    angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], 1) * np.asarray(radii)[:, None]


_T = 2 * np.pi * np.arange(28) / 28
_HEART_Y = 13 * np.cos(_T) - 5 * np.cos(2 * _T) - 2 * np.cos(3 * _T) - np.cos(4 * _T)
_HEART = np.stack([16 * np.sin(_T) ** 3, -_HEART_Y - 2.5], 1) / 15
_ARROW = np.array([(0, -1.15), (1, -0.05), (0.4, -0.05), (0.4, 1.0), (-0.4, 1.0), (-0.4, -0.05), (-1, -0.05)])
_QUARTER = np.array([(1, -3), (1, -1), (3, -1)])
_CROSS = np.concatenate([_QUARTER, _QUARTER[::-1] * (1, -1), -_QUARTER, _QUARTER[::-1] * (-1, 1)])

SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.95,
    "square": _build_polygon(0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])),
    "triangle": _build_polygon(_compute_corners([1.25] * 3)),
    "star": _build_polygon(_compute_corners([1.3, 0.6] * 5)),
    "cross": _build_polygon(0.361 * _CROSS),
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.33,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1.05, 0.75 - np.hypot(u - 0.55, v)),
    "hexagon": _build_polygon(_compute_corners([1.02] * 6)),
    "heart": _build_polygon(_HEART),
    "arrow": _build_polygon(_ARROW),
}

_FILL_HUES = (0.00, 0.60, 0.14, 0.33, 0.50, 0.75, 0.08, 0.88, 0.95, 0.42)  # one per class
_RIM_HUES = (0.16, 0.08, 0.62, 0.83, 0.00, 0.40, 0.52, 0.25, 0.68, 0.92)


def _to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


@dataclass(frozen=True)
class Scene:
    """One scene: image float32 (3, size, size) in [0, 255], n labels, and masks bool (n, size, size), largest sign first."""

    image: Tensor
    labels: list[int]
    masks: Tensor


class SceneDataset(Dataset):
    """Base of data sets of scenes. Item: (image, label), with ``masks=True`` (image, label, mask), of the first object."""

    length: int
    masks: bool

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple:
        scene = self.scene(index)
        return (scene.image, scene.labels[0], scene.masks[0]) if self.masks else (scene.image, scene.labels[0])

    def scene(self, index: int) -> Scene:
        """Return one scene with all labels and masks. Raises IndexError if ``index`` is out of range."""
        if not -self.length <= index < self.length:
            raise IndexError(f"index must be in [{-self.length}, {self.length}), got {index}")
        return self._make_scene(index % self.length)

    def _make_scene(self, index: int) -> Scene:
        raise NotImplementedError


@dataclass(eq=False)
class Signs(SceneDataset):
    """Procedural scenes with known object masks. Item: (image, label), with ``masks=True`` (image, label, mask).

    The image is float32 (3, size, size) in [0, 255], the label an index into ``Signs.classes``, the mask bool (size, size).
    Item i has label i % 10, so that every ten consecutive items are balanced. Item i depends only on seed, i and the options:
    labels, layout and masks are the same on every platform and in every worker, pixels within one grey level. Raises ValueError
    for an option that is out of range.

    Args:
        length, size, seed: number of scenes, image size in pixels (at least 16), and which scenes to draw.
        masks: also return the mask of the object.
        background: "patchwork" (as difficult to reconstruct as a photograph) or "smooth" (one gradient of colour).
        colours: "class" (each class has its own two colours) or "random" (only the shape identifies the class).
        shortcut: share of scenes in [0, 1] that have a mark in one corner; its corner and colour depend on the class.
        objects: 1, 2 or 3 signs of different classes. The label is that of the largest; ``scene(i)`` returns all.
    """

    classes = tuple(SHAPES)
    length: int = 3000
    size: int = 64
    seed: int = 0
    _: KW_ONLY
    masks: bool = False
    background: str = "patchwork"
    colours: str = "class"
    shortcut: float = 0.0
    objects: int = 1

    def __post_init__(self):
        for name, number, least in (("length", self.length, 1), ("size", self.size, 16), ("seed", self.seed, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        choices = {"background": ("patchwork", "smooth"), "colours": ("class", "random"), "objects": (1, 2, 3)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {getattr(self, name)!r}")
        if not 0 <= self.shortcut <= 1:
            raise ValueError(f"shortcut must be a share of the scenes in [0, 1], got {self.shortcut}")
        centres = np.arange(self.size) + 0.5
        self._x, self._y = centres[None], centres[:, None]

    def _make_scene(self, index: int) -> Scene:
        # one random stream per part of the scene, so that an option changes only its own part
        layout, paint, backdrop, chance = (np.random.default_rng([self.seed, index, stream]) for stream in range(4))
        label = index % len(self.classes)
        others = (label + 1 + np.argsort(layout.random(9)))[: self.objects - 1] % 10
        labels = [label, *map(int, others)]

        canvas = self._draw_patchwork(backdrop) if self.background == "patchwork" else self._draw_gradient(backdrop)
        signs = self._place_signs(labels, layout)
        for class_index, (distance, radius) in zip(labels, signs, strict=True):
            fill, rim = self._choose_colours(class_index, paint)
            self._blend(canvas, rim, distance)
            self._blend(canvas, fill, distance + 0.28 * radius)
        if chance.random() < self.shortcut:
            self._draw_mark(canvas, label)
        image = torch.from_numpy(canvas.transpose(2, 0, 1).astype(np.float32).clip(0, 255))
        return Scene(image, labels, torch.from_numpy(np.stack([distance < 0 for distance, _ in signs])))

    # --- the parts of a scene; canvas is (size, size, 3) float64, distances are in pixels ---

    @staticmethod
    def _blend(canvas: np.ndarray, colour: np.ndarray, distance: np.ndarray) -> None:
        """Paint the inside of an outline onto the canvas, with one pixel of anti-aliasing."""
        touched = np.flatnonzero(distance < 0.5)
        cover = np.minimum(0.5 - distance.ravel()[touched], 1)[:, None]
        pixels = canvas.reshape(-1, 3)  # a view
        pixels[touched] += cover * (colour - pixels[touched])

    def _choose_colours(self, label: int, rng: Generator) -> list[np.ndarray]:
        jitter, hue = rng.random((2, 3)), rng.random(2)
        hues = (_FILL_HUES[label], _RIM_HUES[label]) if self.colours == "class" else (hue[0], hue[0] + 0.25 + 0.5 * hue[1])
        jittered = zip(hues, jitter, strict=True)
        return [_to_rgb(h + 0.05 * (j[0] - 0.5), 0.75 + 0.25 * j[1], 0.75 + 0.25 * j[2]) for h, j in jittered]

    def _place_signs(self, labels: list[int], rng: Generator) -> list[tuple[np.ndarray, float]]:
        """Return the signed distance (size, size) and the radius of each sign; draw again, up to 60 times, if signs touch."""
        for _ in range(60):
            circles = []
            for scale in (1.0, 0.62, 0.55)[: len(labels)]:
                radius = self.size * scale * (0.155 + 0.075 * rng.random())
                margin = 1.1 * radius
                x, y = margin + (self.size - 2 * margin) * rng.random(2)
                circles.append((x, y, radius))
            turns = rng.random(len(labels))
            if all(math.dist(a[:2], b[:2]) > 1.2 * (a[2] + b[2]) for i, a in enumerate(circles) for b in circles[:i]):
                break
        signs = []
        for label, (x, y, radius), turn in zip(labels, circles, turns, strict=True):
            angle = 0.7 * (2 * turn - 1)  # +- 40 degrees
            dx, dy = (self._x - x) / radius, (self._y - y) / radius
            u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            distance = np.full_like(u, 9 * radius)
            near = np.hypot(u, v) < 1.6
            distance[near] = radius * SHAPES[self.classes[label]](u[near], v[near])
            signs.append((distance, radius))
        return signs

    def _draw_patchwork(self, rng: Generator) -> np.ndarray:
        canvas = np.broadcast_to(_to_rgb(*(rng.random(3) * (1, 0.8, 1))), (self.size, self.size, 3)).copy()
        for cx, cy, turn, long, short, *hsv in rng.random((22, 8)):
            angle, dx, dy = math.pi * turn, self._x - cx * self.size, self._y - cy * self.size
            u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            distance = np.maximum(np.abs(u) - self.size * (0.08 + 0.17 * long), np.abs(v) - self.size * (0.06 + 0.12 * short))
            self._blend(canvas, _to_rgb(hsv[0], 0.95 * hsv[1], 0.15 + 0.85 * hsv[2]), distance)
        for x0, y0, x1, y1, width, *hsv in rng.random((7, 8)):
            dx, dy = self.size * (x1 - x0), self.size * (y1 - y0)
            ux, uy = self._x - x0 * self.size, self._y - y0 * self.size
            along = np.clip((ux * dx + uy * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
            distance = np.hypot(ux - along * dx, uy - along * dy) - self.size * (0.008 + 0.014 * width)
            self._blend(canvas, _to_rgb(*hsv), distance)
        return canvas

    def _draw_gradient(self, rng: Generator) -> np.ndarray:
        first, second = (_to_rgb(*(rng.random(3) * (1, 0.6, 1))) for _ in range(2))
        angle = 2 * math.pi * rng.random()
        ramp = 0.5 + ((self._x - self.size / 2) * math.cos(angle) + (self._y - self.size / 2) * math.sin(angle)) / (2 * self.size)
        return first + 0.35 * ramp[..., None] * (second - first)

    def _draw_mark(self, canvas: np.ndarray, label: int) -> None:
        side, gap = round(self.size * 0.11), max(1, round(self.size * 0.03))
        rows = slice(gap, gap + side) if label % 4 < 2 else slice(-gap - side, -gap)
        columns = slice(gap, gap + side) if label % 2 == 0 else slice(-gap - side, -gap)
        canvas[rows, columns] = _to_rgb(label / len(self.classes), 1.0, 1.0)
