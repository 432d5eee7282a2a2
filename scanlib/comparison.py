"""Every explainer beside every other and both baselines: one call, one table, with what chance alone would give.

table = compare(model, images, {"Grad-CAM": GradCAM(model, preprocess=p), "SCAN": scanner}, masks=masks, preprocess=p)
table                                                   # a notebook shows it; table.to_markdown(), table.to_csv(path)
table.win("deletion")                                   # paired: on what share of the pictures is each better than each?
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from scanlib.comparison_table import Comparison
from scanlib.explainer import batch_of, prepared
from scanlib.localisation import checked_masks
from scanlib.maps import fitting
from scanlib.metrics import (
    arcc,
    auc,
    centre_maps,
    class_score,
    coherency,
    complexity,
    confidences,
    drop,
    energy_inside,
    increase,
    infidelity,
    iou_at_area,
    max_sensitivity,
    mean_colour,
    peak_inside,
    random_maps,
    removal_curves,
    road,
)
from scanlib.outputs import evaluating, logits_of
from scanlib.removal import Score, floating, places
from scanlib.road import PERCENTILES
from scanlib.targets import class_indices, is_callables


@dataclass
class Case:
    """What a metric of ``compare`` gets: an explainer's maps (N, H, W), and what judging them takes. Curves are computed once."""

    explainer: Callable
    score: Score
    images: Tensor
    maps: Tensor
    masks: Tensor | None
    classes: Tensor
    patch: int = 1
    fill: Callable = mean_colour
    steps: int = 10
    percentiles: Sequence[float] = PERCENTILES
    batch_size: int | None = None
    seed: int = 0

    @cached_property
    def removal(self) -> tuple[Tensor, Tensor]:
        options = {"patch": self.patch, "batch_size": self.batch_size, "seed": self.seed}
        return removal_curves(self.score, self.images, self.maps, steps=self.steps, fill=self.fill, **options)

    @cached_property
    def road(self) -> tuple[Tensor, Tensor]:
        options = {"patch": self.patch, "batch_size": self.batch_size, "seed": self.seed}
        return road(self.score, self.images, self.maps, self.percentiles, **options)

    @cached_property
    def dimmed(self) -> tuple[Tensor, Tensor]:
        return confidences(self.score, self.images, self.maps, batch_size=self.batch_size)

    @cached_property
    def coherency(self) -> Tensor:
        parts = torch.arange(len(self.images)).split(batch_of(self.images, self.batch_size))
        return torch.cat([coherency(self.explainer, self.images[i], self.maps[i], self.classes[i]) for i in parts])

    @cached_property
    def infidelity(self) -> Tensor:
        options = {"patch": self.patch, "fill": self.fill, "batch_size": self.batch_size, "seed": self.seed}
        return infidelity(self.score, self.images, self.maps, **options)

    @cached_property
    def sensitivity(self) -> Tensor:
        return max_sensitivity(self.explainer, self.images, self.classes, batch_size=self.batch_size, seed=self.seed)


# name: (which way is better, 1 or -1; the figure of each picture)
METRICS: dict[str, tuple[int, Callable[[Case], Tensor]]] = {
    "energy": (1, lambda case: energy_inside(case.maps, case.masks)),
    "peak": (1, lambda case: peak_inside(case.maps, case.masks)),
    "IoU": (1, lambda case: iou_at_area(case.maps, case.masks, case.seed)),
    "deletion": (-1, lambda case: auc(case.removal[0])),
    "insertion": (1, lambda case: auc(case.removal[1])),
    "ROAD MoRF": (-1, lambda case: case.road[0].mean(1)),
    "ROAD LeRF": (1, lambda case: case.road[1].mean(1)),
    "ROAD": (1, lambda case: (case.road[1] - case.road[0]).mean(1) / 2),
    "drop %": (-1, lambda case: drop(*case.dimmed)),
    "increase %": (1, lambda case: increase(*case.dimmed)),
    "complexity": (-1, lambda case: complexity(case.maps)),
    "coherency": (1, lambda case: case.coherency),
    "ARCC": (1, lambda case: arcc(complexity(case.maps), case.coherency, METRICS["ROAD"][1](case))),
    "infidelity": (-1, lambda case: case.infidelity),
    "sensitivity": (-1, lambda case: case.sensitivity),
}
WITH_MASKS = ("energy", "peak", "IoU")
DEFAULT = ("energy", "peak", "IoU", "deletion", "insertion", "ROAD", "drop %", "increase %")
BASELINES = ("random", "centre prior")


def compare(
    model: nn.Module,
    images: Tensor,
    explainers: Mapping[str, Callable],
    metrics: Sequence[str] | Mapping[str, tuple[int, Callable[[Case], Tensor]]] | None = None,
    *,
    masks: Tensor | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    target=None,
    patch: int = 1,
    fill: Callable = mean_colour,
    steps: int = 10,
    percentiles: Sequence[float] = PERCENTILES,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Explain the pictures with every explainer, judge every map by every metric, the random map's and the centre prior's too.

    Args:
        images: (N, 3, H, W) in [0, 255].
        masks: (N, H, W) bool, for energy, peak and IoU; ``box_masks`` makes them of boxes.
        explainers: names -> ``explainer(images, target)``; a SCAN is taken by its ``explain``.
        metrics: names out of ``METRICS``, or a dictionary like it with figures of your own; None takes the usual ones.
        target: the class explained, one or one per image; None takes the predicted one, the same for all explainers.
        patch, fill, steps: as in ``removal_curves``, for deletion, insertion and infidelity; drop and increase fade to black, as
            published. percentiles: as in ``road``. batch_size: pictures a run; None takes what is quick on the model's device.

    Every map meets the same pictures, classes, units, fillings, noise and ties; figures are per picture, so that explainers
    compare pair by pair. The time is of one pass over the pictures in batches, the first batch explained once before to warm up.
    """
    metrics, size, images = _known(metrics, masks), tuple(images.shape[2:]), floating(images)
    clash = [name for name in BASELINES if name in explainers]
    if clash:
        raise ValueError(f"explainers are called {clash}, as the baselines that are always in; take other names")
    if not len(images):
        raise ValueError("images are empty; give one or more")
    if masks is not None and checked_masks(masks).shape != (len(images), *size):
        raise ValueError(f"masks have shape {tuple(masks.shape)}; for these images it must be {(len(images), *size)}")
    places(torch.zeros(1, *size), patch)  # refuses a patch before anything is explained
    preprocess = preprocess or (lambda pictures: pictures)
    batch_size = batch_of(images, batch_size, model)
    parts = torch.arange(len(images)).split(batch_size)
    draws = itertools.count(seed)  # a random explainer never says the same twice; the centre prior always does
    baselines = {
        "random": lambda pictures, _: random_maps(len(pictures), size, next(draws)).to(pictures.device),
        "centre prior": lambda pictures, _: centre_maps(len(pictures), size).to(pictures.device),
    }
    found = Comparison({}, {name: way for name, (way, _) in metrics.items()}, {}, {}, seed=seed)
    whose = "predicted class" if target is None else "class given"
    removed = f"patches of {patch} px in {steps} steps, fill {getattr(fill, '__name__', 'of your own')}"
    spread = f"seed {seed}, {time.strftime('%Y-%m-%d')}; ± is half the bootstrap 95 % interval over the pictures"
    kept = f"ROAD keeps {', '.join(f'{p:g}' for p in percentiles)} %; " if any("ROAD" in name for name in metrics) else ""
    found.note = f"{len(images)} pictures, {whose}; removed: {removed}; {kept}{spread}."
    with evaluating(model):
        classes = _classes(model, preprocess, images, target, parts)
        score = class_score(model, preprocess, classes)
        for name in _progress([*explainers, *baselines], progress):
            if name in baselines:
                explain = baselines[name]
                maps = explain(images, classes)
            else:
                explain = getattr(explainers[name], "explain", explainers[name])
                maps, found.milliseconds[name] = _explained(name, explain, images, classes, parts)
            case = Case(explain, score, images, maps, masks, classes, patch, fill, steps, percentiles, batch_size, seed)
            found.values[name] = {metric: figure(case).detach().cpu() for metric, (_, figure) in metrics.items()}
            found.maps[name] = maps.cpu()
            found.curves[name] = {
                curve: value.cpu()
                for attribute, names in (("removal", ("deletion", "insertion")), ("road", ("ROAD MoRF", "ROAD LeRF")))
                if attribute in vars(case)
                for curve, value in zip(names, vars(case)[attribute], strict=True)
            }
    return found


def _known(metrics, masks: Tensor | None) -> Mapping[str, tuple[int, Callable[[Case], Tensor]]]:
    """The metrics by name, as far as there is what they need."""
    if metrics is None:
        metrics = [name for name in DEFAULT if masks is not None or name not in WITH_MASKS]
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"metrics {unknown} are not known; there are {', '.join(METRICS)}")
        metrics = {name: METRICS[name] for name in metrics}
    lacking = [name for name in metrics if name in WITH_MASKS and masks is None]
    if lacking:
        raise ValueError(f"metrics {lacking} need masks; give masks=(N, H, W) bool, or leave them out")
    return metrics


@torch.no_grad()
def _classes(model: nn.Module, preprocess: Callable, images: Tensor, target, parts) -> Tensor:
    """(N,) int64 on the images' device."""
    if is_callables(target):
        raise ValueError("target is callable; compare explains classes: give one, or one per image")
    logits = torch.cat([logits_of(model(prepared(model, preprocess, images[i]))) for i in parts])
    return class_indices(logits, target).to(images.device)


def _explained(name: str, explain: Callable, images: Tensor, classes: Tensor, parts) -> tuple[Tensor, float]:
    """Maps in [0, 1] at the images' size, and the milliseconds that each took."""
    explain(images[parts[0]], classes[parts[0]])
    began = _now()
    maps = torch.cat([explain(images[i], classes[i]).detach() for i in parts])
    milliseconds = 1000 * (_now() - began) / len(images)
    try:
        maps = fitting(maps, len(images), images.shape[2:]).to(images.device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    low, high = float(maps.min()), float(maps.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"{name}: maps run from {low:.2g} to {high:.2g}; bring them to [0, 1], as scanlib.maps.stretched does")
    return maps, milliseconds


def _now() -> float:
    """The time, once what was asked of an accelerator is done."""
    for device in (torch.cuda, torch.mps):
        if (device is torch.cuda and torch.cuda.is_available()) or (device is torch.mps and torch.backends.mps.is_available()):
            device.synchronize()
    return time.perf_counter()


def _progress(names: Sequence[str], wanted: bool):
    if not wanted:
        return names
    from tqdm.auto import tqdm

    return tqdm(names, desc="compare", leave=False)
