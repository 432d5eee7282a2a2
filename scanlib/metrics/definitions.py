"""The metrics that ``compare`` computes: their names, in which direction they are better, and what they need.

METRICS["deletion"]                                     # (-1, function from MetricInputs to one value per image (N,))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scanlib.explainers.base import validate_maps
from scanlib.metrics.class_specificity import compute_asked_denser, compute_class_correlation
from scanlib.metrics.localisation import compute_energy_inside, compute_iou, compute_peak_inside
from scanlib.metrics.quality import ExplainerFunction, compute_arcc, compute_coherency, compute_complexity, run_explainer
from scanlib.metrics.removal import (
    Fill,
    ScoreFunction,
    compute_auc,
    compute_drop,
    compute_increase,
    compute_removal_curves,
    score_dimmed_images,
)
from scanlib.metrics.road import compute_road
from scanlib.metrics.stability import compute_infidelity, compute_max_sensitivity


@dataclass
class MetricInputs:
    """Inputs of a metric: an explainer, its maps (N, H, W) and the arguments of ``compare``. Shared results are computed once."""

    explainer: ExplainerFunction
    score: ScoreFunction
    images: Tensor
    maps: Tensor
    masks: Any  # Tensor (N, H, W), or None if no metric needs them
    classes: Tensor
    fill: Fill
    steps: int
    percentiles: Sequence[float]
    options: dict[str, Any]  # patch, batch_size and seed
    other_masks: Any = None  # Tensor (N, H, W): the object whose class is not asked
    other_classes: Any = None  # Tensor (N,): its class
    absent_classes: Any = None  # Tensor (N,): a class that is not in the image
    curves: dict[str, Tensor] = field(default_factory=dict)  # those that a metric has used, (N, K) each

    def explain(self, classes: Tensor) -> Tensor:
        """Return the maps (N, H, W) of other classes (N,)."""
        batches = zip(*(x.split(self.options["batch_size"]) for x in (self.images, classes)), strict=True)
        maps = torch.cat([run_explainer(self.explainer, *batch) for batch in batches])
        return validate_maps(maps, len(self.images), self.images.shape[2:]).to(self.maps)

    @cached_property
    def other_maps(self) -> Tensor:
        return self.explain(self.other_classes)

    @cached_property
    def absent_maps(self) -> Tensor:
        return self.explain(self.absent_classes)

    @cached_property
    def removal_curves(self) -> tuple[Tensor, Tensor]:
        curves = compute_removal_curves(self.score, self.images, self.maps, steps=self.steps, fill=self.fill, **self.options)
        self.curves["deletion"], self.curves["insertion"] = curves
        return curves

    @cached_property
    def road_curves(self) -> tuple[Tensor, Tensor]:
        curves = compute_road(self.score, self.images, self.maps, self.percentiles, **self.options)
        self.curves["ROAD MoRF"], self.curves["ROAD LeRF"] = curves
        return curves

    @cached_property
    def dimmed_scores(self) -> tuple[Tensor, Tensor]:
        return score_dimmed_images(self.score, self.images, self.maps, batch_size=self.options["batch_size"])

    @cached_property
    def coherency(self) -> Tensor:
        batches = zip(*(x.split(self.options["batch_size"]) for x in (self.images, self.maps, self.classes)), strict=True)
        return torch.cat([compute_coherency(self.explainer, *batch) for batch in batches])

    def compute_infidelity(self) -> Tensor:
        return compute_infidelity(self.score, self.images, self.maps, fill=self.fill, **self.options)

    def compute_max_sensitivity(self) -> Tensor:
        options = {name: self.options[name] for name in ("batch_size", "seed")}
        return compute_max_sensitivity(self.explainer, self.images, self.classes, **options)


# name: (1 if high is good or -1 if low is, function from the inputs to one value per image (N,))
Metrics = Mapping[str, tuple[int, Callable[[MetricInputs], Tensor]]]
METRICS: Metrics = {
    "energy": (1, lambda inputs: compute_energy_inside(inputs.maps, inputs.masks)),
    "peak": (1, lambda inputs: compute_peak_inside(inputs.maps, inputs.masks)),
    "IoU": (1, lambda inputs: compute_iou(inputs.maps, inputs.masks, inputs.options["seed"])),
    "deletion": (-1, lambda inputs: compute_auc(inputs.removal_curves[0])),
    "insertion": (1, lambda inputs: compute_auc(inputs.removal_curves[1])),
    "ROAD MoRF": (-1, lambda inputs: inputs.road_curves[0].mean(1)),
    "ROAD LeRF": (1, lambda inputs: inputs.road_curves[1].mean(1)),
    "ROAD": (1, lambda inputs: (inputs.road_curves[1] - inputs.road_curves[0]).mean(1) / 2),
    "drop %": (-1, lambda inputs: compute_drop(*inputs.dimmed_scores)),
    "increase %": (1, lambda inputs: compute_increase(*inputs.dimmed_scores)),
    "complexity": (-1, lambda inputs: compute_complexity(inputs.maps)),
    "coherency": (1, lambda inputs: inputs.coherency),
    "ARCC": (1, lambda inputs: compute_arcc(compute_complexity(inputs.maps), inputs.coherency, METRICS["ROAD"][1](inputs))),
    "infidelity": (-1, MetricInputs.compute_infidelity),
    "sensitivity": (-1, MetricInputs.compute_max_sensitivity),
    "energy in other": (-1, lambda inputs: compute_energy_inside(inputs.maps, inputs.other_masks)),
    "asked denser": (1, lambda inputs: compute_asked_denser(inputs.maps, inputs.masks, inputs.other_masks)),
    "other correlation": (-1, lambda inputs: compute_class_correlation(inputs.maps, inputs.other_maps)),
    "absent energy": (-1, lambda inputs: compute_energy_inside(inputs.absent_maps, inputs.masks)),
    "absent correlation": (-1, lambda inputs: compute_class_correlation(inputs.maps, inputs.absent_maps)),
}
NEEDED = {  # the arguments of ``compare`` that a metric needs
    "energy": ("masks",),
    "peak": ("masks",),
    "IoU": ("masks",),
    "energy in other": ("other_masks",),
    "asked denser": ("masks", "other_masks"),
    "other correlation": ("other_classes",),
    "absent energy": ("masks", "absent_classes"),
    "absent correlation": ("absent_classes",),
}
OF_OTHER_CLASSES = ("other correlation", "absent energy", "absent correlation")  # they need maps of other classes
DEFAULT_METRICS: tuple[str, ...] = ("energy", "peak", "IoU", "deletion", "insertion", "ROAD", "drop %", "increase %")
DEFAULT_METRICS += ("energy in other", "asked denser", *OF_OTHER_CLASSES)  # of these, those whose arguments are given


def select_metrics(metrics: Sequence[str] | Metrics | None, given: Sequence[str]) -> Metrics:
    """Return the metrics with these names. Raises ValueError for an unknown name, or if an argument is missing.

    given: the names of the arguments that are not None.
    """
    if metrics is None:
        metrics = [name for name in DEFAULT_METRICS if set(NEEDED.get(name, ())) <= set(given)]
    if not isinstance(metrics, Mapping):
        if unknown := [name for name in metrics if name not in METRICS]:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}, got {unknown}")
        metrics = {name: METRICS[name] for name in metrics}
    for argument in ("masks", "other_masks", "other_classes", "absent_classes"):
        lacking = [name for name in metrics if argument in NEEDED.get(name, ()) and argument not in given]
        if lacking:
            kind = "(N, H, W) bool" if "masks" in argument else "one class per image"
            raise ValueError(f"{argument} must be {kind} for the metrics {lacking}, got None; pass {argument} or leave these out")
    return metrics
