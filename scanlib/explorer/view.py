"""Draw what the explorer shows: a function from a ``View`` to an image. The widgets only change the view.

cams = {layer: GradCAM(model, layer, preprocess) for layer in ("layer3", "layer4")}
renderer = MapRenderer(model, images, {"SCAN": {"layer4": scanner.as_explainer()}, "Grad-CAM": cams}, preprocess=preprocess)
pixels = renderer.render(View(image=2, layer="layer4", percentile=90))         # (H, W, 3) uint8

Results are cached: a new opacity or colour map runs no network; a new percentile runs the decoder, and the model once to score
the new map. Further training of a decoder is noticed; after other changes call ``renderer.clear_cache()``.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize

from scanlib.explainers.base import prepare_inputs, resize_map, scale_to_unit_range
from scanlib.explainers.weighted import SCANExplainer
from scanlib.layers import compute_logits
from scanlib.masking import compute_threshold
from scanlib.metrics.removal import are_probabilities, fill_mean
from scanlib.plots import draw_labelled_row, overlay, to_pixels
from scanlib.scan import SCAN
from scanlib.structure.inputs import return_unchanged

STRIPS = ("none", "layers", "percentiles")
FILM_PERCENTILES = (0, 20, 40, 60, 80, 90, 95, 99)
CACHE_SIZE = 200  # entries, each a map or the features of one image
BLANK = np.full((8, 8, 3), 235, np.uint8)  # in place of a missing map

ImageExplainer = Callable[[Tensor, int], Tensor]  # images (N, 3, H, W) and a class -> maps (N, h, w)


@dataclass(frozen=True)
class View:
    """The settings of one rendered image.

    image: index of the image. layer: its name; "" takes the first layer. target: class index; None takes the predicted class.
    methods: names of the explainers shown side by side; () takes all. percentile: of SCAN's mask, in [0, 100]. opacity: of the
    maps, in [0, 1]. colormap: any of matplotlib's. shared: draw all maps on one range instead of each on its own. top: percentage
    of the pixels that are removed to score a map, highest values first. keep: keep these pixels and remove all others. strip:
    "none", "layers" (every layer at this percentile) or "percentiles" (this layer at ``FILM_PERCENTILES``).
    """

    image: int = 0
    layer: str = ""
    target: int | None = None
    methods: tuple[str, ...] = ()
    percentile: float = 95.0
    opacity: float = 0.6
    colormap: str = "magma"
    shared: bool = False
    top: float = 10.0
    keep: bool = False
    strip: str = "none"

    def to_code(self) -> str:
        """Return the Python expression that creates this view."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(View) if getattr(self, f.name) != f.default]
        return f"View({', '.join(changed)})"


@dataclass(frozen=True)
class ResolvedView(View):
    """A valid view that names its layer, class and methods; ``MapRenderer.validate`` makes it."""

    target: int = 0


class MapRenderer:
    """A model, images, and explainers whose maps are drawn.

    Args:
        model: preprocessed images (N, 3, H, W) -> logits or probabilities (N, K) with K >= 2.
        images: (N, 3, H, W) in [0, 255].
        explainers: names -> an explainer, ``explainer(images, target) -> maps (N, h, w)``, or a dictionary from layer name to
            explainer. An explainer outside a dictionary gives the same map for every layer. For a ``SCANExplainer`` the view's
            percentile replaces its own, and the reconstruction is drawn next to the map.
        preprocess: images in [0, 255] -> the model's input; None passes the images on.
        classes: names of the K classes; None takes the indices.
        layers: names of the layers to choose from; None takes the layers of the dictionaries.

    Raises ValueError for images or explainers of another kind, another number of classes, and a model with a single output.
    Methods raise ValueError for a view out of range and for maps that are not (1, h, w).
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
    ):
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images must be a tensor (N, 3, H, W) with N >= 1, got {shape}; for one image pass image[None]")
        to_pixels(images[0])  # raises for images that cannot be drawn
        wrong = {name: explainer for name, explainer in explainers.items() if not _is_explainer(explainer)}
        if wrong or not explainers:
            kinds = "explainers, as GradCAM(model, layer) or scanner.as_explainer(), or dictionaries from layer name to explainer"
            raise ValueError(f"explainers must be {kinds}, got {wrong}")
        self.model, self.images, self.explainers = model, images.float(), dict(explainers)
        self.preprocess = preprocess or return_unchanged
        by_layer = [layer for explainer in explainers.values() if isinstance(explainer, Mapping) for layer in explainer]
        self.layers = list(dict.fromkeys(layers or by_layer)) or [""]
        self._cache: dict[Hashable, Any] = {}
        count = len(self.compute_probabilities(0))
        self.classes = [str(c) for c in range(count)] if classes is None else list(classes)
        if len(self.classes) != count:
            raise ValueError(f"classes must hold {count} names, one for each of the model's classes, got {len(self.classes)}")

    def add_image(self, image: Tensor) -> int:
        """Add an image (3, h, w) in [0, 255], resized and centre-cropped to the size of the others. Return its index."""
        height, width = self.images.shape[-2:]
        scale = max(height / image.shape[1], width / image.shape[2])
        size = [max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))]
        image = center_crop(resize(image, size, antialias=True), [height, width])
        self.images = torch.cat([self.images, image[None].to(self.images)])
        return len(self.images) - 1

    def validate(self, view: View) -> ResolvedView:
        """Return the view with its defaults filled in. Raise ValueError for a value out of range."""
        layer, methods = view.layer or self.layers[0], tuple(view.methods) or tuple(self.explainers)
        for name, highest in {"image": len(self.images) - 1, "percentile": 100, "opacity": 1, "top": 100}.items():
            value, kind = getattr(view, name), (int, np.integer) if name == "image" else (int, float, np.number)
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value <= highest:
                raise ValueError(f"{name} must be in 0..{highest}, got {value!r}")
        for name in ("shared", "keep"):
            if not isinstance(getattr(view, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(view, name)!r}")
        if view.target is not None and (isinstance(view.target, bool) or not isinstance(view.target, (int, np.integer))):
            raise ValueError(f"target must be a class index or None, got {view.target!r}")
        for name, value, choices in (("layer", layer, self.layers), ("strip", view.strip, STRIPS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if unknown := [name for name in methods if name not in self.explainers]:
            raise ValueError(f"methods must be among {', '.join(self.explainers)}, got {unknown}")
        if view.colormap not in colormaps:
            raise ValueError(f"colormap must be one of matplotlib's, as magma, viridis or cividis, got {view.colormap!r}")
        target = int(self.compute_probabilities(view.image).argmax()) if view.target is None else view.target
        if not 0 <= target < len(self.classes):
            raise ValueError(f"target class {target} is out of range: the model has classes 0..{len(self.classes) - 1}")
        return ResolvedView(**vars(view) | {"layer": layer, "methods": methods, "target": target})

    def clear_cache(self) -> None:
        """Compute everything again: after a change of the model, or of an explainer other than SCAN."""
        self._cache.clear()

    def _cached(self, *key: Hashable, compute: Callable[[], Any]) -> Any:
        """Return the cached value of this key, computed at first use. The least recently used entries are dropped."""
        self._cache[key] = self._cache.pop(key) if key in self._cache else compute()
        while len(self._cache) > CACHE_SIZE:
            self._cache.pop(next(iter(self._cache)))
        return self._cache[key]

    def compute_probabilities(self, image: int) -> Tensor:
        """Return the class probabilities of an image, (K,), on the CPU."""
        return self._cached("probabilities", image, compute=lambda: self._run_model(self.images[image : image + 1])[0])

    @torch.no_grad()
    def _run_model(self, images: Tensor) -> Tensor:
        outputs = compute_logits(self.model, prepare_inputs(self.model, self.preprocess, images)).float().cpu()
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(f"model must return logits (N, K) of two classes or more, got {tuple(outputs.shape)}")
        return outputs if are_probabilities(outputs) else outputs.softmax(1)

    def compute_map(self, view: View, name: str) -> Tensor | None:
        """Return a method's map, (H, W) on the CPU: SCAN's confidence or the explainer's map; None if the layer has none."""
        view = self.validate(view)
        explainer = self._find_explainer(view, name)
        if explainer is None:
            return None
        maps = self._decode(view, explainer)[0] if isinstance(explainer, SCANExplainer) else self._explain(view, explainer)
        return resize_map(maps, self.images.shape[-2:])[0]

    def _find_explainer(self, view: ResolvedView, name: str) -> ImageExplainer | None:
        explainer = self.explainers[name]
        return explainer.get(view.layer) if isinstance(explainer, Mapping) else explainer

    def _explain(self, view: ResolvedView, explainer: ImageExplainer) -> Tensor:
        image = self.images[view.image : view.image + 1]
        key = ("map", id(explainer), view.image, view.target)
        maps = self._cached(*key, compute=lambda: explainer(image, view.target).detach().cpu())
        if maps.ndim != 3 or len(maps) != 1:
            raise ValueError(f"explainers must return maps (1, h, w) for one image, got {tuple(maps.shape)}")
        return maps

    def _decode(self, view: ResolvedView, explainer: SCANExplainer) -> tuple[Tensor, np.ndarray, float]:
        """Return SCAN's map (1, H, W), its reconstruction (H, W, 3) uint8, and the share of the features that its mask keeps."""
        scanner, image = explainer.scanner, self.images[view.image : view.image + 1]
        # the decoder too: decoders differ in how they arrange features
        image_key = (id(scanner), id(scanner.decoder), scanner.encoder.preprocess, view.image, view.target)

        def compute() -> tuple[Tensor, np.ndarray, float]:
            features, scores = self._cached("features", *image_key, compute=lambda: scanner.extract(image, view.target))
            confidence, reconstruction = scanner.decode(features, scores, view.percentile)
            is_kept = scores >= compute_threshold(scores, view.percentile)
            return confidence.cpu(), reconstruction[0].cpu().numpy(), float(is_kept.float().mean())

        key = ("decoded", *image_key, _get_version(explainer), view.percentile)
        maps, reconstruction, kept_share = self._cached(*key, compute=compute)
        if explainer.evidence is not None:
            weighted = SCANExplainer(scanner, view.percentile, explainer.evidence)
            maps = self._cached("weighted", id(explainer), *key, compute=lambda: weighted(image, view.target).cpu())
        return maps, reconstruction, kept_share

    def score_removed(self, view: View) -> dict[str, float]:
        """Return the class's probability for each method that has a map, after the removed pixels became the mean colour."""
        view = self.validate(view)
        maps = {name: heat for name in view.methods if (heat := self.compute_map(view, name)) is not None}

        def compute() -> dict[str, float]:
            image, heat = self.images[view.image : view.image + 1], torch.stack(list(maps.values())).flatten(1)
            top = heat.argsort(dim=1, descending=True, stable=True)[:, : round(view.top / 100 * heat.shape[1])]
            is_top = torch.zeros(heat.shape, dtype=torch.bool).scatter(1, top, True)
            is_removed = (is_top != view.keep).view(-1, 1, *image.shape[2:]).to(image.device)
            probabilities = self._run_model(torch.where(is_removed, fill_mean(image), image))
            return dict(zip(maps, probabilities[:, view.target].tolist(), strict=True))

        versions = tuple(_get_version(self._find_explainer(view, name)) for name in view.methods)
        settings = replace(view, opacity=0.0, colormap="", shared=False, strip="none")  # these change no score
        return self._cached("scores", settings, versions, compute=compute) if maps else {}

    def render(self, view: View) -> np.ndarray:
        """Draw a view, (H, W, 3) uint8: the image, the map of every method over it, SCAN's reconstructions, and the strip."""
        view = self.validate(view)
        rows = [draw_labelled_row(self._draw_panels(view))]
        if view.strip != "none":
            panels = self._draw_strip(view)
            rows.append(draw_labelled_row(panels, panel=min(176, max(64, rows[0].shape[1] // len(panels) - 6))))
        width = max(row.shape[1] for row in rows)
        return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows])

    def _draw_panels(self, view: ResolvedView) -> list[tuple[np.ndarray, list[str]]]:
        scores, probability = self.score_removed(view), self.compute_probabilities(view.image)[view.target]
        title = [f"{self.classes[view.target]} {probability:.2f}", f"layer {view.layer}" if view.layer else ""]
        panels = [(to_pixels(self.images[view.image]), title)]
        maps = [self.compute_map(view, name) for name in view.methods]
        for name, pixels in zip(view.methods, self._draw_maps(view, maps), strict=True):
            if name not in scores:
                panels.append((BLANK, [name, "no explainer for this layer"]))
                continue
            panels.append((pixels, [name, f"{'kept' if view.keep else 'removed'} top {view.top:g} %: {scores[name]:.2f}"]))
            if isinstance(explainer := self._find_explainer(view, name), SCANExplainer):
                _, reconstruction, kept_share = self._decode(view, explainer)
                panels.append((reconstruction, [f"{name}, rebuilt", f"P {view.percentile:g}: {kept_share:.1%} of features"]))
        return panels

    def _draw_maps(self, view: ResolvedView, maps: Sequence[Tensor | None]) -> list[np.ndarray]:
        """Draw maps over the image, each on its own range or all on [0, their common maximum]; BLANK for None."""
        image = self.images[view.image]
        highest = max((float(heat.max()) for heat in maps if heat is not None), default=1.0) or 1.0
        scale = (lambda heat: heat / highest) if view.shared else (lambda heat: scale_to_unit_range(heat[None])[0])
        return [BLANK if heat is None else overlay(image, scale(heat), view.opacity, view.colormap) for heat in maps]

    def _draw_strip(self, view: ResolvedView) -> list[tuple[np.ndarray, list[str]]]:
        """Draw the first method at every layer, or the first SCAN at every percentile: other methods have none."""
        names, views = list(view.methods), {layer or "default": replace(view, layer=layer) for layer in self.layers}
        if view.strip == "percentiles":
            names = [name for name in view.methods if isinstance(self._find_explainer(view, name), SCANExplainer)]
            views = {f"P {percentile}": replace(view, percentile=float(percentile)) for percentile in FILM_PERCENTILES}
        if not names:
            return [(BLANK, ["no SCAN in view"])]
        panels = self._draw_maps(view, [self.compute_map(each, names[0]) for each in views.values()])
        return [(pixels, [f"{names[0]}, {title}"]) for pixels, title in zip(panels, views, strict=True)]


def _get_version(explainer: object) -> tuple[int, int] | None:
    """Return a value that changes with the weights of SCAN's decoder; None for other explainers."""
    if not isinstance(explainer, SCANExplainer):
        return None
    decoder = explainer.scanner.decoder
    return id(decoder), sum(tensor._version for tensor in (*decoder.parameters(), *decoder.buffers()))


def _is_explainer(explainer: object) -> bool:
    if isinstance(explainer, Mapping):
        return len(explainer) > 0 and all(map(_is_explainer, explainer.values()))
    return callable(explainer) and not isinstance(explainer, (type, SCAN))
