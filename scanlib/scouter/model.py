"""SCOUTER: a classifier whose score *is* its explanation. Every class has slots that look around; what they find is the logit.

Li, Wang, Verma, Nakashima, Kawasaki, Nagahara, "SCOUTER: Slot Attention-Based Classifier for Explainable Image Recognition",
ICCV 2021, arXiv 2009.06138.

    scouter = Scouter(load_target("signs_cnn").model, classes=10, sign=+1)     # any backbone; its head is let go
    logits = scouter(inputs)                                # (B, K)
    logits, attention = scouter.attend(inputs)              # attention (B, K, slots, h, w) in [0, 1]
    loss = scouter_loss(logits, attention, labels, lam=10)  # cross-entropy + lam * area ^ power
    maps = scouter.explain(images, target=3)                # (N, H, W): the call every explainer answers

With values V >= 0 at N places and m_n the mean of V_n over its channels, the logit is o_c = sign * sum_n A_cn m_n: the mass that
the class's attention A covers. Positive slots win by finding much, and show why. Negative ones win by finding least: the class
with the lowest logit shows why it is not that one.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.base import Explainer, resize_map
from scanlib.layers import Layout, eval_mode, find_default_layer, resolve_layer
from scanlib.models.freezing import FrozenStages
from scanlib.scouter.slot_attention import SlotOutput, XSlotAttention, encode_positions
from scanlib.targets import Target, compute_scores


class Scouter(nn.Module):
    """A backbone up to one layer, and slots that look at its features.

    Args:
        backbone: a model; copied, and what it runs behind ``layer`` is let go. Its weights are where training starts: train it
            with its own head first.
        classes: their number. layer: name, module or index; None takes the last with a spatial extent.
        channels, slots, key_layers, iterations, sign, rescale, bias: see ``XSlotAttention``.
        freeze: how many of the backbone's stages keep their weights and statistics, its stem with them; see ``FrozenStages``.
        preprocess: images in [0, 255] -> the model's input, for ``explain``. image_size: pixels a side, for finding the layer.

    Any size of picture that the backbone takes works, square or not. (B, 3, H, W), preprocessed -> logits (B, K). Raises
    ValueError for an image_size that it does not take.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int,
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
            raise ValueError(f"channels {channels} must be a multiple of 4: sine and cosine of row and column")
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        pixels = next((module.in_channels for module in backbone.modules() if isinstance(module, nn.Conv2d)), 3)
        try:
            self.layer_name = resolve_layer(backbone, find_default_layer(backbone, size, pixels) if layer is None else layer)[0]
            front, width = _front(copy.deepcopy(backbone), self.layer_name, (pixels, *size))
        except AssertionError as error:  # vision transformers
            raise ValueError(f"image_size {image_size} does not fit the backbone: {error}") from error
        self.preprocess = preprocess or (lambda images: images)
        self.backbone = FrozenStages(front, freeze)
        self.project = nn.Conv2d(width, channels, 1)
        self.slot_attention = XSlotAttention(classes, channels, slots, iterations, key_layers, sign, rescale, bias)
        self.to(next(front.parameters()))  # its device and precision

    @property
    def sign(self) -> int:
        return self.slot_attention.sign

    def features(self, inputs: Tensor) -> Tensor:
        """The layer's output, (B, C, h, w); nothing behind the layer is run."""
        return _features(self.backbone.model, self.layer_name, inputs)

    def attend(self, inputs: Tensor) -> SlotOutput:
        """Preprocessed (B, 3, H, W) -> logits (B, K) and attention (B, K, slots, h, w)."""
        return self.look(self.features(inputs))

    def look(self, features: Tensor) -> SlotOutput:
        """``attend`` on what ``features`` gave, (B, C, h, w)."""
        values = self.project(features).relu()  # (B, d, h, w)
        _, channels, height, width = values.shape
        positions = encode_positions(height, width, channels).to(values)
        logits, attention = self.slot_attention(values.flatten(2).mT, positions)
        return SlotOutput(logits, attention.unflatten(3, (height, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attend(inputs).logits

    # --- the explanation ---

    def explain(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        """Images (N, 3, H, W) in [0, 255] -> maps (N, H, W) in [0, 1]: where the class's slots look; see ``SlotExplainer``."""
        return SlotExplainer(self, preprocess=self.preprocess)(images, target, normalize)

    def heat_maps(self, images: Tensor) -> Tensor:
        """Every class's map, (N, K, H, W) in [0, 1], of images in [0, 255]; stretched over all of an image's classes together."""
        explainer = SlotExplainer(self, preprocess=self.preprocess)
        with torch.no_grad(), eval_mode(self):
            attention = self.attend(explainer._inputs(images)).attention.sum(2)
        maps = F.interpolate(_stretched(attention), size=tuple(images.shape[2:]), mode="bilinear", align_corners=False)
        return maps.to(images.device)


class _Reached(Exception):
    """The layer has run: nothing behind it is needed."""


def _features(model: nn.Module, layer: str, inputs: Tensor) -> Tensor:
    def leave(module, inputs, output):
        raise _Reached(output)

    handle = model.get_submodule(layer).register_forward_hook(leave)
    try:
        model(inputs)
        raise RuntimeError(f"layer {layer!r} did not run in the forward pass; take one that the model calls")
    except _Reached as reached:
        output = reached.args[0]
    finally:
        handle.remove()
    output = output[0] if isinstance(output, (tuple, list)) else output
    return Layout.infer(output.shape, tuple(inputs.shape[2:])).to_maps(output)


def _front(model: nn.Module, layer: str, shape: tuple[int, int, int]) -> tuple[nn.Module, int]:
    """The model without what it begins behind the layer, and the number of the layer's features."""
    picture = next(model.parameters()).new_zeros(1, *shape)
    with torch.no_grad(), eval_mode(model):
        width = _features(model, layer, picture).shape[1]
        ran = []  # in order of their beginning
        handles = [module.register_forward_pre_hook(lambda module, _: ran.append(module)) for module in model.modules()]
        done = model.get_submodule(layer).register_forward_hook(lambda *_: ran.append(None))
        try:
            model(picture)
        finally:
            for handle in (*handles, done):
                handle.remove()
    before = len(ran) - ran[::-1].index(None)
    behind = set(ran[before:]) - set(ran[:before])
    gone: list[str] = []
    for name, module in list(model.named_modules()):
        if module in behind and any(True for _ in module.parameters()) and not any(name.startswith(f"{n}.") for n in gone):
            gone.append(name)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, nn.Identity())
    return model, width


class SlotExplainer(Explainer):
    """A Scouter's maps by the common call: the attention of the last look, summed over a class's slots.

    Stretched over all classes and pixels of an image together, as in the paper: 0 is the least that any class saw anywhere, 1
    the most, and a class that saw less stays darker. ``normalize=False``: the sums themselves, (N, h, w), in [0, slots].

    target: None (predicted class), a class, one per image, or callables: those give the classes' maps weighted by the score's
    derivatives for their logits, so that y_3 - y_5 asks what speaks for 3 and not for 5. For a negative sign a class's map is
    what speaks against it: ask for the class with the lowest logit.
    """

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), eval_mode(self.model):
            inputs = self._inputs(images)
            if not len(images):
                return torch.zeros(0, *images.shape[2:], device=images.device)
            logits, attention = self.model.attend(inputs)
            attention = attention.sum(2)  # (N, K, h, w)
            if normalize:
                attention = _stretched(attention)
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                weights = torch.autograd.grad(compute_scores(logits, target).sum(), logits)[0]
            maps = torch.einsum("nk,nkhw->nhw", weights, attention)
            return (resize_map(maps.clamp(0, 1), images.shape[2:]) if normalize else maps).to(images.device)


def _stretched(attention: Tensor) -> Tensor:
    """(N, K, h, w), min-max over all classes and pixels of an image."""
    low, high = attention.amin((1, 2, 3), keepdim=True), attention.amax((1, 2, 3), keepdim=True)
    return (attention - low) / (high - low).clamp_min(torch.finfo(attention.dtype).tiny)
