"""Another explainer's map, weighed by how sure SCAN is: E (1 + C / mean(C)). C raises what it is sure of and vetoes nothing.

maps = weight_by_confidence(compute_evidence(GradCAM(model), images, target), confidence)         # (N, h, w) each
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlib.targets import Target


def compute_evidence(evidence: Callable[[Tensor, Target], Tensor], images: Tensor, target: Target) -> Tensor:
    """The explainer's maps (N, h, w), 0 or more. Raises ValueError for what is no explainer, or gives anything else."""
    explain = getattr(evidence, "explain", evidence)
    if not callable(explain):
        raise ValueError(f"evidence {evidence!r} is no explainer; give one, as GradCAM(model, preprocess=preprocess)")
    maps = explain(images, target).detach().to(images)
    if maps.ndim != 3 or len(maps) != len(images) or bool((maps < 0).any()):
        raise ValueError(f"evidence gives {tuple(maps.shape)} from {float(maps.min()):.2g}; it must be (N, h, w), 0 or more")
    return maps


def find_empty_maps(maps: Tensor) -> Tensor:
    """Which maps (N, h, w) are zero everywhere: (N,) bool."""
    return ~maps.flatten(1).any(1)


def weight_by_confidence(evidence: Tensor, confidence: Tensor) -> Tensor:
    """Evidence (N, h, w) weighed by confidence (N, H, W), at the confidence's size; where evidence is empty, confidence alone."""
    sure = confidence / confidence.mean((1, 2), keepdim=True).clamp_min(1e-12)
    evident = F.interpolate(evidence[:, None], size=confidence.shape[-2:], mode="bilinear", antialias=True)[:, 0]
    return torch.where(find_empty_maps(evidence).view(-1, 1, 1), confidence, evident * (1 + sure))
