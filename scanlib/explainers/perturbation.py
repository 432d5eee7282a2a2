"""Explainers that change the input or the features: how does the score change? No gradient is needed, but many runs.

    Score-CAM       w_c = score of the image masked by channel c's map          softmax over the channels
    SS-CAM          the same, averaged over noisy masks
    IS-CAM          the same, averaged over masks of increasing strength
    Ablation-CAM    w_c = share of the score that is lost when channel c is set to 0
    RISE            the mean of random masks, each weighted by the score of the masked image
    Occlusion       the score that is lost where a grey square covers the image

The map of a CAM is relu(sum_c w_c A_c), with one run of the model per channel, in batches. All channels that are constant over
the image share one run. Ablation-CAM runs only the part of the model behind the layer.

    maps = RISE(model, preprocess=preprocess)(images)               # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scanlib.explainers.base import (
    InputExplainer,
    at_least_float32,
    choose_batch_size,
    full_precision,
    normalize_map,
    resize_map,
    scale_to_unit_range,
)
from scanlib.explainers.cams import CAMExplainer, choose_classes_once
from scanlib.explainers.formulas import weighted_sum
from scanlib.explainers.replay import Replay
from scanlib.layers import make_eval_copy
from scanlib.structure.inputs import to_channels_last
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, compute_scores, is_callable_target, select_targets


class _PerturbationCAM(CAMExplainer):
    """Base class of the CAMs whose weights come from many runs. batch_size: images per run."""

    formula, needs_gradient = staticmethod(weighted_sum), False

    def __init__(self, model, target_layer=None, preprocess=None, *, batch_size: int | None = None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if self.differentiable:
            name = type(self).__name__
            raise ValueError(f"differentiable must be False for {name}, whose weights have no gradient; use GradCAM")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None, got {batch_size}")
        self.batch_size = batch_size

    def _score(self, outputs: Any, targets: Sequence[Target], images: Tensor) -> Tensor:
        """Compute scores (K, n) from the outputs (n, ...) for changed versions of the images with indices (n,)."""
        scores = [compute_scores(self._choose_outputs(outputs, t), select_targets(t, images)) for t in targets]
        return at_least_float32(torch.stack(scores))

    def _choose_outputs(self, outputs: Any, target: Target) -> Any:
        return outputs


class ScoreCAM(_PerturbationCAM):
    """Score-CAM (Wang et al. 2020, Eqs. 5-7): w_c is the score of the preprocessed image multiplied by channel c's map.

    softmax: "channels" takes the softmax of the logits over the channels, as in the paper's algorithm; "classes" takes the
    probability of the class under each mask, as in its authors' code, and callables as they are. stretch: normalize the masks to
    [0, 1] "after" resizing (the paper), or "before". amp: run in bfloat16, in about half the time. batch_size: images per run;
    None chooses it by the device. Other arguments: see ``CAMExplainer``.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, softmax="channels", stretch="after", amp=False, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if softmax not in ("channels", "classes"):
            raise ValueError(f"softmax must be 'channels' or 'classes', got {softmax!r}")
        if stretch not in ("before", "after"):
            raise ValueError(f"stretch must be 'before' or 'after', got {stretch!r}")
        self.softmax, self.stretch, self.amp = softmax, stretch, amp

    def _compute_all_arguments(self, taps, inputs, targets):
        targets = choose_classes_once(targets, taps.logits)
        if self.softmax == "classes" and isinstance(taps.logits, Tensor) and taps.logits.shape[1] == 1:
            raise ValueError("softmax must be 'channels' for a model with a single output, whose softmax is always 1")
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            weights = [self._score_channels(inputs, A, targets) for A in self._to_maps(taps, taps.features)]
        weights = [w.softmax(-1) for w in weights] if self.softmax == "channels" else weights
        return [[of_target] for of_target in zip(*weights, strict=True)]

    def _choose_outputs(self, outputs, target):
        return outputs if self.softmax == "channels" or is_callable_target(target) else outputs.softmax(1)

    def _score_channels(self, inputs: Tensor, A: Tensor, targets: list[Target]) -> Tensor:
        """Compute the scores (K, N, C) of each image under each channel's mask."""
        constant = A.flatten(2).amax(2) == A.flatten(2).amin(2)  # their masks are 0, so all give the same black image
        scores = self._score_masks(inputs, A, (~constant).nonzero(), targets)
        if constant.any():
            black = self._compute_logits(torch.zeros_like(inputs))
            black_scores = self._score(black, targets, torch.arange(len(inputs), device=inputs.device)).to(scores.dtype)
            scores = torch.where(constant, black_scores[..., None], scores)
        return scores

    def _score_masks(
        self, inputs: Tensor, A: Tensor, pairs: Tensor, targets: list[Target], change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Compute scores (K, N, C) at pairs (n, 2) of image and channel, 0 elsewhere. change: function of the masks (n, H, W)."""
        scores = A.new_zeros(len(targets), *A.shape[:2])
        for image, channel in (part.T for part in pairs.split(choose_batch_size(inputs, self.batch_size)) if len(part)):
            masks = scale_to_unit_range(A[image, channel]) if self.stretch == "before" else A[image, channel]
            masks = resize_map(masks, inputs.shape[2:])
            masks = scale_to_unit_range(masks) if self.stretch == "after" else masks
            masks = masks if change is None else change(masks)
            masked = to_channels_last(inputs[image] * masks[:, None].to(inputs.dtype))
            scores[:, image, channel] = self._score(self._compute_logits(masked), targets, image).to(scores.dtype)
        return scores


class SSCAM(ScoreCAM):
    """SS-CAM (Wang et al. 2020, arXiv 2006.14255): Score-CAM averaged over masks with noise N(0, std^2), drawn for each sample,
    channel and pixel. samples: number of draws. seed: of the noise. Other arguments: see ``ScoreCAM``."""

    def __init__(self, model, target_layer=None, preprocess=None, *, samples=35, std=2.0, seed=0, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples, self.std, self.seed = samples, std, seed

    def _score_channels(self, inputs, A, targets):
        generator = torch.Generator(inputs.device).manual_seed(self.seed)

        def add_noise(masks: Tensor) -> Tensor:
            noise = torch.randn(masks.shape, generator=generator, device=masks.device, dtype=masks.dtype)
            return masks.add_(noise, alpha=self.std)

        pairs = torch.ones(A.shape[:2], device=A.device).nonzero()
        return sum(self._score_masks(inputs, A, pairs, targets, add_noise) for _ in range(self.samples)) / self.samples


class ISCAM(ScoreCAM):
    """IS-CAM (Naidu et al. 2020, arXiv 2010.03023): Score-CAM averaged over the masks at strengths 1/n, 2/n, ..., 1.

    samples: n. Other arguments: see ``ScoreCAM``.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, samples=10, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.strengths = [(step + 1) / samples for step in range(samples)]

    def _score_channels(self, inputs, A, targets):
        return torch.stack([super(ISCAM, self)._score_channels(s * inputs, A, targets) for s in self.strengths]).mean(0)


class AblationCAM(_PerturbationCAM):
    """Ablation-CAM (Desai, Ramaswamy 2020, Eq. 3): w_c = (y - y_c) / |y|, y_c the score with channel c set to 0 everywhere.

    The paper divides by y, which inverts all weights where the score is negative. Prefix tokens are not ablated.
    batch_size: versions of the features per run; None takes 64 MB of them, on the CPU 8 MB, because a ViT is slower with more.
    Other arguments: see ``CAMExplainer``; reshape is not supported.
    """

    def __init__(self, model, target_layer=None, preprocess=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if self.reshape is not None:
            raise ValueError("reshape must be None for AblationCAM, which writes into the layer's output; use ScoreCAM")

    def _compute_layer_maps(self, inputs, targets, layers):
        return list(zip(*(self._ablate_layer(inputs, layer, targets) for layer in layers), strict=True))

    def _ablate_layer(self, inputs: Tensor, layer: str, targets: list[Target]) -> list[Tensor]:
        """Compute a raw map (N, h, w) of one layer for each target."""
        with Replay(self.model, layer, inputs, self.output, self.layout) as replay:
            A, targets = at_least_float32(replay.layout.to_maps(replay.features)), choose_classes_once(targets, replay.outputs)
            weights = torch.stack([self._compute_drops(replay, A, image, targets) for image in range(len(inputs))], 1)
        with full_precision(A):
            return [self.formula(A, of_target) for of_target in weights.to(A.dtype)]

    def _compute_drops(self, replay: Replay, A: Tensor, image: int, targets: list[Target]) -> Tensor:
        """Compute the weights (K, C) of one image."""
        features, index = replay.features[image : image + 1], torch.tensor([image], device=replay.features.device)
        whole = self._score(replay.outputs[image : image + 1], targets, index)
        scores = whole.expand(-1, A.shape[1]).clone()
        active = A[image].flatten(1).any(1).nonzero()[:, 0]  # setting a channel of zeros to 0 changes nothing
        budget = 8e6 if features.device.type == "cpu" else 64e6
        for channels in active.split(self.batch_size or max(1, min(256, int(budget / (4 * features.numel()))))):
            if not len(channels):  # no channel is active
                break
            versions = features.expand(len(channels), *features.shape[1:]).clone()
            replay.layout.to_maps(versions)[torch.arange(len(channels), device=channels.device), channels] = 0
            scores[:, channels] = self._score(replay(versions, image), targets, index.expand(len(channels)))
        return (whole - scores) / whole.abs().clamp_min(1e-12)


class _InputPerturbation(InputExplainer):
    """Base class of the explainers that cover parts of the input."""

    def _score_changed(self, inputs: Tensor, target: Target, count: int, change: Callable, probability: bool) -> Iterator[tuple]:
        """Yield (indices of images, indices of versions, scores), (n,) each, for ``count`` changed versions of every input.

        change: function from these indices to changed inputs (n, C, H, W). probability: take the softmax of the logits first.
        """
        copy = make_eval_copy(self.model)
        target = self._choose_target(copy, inputs, target)
        for pairs in torch.arange(len(inputs) * count, device=inputs.device).split(choose_batch_size(inputs, self.batch_size)):
            owners, versions = pairs // count, pairs % count
            outputs = run_copy(copy, change(owners, versions), self.output)
            if probability and not is_callable_target(target):
                if outputs.shape[1] == 1:
                    raise ValueError("target must be a callable for a model with a single output, whose probability is always 1")
                outputs = at_least_float32(outputs).softmax(1)
            yield owners, versions, at_least_float32(compute_scores(outputs, select_targets(target, owners)))


class RISE(_InputPerturbation):
    """RISE (Petsiuk, Das, Saenko 2018, Eqs. 4-6): the mean of random masks, each weighted by the masked image's score, over p.

    The score is the probability of the class, or what a callable target returns. A mask multiplies the preprocessed image.

    masks: number of masks, the same for all images. cells: cells along each side of a mask, which are 1 with a chance of p =
    ``probability`` and else 0, before the mask is resized bilinearly and shifted by less than a cell. seed: of the masks.
    """

    def __init__(
        self,
        model,
        target_layer=None,
        preprocess=None,
        *,
        masks: int = 4000,
        cells: int = 7,
        probability: float = 0.5,
        seed: int = 0,
        **options,
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if masks < 1 or cells < 1:
            raise ValueError(f"masks and cells must be at least 1, got {masks} and {cells}")
        if not 0 < probability <= 1:
            raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
        self.masks, self.cells, self.probability, self.seed = masks, cells, probability, seed

    def _draw_masks(self, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Draw cells (masks, cells + 1, ...) of 0 and 1, and shifts (masks, number of axes) in pixels."""
        draw = torch.Generator().manual_seed(self.seed)
        grid = torch.rand(self.masks, *[self.cells + 1] * len(size), generator=draw, device="cpu") < self.probability
        cell = torch.tensor([-(-side // self.cells) for side in size], device="cpu")  # the side of a cell, rounded up
        return grid, (torch.rand(self.masks, len(size), generator=draw, device="cpu") * cell).long()

    def _compute_maps(self, inputs, target):
        size = inputs.shape[2:]
        grid, shifts = (each.to(inputs.device) for each in self._draw_masks(size))
        maps = torch.zeros(len(inputs), *size, device=inputs.device, dtype=torch.promote_types(inputs.dtype, torch.float32))
        drawn: dict[str, Tensor] = {}

        def change(owners: Tensor, versions: Tensor) -> Tensor:
            drawn["masks"] = _enlarge_masks(grid[versions].to(maps.dtype), shifts[versions], size)
            return to_channels_last(inputs[owners] * drawn["masks"][:, None].to(inputs.dtype))

        for owners, _, scores in self._score_changed(inputs, target, self.masks, change, probability=True):
            maps.index_add_(0, owners, drawn["masks"] * scores.to(maps.dtype).view(-1, *[1] * len(size)))
        return maps / (self.masks * self.probability)

    def _normalize(self, maps, size):
        return normalize_map(maps, size)  # a callable target may be negative everywhere: only differences count


def _enlarge_masks(grid: Tensor, shifts: Tensor, size: Sequence[int]) -> Tensor:
    """Resize grids (n, c + 1, c + 1) bilinearly, so that c cells cover the image, and cut (n, H, W) out of each at its shift."""
    for axis, side in enumerate(size, 1):
        count = grid.shape[axis]
        units = torch.eye(count, device=grid.device, dtype=grid.dtype)[:, None]
        weights = F.interpolate(units, size=count * -(-side // (count - 1)), mode="linear", align_corners=False)[:, 0]
        window = weights.T[shifts[:, axis - 1, None] + torch.arange(side, device=grid.device)]  # (n, side, count)
        rest = grid.movedim(axis, 1)
        grid = (window @ rest.reshape(*rest.shape[:2], -1)).view(len(grid), side, *rest.shape[2:]).movedim(1, axis)
    return grid


class Occlusion(_InputPerturbation):
    """Occlusion (Zeiler, Fergus 2014): the score lost where a square covers the image, averaged where squares overlap.

    patch: side of the square in pixels of the preprocessed image; None takes an eighth of the shorter side. stride: step from
    one square to the next; None is half of patch. fill: value of the covered pixels in [0, 255], before preprocessing.
    """

    def __init__(
        self,
        model,
        target_layer=None,
        preprocess=None,
        *,
        patch: int | None = None,
        stride: int | None = None,
        fill: float = 127.5,
        **options,
    ):
        super().__init__(model, target_layer, preprocess, **options)
        for name, value in (("patch", patch), ("stride", stride)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value}")
        self.patch, self.stride, self.fill = patch, stride, fill

    def _prepare(self, images):
        return torch.cat([super()._prepare(images), super()._prepare(torch.full_like(images, self.fill))])

    def _compute_maps(self, inputs, target):
        inputs, grey = inputs.chunk(2)
        size = inputs.shape[2:]
        patch = self.patch or max(1, min(size) // 8)
        stride = self.stride or max(1, patch // 2)
        if stride > patch or patch > min(size):
            raise ValueError(
                f"patch must be from stride, {stride}, to {min(size)} pixels for inputs of {tuple(size)}, got {patch}"
            )
        counts = [-(-(side - patch) // stride) + 1 for side in size]  # the last squares may be cut at the edge
        places = torch.cartesian_prod(*(torch.arange(n, device=inputs.device) * stride for n in counts)).view(-1, len(size))

        def cover(versions: Tensor) -> Tensor:  # (n, H, W) bool; version 0 is the unchanged image
            covered = (versions > 0).view(-1, *[1] * len(size))
            for axis, side in enumerate(size):
                offset = torch.arange(side, device=inputs.device) - places[versions - 1, axis, None]
                shape = [len(versions), *(side if k == axis else 1 for k in range(len(size)))]
                covered = covered & ((offset >= 0) & (offset < patch)).view(shape)
            return covered

        def change(owners: Tensor, versions: Tensor) -> Tensor:
            return to_channels_last(torch.where(cover(versions)[:, None], grey[owners], inputs[owners]))

        scored = self._score_changed(inputs, target, len(places) + 1, change, probability=False)
        scores = torch.cat([of_batch for _, _, of_batch in scored]).view(len(inputs), -1)
        total, count = scores.new_zeros(len(inputs), math.prod(size)), scores.new_zeros(math.prod(size))
        for versions in torch.arange(1, len(places) + 1, device=inputs.device).split(256):
            covered = cover(versions).flatten(1).to(scores.dtype)
            total += (scores[:, :1] - scores[:, versions]) @ covered
            count += covered.sum(0)
        return (total / count).view(len(inputs), *size)
