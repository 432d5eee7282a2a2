"""Class activation maps whose weights come from trying: what becomes of the score when a channel masks the image, or is missing?

    Score-CAM       w_c = score of the image under channel c's own map          softmax over the channels
    SS-CAM          the same, averaged over noisy maps
    IS-CAM          the same, averaged over the map at a rising strength
    Ablation-CAM    w_c = share of the score that is lost when channel c is zeroed

and then relu(sum_c w_c A_c). No gradient is needed, but a run of the model per channel: in batches, with the memory of one.
Channels that are constant over the picture are tried once for all of them; Ablation-CAM runs only what lies behind the layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scanlib.explainers.base import at_least_float32, choose_batch_size, resize_map, scale_to_unit_range, to_channels_last
from scanlib.explainers.cams import CAMExplainer
from scanlib.explainers.formulas import weighted_sum
from scanlib.explainers.replay import Replay
from scanlib.hooks import FeatureTaps
from scanlib.layers import get_logits
from scanlib.targets import Target, compute_scores, is_callable_target, resolve_classes


class _Perturbation(CAMExplainer):
    """A CAM whose weights come from many runs.

    batch_size: images a run; None takes what is quick on the device. ``CAMExplainer`` tells the other arguments.
    """

    graph, formula = None, staticmethod(weighted_sum)

    def __init__(self, model, target_layer=None, preprocess=None, *, batch_size: int | None = None, **options):
        if options.get("differentiable"):
            raise ValueError(
                f"differentiable=True is not for {type(self).__name__}, whose weights have no gradient; take GradCAM"
            )
        super().__init__(model, target_layer, preprocess, **options)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} is too small; give 1 or more, or None")
        self.batch_size = batch_size


def _resolved(targets: list[Target], outputs) -> list[Target]:
    """Classes as a tensor with one per image; callables as they are."""
    return [target if is_callable_target(target) else resolve_classes(outputs, target) for target in targets]


def _chosen(target: Target, images: Tensor) -> Target:
    """The target of each of a batch that is made of these images."""
    if callable(target):
        return target
    return target[images] if isinstance(target, Tensor) else [target[i] for i in images.tolist()]


class ScoreCAM(_Perturbation):
    """Score-CAM (Wang et al. 2020, Eqs. 5-7): w_c is the score of the preprocessed image times channel c's map.

    softmax: "channels": weights are the softmax of the logits over the channels, as in the paper's algorithm; "classes": they are
    the class's probability under each mask, as in its authors' code; callables are taken as they are. stretch: maps are brought
    to [0, 1] "after" they are resized (the paper), or "before". amp: run in bfloat16, in about half the time.
    """

    def __init__(
        self, model, target_layer=None, preprocess=None, *, softmax="channels", stretch="after", amp: bool = False, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if softmax not in ("channels", "classes"):
            raise ValueError(f"softmax {softmax!r} is not known; take 'channels' or 'classes'")
        if stretch not in ("before", "after"):
            raise ValueError(f"stretch {stretch!r} is not known; take 'before' or 'after'")
        self.softmax, self.stretch, self.amp = softmax, stretch, amp

    def _layer_maps(self, inputs, targets):
        with FeatureTaps(self.model, self.layers, graph=None) as taps:
            logits = taps(inputs)
            targets = _resolved(targets, logits)
            if self.softmax == "classes" and isinstance(logits, Tensor) and logits.shape[1] == 1:
                raise ValueError("softmax='classes' says nothing of a single output; take softmax='channels'")
            features = self._arranged(taps, taps.features)
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.amp):
            weights = [self._scores(inputs, A, targets) for A in features]
        weights = [w.softmax(-1) for w in weights] if self.softmax == "channels" else weights
        return [
            [weighted_sum(A, of_layer[k], **self.options) for A, of_layer in zip(features, weights, strict=True)]
            for k in range(len(targets))
        ]

    def _scores(self, inputs: Tensor, A: Tensor, targets: list[Target]) -> Tensor:
        """Scores (K, N, C) of each image under each channel's mask."""
        constant = A.flatten(2).amax(2) == A.flatten(2).amin(2)  # masks of zeros: all these see the same black image
        scores = self._tried(inputs, A, (~constant).nonzero(), targets)
        if constant.any():
            black = self._score(self.model(torch.zeros_like(inputs)), targets, torch.arange(len(inputs))).to(scores.dtype)
            scores = torch.where(constant, black[..., None], scores)
        return scores

    def _tried(self, inputs: Tensor, A: Tensor, pairs: Tensor, targets: list[Target], change: Callable | None = None) -> Tensor:
        """Scores (K, N, C), filled in at pairs (n, 2) of image and channel. change: what is done to masks (n, H, W) first."""
        scores = A.new_zeros(len(targets), *A.shape[:2])
        for image, channel in (part.T for part in pairs.split(choose_batch_size(inputs, self.batch_size)) if len(part)):
            masks = A[image, channel]
            masks = scale_to_unit_range(masks) if self.stretch == "before" else masks
            masks = resize_map(masks, inputs.shape[2:])
            masks = scale_to_unit_range(masks) if self.stretch == "after" else masks
            masks = masks if change is None else change(masks)
            masked = to_channels_last(inputs[image] * masks[:, None].to(inputs.dtype))
            scores[:, image, channel] = self._score(self.model(masked), targets, image).to(scores.dtype)
        return scores

    def _score(self, outputs, targets: list[Target], images: Tensor) -> Tensor:
        outputs = get_logits(outputs)
        rows = [
            outputs.softmax(1) if self.softmax == "classes" and not is_callable_target(target) else outputs for target in targets
        ]
        return torch.stack([compute_scores(row, _chosen(t, images)) for row, t in zip(rows, targets, strict=True)])


class SSCAM(ScoreCAM):
    """SS-CAM (Wang et al. 2020, arXiv 2006.14255): Score-CAM averaged over masks with noise N(0, std^2), a draw for each sample,
    channel and pixel."""

    def __init__(
        self, model, target_layer=None, preprocess=None, *, samples: int = 35, std: float = 2.0, seed: int = 0, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples {samples} is too few; give 1 or more")
        self.samples, self.std, self.seed = samples, std, seed

    def _scores(self, inputs, A, targets):
        generator = torch.Generator(inputs.device).manual_seed(self.seed)

        def noisy(masks: Tensor) -> Tensor:
            noise = torch.randn(masks.shape, generator=generator, device=masks.device, dtype=masks.dtype)
            return masks.add_(noise, alpha=self.std)

        pairs = torch.ones(A.shape[:2], device=A.device).nonzero()
        return sum(self._tried(inputs, A, pairs, targets, noisy) for _ in range(self.samples)) / self.samples


class ISCAM(ScoreCAM):
    """IS-CAM (Naidu et al. 2020, arXiv 2010.03023): Score-CAM averaged over the masks at strengths 1/n, 2/n, ..., 1."""

    def __init__(self, model, target_layer=None, preprocess=None, *, samples=10, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples {samples} is too few; give 1 or more")
        self.strengths = [(step + 1) / samples for step in range(samples)]

    def _scores(self, inputs, A, targets):
        return torch.stack([ScoreCAM._scores(self, strength * inputs, A, targets) for strength in self.strengths]).mean(0)


class AblationCAM(_Perturbation):
    """Ablation-CAM (Desai, Ramaswamy 2020, Eq. 3): w_c = (y - y_c) / |y|, y_c the score with channel c zeroed at every place.

    The size of y is divided by, not y: else every weight turns round where the score is negative. Prefix tokens stay as they are.
    batch_size: None takes as many versions of the features as fit 64 MB, on the CPU 8, as a ViT is slower with more.
    """

    def __init__(self, model, target_layer=None, preprocess=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if self.reshape is not None:
            raise ValueError("reshape is not for AblationCAM, which has to write into the layer's output; take ScoreCAM")

    def _layer_maps(self, inputs, targets):
        return list(zip(*(self._of_layer(inputs, layer, targets) for layer in self.layers), strict=True))

    def _of_layer(self, inputs: Tensor, layer: str, targets: list[Target]) -> list[Tensor]:
        """One map (N, h, w) for each target."""
        with Replay(self.model, layer, inputs) as tail:
            A, targets = at_least_float32(tail.layout.to_maps(tail.features)), _resolved(targets, tail.outputs)
            weights = A.new_zeros(len(targets), *A.shape[:2])
            for image in range(len(inputs)):  # each a few runs of a full batch
                weights[:, image] = self._lost(tail, A, image, [_chosen(target, torch.tensor([image])) for target in targets])
        return [weighted_sum(A, of_target, **self.options) for of_target in weights]

    def _lost(self, tail: Replay, A: Tensor, image: int, targets: list[Target]) -> Tensor:
        """Weights (K, C) of one image."""
        features, one = tail.features[image : image + 1], slice(image, image + 1)
        whole = self._score(tail.outputs[one], targets)
        scores = whole.expand(-1, A.shape[1]).clone()
        alive = A[image].flatten(1).any(1).nonzero()[:, 0]  # zeroing a channel of zeros changes nothing
        room = 8e6 if features.device.type == "cpu" else 64e6
        for channels in alive.split(self.batch_size or max(1, min(256, int(room / (4 * features.numel()))))):
            if not len(channels):  # all are dead
                break
            versions = features.expand(len(channels), *features.shape[1:]).clone()
            tail.layout.to_maps(versions)[torch.arange(len(channels)), channels] = 0
            scores[:, channels] = self._score(tail(versions, image), targets)
        return (whole - scores) / whole.abs().clamp_min(1e-12)

    def _score(self, outputs, targets: list[Target]) -> Tensor:
        """Scores (K, n) of n versions of an image; each target is of that image."""
        one = [target[0] if isinstance(target, list) else target for target in targets]
        return at_least_float32(torch.stack([compute_scores(outputs, t if callable(t) else t.expand(len(outputs))) for t in one]))
