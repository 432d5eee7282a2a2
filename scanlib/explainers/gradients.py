"""Explainers that differentiate the score with respect to the input pixels, x: the preprocessed image.

    Saliency               max over channels of |dy/dx|                         Simonyan et al. 2014, arXiv 1312.6034
    InputXGradient         sum over channels of x dy/dx                         Shrikumar et al. 2016, arXiv 1605.01713
    IntegratedGradients    (x - b) times the mean of dy/dx from b to x          Sundararajan et al. 2017, arXiv 1703.01365
    ExpectedGradients      the same, averaged over baselines b from data        Erion et al. 2019, arXiv 1906.10670
    SmoothGrad             the mean of dy/dx over noisy copies of x             Smilkov et al. 2017, arXiv 1706.03825

maps = IntegratedGradients(model, preprocess=preprocess)(images)        # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scanlib.explainers.base import InputExplainer, at_least_float32, choose_batch_size
from scanlib.hooks import check_finite, differentiate
from scanlib.layers import make_eval_copy
from scanlib.structure.outputs import run_copy
from scanlib.targets import Target, compute_scores, select_targets
from scanlib.training.interrupts import delay_interrupts


class _GradientExplainer(InputExplainer):
    """Base class of the explainers that differentiate with respect to the input.

    libra: True takes the gradients of LibraGrad, see ``libra``. Other arguments: see ``InputExplainer``.
    """

    needs_gradient = True

    def _compute_gradient(self, copy: nn.Module, inputs: Tensor, target: Target) -> Tensor:
        """Compute dy/dx at inputs (n, C, H, W), for one target per input or one for all."""
        with torch.enable_grad():
            inputs = inputs.detach().clone().requires_grad_()
            with delay_interrupts(), self._change_gradients():
                logits = run_copy(copy, inputs, self.output)
            (gradient,) = differentiate(compute_scores(logits, target).sum(), [inputs])
        assert gradient is not None
        return at_least_float32(check_finite(gradient, "the gradient at the inputs holds"))

    def _average_gradients(self, inputs: Tensor, target: Target, count: int, change: Callable) -> Tensor:
        """Average factor * gradient over ``count`` changed versions of each input, in batches.

        change: function from the indices of images and versions, (n,) each, to changed inputs (n, C, H, W) and their factors.
        """
        copy, images = make_eval_copy(self.model), len(inputs)
        target = self._choose_target(copy, inputs, target)
        total = torch.zeros_like(inputs, dtype=torch.promote_types(inputs.dtype, torch.float32))
        for chunk in torch.arange(images * count, device=inputs.device).split(choose_batch_size(inputs, self.batch_size)):
            owners, versions = chunk % images, chunk // images
            changed, factor = change(owners, versions)
            gradient = self._compute_gradient(copy, changed, select_targets(target, owners))
            total.index_add_(0, owners, (gradient * factor).to(total.dtype))
        return total / count


class Saliency(_GradientExplainer):
    """Saliency (Simonyan, Vedaldi, Zisserman 2014): the largest |dy/dx| of the channels."""

    def _compute_maps(self, inputs, target):
        return self._compute_gradient(make_eval_copy(self.model), inputs, target).abs().amax(1)


class InputXGradient(_GradientExplainer):
    """Input times gradient (Shrikumar et al. 2016), summed over the channels. Its sum is y for a model linear in x."""

    def _compute_maps(self, inputs, target):
        return (inputs * self._compute_gradient(make_eval_copy(self.model), inputs, target)).sum(1)


class IntegratedGradients(_GradientExplainer):
    """Integrated Gradients (Sundararajan, Taly, Yan 2017, Eq. 1): the gradient along a straight path from a baseline.

    The map sums to y(x) - y(baseline), up to the error of the midpoint rule.

    steps: points on the path. baseline: the image at its start, (3, H, W) or (N, 3, H, W) in [0, 255]; None is black.
    """

    def __init__(self, model, target_layer=None, preprocess=None, *, steps: int = 50, baseline: Tensor | None = None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps, self.baseline = steps, baseline

    def _prepare(self, images):
        inputs = super()._prepare(images)
        start = torch.zeros_like(images) if self.baseline is None else self.baseline.to(images).expand_as(images)
        return torch.cat([inputs, super()._prepare(start)])

    def _compute_maps(self, inputs, target):
        inputs, start = inputs.chunk(2)
        path = inputs - start

        def change(owners: Tensor, versions: Tensor) -> tuple[Tensor, Tensor]:
            share = ((versions + 0.5) / self.steps).to(inputs.dtype).view(-1, *[1] * (inputs.ndim - 1))
            return start[owners] + share * path[owners], path[owners]

        return self._average_gradients(inputs, target, self.steps, change).sum(1)


class ExpectedGradients(_GradientExplainer):
    """Expected Gradients (Erion et al. 2019, Eq. 5): Integrated Gradients, averaged over baselines drawn from data.

    baselines: images (M, 3, H, W) in [0, 255] to draw from. samples: draws of a baseline and a point on its path. seed: of the
    draws. In expectation the map sums to y(x) less the mean of y over the baselines.
    """

    def __init__(
        self, model, target_layer=None, preprocess=None, *, baselines: Tensor, samples: int = 100, seed: int = 0, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if baselines.ndim != 4 or not len(baselines):
            raise ValueError(f"baselines must be images (M, 3, H, W), got {tuple(baselines.shape)}")
        self.baselines, self.samples, self.seed = baselines, samples, seed

    def _compute_maps(self, inputs, target):
        starts = self._prepare(self.baselines.to(inputs.device))
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(starts), (self.samples,), generator=draw, device="cpu").to(inputs.device)
        # one point in each of ``samples`` equal parts of the path: fewer draws for the same error
        shares = torch.rand(self.samples, generator=draw, device="cpu")
        shares = (shares + torch.randperm(self.samples, generator=draw, device="cpu")) / self.samples
        shares = shares.to(inputs)

        def change(owners: Tensor, versions: Tensor) -> tuple[Tensor, Tensor]:
            path = inputs[owners] - starts[chosen[versions]]
            return inputs[owners] - (1 - shares[versions].view(-1, *[1] * (inputs.ndim - 1))) * path, path

        return self._average_gradients(inputs, target, self.samples, change).sum(1)


class SmoothGrad(_GradientExplainer):
    """SmoothGrad (Smilkov et al. 2017): the largest |mean dy/dx| of the channels, over copies with Gaussian noise.

    samples: noisy copies. noise: its standard deviation, as a share of each input's range. seed: of the noise.
    """

    def __init__(
        self, model, target_layer=None, preprocess=None, *, samples: int = 25, noise: float = 0.15, seed: int = 0, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1 or noise < 0:
            raise ValueError(f"samples must be at least 1 and noise at least 0, got {samples} and {noise}")
        self.samples, self.noise, self.seed = samples, noise, seed

    def _compute_maps(self, inputs, target):
        draw = torch.Generator().manual_seed(self.seed)
        axes = tuple(range(1, inputs.ndim))
        scale = self.noise * (inputs.amax(axes, keepdim=True) - inputs.amin(axes, keepdim=True))

        def change(owners: Tensor, versions: Tensor) -> tuple[Tensor, float]:
            noise = torch.randn(len(owners), *inputs.shape[1:], generator=draw, dtype=inputs.dtype, device="cpu").to(
                inputs.device
            )
            return inputs[owners] + scale[owners] * noise, 1.0

        return self._average_gradients(inputs, target, self.samples, change).abs().amax(1)
