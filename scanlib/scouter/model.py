"""SCOUTER: a classifier whose logits are feature values weighted by attention maps. The attention of a class explains it.

Li, Wang, Verma, Nakashima, Kawasaki, Nagahara, "SCOUTER: Slot Attention-Based Classifier for Explainable Image Recognition",
ICCV 2021, arXiv 2009.06138.

    c = load_classifier("signs_cnn")                                                # any backbone; its head is removed
    scouter = Scouter(c.model, classes=10, sign=+1, preprocess=c.preprocess, image_size=64)
    logits = scouter(inputs)                                                        # (B, K)
    logits, attention = scouter.attend(inputs)                                      # attention (B, K, slots, h, w) in [0, 1]
    loss = compute_scouter_loss(logits, attention, labels, lam=10)                  # cross-entropy + lam * area ^ power
    maps = scouter.as_explainer()(images, target=3)                                 # (N, H, W), called like every explainer

For values V >= 0 at N locations, with m_n the mean of V_n over its channels, the logit is o_c = sign * sum_n A_cn m_n, where A_c
is the attention of class c. With sign +1 the predicted class has the largest sum, and its map shows the evidence for it. With
sign -1 the predicted class has the smallest sum; the map of the class with the lowest logit shows evidence against that class.
"""

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, at_least_float32, resize_map, scale_to_unit_range
from scanlib.hooks import check_finite
from scanlib.layers import Layout, find_default_layer, make_eval_copy, resolve_layer
from scanlib.models.freezing import FrozenStages
from scanlib.scouter.slot_attention import SlotOutput, XSlotAttention, encode_positions
from scanlib.structure.layout import is_channels_first
from scanlib.targets import Target, compute_scores


class Scouter(nn.Module):
    """Classifier made of a backbone, up to one layer, and slot attention on the features of that layer.

    Takes preprocessed images (B, 3, H, W) of any size that the backbone takes, and returns logits (B, K). Raises ValueError for
    channels that are not a multiple of 4 and for an image_size that the backbone does not take.

    Args:
        backbone: a model, trained with its own head first. It is copied, and modules that run only after ``layer`` are removed.
        classes: number of classes K, or their names.
        layer: name, module or index; None selects the last layer with a spatial extent.
        channels, slots, key_layers, iterations, sign, rescale, bias: see ``XSlotAttention``.
        freeze: number of backbone stages whose weights and statistics are frozen, with the stem; see ``FrozenStages``.
        preprocess: function from images in [0, 255] to model inputs. image_size: pixels per side or (H, W) to find the layer.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | Sequence[str],
        layer: str | int | nn.Module | None = None,
        *,
        channels: int = 64,
        slots: int = 1,
        key_layers: int = 1,
        iterations: int = 3,
        sign: int = 1,
        rescale: bool = False,
        bias: float = 0.0,
        freeze: int = 0,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        image_size: int | tuple[int, int] = 224,
    ):
        super().__init__()
        if channels < 4 or channels % 4:
            raise ValueError(f"channels must be a multiple of 4 (sine and cosine of row and column), got {channels}")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        colors = next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), 3)
        try:
            self.layer_name = resolve_layer(backbone, find_default_layer(backbone, size, colors) if layer is None else layer)[0]
            backbone, width = _remove_layers_behind(copy.deepcopy(backbone), self.layer_name, (colors, *size))
        except ValueError as error:
            if "the size that" not in str(error):  # vision transformers take one size only
                raise
            raise ValueError(f"image_size must fit the backbone, got {image_size}: {error}") from error
        self.classes = [str(c) for c in (range(classes) if isinstance(classes, int) else classes)]
        self.sign, self.preprocess = sign, preprocess or nn.Identity()
        self.backbone = FrozenStages(backbone, freeze)
        self.project = nn.Conv2d(width, channels, 1)
        self.slot_attention = XSlotAttention(len(self.classes), channels, slots, iterations, key_layers, sign, rescale, bias)
        self.to(next(backbone.parameters()))  # its device and precision

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attend(inputs).logits

    def attend(self, inputs: Tensor) -> SlotOutput:
        """Compute logits (B, K) and attention (B, K, slots, h, w) from preprocessed images (B, 3, H, W)."""
        return self.attend_features(self.extract_features(inputs))

    def extract_features(self, inputs: Tensor) -> Tensor:
        """Return the layer's output (B, C, h, w); modules behind the layer do not run."""
        return _run_up_to(self.backbone.model, self.layer_name, inputs)

    def attend_features(self, features: Tensor) -> SlotOutput:
        """Compute what ``attend`` returns from features (B, C, h, w)."""
        values = self.project(features).relu()  # (B, d, h, w)
        _, channels, height, width = values.shape
        positions = encode_positions(height, width, channels).to(values)
        logits, attention = self.slot_attention(values.flatten(2).mT, positions)
        return SlotOutput(logits, attention.unflatten(3, (height, width)))

    def as_explainer(self) -> "SlotExplainer":
        """Return the explainer of this model: ``explainer(images, target) -> maps (N, H, W)``."""
        return SlotExplainer(self)

    def compute_all_maps(self, images: Tensor) -> Tensor:
        """Compute the maps of all classes, (N, K, H, W) in [0, 1], from images in [0, 255]; (K, H, W) for a single image."""
        explainer = self.as_explainer()
        maps = explainer._run(images, lambda inputs: explainer._attend(inputs, normalize=True)[1], normalize=True)
        return maps.reshape(*images.shape[:-3], len(self.classes), *images.shape[-2:])  # gives an empty batch its K axis


class BaseClassifier(FrozenStages):
    """Classifier with a linear head, whose backbone a ``Scouter`` starts from. ``classes`` are the names of its classes."""

    def __init__(self, model: nn.Module, freeze: int, preprocess: Callable[[Tensor], Tensor], classes: list[str]):
        super().__init__(model, freeze, preprocess)
        self.classes = classes


class SlotExplainer(Explainer):
    """Explainer of a ``Scouter``: the attention of the last iteration, summed over the slots of a class.

    Maps are normalized over all classes and pixels of an image together, as in the paper: 0 is the lowest attention of any class
    and 1 the highest, so a class with lower attention has lower values. ``normalize=False`` returns the sums, (N, h, w) in
    [0, slots].

    For a callable target the map is the sum of all classes' maps, each weighted by d score / d logit: y_3 - y_5 gives map 3
    minus map 5, with negative values set to 0.
    """

    def __init__(self, scouter: Scouter):
        super().__init__(scouter, preprocess=scouter.preprocess)
        self.scouter = scouter

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        return self._run(images, lambda inputs: self._compute_maps(inputs, target, normalize), normalize)

    def _compute_maps(self, inputs: Tensor, target: Target, normalize: bool = False) -> Tensor:
        logits, attention = self._attend(inputs, normalize)
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            weights = torch.autograd.grad(compute_scores(logits, target).sum(), logits)[0]
        return torch.einsum("nk,nkhw->nhw", weights, attention)

    def _attend(self, inputs: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        copied: Any = make_eval_copy(self.scouter)
        logits, attention = copied.attend(inputs.clone())
        check_finite(attention, "the attention of the slots holds")
        attention = at_least_float32(attention).sum(2)  # (N, K, h, w)
        return logits, scale_to_unit_range(attention) if normalize else attention

    def _normalize(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Resize maps that ``_attend`` has normalized over all classes; differences of maps are clamped to [0, 1]."""
        return resize_map(maps.clamp(0, 1).flatten(0, -3), size).unflatten(0, maps.shape[:-2])


class _StopForward(Exception):
    """Ends a forward pass at a layer."""


def _run_up_to(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    """Run the model up to a layer and return the layer's output as (B, C, h, w)."""
    outputs, thread = [], threading.get_ident()

    def stop(module, inputs, output):
        if threading.get_ident() != thread:  # another thread runs the same model
            return
        outputs.append(output[0] if isinstance(output, (tuple, list)) else output)
        raise _StopForward

    with model.get_submodule(layer).register_forward_hook(stop), suppress(_StopForward):
        model(inputs)
    if not outputs:
        raise RuntimeError(f"layer must be called by the model, got {layer!r}, which did not run in the forward pass")
    channels_first = is_channels_first(model.get_submodule(layer), outputs[0])
    return Layout.infer(outputs[0].shape, tuple(inputs.shape[2:]), channels_first).to_maps(outputs[0])


def _remove_layers_behind(model: nn.Module, layer: str, shape: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Replace modules that run only after ``layer`` by identities; return the model and the layer's number of channels."""
    image = next(model.parameters()).new_zeros(1, *shape)
    calls: list[nn.Module | None] = []  # modules in the order in which they start; None when the layer has finished
    copied = make_eval_copy(model)
    originals = dict(zip(copied.modules(), model.modules(), strict=True))
    with torch.no_grad():
        width = _run_up_to(copied, layer, image).shape[1]
        for module in copied.modules():
            module.register_forward_pre_hook(lambda module, _: calls.append(originals[module]))
        copied.get_submodule(layer).register_forward_hook(lambda *_: calls.append(None))
        copied(image)
    end = len(calls) - calls[::-1].index(None)
    behind = set(calls[end:]) - set(calls[:end])
    for name, module in reversed(list(model.named_modules())):  # children before their parents
        parent = model.get_submodule(name.rpartition(".")[0])
        if module in behind and not isinstance(parent, nn.TransformerEncoderLayer):  # torch's layers read each other's attributes
            model.set_submodule(name, nn.Identity())
    return model, width
