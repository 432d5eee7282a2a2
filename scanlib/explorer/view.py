"""What the explorer shows, as a function: one ``View`` in, one picture out. The widget only sets the view.

scene = MapRenderer(model, images, {"SCAN": {"layer4": scanner}, "Grad-CAM": GradCAM}, preprocess=preprocess)
picture = scene.render(View(image=2, layer="layer4", percentile=90))         # (H, W, 3) uint8

Whatever the model computed is kept: features and gradients by picture, layer and class, maps by these and the percentile, so that
opacity and colours never touch a network, and a percentile only the decoder, and the model once to try the new map out. A decoder
that is trained further is noticed; after a change of the model itself call ``scene.forget()``. Drawn with arrays and Pillow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import prepare_inputs, resize_map, scale_to_unit_range
from scanlib.layers import eval_mode, get_logits
from scanlib.masking import compute_threshold
from scanlib.metrics.removal import are_probabilities, fill_mean
from scanlib.plots import draw_labelled_row, overlay, to_pixels
from scanlib.scan import SCAN

STRIPS = ("none", "layers", "percentiles")
FILM_PERCENTILES = (0, 20, 40, 60, 80, 90, 95, 99)
KEPT = 200  # what is kept in memory, in maps and features of a picture
BLANK = np.full((8, 8, 3), 235, np.uint8)  # where there is no map


@dataclass(frozen=True)
class View:
    """What is to be shown.

    image: its number. layer: by name; None the first there is. target: a class, None the predicted one. methods: by name, shown
    side by side; () all. percentile: SCAN's, 0..100. opacity of the map, 0..1. colormap: any of matplotlib's. shared: one range
    for all maps, else each its own. top: % of the pixels whose loss, or keeping, is tried out. keep: keep them, else remove them.
    strip: "none", "layers" (every layer at this percentile) or "percentiles" (this layer, from 0 to 99).
    """

    image: int = 0
    layer: str | None = None
    target: int | None = None
    methods: tuple[str, ...] = ()
    percentile: float = 95.0
    opacity: float = 0.6
    colormap: str = "magma"
    shared: bool = False
    top: float = 10.0
    keep: bool = False
    strip: str = "none"

    def code(self) -> str:
        """The call that makes this view again."""
        changed = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"View({', '.join(changed)})"


class MapRenderer:
    """A model, pictures and explainers to look at.

    Args:
        model: (N, 3, H, W) preprocessed -> logits. images: (N, 3, H, W) in [0, 255].
        explainers: by name, each one of: a trained ``SCAN``, or a dictionary of them by layer; a class of explainer, built for
            the layer in view; any callable ``(images, target) -> maps (N, h, w)``, which has no choice of layer.
        preprocess: images in [0, 255] -> the model's input. classes: their names. layers: names to choose from; left out, those
            that SCANs were trained for.

    Raises ValueError for explainers of no known kind and for a view that does not fit, naming what would.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        explainers: Mapping[str, object],
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        layers: Sequence[str] | None = None,
    ):
        if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
            raise ValueError("images must be a tensor (N, 3, H, W) with one picture or more; put [None] behind a single one")
        explainers = {name: {e.layer_name: e} if isinstance(e, SCAN) else e for name, e in explainers.items()}
        strange = [n for n, e in explainers.items() if not (callable(e) or (isinstance(e, Mapping) and _are_scans(e)))]
        if strange or not explainers:
            raise ValueError(f"explainers {strange}: give a dictionary from layers to SCANs, a class of explainer, or a callable")
        self.model, self.images, self.explainers = model, images.float(), dict(explainers)
        self.preprocess = preprocess or (lambda images: images)
        scans = [layer for explainer in explainers.values() if isinstance(explainer, Mapping) for layer in explainer]
        self.layers = list(dict.fromkeys(layers or scans)) or [None]
        self._kept: dict[tuple, object] = {}
        count = len(self.probabilities(0))
        self.classes = list(classes) if classes is not None else [str(c) for c in range(count)]
        if len(self.classes) != count:
            raise ValueError(f"classes names {len(self.classes)}, and the model has {count}")

    def add(self, image: Tensor) -> int:
        """Take in one more picture (3, h, w) in [0, 255], resized to cover the others' size, the centre cropped; its number."""
        height, width = self.images.shape[-2:]
        scale = max(height / image.shape[1], width / image.shape[2])
        size = max(height, round(image.shape[1] * scale)), max(width, round(image.shape[2] * scale))
        if size != tuple(image.shape[1:]):
            image = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        image = image[:, top : top + height, left : left + width]
        self.images = torch.cat([self.images, image[None].to(self.images)])
        return len(self.images) - 1

    def _once(self, *key, make: Callable[[], object]):
        """What was made for this key, made when it is first asked for. What was not asked for the longest goes first."""
        self._kept[key] = self._kept.pop(key) if key in self._kept else make()  # the last one now
        while len(self._kept) > KEPT:
            self._kept.pop(next(iter(self._kept)))
        return self._kept[key]

    def forget(self) -> None:
        """Compute everything anew: after the model was changed, or a callable's mind."""
        self._kept.clear()

    @torch.no_grad()
    def _run(self, images: Tensor) -> Tensor:
        with eval_mode(self.model):
            outputs = get_logits(self.model(prepare_inputs(self.model, self.preprocess, images))).float().cpu()
        if outputs.ndim != 2 or outputs.shape[1] < 2:
            raise ValueError(f"the model returns {tuple(outputs.shape)}; the explorer takes classifiers of two classes or more")
        return outputs if are_probabilities(outputs) else outputs.softmax(1)

    def probabilities(self, image: int) -> Tensor:
        """Of a picture's classes, (K,)."""
        return self._once("probabilities", image, make=lambda: self._run(self.images[image : image + 1])[0])

    def checked(self, view: View) -> View:
        """The view with its gaps filled in. Raises ValueError for what there is not."""
        import matplotlib

        known = list(self.explainers)
        view = replace(view, layer=view.layer or self.layers[0], methods=tuple(view.methods) or tuple(known))
        if not 0 <= view.image < len(self.images):
            raise ValueError(f"image {view.image} is out of range: there are 0..{len(self.images) - 1}")
        if view.layer not in self.layers:
            raise ValueError(f"layer {view.layer!r} is not to be chosen; take one of {', '.join(map(str, self.layers))}")
        if unknown := [name for name in view.methods if name not in known]:
            raise ValueError(f"methods {unknown} are not known; there are {', '.join(known)}")
        if view.strip not in STRIPS:
            raise ValueError(f"strip {view.strip!r} is not known; take one of {', '.join(STRIPS)}")
        for name, most in (("percentile", 100), ("opacity", 1), ("top", 100)):
            if not 0 <= getattr(view, name) <= most:
                raise ValueError(f"{name} {getattr(view, name)} is out of range; give 0..{most}")
        if view.colormap not in matplotlib.colormaps:
            raise ValueError(f"colormap {view.colormap!r} is not known; take one of matplotlib's, as magma, viridis, cividis")
        if view.target is None:
            view = replace(view, target=int(self.probabilities(view.image).argmax()))
        if not 0 <= view.target < len(self.classes):
            raise ValueError(f"target class {view.target} is out of range: the model has classes 0..{len(self.classes) - 1}")
        return view

    # --- maps ---

    def _scan(self, view: View, name: str) -> SCAN | None:
        explainer = self.explainers[name]
        return explainer.get(view.layer) if isinstance(explainer, Mapping) else None

    def _state(self, view: View, name: str) -> tuple:
        """What tells a decoder from the same decoder trained further."""
        scan = self._scan(view, name)
        if scan is None or scan.decoder is None:
            return ()
        tensors = [*scan.decoder.parameters(), *scan.decoder.buffers()]
        return id(scan.decoder), sum(tensor._version for tensor in tensors)

    def _features(self, view: View, name: str) -> tuple[Tensor, Tensor]:
        """What SCAN decodes; the model runs here, and not again for this picture, layer and class."""
        scan, image = self._scan(view, name), self.images[view.image : view.image + 1]
        key = (name, view.image, view.layer, view.target, id(scan.decoder))
        return self._once("features", *key, make=lambda: scan.extract(image, view.target))

    def _decoded(self, view: View, name: str) -> tuple[Tensor, np.ndarray]:
        def make():
            confidence, rebuilt = self._scan(view, name).decode(*self._features(view, name), view.percentile)
            return confidence[0].cpu(), rebuilt[0].cpu().numpy()

        key = (name, view.image, view.layer, view.target, view.percentile, self._state(view, name))
        return self._once("decoded", *key, make=make)

    def heat(self, view: View, name: str) -> Tensor | None:
        """A method's map of the view, (H, W) in [0, 1], on the CPU; None where SCAN has no decoder for the layer."""
        view, explainer = self.checked(view), self.explainers[name]
        if isinstance(explainer, Mapping):
            return self._fitting(self._decoded(view, name)[0]) if view.layer in explainer else None
        image = self.images[view.image : view.image + 1]
        if isinstance(explainer, type):
            place = {} if view.layer is None else {"target_layer": view.layer}

            def make():
                return explainer(self.model, preprocess=self.preprocess, **place)(image, view.target)[0].cpu()

            return self._fitting(self._once("heat", name, view.image, view.layer, view.target, make=make))
        found = self._once("heat", name, view.image, view.target, make=lambda: explainer(image, view.target)[0].cpu())
        return self._fitting(found)

    def _fitting(self, heat: Tensor) -> Tensor:
        if heat.ndim != 2:
            raise ValueError(f"an explainer returns maps of shape {tuple(heat.shape)} for one picture; they must be (h, w)")
        return resize_map(heat[None], self.images.shape[-2:])[0]

    def share(self, view: View, name: str) -> float:
        """Share of the features that SCAN's mask leaves, 0..1."""
        view = self.checked(view)
        _, scores = self._features(view, name)
        return float((scores >= compute_threshold(scores, view.percentile)).float().mean())

    def tried(self, view: View) -> dict[str, float]:
        """The class's probability when each method's top pixels are removed, or all others: one run of the model for all."""
        view = self.checked(view)
        heats = {name: self.heat(view, name) for name in view.methods}
        heats = {name: heat for name, heat in heats.items() if heat is not None}

        def make():
            image = self.images[view.image : view.image + 1]
            kept = []
            for heat in heats.values():
                count = round(view.top / 100 * heat.numel())
                gone = torch.zeros(heat.numel(), dtype=torch.bool)
                gone[heat.flatten().argsort(descending=True, stable=True)[:count]] = True
                gone = ~gone if view.keep else gone
                kept.append(torch.where(gone.view(heat.shape).to(image.device), fill_mean(image)[0], image[0]))
            found = self._run(torch.stack(kept))[:, view.target].tolist()
            return dict(zip(heats, found, strict=True))

        states = tuple(self._state(view, name) for name in view.methods)
        key = (view.image, view.layer, view.target, view.methods, view.percentile, view.top, view.keep, states)
        return self._once("tried", *key, make=make) if heats else {}

    # --- the picture ---

    def render(self, view: View) -> np.ndarray:
        """The view's picture, (H, W, 3) uint8: the scene, every method's map over it, SCAN's reconstruction, and the strip."""
        view = self.checked(view)
        image, tried = self.images[view.image], self.tried(view)
        probability = self.probabilities(view.image)[view.target]
        heats = {name: self.heat(view, name) for name in view.methods}
        own = [f"{self.classes[view.target]} {probability:.2f}", f"layer {view.layer}" if view.layer else ""]
        panels = [(to_pixels(image), own)]
        for (name, heat), shown in zip(heats.items(), self._ranged(view, list(heats.values())), strict=True):
            if heat is None:
                panels.append((BLANK, [name, "no decoder for this layer"]))
                continue
            said = f"{'kept' if view.keep else 'removed'} top {view.top:g} %: {tried[name]:.2f}"
            panels.append((overlay(image, shown, view.opacity, view.colormap), [name, said]))
            if self._scan(view, name):
                mask = f"P {view.percentile:g}: {100 * self.share(view, name):.1f} % of features"
                panels.append((self._decoded(view, name)[1], [f"{name}, rebuilt", mask]))
        rows = [draw_labelled_row(panels)]
        if view.strip != "none":
            rows.append(
                draw_labelled_row(self._strip(view), panel=max(64, rows[0].shape[1] // max(1, len(self._places(view))) - 6))
            )
        width = max(row.shape[1] for row in rows)
        return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0)), constant_values=255) for r in rows])

    def _ranged(self, view: View, heats: list[Tensor | None]) -> list[Tensor | None]:
        """Maps as they are drawn: each stretched to its own range, or all on the one they have in common."""
        there = [heat for heat in heats if heat is not None]
        if not view.shared:
            return [heat if heat is None else scale_to_unit_range(heat[None])[0] for heat in heats]
        high = max((float(heat.max()) for heat in there), default=1.0) or 1.0
        return [heat if heat is None else heat / high for heat in heats]

    def _places(self, view: View) -> list[View]:
        if view.strip == "layers":
            return [replace(view, layer=layer) for layer in self.layers]
        return [replace(view, percentile=float(p)) for p in FILM_PERCENTILES]

    def _strip(self, view: View) -> list[tuple[np.ndarray, list[str]]]:
        """The first method at every layer; the first SCAN at every percentile, which is nothing to the others."""
        scans = [name for name in view.methods if isinstance(self.explainers[name], Mapping)]
        if view.strip == "percentiles" and not scans:
            return [(BLANK, ["no SCAN in view"])]
        name = scans[0] if view.strip == "percentiles" else view.methods[0]
        places = self._places(view)
        heats = [self.heat(place, name) for place in places]
        titles = [str(place.layer) if view.strip == "layers" else f"P {place.percentile:g}" for place in places]
        image, shown = self.images[view.image], self._ranged(view, heats)
        drawn = [BLANK if heat is None else overlay(image, heat, view.opacity, view.colormap) for heat in shown]
        return [(pixels, [f"{name}, {title}"]) for pixels, title in zip(drawn, titles, strict=True)]


def _are_scans(explainer: Mapping) -> bool:
    return len(explainer) > 0 and all(isinstance(scan, SCAN) for scan in explainer.values())
