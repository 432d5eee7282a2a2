"""Explainers made from others: SCAN's confidence, alone or as the weight of another map, and maps of log-probabilities.

    maps = scanner.as_explainer(percentile=95)(images, target)                          # C, normalized
    maps = scanner.as_explainer(evidence=GradCAM(model, preprocess=p))(images, target)  # E (1 + C / mean(C)), normalized
    maps = explain_log_probability(GradCAM(model, preprocess=p))(images, [3, 7])        # these classes against all others

The confidence C raises the evidence E where the decoder is sure. It removes no evidence.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import Explainer
from scanlib.targets import LogProbability, Target
from scanlib.training.decoder_file import DecoderState
from scanlib.training.encoding import FeatureEncoder


class Scanner(Protocol):
    """What ``SCANExplainer`` needs of a SCAN."""

    model: nn.Module
    encoder: FeatureEncoder

    @property
    def decoder_state(self) -> DecoderState: ...

    @property
    def decoder(self) -> nn.Module: ...

    def extract(self, images: Tensor, target: Target = None) -> tuple[Tensor, Tensor]: ...

    def decode(self, features: Tensor, scores: Tensor, percentile: float | Sequence[float] = 95) -> tuple[Tensor, Tensor]: ...


class SCANExplainer(Explainer):
    """SCAN as an explainer like any other; ``SCAN.as_explainer`` makes it.

    Args:
        scanner: a SCAN with a trained decoder.
        percentile: one or several; see ``SCAN.decode``.
        evidence: another explainer, whose map E is weighted by the confidence. It explains the scanner's ``score``. Its maps must
            be 0 or more. Where E is zero everywhere the map is C, with a warning.

    ``normalize=False`` returns raw values at the decoder's resolution.
    """

    def __init__(self, scanner: Scanner, percentile: float | Sequence[float] = 95, evidence: Callable | None = None):
        super().__init__(scanner.model, scanner.encoder.layer_name, scanner.encoder.preprocess)
        self.scanner, self.percentile, self.evidence = scanner, percentile, evidence

    def _prepare(self, images: Tensor) -> Tensor:
        return self.scanner.encoder.prepare_images(images)  # extract() preprocesses

    def _compute_maps(self, inputs: Tensor, target: Target) -> Tensor:
        if self.evidence is not None:
            target = self.scanner.encoder.resolve_target(inputs, target)
        features, scores = self.scanner.extract(inputs, target)
        confidence = self.scanner.decoder_state.decode(features, scores, self.percentile)[:, 0]
        if self.evidence is None:
            return confidence
        evidence = compute_evidence(self.evidence, inputs, target)
        if empty := int(find_empty_maps(evidence).sum()):
            self.scanner.encoder.warn_once("evidence", f"the evidence of {empty} images is zero; their maps are SCAN's alone")
        return weight_by_confidence(evidence, confidence)


def compute_evidence(evidence: Callable[[Tensor, Target], Tensor], images: Tensor, target: Target) -> Tensor:
    """Return an explainer's maps (N, h, w). Raises ValueError if it is no explainer, or a map is negative or of another shape."""
    if not callable(evidence):
        raise ValueError(f"evidence must be an explainer, such as GradCAM(model, preprocess=preprocess), got {evidence!r}")
    with torch.enable_grad():
        maps = evidence(images, target)
    if not isinstance(maps, Tensor):
        raise ValueError(
            f"evidence must return maps (N, h, w), got {type(maps).__name__}; for a SCAN pass scanner.as_explainer()"
        )
    maps = maps.detach().to(images)
    if maps.ndim != 3 or len(maps) != len(images) or not bool((maps >= 0).all()):
        raise ValueError(f"evidence must be maps (N, h, w), 0 or more, got {tuple(maps.shape)} from {float(maps.min()):.2g}")
    return maps


def find_empty_maps(maps: Tensor) -> Tensor:
    """Return (N,) bool: which maps (N, h, w) are zero everywhere."""
    return ~maps.flatten(1).any(1)


def weight_by_confidence(evidence: Tensor, confidence: Tensor) -> Tensor:
    """Weight evidence (N, h, w) by confidence (N, H, W), at the confidence's size. Empty evidence gives the confidence."""
    weight = 1 + confidence / confidence.mean((1, 2), keepdim=True).clamp_min(1e-12)
    evidence_at_size = F.interpolate(evidence[:, None], size=confidence.shape[-2:], mode="bilinear", antialias=True)[:, 0]
    return torch.where(find_empty_maps(evidence).view(-1, 1, 1), confidence, evidence_at_size * weight)


def explain_log_probability(explainer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``explain(images, target, normalize=True)``, which uses ``explainer`` on the log-probability of a class.

    target: a class or one per image. Raises ValueError for None: it could be another class for each changed copy of an image.
    """

    def explain(images: Tensor, target: int | Sequence[int] | Tensor, normalize: bool = True) -> Tensor:
        if target is None:
            raise ValueError("target must be a class or one per image, got None; for the predicted classes pass logits.argmax(1)")
        classes = torch.as_tensor(target).tolist()
        scores = [LogProbability(c) for c in classes] if isinstance(classes, list) else LogProbability(classes)
        return explainer(images, scores) if normalize else explainer(images, scores, normalize=False)

    return explain
