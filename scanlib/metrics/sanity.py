"""Sanity check: does the map depend on what the model learned? Randomise the parameters stage by stage and compare the maps.

    found = randomise_parameters(lambda model: GradCAM(model, preprocess=preprocess), model, images, target)
    found.stages, found.rank_correlation, found.ssim        # names from the output down; (K + 1, N) each, the first row is 1

Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018. A map that does not change explains the image, not the model.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import at_least_float32, choose_batch_size
from scanlib.metrics.quality import ExplainerFunction, compute_correlation, find_constant_maps, run_explainer
from scanlib.targets import Target, select_targets


class RandomisationResult(NamedTuple):
    """Result of ``randomise_parameters``: stages (K + 1), first "trained"; metrics (K + 1, N); maps (K + 1, N, H, W).

    blank: (K + 1, N) bool, which maps are constant. Both metrics are nan there: nothing can be said of such a map.
    """

    stages: list[str]
    rank_correlation: Tensor
    ssim: Tensor
    maps: Tensor
    blank: Tensor


def list_parameter_groups(model: nn.Module, at_least: int = 6) -> list[str]:
    """List the submodules that have parameters, from the output down; the largest are split until there are ``at_least``."""

    def list_children(name: str) -> list[str]:
        children = model.get_submodule(name).named_children()
        return [f"{name}.{n}" if name else n for n, child in children if any(True for _ in child.parameters())]

    names = list_children("")
    while len(names) < at_least and (parents := [name for name in names if list_children(name)]):
        largest = max(parents, key=lambda name: sum(p.numel() for p in model.get_submodule(name).parameters()))
        position = names.index(largest)
        names[position : position + 1] = list_children(largest)
    return names[::-1]


@torch.no_grad()
def randomise_tensors(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Redraw parameters and running statistics in place, from a normal with the mean and standard deviation of each tensor.

    Running variances stay positive. A tensor with one entry, or with equal entries, does not change.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() > 1:
            new = value.mean() + value.std() * torch.randn(value.shape, generator=generator, device="cpu").to(value)
            value.copy_(new.abs() if name.endswith("running_var") else new)


def _get_learned_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and running statistics, without other buffers."""
    buffers = {name: value for name, value in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return dict(module.named_parameters()) | buffers


def iterate_randomised_models(
    model: nn.Module, stages: Sequence[str] | None = None, cascading: bool = True, seed: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (stage, copy of the model with randomised parameters). The model itself does not change.

    stages: names of submodules from the output down. None uses ``list_parameter_groups`` and a last stage "the rest" for the
    parameters of no submodule, such as a class token. cascading: randomise all stages down to this one; False only this one.
    """
    names = list_parameter_groups(model) if stages is None else list(stages)
    rest = [name for name in _get_learned_tensors(model) if not any(name.startswith(f"{stage}.") for stage in names)]
    changed = model
    for k, stage in enumerate([*names, *(["the rest"] if rest and stages is None else [])]):
        changed = copy.deepcopy(changed if cascading else model)
        learned = _get_learned_tensors(changed)
        inside = rest if stage == "the rest" else [name for name in learned if name.startswith(f"{stage}.")]
        randomise_tensors({name: learned[name] for name in inside}, seed + k)
        yield stage, changed


def randomise_parameters(
    build_explainer: Callable[[nn.Module], ExplainerFunction],
    model: nn.Module,
    images: Tensor,
    target: Target = None,
    *,
    stages: Sequence[str] | None = None,
    cascading: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> RandomisationResult:
    """Measure how similar the maps of randomised models are to those of the trained model. Values near 1 are a failed check.

    Args:
        build_explainer: returns the explainer of a model, as ``lambda model: GradCAM(model, preprocess=preprocess)``.
        images: (N, 3, H, W) in [0, 255]. target: pass one class per image; None could be another class for each model.
        stages, cascading, seed: see ``iterate_randomised_models``.
    """
    parts = torch.arange(len(images), device="cpu").split(choose_batch_size(images, batch_size, model))

    def explain(model: nn.Module) -> Tensor:
        explainer = build_explainer(model)
        return torch.cat([run_explainer(explainer, images[i], select_targets(target, i)) for i in parts])

    names, maps = ["trained"], [explain(model)]
    for stage, changed in iterate_randomised_models(model, stages, cascading, seed):
        names.append(stage)
        maps.append(explain(changed))
    blank = torch.stack([find_constant_maps(each) for each in maps])
    ranks, ssim = (torch.stack([measure(maps[0], each) for each in maps]) for measure in (compute_rank_correlation, compute_ssim))
    return RandomisationResult(names, ranks, ssim.masked_fill(blank | blank[0], torch.nan), torch.stack(maps), blank)


def compute_rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Compute Spearman's correlation of maps (N, H, W), (N,) in [-1, 1]; ties share their mean rank; nan if one is constant."""
    ranks = (_compute_ranks(x.flatten(1)) for x in (a, b))
    return compute_correlation(*ranks).masked_fill(find_constant_maps(a) | find_constant_maps(b), torch.nan)


def _compute_ranks(x: Tensor) -> Tensor:
    """Return ranks within each row, in [0, 1]; ties share their mean."""
    values = x.sort(dim=1).values
    twice = torch.searchsorted(values, x) + torch.searchsorted(values, x, right=True) - 1
    return twice.to(torch.promote_types(x.dtype, torch.float32)) / (2 * x.shape[1])


def compute_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compute the structural similarity of maps (N, H, W) in [0, 1] with maps (N, H, W), (N,) in [-1, 1].

    Wang et al. 2004: Gaussian windows of 11 x 11 pixels, sigma 1.5. Raises ValueError for smaller maps.
    """
    if min(a.shape[1:]) < 11:
        raise ValueError(f"maps must be at least 11 x 11 for the windows of SSIM, got {tuple(a.shape[1:])}; resize them")
    a = at_least_float32(a)
    b = b.to(a.dtype)
    offsets = torch.arange(-5.0, 6, device=a.device, dtype=a.dtype)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2

    def average(x: Tensor) -> Tensor:  # weighted mean of every window inside the image
        return F.conv2d(x[:, None], window[None, None])[:, 0]

    mean_a, mean_b = average(a), average(b)
    var_a, var_b, covariance = average(a * a) - mean_a**2, average(b * b) - mean_b**2, average(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean((1, 2))
