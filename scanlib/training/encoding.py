"""SCAN's encoder: from images to one layer's features, their mask scores, and the reference images to reconstruct.

encoder = FeatureEncoder(model, "layer4", (224, 224), torch.device("cpu"))
features, scores = encoder.encode(images, target=3)                 # (N, C, h, w) each
reference = encoder.blur(images, size=(28, 28))                     # (N, 3, 28, 28) in [-1, 1]
"""

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.hooks import FeatureTap
from scanlib.layers import Layout, find_default_layer, resolve_layer
from scanlib.masking import MASK_METHODS, blur_to_grid, compute_mask_scores
from scanlib.structure.inputs import prepare_inputs, return_unchanged
from scanlib.structure.outputs import compute_logits
from scanlib.targets import LogProbability, Target, check_count, is_callable_target, resolve_classes
from scanlib.training.decoder_file import compute_fingerprint
from scanlib.training.feature_cache import EncodedLoader, FeatureCache, count_images, is_repeatable
from scanlib.training.randomness import isolated_rng

SCORES = ("logit", "log_probability")


@dataclass(frozen=True)
class Probe:
    """Result of one forward pass: the target layer, which may have moved, and how it arranges its features."""

    layer_name: str
    layout: Layout


class FeatureEncoder:
    """Read features and mask scores from one layer of a frozen model.

    Args:
        model, layer: the classifier and its target layer, by name, module or index.
        image_size: (H, W) that images are resized to.
        device: where the images are encoded.
        use_gradient_mask: False needs no gradient and gives scores of 1.
        mask_by: what the scores rank by, one of ``MASK_METHODS``; see ``compute_mask_scores``.
        score: the score of a class whose gradient the mask uses, one of ``SCORES``.
        tap_type: the tap to read the layer with. It must give relevance if ``mask_by`` is "relevance" or "libra".
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | int | nn.Module,
        image_size: tuple[int, int],
        device: torch.device,
        *,
        use_gradient_mask: bool = True,
        mask_by: str = "gradient",
        score: str = "logit",
        tap_type: type[FeatureTap] = FeatureTap,
    ):
        if mask_by not in MASK_METHODS:
            raise ValueError(f"mask_by must be one of {', '.join(MASK_METHODS)}, got {mask_by!r}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        self.model, self.image_size, self.device = model, image_size, device
        self.use_gradient_mask, self.mask_by, self.score, self.tap_type = use_gradient_mask, mask_by, score, tap_type
        self._requested_layer = resolve_layer(model, layer)[0]
        self.preprocess: Callable[[Tensor], Tensor] = return_unchanged
        self._probe: Probe | None = None
        self._warned: set[str] = set()

    def set_preprocess(self, function: Callable[[Tensor], Tensor]) -> None:
        """Set the function from images in [0, 255] to the model's input."""
        self.preprocess, self._probe = function, None

    @property
    def layer_name(self) -> str:
        """Name of the layer that is read. It may differ from the requested one after ``layout`` is known."""
        return self._requested_layer if self._probe is None else self._probe.layer_name

    @property
    def layout(self) -> Layout:
        """How the target layer arranges its features, found by one forward pass of a grey image.

        In the last output of a class-token transformer the gradient at the patch tokens is zero. The layer that
        ``find_default_layer`` returns is then used instead, with a warning.
        """
        if self._probe is None:
            self._probe = self._run_probe(self._requested_layer)
        return self._probe.layout

    def _run_probe(self, layer_name: str) -> Probe:
        inputs = prepare_inputs(self.model, self.preprocess, torch.full((1, 3, *self.image_size), 127.5, device=self.device))
        with self.tap_type(self.model, layer_name) as tap:
            tap(inputs)
            layout = tap.layout
            if not self.use_gradient_mask:
                return Probe(layer_name, layout)
            gradient, _ = tap.gradient_and_relevance(None)
        prefix, patches = gradient[:, : layout.prefix], gradient[:, layout.prefix :]
        if not layout.prefix or not prefix.any() or patches.any():
            return Probe(layer_name, layout)
        default = find_default_layer(self.model, tuple(inputs.shape[-2:]))
        reason = f"layer {layer_name!r} sends no gradient to the patch tokens, because the head reads the class token only"
        if default == layer_name:
            raise ValueError(f"{reason}; use an earlier target_layer")
        self.warn_once("moved", f"{reason}; target_layer is now {default!r}")
        return self._run_probe(default)

    def encode(
        self, images: Tensor, target: Target = None, *, as_tokens: bool = False, unknown: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return features and mask scores of prepared images (N, 3, H, W), both float32.

        (N, C, h, w) each, or (N, T, C) with ``as_tokens``. Without a gradient mask the mask scores are ones, (N, 1, 1, 1). If an
        image has no positive mask score, the mask keeps all its features, as published. With ``score="log_probability"`` it
        keeps none: the mask scores are -1. With ``unknown`` class -1 means the predicted class, as in training labels.
        """
        layout = self.layout

        def arrange(x: Tensor) -> Tensor:
            return (layout.to_tokens(x) if as_tokens else layout.to_maps(x)).float()

        with self.tap_type(self.model, self.layer_name) as tap:
            logits = tap(prepare_inputs(self.model, self.preprocess, images))
            check_count(target, len(images))
            target = self._build_target(logits, target, unknown)
            features = arrange(tap.features)
            if not self.use_gradient_mask:
                return features, features.new_ones(len(features), *[1] * (features.ndim - 1))
            gradient, relevance = tap.gradient_and_relevance(target)
        if relevance is not None:
            relevance = self._arrange_relevance(relevance.float(), as_tokens)
        scores = compute_mask_scores(features, arrange(gradient), self.mask_by, -1 if as_tokens else 1, relevance)
        if self.score == "log_probability":  # without evidence for the class nothing is kept, and the map is dark
            return features, torch.where((scores > 0).flatten(1).any(1).view(-1, *[1] * (scores.ndim - 1)), scores, -1.0)
        self._warn_of_empty_scores(scores[:, layout.prefix :] if as_tokens else scores)
        return features, scores

    def _build_target(self, logits: Any, target: Target, unknown: bool = False) -> Target:
        if is_callable_target(target):
            return target
        classes = resolve_classes(logits, target, unknown)
        return list(map(LogProbability, classes.tolist())) if self.score == "log_probability" else classes

    def resolve_target(self, images: Tensor, target: Target) -> Target:
        """Return a target with which any explainer explains the scanner's ``score``. images: prepared, (N, 3, H, W)."""
        if self.score == "logit" or is_callable_target(target):
            return target
        return self._build_target(compute_logits(self.model, prepare_inputs(self.model, self.preprocess, images)), target)

    def _arrange_relevance(self, relevance: Tensor, as_tokens: bool) -> Tensor:
        """Arrange relevance (N, h, w) like the features, with one channel; prefix tokens get 0."""
        maps = F.interpolate(relevance[:, None], size=self.layout.grid, mode="bilinear", align_corners=False, antialias=True)
        return F.pad(maps.flatten(2).mT, (0, 0, self.layout.prefix, 0)) if as_tokens else maps

    def _warn_of_empty_scores(self, scores: Tensor) -> None:
        if empty := int((scores.flatten(1) <= 0).all(1).sum()):
            found = f"{empty} of {len(scores)} images have no positive mask score ({self.mask_by}) at layer {self.layer_name!r}"
            self.warn_once("empty scores", f"{found}, so their maps do not depend on the class; use an earlier layer")

    def blur(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return reference images in [-1, 1]: prepared images, blurred to the layer's grid and resized to ``size``."""
        return F.interpolate(blur_to_grid(images, self.layout.grid) / 127.5 - 1, size=size, mode="bilinear", align_corners=False)

    def prepare_images(self, images: Tensor) -> Tensor:
        """Return images (N, 3, H, W) or (3, H, W) as a float32 batch on the device, resized to ``image_size``.

        Raises ValueError for another shape, NaN or infinite values. Warns once if the values do not look like [0, 255].
        """
        if not isinstance(images, Tensor) or images.ndim not in (3, 4) or images.shape[-3] != 3:
            shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"image must be a tensor (3, H, W) or (N, 3, H, W) in [0, 255], got {shape}")
        is_integer = not images.is_floating_point()
        images = (images if images.ndim == 4 else images[None]).to(self.device, torch.float32)
        if images.numel():
            low, high = map(float, images.aminmax())
            if not torch.isfinite(images).all():
                raise ValueError("image must hold finite pixels in [0, 255], got NaN or infinite values")
            values = f"image values must be in [0, 255], got [{low:.2g}, {high:.2g}]"
            if 0 < high <= 1 and low >= 0 and not is_integer:
                self.warn_once("range", f"{values}; multiply the image by 255")
            elif low < 0 or high > 256:
                self.warn_once("range", f"{values}; pass the image before it is normalized")
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", align_corners=False, antialias=True)
        return images

    def warn_once(self, topic: str, message: str) -> None:
        """Warn on the first call for a topic only."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)

    def describe_preprocess(self) -> list[float]:
        """Return numbers that differ between most preprocessing functions: statistics of a preprocessed ramp."""
        ramp = torch.linspace(0, 255, 3 * math.prod(self.image_size), device=self.device).view(1, 3, *self.image_size)
        with isolated_rng():
            inputs = prepare_inputs(self.model, self.preprocess, ramp).float()
        return [round(float(value), 3) for value in (inputs.mean(), inputs.std(), inputs.flatten()[0], inputs.flatten()[-1])]

    def get_identity(self) -> dict:
        """Return what a decoder is trained for, in plain values."""
        layout = self.layout
        return {
            "model": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layer": self.layer_name,
            "channels": layout.channels,
            "grid": list(layout.grid),
            "image_size": list(self.image_size),
            "use_gradient_mask": self.use_gradient_mask,
            "mask_by": self.mask_by,
            "score": self.score,
        }


@dataclass(frozen=True)
class BatchEncoder:
    """Encode a loader's batches for one decoder: features, mask scores, and reference images of ``output_size``.

    uses_tokens: features are (N, T, C) instead of (N, C, h, w). output_size: (h', w') that the decoder returns.
    """

    encoder: FeatureEncoder
    uses_tokens: bool
    output_size: tuple[int, int]

    def __call__(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        """Encode (images, labels), or images alone. Raises TypeError for a dictionary."""
        if isinstance(batch, dict):
            raise TypeError(f"a batch must be (images, labels) or images alone, got a dictionary of {', '.join(map(str, batch))}")
        images, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        images = self.encoder.prepare_images(images)
        features, scores = self.encoder.encode(images, labels, as_tokens=self.uses_tokens, unknown=True)
        return features, scores, self.encoder.blur(images, self.output_size)

    def get_identity(self) -> dict:
        """Return what encoded images depend on, in plain values."""
        own = {"tokens": self.uses_tokens, "decoded": list(self.output_size), "device": str(self.encoder.device)}
        own["preprocess"] = self.encoder.describe_preprocess()
        return self.encoder.get_identity() | {"weights": compute_fingerprint(self.encoder.model)} | own

    def describe(self, batches) -> dict:
        """Return what a training run on these encoded batches depends on, in plain values."""
        cached = isinstance(batches, FeatureCache) and [batches.identity["images"], batches.identity["seed"]]
        return self.get_identity() | {"batches": length_hint(batches) or None, "cached": cached}

    def build_cache(self, loader, seed: int = 0, verbose: bool = False) -> FeatureCache:
        """Encode a loader once and keep the result in memory."""
        return FeatureCache.build(loader, self, seed, self.encoder.device, verbose, self.get_identity())

    def encode_loader(
        self, loader, cache: bool | str = "auto", budget: float = 4e9, seed: int = 0, verbose: bool = False
    ) -> tuple[Iterable, float]:
        """Return encoded batches, from memory or encoded in every epoch, and the bytes left of the budget.

        cache: True keeps the features in memory. "auto" does if they fit the budget and the images are the same in each epoch.
        """
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache must be True, False or 'auto', got {cache!r}")
        if isinstance(loader, FeatureCache):
            loader.check_identity(self.get_identity())
            return loader, budget - loader.nbytes
        if cache == "auto":
            layout = self.encoder.layout
            entries = layout.channels * (math.prod(layout.grid) + layout.prefix) * (2 if self.encoder.use_gradient_mask else 1)
            image_bytes = 4 * (entries + 3 * math.prod(self.output_size))
            cache = count_images(loader) * image_bytes <= budget and is_repeatable(loader)
        if not cache:
            return EncodedLoader(loader, self), budget
        features = self.build_cache(loader, seed, verbose)
        features.source = loader
        return features, budget - features.nbytes
