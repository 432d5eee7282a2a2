"""Class activation maps by gradients and components: for each formula of ``scanlib.formulas`` the explainer that feeds it.

maps = GradCAM(model, "layer4", preprocess)(images)             # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
each = GradCAM(model, ["layer3", "layer4"], preprocess).for_classes(images, [3, 7])         # (N, 2, H, W)
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scanlib.explainers import formulas
from scanlib.explainers.base import Explainer, at_least_float32, normalize_map
from scanlib.explainers.formulas import FUSIONS, compute_first_component, fuse_maps
from scanlib.hooks import FeatureTaps
from scanlib.layers import eval_mode, find_default_layer, resolve_layer
from scanlib.targets import Target, compute_scores, contrast, is_callable_target, resolve_classes


class CAMExplainer(Explainer):
    """Every method's call; see ``Explainer``.

    Args:
        model: any classifier; with a callable target any model.
        target_layer: name, module, index, or a list of them, whose maps are fused; None takes the last layer with a spatial
            extent, which ``layers`` tells after the call.
        preprocess: what turns images in [0, 255] into the model's input; None passes them on as they are.
        fuse: how maps of several layers become one: "mean", "max", "product", "tanh" (Layer-CAM's), or a function of the list of
            maps (N, h, w), all resized to the finest. None: what the method's paper says, else "mean".
        reshape: the layer's output -> (N, C, h, w); None reads the layout off the shape (CNNs, Swin, tokens with any prefix).
        eigen_smooth: the first principal component of the channels' contributions in place of their sum.
        aug_smooth: the mean over mirrored and brighter or darker inputs (six in all).
        differentiable: keep the graph, so that the map's gradient reaches images and weights; for raw or normalised maps.
    """

    graph: str | None = "tail"  # what is recorded, and whether gradients have gradients: see FeatureTaps
    twice = False
    fusion = "mean"
    formula: Callable[..., Tensor]

    def __init__(
        self,
        model: nn.Module,
        target_layer=None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        fuse: str | Callable | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
        eigen_smooth: bool = False,
        aug_smooth: bool = False,
        differentiable: bool = False,
    ):
        super().__init__(model, target_layer, preprocess)
        layers = list(target_layer) if isinstance(target_layer, (list, tuple)) else [target_layer]
        if not layers:
            raise ValueError(f"target_layer {target_layer!r} is empty; give a layer, a list of them, or None for the last one")
        self.layers = None if target_layer is None else [resolve_layer(model, layer)[0] for layer in layers]
        self._found: dict[tuple[int, ...], str] = {}  # the last layer with a spatial extent, by the shape of an input
        fuse = fuse or self.fusion
        if not callable(fuse) and fuse not in FUSIONS:
            raise ValueError(f"fuse {fuse!r} is not known; take one of {', '.join(FUSIONS)}, or a function")
        self.fuse = fuse if callable(fuse) else FUSIONS[fuse]
        self.reshape, self.aug_smooth = reshape, aug_smooth
        component = "combine" not in inspect.signature(type(self).formula).parameters
        if eigen_smooth and component:
            raise ValueError(f"eigen_smooth is not for {type(self).__name__}, whose map is a component already; leave it out")
        if differentiable and (eigen_smooth or component):
            raise ValueError(
                "differentiable=True is not for principal components, which turn where eigenvalues meet; take GradCAM"
            )
        self.options = {"combine": compute_first_component} if eigen_smooth else {}
        self.differentiable = differentiable
        if differentiable:
            self.graph, self.twice = "whole", True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(self.layers or ['last spatial layer'])})"

    def for_classes(self, images: Tensor, classes: Sequence[Target], normalize: bool = True) -> Tensor:
        """The same images for K classes, (N, K, H, W), from one run of the model; (N, K, h, w) raw. classes: K targets."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable), eval_mode(self.model):
            inputs = self._inputs(images)
            if not len(images):
                return torch.zeros(0, len(classes), *images.shape[2:], device=images.device)
            maps = torch.stack(self._maps_for(inputs, list(classes)), 1)
        self._one_each(maps, images)
        if normalize:
            maps = normalize_map(maps.flatten(0, 1).relu(), images.shape[2:]).unflatten(0, maps.shape[:2])
        return maps.to(images.device)

    def _maps(self, inputs: Tensor, target: Target) -> Tensor:
        return self._maps_for(inputs, [target])[0]

    def _maps_for(self, inputs: Tensor, targets: list[Target]) -> list[Tensor]:
        """One raw map (N, h, w) for each target."""
        if self.target_layer is None:
            shape = tuple(inputs.shape[1:])
            if shape not in self._found:
                self._found[shape] = find_default_layer(self.model, shape[1:], shape[0])
            self.layers = [self._found[shape]]
        if not self.aug_smooth:
            return self._fused(inputs, targets)
        with FeatureTaps(self.model, self.layers, graph=None) as taps:
            logits = taps(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("aug_smooth mirrors the images, but not what a target says of places; leave it out for this model")
        # changed inputs must not be explained for other classes
        targets = [resolve_classes(logits, None) if target is None else target for target in targets]
        runs = [self._fused(scale * inputs, targets) for scale in (0.9, 1.0, 1.1)]
        mirrored = [self._fused(scale * inputs.flip(-1), targets) for scale in (0.9, 1.0, 1.1)]
        runs += [[maps.flip(-1) for maps in run] for run in mirrored]
        return [torch.stack(maps).mean(0) for maps in zip(*runs, strict=True)]

    def _fused(self, inputs: Tensor, targets: list[Target]) -> list[Tensor]:
        return [fuse_maps(maps, self.fuse) for maps in self._layer_maps(inputs, targets)]

    def _layer_maps(self, inputs: Tensor, targets: list[Target]) -> list[list[Tensor]]:
        """For each target one raw map (N, h, w) for each layer."""
        with FeatureTaps(self.model, self.layers, graph=self.graph, twice=self.twice) as taps:
            taps(inputs)
            features = self._arranged(taps, taps.features)
            formula = partial(type(self).formula, **self.options)
            return [list(map(formula, features, *self._evidence(taps, target))) for target in targets]

    def _evidence(self, taps: FeatureTaps, target: Target) -> list[list[Tensor]]:
        """What the formula wants besides the activations: for each of its arguments a tensor for each layer."""
        return [self._arranged(taps, taps.gradients(target))]

    def _arranged(self, taps: FeatureTaps, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each layer's tensor as (N, C, h, w), in single precision or better."""
        arrange = [self.reshape] * len(tensors) if self.reshape else [layout.to_maps for layout in taps.layouts]
        return [at_least_float32(to_maps(tensor)) for to_maps, tensor in zip(arrange, tensors, strict=True)]


class CAM(CAMExplainer):
    """CAM (Zhou et al. 2016, Eq. 2): relu(sum_c w_c A_c), w the class's weights in the linear layer behind the pooling.

    fc_layer: that layer (Linear, or a convolution of 1x1): name, module or index; None finds the one whose sizes fit. Targets are
    classes. ``CAMExplainer`` tells the other arguments, ``Explainer`` the call.
    """

    graph, formula = None, staticmethod(formulas.weighted_sum)

    def __init__(self, model, target_layer=None, preprocess=None, *, fc_layer=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        self.fc_layer = fc_layer

    def _evidence(self, taps, target):
        channels = [A.shape[1] for A in self._arranged(taps, taps.features)]
        if len(set(channels)) != 1:
            raise ValueError(f"target_layer has layers of {channels} channels; CAM reads the one in front of the pooling")
        if is_callable_target(target):
            raise TypeError("CAM's target must be a class, not a callable: it reads the head's weights; take GradCAM")
        classes = resolve_classes(taps.logits, target)
        weights = self._head(channels[0], taps.logits.shape[1])[classes]
        return [[at_least_float32(weights)] * len(channels)]

    def _head(self, channels: int, classes: int) -> Tensor:
        heads = dict(self.model.named_modules())
        if self.fc_layer is not None:
            try:
                heads = dict([resolve_layer(self.model, self.fc_layer)])
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("target_layer", "fc_layer")) from None
        fits = {
            name: module.weight
            for name, module in heads.items()
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and module.weight.shape[:2] == (classes, channels)
            and module.weight.numel() == classes * channels
        }
        if len(fits) != 1:
            found = ", ".join(fits) or "none"
            raise ValueError(
                f"CAM needs one linear layer from {channels} channels to {classes} classes, found: {found}; "
                "give fc_layer and the target_layer in front of it, or take GradCAM"
            )
        (weight,) = fits.values()
        return weight.reshape(classes, channels)


class GradCAM(CAMExplainer):
    """Grad-CAM (Selvaraju et al. 2017); formula: ``grad_cam``."""

    formula = staticmethod(formulas.grad_cam)


class GradCAMPlusPlus(CAMExplainer):
    """Grad-CAM++ (Chattopadhyay et al. 2018); formula: ``grad_cam_plus_plus``."""

    formula = staticmethod(formulas.grad_cam_plus_plus)


class SmoothGradCAMPlusPlus(CAMExplainer):
    """SmoothGrad-CAM++ (Omeiza et al. 2019); formula: ``smooth_grad_cam_plus_plus``.

    samples: noisy copies of the images. std: of the noise, in units of the model's input. seed: of the noise.
    """

    formula = staticmethod(formulas.smooth_grad_cam_plus_plus)

    def __init__(
        self, model, target_layer=None, preprocess=None, *, samples: int = 4, std: float = 0.3, seed: int = 0, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples {samples} is too few; give 1 or more")
        self.samples, self.std, self.seed = samples, std, seed

    def _layer_maps(self, inputs, targets):
        with FeatureTaps(self.model, self.layers, graph=self.graph, twice=self.twice) as taps:
            taps(inputs)
            features = self._arranged(taps, taps.features)
            targets = [resolve_classes(taps.logits, None) if target is None else target for target in targets]
            moments = [[[0.0] * 3 for _ in features] for _ in targets]  # mean g, g^2, g^3 for each target and layer
            generator = torch.Generator(inputs.device).manual_seed(self.seed)
            for _ in range(self.samples):
                noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
                taps(inputs + self.std * noise)
                for target, of_target in zip(targets, moments, strict=True):
                    for g, of_layer in zip(self._arranged(taps, taps.gradients(target)), of_target, strict=True):
                        of_layer[:] = [mean + g**power / self.samples for power, mean in enumerate(of_layer, 1)]
        formula = partial(type(self).formula, **self.options)
        return [[formula(A, *of_layer) for A, of_layer in zip(features, of_target, strict=True)] for of_target in moments]


class XGradCAM(CAMExplainer):
    """XGrad-CAM (Fu et al. 2020); formula: ``x_grad_cam``."""

    formula = staticmethod(formulas.x_grad_cam)


class LayerCAM(CAMExplainer):
    """Layer-CAM (Jiang et al. 2021); formula: ``layer_cam``. Several layers are fused by ``max_of_tanh``."""

    formula, fusion = staticmethod(formulas.layer_cam), "tanh"


class HiResCAM(CAMExplainer):
    """HiResCAM (Draelos, Carin 2020); formula: ``hires_cam``."""

    formula = staticmethod(formulas.hires_cam)


class GradCAMElementWise(CAMExplainer):
    """Element-wise Grad-CAM; formula: ``grad_cam_elementwise``."""

    formula = staticmethod(formulas.grad_cam_elementwise)


class ShapleyCAM(CAMExplainer):
    """ShapleyCAM (Cai 2025); formula: ``shapley_cam``. The paper explains the score ``targets.rest(class)``."""

    formula, twice = staticmethod(formulas.shapley_cam), True

    def __init__(self, model, target_layer=None, preprocess=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if self.differentiable and any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            raise ValueError(
                "differentiable=True is not for ShapleyCAM on models with LayerNorm, whose third derivative torch gets wrong; "
                "take GradCAM"
            )

    def _evidence(self, taps, target):
        products = []
        gradients = taps.gradients(target)
        for features, g in zip(taps.captured, gradients, strict=True):
            product = None
            if g.requires_grad:  # else the score is linear in the features
                with torch.enable_grad():
                    retain = {"retain_graph": True, "create_graph": self.differentiable}
                    vector = features if self.differentiable else features.detach()
                    (product,) = torch.autograd.grad(g, features, vector, allow_unused=True, **retain)
            products.append(torch.zeros_like(g) if product is None else product)
        return [self._arranged(taps, gradients), self._arranged(taps, products)]


class EigenCAM(CAMExplainer):
    """Eigen-CAM (Muhammad, Yeasin 2020); formula: ``eigen_cam``. The target makes no difference."""

    graph, formula = None, staticmethod(formulas.eigen_cam)

    def _evidence(self, taps, target):
        if target is not None:
            compute_scores(taps.logits, target)  # a wrong one is refused all the same
        return []


class EigenGradCAM(CAMExplainer):
    """Eigen-Grad-CAM; formula: ``eigen_grad_cam``."""

    formula = staticmethod(formulas.eigen_grad_cam)


class SegEigenCAM(CAMExplainer):
    """Seg-Eigen-CAM (Chung, Ying 2025); formula: ``seg_eigen_cam``."""

    formula = staticmethod(formulas.seg_eigen_cam)


class KPCACAM(CAMExplainer):
    """KPCA-CAM (Karmani et al. 2024); formula: ``kpca_cam``, with its kernel and gamma. The target makes no difference."""

    graph, formula = None, staticmethod(formulas.kpca_cam)
    _evidence = EigenCAM._evidence

    def __init__(
        self, model, target_layer=None, preprocess=None, *, kernel: str = "sigmoid", gamma: float | None = None, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        self.options |= {"kernel": kernel, "gamma": gamma}


class FEM(CAMExplainer):
    """FEM (Fuad et al. 2020); formula: ``fem``, with its k. The target makes no difference."""

    graph, formula = None, staticmethod(formulas.fem)
    _evidence = EigenCAM._evidence

    def __init__(self, model, target_layer=None, preprocess=None, *, k: float = 2.0, **options):
        super().__init__(model, target_layer, preprocess, **options)
        self.options |= {"k": k}


class FinerCAM(GradCAM):
    """Finer-CAM (Zhang et al. 2025): Grad-CAM of what sets the class apart from similar ones, ``targets.contrast``.

    references: the classes to compare with, or how many of those with the closest logits. strength: of the comparison. Any other
    method does the same with ``target=contrast(class)``.
    """

    def __init__(
        self,
        model,
        target_layer=None,
        preprocess=None,
        *,
        references: int | Sequence[int] = 3,
        strength: float = 1.0,
        **options,
    ):
        super().__init__(model, target_layer, preprocess, **options)
        self.references, self.strength = references, strength

    def _evidence(self, taps, target):
        if is_callable_target(target):
            raise TypeError("FinerCAM's target must be a class, not a callable: it makes its own; take GradCAM")
        classes = resolve_classes(taps.logits, target).tolist()
        return super()._evidence(taps, [contrast(c, self.references, self.strength) for c in classes])


class RefineCAM(GradCAMPlusPlus):
    """RefineCAM (arXiv 2605.14641): the product of several layers' Grad-CAM++ maps. Any method does it with fuse="product"."""

    fusion = "product"
