"""Class activation maps: weights from gradients, principal components or the classifier's head; see ``formulas``.

maps = GradCAM(model, "layer4", preprocess)(images)             # (N, 3, H, W) in [0, 255] -> (N, H, W) in [0, 1]
maps = GradCAM(model, ["layer3", "layer4"], preprocess).explain_classes(images, [3, 7])     # (N, 2, H, W)
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scanlib.explainers import formulas
from scanlib.explainers.base import Explainer, at_least_float32, full_precision
from scanlib.explainers.formulas import FUSIONS, compute_first_component, fuse_maps
from scanlib.hooks import FeatureTaps
from scanlib.layers import resolve_layer
from scanlib.targets import Contrast, Target, check_count, compute_scores, is_callable_target, resolve_classes


class CAMExplainer(Explainer):
    """Base class of the class activation maps. See ``Explainer`` for the call, the model and preprocess.

    It runs ``_compute_class_maps`` (smoothing, fusion) -> ``_compute_layer_maps`` (formula) -> ``_compute_arguments``.

    Args:
        target_layer: name, module, index, or a list of them to fuse. None uses
            ``find_default_layer``; ``layers`` holds its name after the call.
        fuse: how to fuse several layers: "mean", "max", "product", "tanh" (Layer-CAM), or a function of the list of raw maps
            (N, h, w), resized to the largest. None uses the fusion of the method's paper, else "mean".
        reshape: function from the layer's output to (N, C, h, w). None infers it from the shape (CNNs, Swin, tokens).
        eigen_smooth: use the first principal component of the channels' contributions instead of their sum.
        aug_smooth: average over six inputs: mirrored or not, their values multiplied by 0.9, 1 and 1.1.
        differentiable: keep the autograd graph, so that the maps can be differentiated with respect to images and weights.

    Raises ValueError for an unknown layer or fusion, and for options that the method does not support.
    """

    needs_gradient = True  # whether the formula takes the score's gradient
    create_graph = False  # whether that gradient is differentiated again
    fusion = "mean"
    is_component = False  # whether the formula computes a principal component
    formula: Callable[..., Tensor]

    def __init__(
        self,
        model: nn.Module,
        target_layer=None,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        *,
        fuse: str | Callable[[Sequence[Tensor]], Tensor] | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
        eigen_smooth: bool = False,
        aug_smooth: bool = False,
        differentiable: bool = False,
        **options,
    ):
        super().__init__(model, target_layer, preprocess, **options)
        layers = target_layer if isinstance(target_layer, (list, tuple)) else [target_layer]
        if not layers:
            raise ValueError(f"target_layer must be a layer, a list of layers, or None for the last one, got {target_layer!r}")
        self.layers = [] if target_layer is None else [resolve_layer(model, layer)[0] for layer in layers]
        fuse = fuse or self.fusion
        if not callable(fuse) and fuse not in FUSIONS:
            raise ValueError(f"fuse must be one of {', '.join(FUSIONS)}, or a function, got {fuse!r}")
        self.fuse = fuse if callable(fuse) else FUSIONS[fuse]
        self.reshape, self.aug_smooth, self.differentiable = reshape, aug_smooth, differentiable
        if eigen_smooth and self.is_component:
            raise ValueError(f"eigen_smooth must be False for {type(self).__name__}, whose map is a principal component already")
        if differentiable and (eigen_smooth or self.is_component):
            raise ValueError(
                "differentiable must be False for principal components, which have no derivative everywhere; use GradCAM"
            )
        if eigen_smooth:
            self.formula = partial(self.formula, combine=compute_first_component)
        self.record = "all" if differentiable else "after" if self.needs_gradient else None
        self.create_graph = self.create_graph or differentiable

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(self.layers) or 'last spatial layer'})"

    def explain_classes(self, images: Tensor, classes: Sequence[Target], normalize: bool = True) -> Tensor:
        """Explain the same images for K classes with the forward passes of one: (N, K, H, W), or (K, H, W) for a single image.

        classes: K targets. images, normalize, and each target: as in ``__call__``; raw maps are (N, K, h, w).
        """
        targets = list(classes)
        maps = self._run(images, lambda inputs: torch.stack(self._compute_class_maps(inputs, targets), 1), normalize)
        return maps if len(maps) else maps.new_zeros(0, len(targets), *maps.shape[1:])

    def _compute_maps(self, inputs: Tensor, target: Target) -> Tensor:
        return self._compute_class_maps(inputs, [target])[0]

    def _compute_class_maps(self, inputs: Tensor, targets: list[Target]) -> list[Tensor]:
        """Compute a raw map (N, h, w) for each target: smooth over changed inputs, fuse the layers."""
        layers = self.layers
        if self.target_layer is None:
            self.layers = layers = [self._find_default_layer(inputs)]  # for information: other threads may overwrite it
        if not self.aug_smooth:
            return [fuse_maps(maps, self.fuse) for maps in self._compute_layer_maps(inputs, targets, layers)]
        with torch.no_grad():
            logits = self._compute_logits(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError(
                "aug_smooth must be False for this model: it mirrors the images, but not the mask or boxes of a target"
            )
        targets = choose_classes_once(targets, logits)
        changed = [scale * x for x in (inputs, inputs.flip(-1)) for scale in (0.9, 1.0, 1.1)]
        runs = [[fuse_maps(maps, self.fuse) for maps in self._compute_layer_maps(x, targets, layers)] for x in changed]
        runs[3:] = [[maps.flip(-1) for maps in run] for run in runs[3:]]
        return [torch.stack(maps).mean(0) for maps in zip(*runs, strict=True)]

    def _compute_layer_maps(self, inputs: Tensor, targets: list[Target], layers: list[str]) -> list[list[Tensor]]:
        """Compute a raw map (N, h, w) for each target and layer."""
        with self._open_taps(layers, record=self.record, create_graph=self.create_graph) as taps:
            taps(inputs)
            A = self._to_maps(taps, taps.features)
            all_arguments = self._compute_all_arguments(taps, inputs, targets)
            with full_precision(inputs):
                return [list(map(self.formula, A, *arguments)) for arguments in all_arguments]

    def _compute_all_arguments(self, taps: FeatureTaps, inputs: Tensor, targets: list[Target]) -> list[list[Sequence[Tensor]]]:
        """Compute the formula's arguments besides the activations: for each target and argument one tensor per layer."""
        return [self._compute_arguments(taps, target) for target in targets]

    def _compute_arguments(self, taps: FeatureTaps, target: Target) -> list[Sequence[Tensor]]:
        if self.needs_gradient:
            return [self._to_maps(taps, taps.gradients(target))]
        if target is not None:
            compute_scores(taps.logits, target)  # raises for an invalid target
        return []

    def _to_maps(self, taps: FeatureTaps, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Convert each layer's tensor to (N, C, h, w), in float32 or better."""
        convert = [self.reshape] * len(tensors) if self.reshape else [layout.to_maps for layout in taps.layouts]
        return [at_least_float32(to_maps(tensor)) for to_maps, tensor in zip(convert, tensors, strict=True)]


def choose_classes_once(targets: Sequence[Target], logits: Tensor) -> list[Target]:
    """Replace classes and None by one class per image, so that changed inputs are explained for the same classes.

    Raises ValueError for a wrong class, and for a wrong number of classes or callables.
    """
    for target in targets:
        check_count(target, len(logits))
    return [target if is_callable_target(target) else resolve_classes(logits, target) for target in targets]


class CAM(CAMExplainer):
    """CAM (Zhou et al. 2016, Eq. 2): relu(sum_c w_c A_c), w the class's weights in the linear layer after the pooling.

    fc_layer: that layer (Linear, or a 1x1 convolution): name, module or index; None finds it by its size. Targets must be
    classes. Other arguments: see ``CAMExplainer``.
    """

    formula, needs_gradient = staticmethod(formulas.weighted_sum), False

    def __init__(self, model, target_layer=None, preprocess=None, *, fc_layer=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        self.fc_layer = fc_layer

    def _compute_arguments(self, taps, target):
        channels = [A.shape[1] for A in self._to_maps(taps, taps.features)]
        if len(set(channels)) != 1:
            raise ValueError(f"target_layer must be the layer before the pooling, got layers of {channels} channels")
        if is_callable_target(target):
            raise TypeError("target must be a class for CAM, which reads the head's weights, got a callable; use GradCAM")
        classes = resolve_classes(taps.logits, target)
        weights = self._find_weights(channels[0], taps.logits.shape[1])[classes]
        return [[at_least_float32(weights)] * len(channels)]

    def _find_weights(self, channels: int, classes: int) -> Tensor:
        """Return the weights (classes, channels) of the linear layer after the pooling."""
        candidates = dict(self.model.named_modules())
        if self.fc_layer is not None:
            try:
                candidates = dict([resolve_layer(self.model, self.fc_layer)])
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("target_layer", "fc_layer")) from None
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        weights = {name: module.weight for name, module in candidates.items() if isinstance(module, kinds)}
        found = {name: w for name, w in weights.items() if w.shape == (classes, channels, *[1] * (w.ndim - 2))}
        if len(found) != 1:
            needed = f"one linear layer from {channels} channels to {classes} classes, found: {', '.join(found) or 'none'}"
            raise ValueError(f"fc_layer must be {needed}; give fc_layer and the target_layer before it, or use GradCAM")
        return found.popitem()[1].reshape(classes, channels)


class GradCAM(CAMExplainer):
    """Grad-CAM (Selvaraju et al. 2017); formula: ``grad_cam``."""

    formula = staticmethod(formulas.grad_cam)


class GradCAMPlusPlus(CAMExplainer):
    """Grad-CAM++ (Chattopadhyay et al. 2018); formula: ``grad_cam_plus_plus``."""

    formula = staticmethod(formulas.grad_cam_plus_plus)


class SmoothGradCAMPlusPlus(CAMExplainer):
    """SmoothGrad-CAM++ (Omeiza et al. 2019); formula: ``smooth_grad_cam_plus_plus``.

    samples: number of noisy copies of the images. std: standard deviation of the noise, in units of the model's input. seed: of
    the noise. Other arguments: see ``CAMExplainer``.
    """

    formula = staticmethod(formulas.smooth_grad_cam_plus_plus)

    def __init__(self, model, target_layer=None, preprocess=None, *, samples=4, std=0.3, seed=0, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples, self.std, self.seed = samples, std, seed

    def _compute_all_arguments(self, taps, inputs, targets):
        targets = choose_classes_once(targets, taps.logits)
        generator = torch.Generator(inputs.device).manual_seed(self.seed)
        means: list[list[list[Tensor | float]]] = [[[0.0] * 3 for _ in taps.names] for _ in targets]  # of G, G^2, G^3
        for _ in range(self.samples):
            noise = torch.randn(inputs.shape, generator=generator, device=inputs.device, dtype=inputs.dtype)
            taps(inputs + self.std * noise)
            for target, of_target in zip(targets, means, strict=True):
                for G, of_layer in zip(self._to_maps(taps, taps.gradients(target)), of_target, strict=True):
                    wide = G if G.device.type == "mps" else G.double()
                    of_layer[:] = [mean + wide**power / self.samples for power, mean in enumerate(of_layer, 1)]
        return [list(zip(*of_target, strict=True)) for of_target in means]


class XGradCAM(CAMExplainer):
    """XGrad-CAM (Fu et al. 2020); formula: ``x_grad_cam``."""

    formula = staticmethod(formulas.x_grad_cam)


class LayerCAM(CAMExplainer):
    """Layer-CAM (Jiang et al. 2021); formula: ``layer_cam``. Several layers are fused by ``fuse_by_tanh``."""

    formula, fusion = staticmethod(formulas.layer_cam), "tanh"


class HiResCAM(CAMExplainer):
    """HiResCAM (Draelos, Carin 2020); formula: ``hires_cam``."""

    formula = staticmethod(formulas.hires_cam)


class GradCAMElementWise(CAMExplainer):
    """Element-wise Grad-CAM; formula: ``grad_cam_elementwise``."""

    formula = staticmethod(formulas.grad_cam_elementwise)


class ShapleyCAM(CAMExplainer):
    """ShapleyCAM (Cai 2025); formula: ``shapley_cam``. The paper explains the score ``targets.ReST(class)``."""

    formula, create_graph = staticmethod(formulas.shapley_cam), True

    def __init__(self, model, target_layer=None, preprocess=None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        if self.differentiable and any(isinstance(module, nn.LayerNorm) for module in model.modules()):
            raise ValueError("differentiable must be False with LayerNorm, whose third derivative is wrong in torch; use GradCAM")

    def _compute_arguments(self, taps, target):
        gradients = taps.gradients(target)
        products = [self._multiply_hessian(A, G) for A, G in zip(taps.captured, gradients, strict=True)]
        return [self._to_maps(taps, gradients), self._to_maps(taps, products)]

    def _multiply_hessian(self, A: Tensor, G: Tensor) -> Tensor:
        """Compute H A with H = dG / dA."""
        if not G.requires_grad:  # the score is linear in A
            return torch.zeros_like(G)
        vector, again = A if self.differentiable else A.detach(), self.differentiable
        with torch.enable_grad():
            return torch.autograd.grad(G, A, vector, retain_graph=True, create_graph=again, materialize_grads=True)[0]


class EigenCAM(CAMExplainer):
    """Eigen-CAM (Muhammad, Yeasin 2020); formula: ``eigen_cam``. The map is the same for all classes."""

    formula, is_component, needs_gradient = staticmethod(formulas.eigen_cam), True, False


class EigenGradCAM(CAMExplainer):
    """Eigen-Grad-CAM; formula: ``eigen_grad_cam``."""

    formula, is_component = staticmethod(formulas.eigen_grad_cam), True


class SegEigenCAM(CAMExplainer):
    """Seg-Eigen-CAM (Chung, Ying 2025); formula: ``seg_eigen_cam``."""

    formula, is_component = staticmethod(formulas.seg_eigen_cam), True


class KPCACAM(CAMExplainer):
    """KPCA-CAM (Karmani et al. 2024); formula: ``kpca_cam``, with its kernel and gamma. The map is the same for all classes."""

    formula, is_component, needs_gradient = staticmethod(formulas.kpca_cam), True, False

    def __init__(self, model, target_layer=None, preprocess=None, *, kernel="sigmoid", gamma: float | None = None, **options):
        super().__init__(model, target_layer, preprocess, **options)
        self.formula = partial(self.formula, kernel=kernel, gamma=gamma)


class FEM(CAMExplainer):
    """FEM (Fuad et al. 2020); formula: ``fem``, with its k. The map is the same for all classes."""

    formula, needs_gradient = staticmethod(formulas.fem), False

    def __init__(self, model, target_layer=None, preprocess=None, *, k=2.0, **options):
        super().__init__(model, target_layer, preprocess, **options)
        self.formula = partial(self.formula, k=k)


class FinerCAM(GradCAM):
    """Finer-CAM (Zhang et al. 2025): Grad-CAM of ``targets.Contrast``, the difference between a class and similar ones.

    references: the classes to compare with, or the number of classes with the closest logits. strength: weight of their scores.
    Other methods do the same with ``target=Contrast(class)``.
    """

    def __init__(
        self, model, target_layer=None, preprocess=None, *, references: int | Sequence[int] = 3, strength=1.0, **options
    ):
        super().__init__(model, target_layer, preprocess, **options)
        self.references, self.strength = references, strength

    def _compute_arguments(self, taps, target):
        if is_callable_target(target):
            raise TypeError("target must be a class for FinerCAM, which builds its own Contrast, got a callable; use GradCAM")
        classes = resolve_classes(taps.logits, target).tolist()
        return super()._compute_arguments(taps, [Contrast(c, self.references, self.strength) for c in classes])


class RefineCAM(GradCAMPlusPlus):
    """RefineCAM (arXiv 2605.14641): the product of the Grad-CAM++ maps of a list of layers; one layer gives Grad-CAM++."""

    fusion = "product"
