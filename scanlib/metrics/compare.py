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

from scanlib.explainers.base import choose_batch_size, prepare_inputs, validate_maps
from scanlib.layers import eval_mode, get_logits
from scanlib.metrics.baselines import make_centre_maps, make_random_maps
from scanlib.metrics.localisation import compute_energy_inside, compute_iou, compute_peak_inside, validate_masks
from scanlib.metrics.quality import compute_arcc, compute_coherency, compute_complexity
from scanlib.metrics.removal import (
    ScoreFunction,
    build_class_score,
    compute_auc,
    compute_drop,
    compute_increase,
    compute_removal_curves,
    fill_mean,
    rank_locations,
    score_dimmed_images,
    to_floating,
)
from scanlib.metrics.road import PERCENTILES, compute_road
from scanlib.metrics.stability import compute_infidelity, compute_max_sensitivity
from scanlib.metrics.table import Comparison
from scanlib.targets import is_callable_target, resolve_classes


@dataclass
class MetricInputs:
    """What a metric of ``compare`` gets: an explainer's maps (N, H, W), and what judging them takes. Curves are computed once."""

    explainer: Callable
    score: ScoreFunction
    images: Tensor
    maps: Tensor
    masks: Tensor | None
    classes: Tensor
    patch: int = 1
    fill: Callable = fill_mean
    steps: int = 10
    percentiles: Sequence[float] = PERCENTILES
    batch_size: int | None = None
    seed: int = 0

    @cached_property
    def removal(self) -> tuple[Tensor, Tensor]:
        options = {"patch": self.patch, "batch_size": self.batch_size, "seed": self.seed}
        return compute_removal_curves(self.score, self.images, self.maps, steps=self.steps, fill=self.fill, **options)

    @cached_property
    def road(self) -> tuple[Tensor, Tensor]:
        options = {"patch": self.patch, "batch_size": self.batch_size, "seed": self.seed}
        return compute_road(self.score, self.images, self.maps, self.percentiles, **options)

    @cached_property
    def dimmed(self) -> tuple[Tensor, Tensor]:
        return score_dimmed_images(self.score, self.images, self.maps, batch_size=self.batch_size)

    @cached_property
    def coherency(self) -> Tensor:
        parts = torch.arange(len(self.images)).split(choose_batch_size(self.images, self.batch_size))
        return torch.cat([compute_coherency(self.explainer, self.images[i], self.maps[i], self.classes[i]) for i in parts])

    @cached_property
    def infidelity(self) -> Tensor:
        options = {"patch": self.patch, "fill": self.fill, "batch_size": self.batch_size, "seed": self.seed}
        return compute_infidelity(self.score, self.images, self.maps, **options)

    @cached_property
    def sensitivity(self) -> Tensor:
        return compute_max_sensitivity(self.explainer, self.images, self.classes, batch_size=self.batch_size, seed=self.seed)


# name: (which way is better, 1 or -1; the figure of each picture)
METRICS: dict[str, tuple[int, Callable[[MetricInputs], Tensor]]] = {
    "energy": (1, lambda case: compute_energy_inside(case.maps, case.masks)),
    "peak": (1, lambda case: compute_peak_inside(case.maps, case.masks)),
    "IoU": (1, lambda case: compute_iou(case.maps, case.masks, case.seed)),
    "deletion": (-1, lambda case: compute_auc(case.removal[0])),
    "insertion": (1, lambda case: compute_auc(case.removal[1])),
    "ROAD MoRF": (-1, lambda case: case.road[0].mean(1)),
    "ROAD LeRF": (1, lambda case: case.road[1].mean(1)),
    "ROAD": (1, lambda case: (case.road[1] - case.road[0]).mean(1) / 2),
    "drop %": (-1, lambda case: compute_drop(*case.dimmed)),
    "increase %": (1, lambda case: compute_increase(*case.dimmed)),
    "complexity": (-1, lambda case: compute_complexity(case.maps)),
    "coherency": (1, lambda case: case.coherency),
    "ARCC": (1, lambda case: compute_arcc(compute_complexity(case.maps), case.coherency, METRICS["ROAD"][1](case))),
    "infidelity": (-1, lambda case: case.infidelity),
    "sensitivity": (-1, lambda case: case.sensitivity),
}
METRICS_WITH_MASKS = ("energy", "peak", "IoU")
DEFAULT_METRICS = ("energy", "peak", "IoU", "deletion", "insertion", "ROAD", "drop %", "increase %")
BASELINES = ("random", "centre prior")


def compare(
    model: nn.Module,
    images: Tensor,
    explainers: Mapping[str, Callable],
    metrics: Sequence[str] | Mapping[str, tuple[int, Callable[[MetricInputs], Tensor]]] | None = None,
    *,
    masks: Tensor | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    target=None,
    patch: int = 1,
    fill: Callable = fill_mean,
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
        patch, fill, steps: as in ``compute_removal_curves``, for deletion, insertion and infidelity; drop and increase fade to black, as
            published. percentiles: as in ``road``. batch_size: pictures a run; None takes what is quick on the model's device.

    Every map meets the same pictures, classes, units, fillings, noise and ties; figures are per picture, so that explainers
    compare pair by pair. The time is of one pass over the pictures in batches, the first batch explained once before to warm up.
    """
    metrics, size, images = _known(metrics, masks), tuple(images.shape[2:]), to_floating(images)
    clash = [name for name in BASELINES if name in explainers]
    if clash:
        raise ValueError(f"explainers are called {clash}, as the baselines that are always in; take other names")
    if not len(images):
        raise ValueError("images are empty; give one or more")
    if masks is not None and validate_masks(masks).shape != (len(images), *size):
        raise ValueError(f"masks have shape {tuple(masks.shape)}; for these images it must be {(len(images), *size)}")
    rank_locations(torch.zeros(1, *size), patch)  # refuses a patch before anything is explained
    preprocess = preprocess or (lambda pictures: pictures)
    batch_size = choose_batch_size(images, batch_size, model)
    parts = torch.arange(len(images)).split(batch_size)
    draws = itertools.count(seed)  # a random explainer never says the same twice; the centre prior always does
    baselines = {
        "random": lambda pictures, _: make_random_maps(len(pictures), size, next(draws)).to(pictures.device),
        "centre prior": lambda pictures, _: make_centre_maps(len(pictures), size).to(pictures.device),
    }
    found = Comparison({}, {name: way for name, (way, _) in metrics.items()}, {}, {}, seed=seed)
    whose = "predicted class" if target is None else "class given"
    removed = f"patches of {patch} px in {steps} steps, fill {getattr(fill, '__name__', 'of your own').removeprefix('fill_')}"
    spread = f"seed {seed}, {time.strftime('%Y-%m-%d')}; ± is half the bootstrap 95 % interval over the pictures"
    kept = f"ROAD keeps {', '.join(f'{p:g}' for p in percentiles)} %; " if any("ROAD" in name for name in metrics) else ""
    found.note = f"{len(images)} pictures, {whose}; removed: {removed}; {kept}{spread}."
    with eval_mode(model):
        classes = _classes(model, preprocess, images, target, parts)
        score = build_class_score(model, preprocess, classes)
        for name in _progress([*explainers, *baselines], progress):
            if name in baselines:
                explain = baselines[name]
                maps = explain(images, classes)
            else:
                explain = getattr(explainers[name], "explain", explainers[name])
                maps, found.milliseconds[name] = _explained(name, explain, images, classes, parts)
            case = MetricInputs(explain, score, images, maps, masks, classes, patch, fill, steps, percentiles, batch_size, seed)
            found.values[name] = {metric: figure(case).detach().cpu() for metric, (_, figure) in metrics.items()}
            found.maps[name] = maps.cpu()
            found.curves[name] = {
                curve: value.cpu()
                for attribute, names in (("removal", ("deletion", "insertion")), ("road", ("ROAD MoRF", "ROAD LeRF")))
                if attribute in vars(case)
                for curve, value in zip(names, vars(case)[attribute], strict=True)
            }
    return found


def _known(metrics, masks: Tensor | None) -> Mapping[str, tuple[int, Callable[[MetricInputs], Tensor]]]:
    """The metrics by name, as far as there is what they need."""
    if metrics is None:
        metrics = [name for name in DEFAULT_METRICS if masks is not None or name not in METRICS_WITH_MASKS]
    if not isinstance(metrics, Mapping):
        unknown = [name for name in metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"metrics {unknown} are not known; there are {', '.join(METRICS)}")
        metrics = {name: METRICS[name] for name in metrics}
    lacking = [name for name in metrics if name in METRICS_WITH_MASKS and masks is None]
    if lacking:
        raise ValueError(f"metrics {lacking} need masks; give masks=(N, H, W) bool, or leave them out")
    return metrics


@torch.no_grad()
def _classes(model: nn.Module, preprocess: Callable, images: Tensor, target, parts) -> Tensor:
    """(N,) int64 on the images' device."""
    if is_callable_target(target):
        raise ValueError("target is callable; compare explains classes: give one, or one per image")
    logits = torch.cat([get_logits(model(prepare_inputs(model, preprocess, images[i]))) for i in parts])
    return resolve_classes(logits, target).to(images.device)


def _explained(name: str, explain: Callable, images: Tensor, classes: Tensor, parts) -> tuple[Tensor, float]:
    """Maps in [0, 1] at the images' size, and the milliseconds that each took."""
    explain(images[parts[0]], classes[parts[0]])
    began = _now()
    maps = torch.cat([explain(images[i], classes[i]).detach() for i in parts])
    milliseconds = 1000 * (_now() - began) / len(images)
    try:
        maps = validate_maps(maps, len(images), images.shape[2:]).to(images.device)
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


def evaluate_maps(maps: Tensor, masks: Tensor, images: Tensor, score: ScoreFunction, **options) -> dict[str, float]:
    """The five figures of a short table, each a mean over the pictures: energy inside, peak inside, IoU, deletion, insertion.

    score and options are removal_curves'.
    """
    deletion, insertion = compute_removal_curves(score, images, maps, **options)
    figures = {
        "energy": compute_energy_inside(maps, masks),
        "peak": compute_peak_inside(maps, masks),
        "IoU": compute_iou(maps, masks),
    }
    figures |= {"deletion": compute_auc(deletion), "insertion": compute_auc(insertion)}
    return {name: float(values.float().mean()) for name, values in figures.items()}
