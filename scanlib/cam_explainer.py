"""What every class activation map shares: its layers, found and fused; smoothing; several classes from one run of the model.

A method adds its ``formula`` (activations, and what ``_evidence`` gives -> map): see ``scanlib.cams``, ``scanlib.perturbation``.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from scanlib.explainer import Explainer, exact
from scanlib.formulas import first_component
from scanlib.fusing import FUSE, fused
from scanlib.hooks import FeatureTaps
from scanlib.layers import resolve_layer
from scanlib.maps import stretched
from scanlib.models import default_layer
from scanlib.outputs import evaluating
from scanlib.targets import Target, class_indices


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
        if not callable(fuse) and fuse not in FUSE:
            raise ValueError(f"fuse {fuse!r} is not known; take one of {', '.join(FUSE)}, or a function")
        self.fuse = fuse if callable(fuse) else FUSE[fuse]
        self.reshape, self.aug_smooth = reshape, aug_smooth
        component = "combine" not in inspect.signature(type(self).formula).parameters
        if eigen_smooth and component:
            raise ValueError(f"eigen_smooth is not for {type(self).__name__}, whose map is a component already; leave it out")
        if differentiable and (eigen_smooth or component):
            raise ValueError(
                "differentiable=True is not for principal components, which turn where eigenvalues meet; take GradCAM"
            )
        self.options = {"combine": first_component} if eigen_smooth else {}
        self.differentiable = differentiable
        if differentiable:
            self.graph, self.twice = "whole", True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {', '.join(self.layers or ['last spatial layer'])})"

    def for_classes(self, images: Tensor, classes: Sequence[Target], normalize: bool = True) -> Tensor:
        """The same images for K classes, (N, K, H, W), from one run of the model; (N, K, h, w) raw. classes: K targets."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable), evaluating(self.model):
            inputs = self._inputs(images)
            if not len(images):
                return torch.zeros(0, len(classes), *images.shape[2:], device=images.device)
            maps = torch.stack(self._maps_for(inputs, list(classes)), 1)
        self._one_each(maps, images)
        if normalize:
            maps = stretched(maps.flatten(0, 1).relu(), images.shape[2:]).unflatten(0, maps.shape[:2])
        return maps.to(images.device)

    def _maps(self, inputs: Tensor, target: Target) -> Tensor:
        return self._maps_for(inputs, [target])[0]

    def _maps_for(self, inputs: Tensor, targets: list[Target]) -> list[Tensor]:
        """One raw map (N, h, w) for each target."""
        if self.target_layer is None:
            shape = tuple(inputs.shape[1:])
            if shape not in self._found:
                self._found[shape] = default_layer(self.model, shape[1:], shape[0])
            self.layers = [self._found[shape]]
        if not self.aug_smooth:
            return self._fused(inputs, targets)
        with FeatureTaps(self.model, self.layers, graph=None) as taps:
            logits = taps(inputs)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("aug_smooth mirrors the images, but not what a target says of places; leave it out for this model")
        # changed inputs must not be explained for other classes
        targets = [class_indices(logits, None) if target is None else target for target in targets]
        runs = [self._fused(scale * inputs, targets) for scale in (0.9, 1.0, 1.1)]
        mirrored = [self._fused(scale * inputs.flip(-1), targets) for scale in (0.9, 1.0, 1.1)]
        runs += [[maps.flip(-1) for maps in run] for run in mirrored]
        return [torch.stack(maps).mean(0) for maps in zip(*runs, strict=True)]

    def _fused(self, inputs: Tensor, targets: list[Target]) -> list[Tensor]:
        return [fused(maps, self.fuse) for maps in self._layer_maps(inputs, targets)]

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
        return [exact(to_maps(tensor)) for to_maps, tensor in zip(arrange, tensors, strict=True)]
