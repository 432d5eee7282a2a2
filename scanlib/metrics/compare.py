"""Compare explainers with each other, with two baselines and a ceiling: one call computes all metrics of all maps.

explainers = {"Grad-CAM": GradCAM(model, preprocess=preprocess), "SCAN": scanner.as_explainer()}
table = compare(model, images, explainers, masks=masks, preprocess=preprocess)
table                                                   # a notebook shows it; table.to_markdown(), table.to_csv(path)
table.win("deletion")                                   # on which share of the images is each better than each other?
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scanlib.explainers.base import at_least_float32, choose_batch_size, prepare_inputs, validate_maps
from scanlib.layers import compute_logits
from scanlib.metrics.baselines import make_centre_maps, make_random_maps
from scanlib.metrics.definitions import METRICS as METRICS, NEEDED, OF_OTHER_CLASSES, MetricInputs, Metrics, select_metrics
from scanlib.metrics.localisation import compute_energy_inside, compute_iou, compute_peak_inside, validate_masks
from scanlib.metrics.quality import ExplainerFunction, run_explainer
from scanlib.metrics.removal import (
    Fill,
    ScoreFunction,
    build_class_score,
    compute_auc,
    compute_removal_curves,
    fill_mean,
    order_patches_greedily,
    rank_locations,
)
from scanlib.metrics.road import PERCENTILES
from scanlib.metrics.table import Comparison
from scanlib.structure.inputs import return_unchanged
from scanlib.targets import Target, is_callable_target, resolve_classes
from scanlib.training.decoder_file import validate_percentile


def compare(
    model: nn.Module,
    images: Tensor,
    explainers: Mapping[str, ExplainerFunction],
    metrics: Sequence[str] | Metrics | None = None,
    *,
    masks: Tensor | None = None,
    other_masks: Tensor | None = None,
    other_classes: Tensor | Sequence[int] | None = None,
    absent_classes: Tensor | Sequence[int] | None = None,
    ceiling: int | None = None,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    target: Target = None,
    patch: int = 1,
    fill: Fill = fill_mean,
    steps: int = 10,
    percentiles: Sequence[float] = PERCENTILES,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Compute the metrics of every explainer's maps, and of a random map and a centre prior.

    Args:
        images: (N, 3, H, W) in [0, 255]. preprocess: function from images to the model's input.
        explainers: name -> callable (images, target) -> maps (N, H, W) in [0, 1]; for a SCAN ``scanner.as_explainer()``.
        metrics: names from ``METRICS``, or a dictionary like it with your own metrics; None uses ``DEFAULT_METRICS``.
        masks: (N, H, W) bool, for energy, peak and IoU; ``make_box_masks`` makes them from boxes.
        other_masks, other_classes: (N, H, W) bool and (N,), a second object in each image and its class. absent_classes: (N,), a
            class that is not in the image, see ``draw_absent_classes``. They are for the metrics of ``class_specificity``.
        ceiling: adds the row "ceiling", the order of ``order_patches_greedily`` with this number of patches per round. It shows
            what deletion can reach, is not an explainer, and takes many runs of the model; the note says how many.
        target: a class or one per image; None is the predicted class. percentiles: see ``compute_road``.
        patch, fill, steps, batch_size: see ``compute_removal_curves``; ROAD has its own fill, drop and increase dim to black.

    All explainers get the same images, classes, patches, noise and order of ties, so that they can be compared image by image.
    The time is that of one pass over the images in batches, after one image to warm up. Raises ValueError for wrong arguments
    and for maps outside [0, 1], TypeError for an explainer that does not return maps.
    """
    from tqdm.auto import tqdm

    _validate_arguments(images, explainers, steps, patch, batch_size, ceiling, percentiles)
    given = {"masks": masks, "other_masks": other_masks, "other_classes": other_classes, "absent_classes": absent_classes}
    metrics = select_metrics(metrics, [name for name, value in given.items() if value is not None])
    size, images = (images.shape[2], images.shape[3]), at_least_float32(images)
    seeds = itertools.count(seed)  # the random map differs from call to call, the centre prior does not
    baselines: dict[str, ExplainerFunction] = {
        "random": lambda images, target: make_random_maps(len(images), size, next(seeds)).to(images.device),
        "centre prior": lambda images, target: make_centre_maps(len(images), size).to(images.device),
    }
    if reserved := [name for name in (*baselines, "ceiling") if name in explainers]:
        raise ValueError(f"explainers must not use the names of the baselines, which are always included, got {reserved}")
    for name, value in (("masks", masks), ("other_masks", other_masks)):
        if value is not None and validate_masks(value).shape != (len(images), *size):
            raise ValueError(f"{name} must have shape {(len(images), *size)} for these images, got {tuple(value.shape)}")
    if is_callable_target(target):
        raise ValueError("target must be a class or one per image, got a callable; compare explains classes only")
    rank_locations(torch.zeros(1, *size, device=images.device), patch)  # raises for a wrong patch before anything is explained
    preprocess = preprocess or return_unchanged
    batch_size = choose_batch_size(images, batch_size, model)
    options: dict[str, Any] = {"patch": patch, "batch_size": batch_size, "seed": seed}
    found = Comparison({}, {name: way for name, (way, _) in metrics.items()}, {}, {}, seed=seed)
    kept = f"ROAD keeps {', '.join(f'{p:g}' for p in percentiles)} %; " if any("ROAD" in name for name in metrics) else ""
    fill_name = getattr(fill, "__name__", "your own").removeprefix("fill_")
    removed = f"removed: patches of {patch} px in {steps} steps, fill {fill_name}; "
    found.note = (
        f"{len(images)} images, {'predicted' if target is None else 'given'} class; "
        f"{removed if set(metrics) - set(NEEDED) else ''}{kept}seed {seed}, "
        f"{time.strftime('%Y-%m-%d')}; ± is half the bootstrap 95 % interval over the images; bold: the best, and ties."
    )
    with torch.no_grad():
        logits = torch.cat([compute_logits(model, prepare_inputs(model, preprocess, x)) for x in images.split(batch_size)])
    classes = resolve_classes(logits, target).to(images.device)
    other_classes = _resolve_others("other_classes", logits, other_classes, classes)
    absent_classes = _resolve_others("absent_classes", logits, absent_classes, classes)
    score = build_class_score(model, preprocess, classes)
    if ceiling is not None:
        best, runs = order_patches_greedily(
            score, images, patch, per_round=ceiling, fill=fill, batch_size=batch_size, progress=progress
        )
        baselines["ceiling"] = lambda images, target: best
        found.note += (
            f" Ceiling: greedy order, {ceiling} patches per round, {runs.float().mean():.0f} runs of the model per image."
        )
    for name, explainer in tqdm([*explainers.items(), *baselines.items()], "compare", leave=False, disable=not progress):
        if name in baselines:
            maps = explainer(images, classes)
        else:
            maps, found.milliseconds[name] = _explain(name, explainer, images, classes, batch_size)
        inputs = MetricInputs(
            explainer=explainer,
            score=score,
            images=images,
            maps=maps,
            masks=masks,
            classes=classes,
            fill=fill,
            steps=steps,
            percentiles=percentiles,
            options=options,
            other_masks=other_masks,
            other_classes=other_classes,
            absent_classes=absent_classes,
        )
        undefined = torch.full((len(images),), torch.nan)  # the ceiling is searched for one class
        try:
            found.values[name] = {
                metric: undefined if name == "ceiling" and metric in OF_OTHER_CLASSES else measure(inputs).detach().cpu()
                for metric, (_, measure) in metrics.items()
            }
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found.curves[name] = {curve: value.cpu() for curve, value in inputs.curves.items()}
        found.maps[name] = maps.cpu()
    return found


def _validate_arguments(images, explainers, steps, patch, batch_size, ceiling, percentiles) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        advice = "for one image pass image[None]; signals and volumes cannot be compared"
        raise ValueError(f"images must be a tensor (N, 3, H, W) with N >= 1, got {shape}; {advice}")
    classes = [each for each in explainers.values() if isinstance(each, type)] if isinstance(explainers, Mapping) else []
    if classes or not isinstance(explainers, Mapping):
        seen = f"the class {classes[0].__name__}" if classes else type(explainers).__name__
        raise ValueError(f"explainers must be a dictionary such as {{'Grad-CAM': GradCAM(model)}}, got {seen}")
    for name, value, most in (
        ("steps", steps, 10_000),
        ("patch", patch, max(images.shape[2:])),
        ("batch_size", batch_size, math.inf),
        ("ceiling", ceiling, math.inf),
    ):
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
    if not isinstance(percentiles, (list, tuple)) or not percentiles:
        raise ValueError(f"percentiles must be a list of numbers in [0, 100], got {percentiles!r}")
    for percentile in percentiles:
        validate_percentile(percentile)


def _resolve_others(name: str, logits: Tensor, others: Any, classes: Tensor) -> Tensor | None:
    """Return one class per image (N,). Raises ValueError for a wrong class, and for the class that is explained."""
    if others is None:
        return None
    try:
        others = resolve_classes(logits, others).to(classes.device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if same := (others == classes).nonzero()[:, 0].tolist():
        raise ValueError(f"{name} must differ from the class that is explained, got {int(classes[same[0]])} for image {same[0]}")
    return others


def _explain(name: str, explainer: ExplainerFunction, images: Tensor, classes: Tensor, batch_size: int) -> tuple[Tensor, float]:
    """Return maps in [0, 1] at the images' size, and the milliseconds per image. Error messages start with the name."""
    batches = list(zip(images.split(batch_size), classes.split(batch_size), strict=True))
    run_explainer(explainer, images[:1], classes[:1])
    start = _read_clock()
    maps = torch.cat([run_explainer(explainer, *batch) for batch in batches])
    milliseconds = 1000 * (_read_clock() - start) / len(images)
    try:
        maps = validate_maps(maps, len(images), images.shape[2:]).to(images.device)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    low, high = float(maps.min()), float(maps.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"{name}: maps must be in [0, 1], got {low:.2g} to {high:.2g}; scale them, see normalize_map")
    return maps, milliseconds


def _read_clock() -> float:
    """Return the time in seconds, after pending work on an accelerator is finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def evaluate_maps(
    maps: Tensor, masks: Tensor, images: Tensor, score: ScoreFunction, *, steps: int = 10, patch: int = 1, fill: Fill = fill_mean
) -> dict[str, float]:
    """Return the means over the images of five metrics: energy, peak, IoU, deletion and insertion.

    maps: (N, H, W). masks: (N, H, W) bool. For the other arguments see ``compute_removal_curves``.
    """
    curves = compute_removal_curves(score, images, maps, steps=steps, patch=patch, fill=fill)
    inside = (compute_energy_inside(maps, masks), compute_peak_inside(maps, masks), compute_iou(maps, masks))
    names = ("energy", "peak", "IoU", "deletion", "insertion")
    return {name: float(value.float().mean()) for name, value in zip(names, (*inside, *map(compute_auc, curves)), strict=True)}
