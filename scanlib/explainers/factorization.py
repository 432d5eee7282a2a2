"""Deep feature factorization: which few concepts are the features of these images made of, and what does the model make of each?

All places of all images are rows of V (places, C) >= 0, and V ~ H W with H (places, k) >= 0 and W (k, C) >= 0: every place mixes
k concepts, every concept is a pattern of channels (Collins, Achanta, Suesstrunk 2018, arXiv 1806.10206).

    found = DeepFeatureFactorization(model, "layer4", preprocess, concepts=4)(images)
    found.maps                  # (N, k, H, W) in [0, 1]: where each concept is
    found.scores                # (k, K): the logits of a picture that is that concept everywhere
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map
from scanlib.explainers.replay import Replay
from scanlib.hooks import FeatureTaps
from scanlib.layers import eval_mode, find_default_layer


def nmf(V: Tensor, concepts: int, iterations: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Non-negative factors of V (P, C) >= 0: H (P, k), W (k, C), for a small |V - H W|^2, which never grows from step to step.

    Hierarchical alternating least squares (Cichocki, Phan 2009): each column of H, then each row of W, is set to its best
    non-negative value, the others held.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = (V.mean() / concepts).sqrt()
    H, W = (scale * torch.rand(*shape, generator=generator).to(V) for shape in ((len(V), concepts), (concepts, V.shape[1])))
    for _ in range(iterations):
        _improve(H, V @ W.T, W @ W.T)
        _improve(W.T, V.T @ H, H.T @ H)
    return H, W


def _improve(H: Tensor, products: Tensor, gram: Tensor) -> None:
    """The best non-negative H for V ~ H W, column by column, in place; products V W', gram W W'."""
    for k in range(H.shape[1]):
        step = (products[:, k] - H @ gram[:, k]) / gram[k, k].clamp_min(1e-12)
        H[:, k] = (H[:, k] + step).clamp_min(0)


@dataclass(frozen=True)
class Factorization:
    """maps (N, k, H, W) in [0, 1], each concept's largest value being 1; raw (N, k, h, w), H, its largest being 1; concepts
    (k, C), W; scores (k, K), logits; error: |V - H W| / |V|, of V lifted where features are negative."""

    maps: Tensor
    raw: Tensor
    concepts: Tensor
    scores: Tensor
    error: float

    def labels(self, classes: Sequence[str], top: int = 2) -> list[str]:
        """A line for each concept: its likeliest classes, with the softmax's probability."""
        likely = self.scores.softmax(1).topk(min(top, len(classes)))
        return [
            ", ".join(f"{classes[c]} {p:.2f}" for p, c in zip(row.tolist(), index.tolist(), strict=True))
            for row, index in zip(*likely, strict=True)
        ]


class DeepFeatureFactorization(Explainer):
    """Called on images (N, 3, H, W) in [0, 255], gives a ``Factorization``. Concepts are shared by all images of a call.

    concepts: how many. iterations, seed: see ``nmf``. Where features are negative they are first lifted by each channel's
    smallest value, and the concepts lowered again. A concept's scores are what the model says when the layer's output is that
    concept at every place; whatever goes around the layer, and prefix tokens, then stem from the first image.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer=None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        concepts: int = 5,
        iterations: int = 200,
        seed: int = 0,
    ):
        super().__init__(model, target_layer, preprocess)
        if concepts < 1:
            raise ValueError(f"concepts {concepts} is too few; give 1 or more")
        self.concepts, self.iterations, self.seed = concepts, iterations, seed

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Factorization:
        with torch.inference_mode(False), eval_mode(self.model):
            inputs = self._inputs(images)
            if not len(images):
                raise ValueError("images is empty; give at least one to factorize")
            layer = self.target_layer
            if layer is None:
                layer = find_default_layer(self.model, tuple(inputs.shape[2:]), inputs.shape[1])
            with FeatureTaps(self.model, [layer], graph=None) as taps:
                taps(inputs)
                features, layout = taps.features[0], taps.layouts[0]
            A = at_least_float32(layout.to_maps(features))
            V = A.movedim(1, -1).flatten(0, -2)
            lift = V.amin(0).clamp_max(0)
            H, W = nmf(V - lift, self.concepts, self.iterations, self.seed)
            error = float((V - lift - H @ W).norm() / (V - lift).norm().clamp_min(1e-12))
            strongest = H.amax(0).clamp_min(1e-12)  # only H W is fixed: let each concept be as strong as at its strongest place
            H, W = H / strongest, W * strongest[:, None] + lift
            with Replay(self.model, layer, inputs[:1]) as tail:
                pure = tail.features.expand(self.concepts, *tail.features.shape[1:]).clone()
                layout.to_maps(pure)[:] = W.view(*W.shape, *[1] * len(layout.grid)).to(pure.dtype)
                scores = at_least_float32(tail(pure))
        raw = H.unflatten(0, (len(A), *A.shape[2:])).movedim(-1, 1)
        maps = resize_map(raw.flatten(0, 1), images.shape[2:]).unflatten(0, raw.shape[:2])
        maps = maps / maps.amax((0, *range(2, maps.ndim)), keepdim=True).clamp_min(1e-12)
        return Factorization(*(tensor.to(images.device) for tensor in (maps, raw, W, scores)), error)
