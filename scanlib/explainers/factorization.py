"""Deep feature factorization: which few concepts do the features of these images consist of, and how does the model score them?

All locations of all images are the rows of V (locations, C) >= 0, and V ~ H W with H (locations, k) >= 0 and W (k, C) >= 0. Every
location is a mixture of k concepts; every concept is a pattern of channels (Collins, Achanta, Suesstrunk 2018, arXiv 1806.10206).

    found = DeepFeatureFactorization(model, "layer4", preprocess, concepts=4)(images)
    found.maps                  # (N, k, H, W) in [0, 1]: where each concept is
    found.scores                # (k, K): the logits of an image with that concept everywhere
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scanlib.explainers.base import Explainer, at_least_float32, full_precision, resize_map
from scanlib.explainers.replay import Replay
from scanlib.structure.inputs import KeepModes, leave_inference_mode


def nmf(V: Tensor, concepts: int, iterations: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factorize V (P, C) >= 0 into H (P, k) >= 0 and W (k, C) >= 0 with a small |V - H W|^2, which no iteration increases.

    Hierarchical alternating least squares (Cichocki, Phan 2009): sets each column of H, then each row of W, to its best
    non-negative value while the others are fixed. seed: of the random start.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = (V.mean() / concepts).sqrt()
    H, W = (
        scale * torch.rand(*shape, generator=generator, device="cpu").to(V)
        for shape in ((len(V), concepts), (concepts, V.shape[1]))
    )
    for _ in range(iterations):
        _improve(H, V @ W.T, W @ W.T)
        _improve(W.T, V.T @ H, H.T @ H)
    return H, W


def _improve(H: Tensor, products: Tensor, gram: Tensor) -> None:
    """Set each column of H to its best non-negative value for V ~ H W, in place; products V W', gram W W'."""
    for k in range(H.shape[1]):
        step = (products[:, k] - H @ gram[:, k]) / gram[k, k].clamp_min(1e-12)
        H[:, k] = (H[:, k] + step).clamp_min(0)


@dataclass(frozen=True)
class Factorization:
    """Result of ``DeepFeatureFactorization``.

    maps: (N, k, H, W) in [0, 1]; the largest value of each concept is 1. raw: H as (N, k, h, w), scaled likewise. concepts: W,
    (k, C). scores: logits (k, K). error: |V - H W| / |V|, with V shifted where features are negative.
    """

    maps: Tensor
    raw: Tensor
    concepts: Tensor
    scores: Tensor
    error: float

    def labels(self, classes: Sequence[str], top: int = 2) -> list[str]:
        """Return one line per concept: its most likely classes and their probabilities."""
        likely = self.scores.softmax(1).topk(min(top, len(classes)))
        return [
            ", ".join(f"{classes[c]} {p:.2f}" for p, c in zip(row.tolist(), index.tolist(), strict=True))
            for row, index in zip(*likely, strict=True)
        ]


class DeepFeatureFactorization(Explainer):
    """Called on images (N, 3, H, W) in [0, 255], return a ``Factorization``. All images of a call share the concepts.

    concepts: how many. iterations, seed: see ``nmf``. Negative features: each channel's minimum is subtracted before the
    factorization and added to the concepts afterwards. A concept's scores are the model's logits when the layer's output is that
    concept at every location; connections around the layer and prefix tokens keep the values of the first image.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, concepts=5, iterations=200, seed=0, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if concepts < 1:
            raise ValueError(f"concepts must be at least 1, got {concepts}")
        self.concepts, self.iterations, self.seed = concepts, iterations, seed

    def __call__(self, images: Tensor) -> Factorization:  # type: ignore[override]  # a factorization has no target
        batch = self._validate_images(images)
        if not len(batch):
            raise ValueError("images must hold at least one image to factorize, got 0")
        with KeepModes(), leave_inference_mode(), torch.no_grad():
            inputs = self._prepare(batch)
            layer = self._find_default_layer(inputs) if self.target_layer is None else self.target_layer
            with self._open_taps([layer], record=None) as taps:
                taps(inputs)
                features, layout = taps.features[0], taps.layouts[0]
            A = at_least_float32(layout.to_maps(features))
            V = A.movedim(1, -1).flatten(0, -2)
            minimum = V.amin(0).clamp_max(0)
            with full_precision(V):
                H, W = nmf(V - minimum, self.concepts, self.iterations, self.seed)
                error = float((V - minimum - H @ W).norm() / (V - minimum).norm().clamp_min(1e-12))
            peak = H.amax(0).clamp_min(1e-12)  # only H W is determined: scale each concept to 1 where it is strongest
            H, W = H / peak, W * peak[:, None] + minimum
            with Replay(self.model, layer, inputs[:1], self.output, self.layout) as replay:
                pure = replay.features.expand(self.concepts, *replay.features.shape[1:]).clone()
                layout.to_maps(pure)[:] = W.view(*W.shape, *[1] * len(layout.grid)).to(pure.dtype)
                scores = at_least_float32(replay(pure))
        raw = H.unflatten(0, (len(A), *A.shape[2:])).movedim(-1, 1)
        maps = resize_map(raw.flatten(0, 1), batch.shape[2:]).unflatten(0, raw.shape[:2])
        maps = maps / maps.amax((0, *range(2, maps.ndim)), keepdim=True).clamp_min(1e-12)
        maps, raw, W, scores = (tensor.to(images.device) for tensor in (maps, raw, W, scores))
        return Factorization(maps, raw, W, scores, error)
