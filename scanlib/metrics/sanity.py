"""Does the map depend on what the model learned? Replace its parameters, stage by stage, and see whether the map changes.

found = randomise_parameters(lambda model: GradCAM(model, preprocess=preprocess), model, images, target)
found.stages, found.rank_correlation, found.ssim        # names from the output down; (K + 1, N) each, the first row is 1

Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018. A map that stays as it was explains the picture, not the model.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import choose_batch_size
from scanlib.metrics.quality import compute_correlation
from scanlib.targets import select_targets


class RandomisationResult(NamedTuple):
    """What ``randomise_parameters`` found: names (K + 1), led by "trained", figures (K + 1, N), maps (K + 1, N, H, W)."""

    stages: list[str]
    rank_correlation: Tensor
    ssim: Tensor
    maps: Tensor


def list_parameter_groups(model: nn.Module, at_least: int = 6) -> list[str]:
    """Names of the model's parts that hold parameters, from the output down; the largest is opened up until there are enough."""

    def inside(name: str) -> list[str]:
        children = model.get_submodule(name).named_children()
        return [f"{name}.{n}" if name else n for n, child in children if any(True for _ in child.parameters())]

    names = inside("")
    while len(names) < at_least:
        sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in names}
        opened = next((name for name in sorted(names, key=sizes.get, reverse=True) if inside(name)), None)
        if opened is None:
            break
        place = names.index(opened)
        names[place : place + 1] = inside(opened)
    return names[::-1]


@torch.no_grad()
def randomise_tensors(tensors: dict[str, Tensor], seed: int = 0) -> None:
    """Draw parameters and running statistics anew, in place, normally, with the mean and spread of each one's own entries.

    Variances stay positive. What has one entry, or all the same, stays as it is.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() > 1:
            new = value.mean() + value.std() * torch.randn(value.shape, generator=generator).to(value)
            value.copy_(new.abs() if name.endswith("running_var") else new)


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the statistics of normalisation; no other buffers."""
    buffers = {name: value for name, value in module.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return dict(module.named_parameters()) | buffers


def iterate_randomised_models(
    model: nn.Module, stages: Sequence[str] | None = None, cascading: bool = True, seed: int = 0
) -> Iterator[tuple[str, nn.Module]]:
    """Copies of the model with parameters replaced: cascading, of all stages from the output down to this one; else of this one.

    Yields (stage, model); the model itself stays as it is. stages: names of submodules from the output down; None takes
    ``list_parameter_groups`` and, as a last stage "the rest", what belongs to none of them, as a class token.
    """
    names = list_parameter_groups(model) if stages is None else list(stages)
    rest = [name for name in _learned(model) if not any(name.startswith(f"{stage}.") for stage in names)]
    changed = model
    for k, stage in enumerate([*names, *(["the rest"] if rest and stages is None else [])]):
        changed = copy.deepcopy(changed if cascading else model)
        learned = _learned(changed)
        inside = rest if stage == "the rest" else [name for name in learned if name.startswith(f"{stage}.")]
        randomise_tensors({name: learned[name] for name in inside}, seed + k)
        yield stage, changed


def randomise_parameters(
    explainer: Callable[[nn.Module], Callable],
    model: nn.Module,
    images: Tensor,
    target=None,
    *,
    stages: Sequence[str] | None = None,
    cascading: bool = True,
    batch_size: int | None = None,
    seed: int = 0,
) -> RandomisationResult:
    """The sanity check: how like the trained model's are the maps of the randomised ones?

    Args:
        explainer: makes an explainer of a model, as ``lambda model: GradCAM(model, preprocess=preprocess)``.
        images, target: as explainers take them; give one class per image, so that the question stays the same.
        stages, cascading, seed: as in ``iterate_randomised_models``.

    Near 1 all along is a failed check. The model is left as it was.
    """
    parts = torch.arange(len(images)).split(choose_batch_size(images, batch_size, model))
    trained = explainer(model)
    targets = [select_targets(target, i) for i in parts]
    first = torch.cat([trained(images[i], asked) for i, asked in zip(parts, targets, strict=True)])
    names, maps = ["trained"], [first]
    for stage, changed in iterate_randomised_models(model, stages, cascading, seed):
        explain = explainer(changed)
        names.append(stage)
        maps.append(torch.cat([explain(images[i], asked) for i, asked in zip(parts, targets, strict=True)]))
    ranks, alike = (torch.stack([figure(first, each) for each in maps]) for figure in (compute_rank_correlation, compute_ssim))
    return RandomisationResult(names, ranks, alike, torch.stack(maps))


def compute_rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's, of maps (N, H, W) with maps (N, H, W), (N,) in [-1, 1]; ties share their mean rank; 0 where one is constant."""
    return compute_correlation(*(_ranks(x.flatten(1)) for x in (a, b)))


def _ranks(x: Tensor) -> Tensor:
    """Ranks within each row, from 0 to 1; ties share their mean."""
    ordered, exact = x.sort(dim=1).values, torch.promote_types(x.dtype, torch.float32)
    both = torch.searchsorted(ordered, x) + torch.searchsorted(ordered, x, right=True) - 1
    return both.to(exact) / (2 * x.shape[1])


def compute_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of maps (N, H, W) in [0, 1], (N,); Wang et al. 2004: Gaussian windows of 11 pixels, sigma 1.5."""
    offsets = torch.arange(-5.0, 6, device=a.device, dtype=torch.promote_types(a.dtype, torch.float32))
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    a, b = (x.to(window.dtype) for x in (a, b))
    if min(a.shape[1:]) < 11:
        raise ValueError(f"maps of {tuple(a.shape[1:])} are too small for SSIM's windows of 11 x 11; resize them")

    def local(x: Tensor) -> Tensor:  # weighted mean in every window that lies in the picture
        return F.conv2d(x[:, None], window[None, None])[:, 0]

    mean_a, mean_b = local(a), local(b)
    var_a, var_b, both = local(a * a) - mean_a**2, local(b * b) - mean_b**2, local(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    structure = (2 * both + 0.03**2) / (var_a + var_b + 0.03**2)
    return (luminance * structure).mean((1, 2))
