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
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.distributed import summed
from scanlib.explainer import Explainer, exact
from scanlib.freezing import Frozen
from scanlib.hooks import Layout, Target, evaluating, resolve_layer, target_scores
from scanlib.maps import resized
from scanlib.models import default_layer


class Slots(NamedTuple):
    """What slot attention returns: logits (B, K), attention (B, K, slots, ...) in [0, 1]."""

    logits: Tensor
    attention: Tensor


class XSlotAttention(nn.Module):
    """Slots of every class look at the values, three times, each time knowing what they saw before (paper, Sect. 3.2).

    Args:
        classes: K. channels: d, of values and slots. slots: per class. iterations: how often they look.
        key_layers: linear layers that make keys, with ReLU in between.
        sign: +1, what is found speaks for the class; -1, against it.
        rescale: every row of scores scaled to the sum of all, as in the released code and not in the paper. It couples every
            class to every other.

    Slots are drawn once from a normal distribution and learned.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 64,
        slots: int = 1,
        iterations: int = 3,
        key_layers: int = 1,
        sign: int = 1,
        rescale=False,
    ):
        super().__init__()
        for name, value in {"classes": classes, "slots": slots, "iterations": iterations, "key_layers": key_layers}.items():
            if value != int(value) or value < 1:
                raise ValueError(f"{name} {value} is no count; give 1 or more")
        if sign not in (1, -1):
            raise ValueError(f"sign {sign!r} is not known; take +1, evidence for a class, or -1, against it")
        self.classes, self.iterations, self.sign, self.rescale = classes, iterations, sign, rescale
        self.slots = nn.Parameter(torch.randn(classes * slots, channels))
        layers = [layer for _ in range(key_layers) for layer in (nn.Linear(channels, channels), nn.ReLU())]
        self.keys = nn.Sequential(*layers[:-1])
        self.update = nn.GRUCell(channels, channels)

    def forward(self, values: Tensor, positions: Tensor) -> Slots:
        """Values (B, N, d), not negative, and the code of their places (N, d) -> logits (B, K), attention (B, K, slots, N).

        Raises FloatingPointError where rescaling would divide by zero.
        """
        batch, _, channels = values.shape
        keys = self.keys(values + positions)  # (B, N, d): only keys know where they are
        slots = self.slots.to(keys.dtype).expand(batch, -1, -1)  # (B, S, d), S = K * slots
        for iteration in range(self.iterations):
            if iteration:
                slots = self.update(found.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)  # noqa: F821
            scores = slots @ keys.mT / math.sqrt(channels)  # (B, S, N)
            if self.rescale:
                scores = _rescaled(scores)
            attention = scores.sigmoid()  # no softmax: slots do not compete
            found = attention @ values / channels  # (B, S, d)
        logits = self.sign * exact(found).unflatten(1, (self.classes, -1)).sum((2, 3))
        return Slots(logits, attention.unflatten(1, (self.classes, -1)))


def _rescaled(scores: Tensor) -> Tensor:
    """Each row times the sum of all rows over its own."""
    sums = scores.sum(2, keepdim=True)
    if (sums == 0).any():
        raise FloatingPointError("a slot's scores sum to zero, so they can not be rescaled; take rescale=False, as in the paper")
    return scores / sums * sums.sum(1, keepdim=True)


def position_code(height: int, width: int, channels: int) -> Tensor:
    """Sines and cosines of the row, then of the column, d / 2 channels each: (h * w, d), row by row (Carion et al. 2020, DETR).

    Rows and columns run over (0, 2 pi] whatever their number; the k-th pair has the frequency 10000 ^ (-4 k / d).
    """
    frequency = 10_000 ** (-4 / channels * torch.arange(channels // 4))

    def code(count):
        angle = 2 * math.pi / count * torch.arange(1, count + 1)[:, None] * frequency  # (count, d / 4)
        return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)  # (count, d / 2)

    rows, columns = code(height)[:, None].expand(-1, width, -1), code(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class Scouter(nn.Module):
    """A backbone up to one layer, and slots that look at its features.

    Args:
        backbone: a model; copied, and what it runs behind ``layer`` is let go. Its weights are where training starts: train it
            with its own head first.
        classes: their number. layer: name, module or index; None takes the last with a spatial extent.
        channels, slots, key_layers, iterations, sign, rescale: see ``XSlotAttention``.
        freeze: how many of the backbone's stages keep their weights and statistics, its stem with them; see ``Frozen``.
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
            self.layer_name = resolve_layer(backbone, default_layer(backbone, size, pixels) if layer is None else layer)[0]
            front, width = _front(copy.deepcopy(backbone), self.layer_name, (pixels, *size))
        except AssertionError as error:  # vision transformers
            raise ValueError(f"image_size {image_size} does not fit the backbone: {error}") from error
        self.preprocess = preprocess or (lambda images: images)
        self.backbone = Frozen(front, freeze)
        self.project = nn.Conv2d(width, channels, 1)
        self.slot_attention = XSlotAttention(classes, channels, slots, iterations, key_layers, sign, rescale)
        self.to(next(front.parameters()))  # its device and precision

    @property
    def sign(self) -> int:
        return self.slot_attention.sign

    def features(self, inputs: Tensor) -> Tensor:
        """The layer's output, (B, C, h, w); nothing behind the layer is run."""
        return _features(self.backbone.model, self.layer_name, inputs)

    def attend(self, inputs: Tensor) -> Slots:
        """Preprocessed (B, 3, H, W) -> logits (B, K) and attention (B, K, slots, h, w)."""
        return self.look(self.features(inputs))

    def look(self, features: Tensor) -> Slots:
        """``attend`` on what ``features`` gave, (B, C, h, w)."""
        values = self.project(features).relu()  # (B, d, h, w)
        _, channels, height, width = values.shape
        positions = position_code(height, width, channels).to(values)
        logits, attention = self.slot_attention(values.flatten(2).mT, positions)
        return Slots(logits, attention.unflatten(3, (height, width)))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attend(inputs).logits

    # --- the explanation ---

    def explain(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        """Images (N, 3, H, W) in [0, 255] -> maps (N, H, W) in [0, 1]: where the class's slots look; see ``SlotMaps``."""
        return SlotMaps(self, preprocess=self.preprocess)(images, target, normalize)

    def heat_maps(self, images: Tensor) -> Tensor:
        """Every class's map, (N, K, H, W) in [0, 1], of images in [0, 255]; stretched over all of an image's classes together."""
        explainer = SlotMaps(self, preprocess=self.preprocess)
        with torch.no_grad(), evaluating(self):
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
    with torch.no_grad(), evaluating(model):
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


class SlotMaps(Explainer):
    """A Scouter's maps by the common call: the attention of the last look, summed over a class's slots.

    Stretched over all classes and pixels of an image together, as in the paper: 0 is the least that any class saw anywhere, 1
    the most, and a class that saw less stays darker. ``normalize=False``: the sums themselves, (N, h, w), in [0, slots].

    target: None (predicted class), a class, one per image, or callables: those give the classes' maps weighted by the score's
    derivatives for their logits, so that y_3 - y_5 asks what speaks for 3 and not for 5. For a negative sign a class's map is
    what speaks against it: ask for the class with the lowest logit.
    """

    def __call__(self, images: Tensor, target: Target = None, normalize: bool = True) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), evaluating(self.model):
            inputs = self._inputs(images)
            if not len(images):
                return torch.zeros(0, *images.shape[2:], device=images.device)
            logits, attention = self.model.attend(inputs)
            attention = attention.sum(2)  # (N, K, h, w)
            if normalize:
                attention = _stretched(attention)
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                weights = torch.autograd.grad(target_scores(logits, target).sum(), logits)[0]
            maps = torch.einsum("nk,nkhw->nhw", weights, attention)
            return (resized(maps.clamp(0, 1), images.shape[2:]) if normalize else maps).to(images.device)


def _stretched(attention: Tensor) -> Tensor:
    """(N, K, h, w), min-max over all classes and pixels of an image."""
    low, high = attention.amin((1, 2, 3), keepdim=True), attention.amax((1, 2, 3), keepdim=True)
    return (attention - low) / (high - low).clamp_min(torch.finfo(attention.dtype).tiny)


# --- training ---


def scouter_loss(logits: Tensor, attention: Tensor, labels: Tensor, lam: float = 1.0, power: float = 2.0) -> Tensor:
    """Cross-entropy + lam * (mean attention) ^ power (paper, Eqs. 7 and 8). The area term makes the explanation: without it
    nothing keeps the slots from looking everywhere."""
    return F.cross_entropy(logits, labels) + lam * attention.mean() ** power


def scouter_step(
    scouter: Scouter, lam: float = 1.0, power: float = 2.0, device="cpu", *, encoded: bool = False, patience: int = 100
) -> Callable:
    """The step of a Scouter, for ``Trainer``: (images in [0, 255], labels) -> loss, Slots, labels; with ``encoded``, batches
    hold a frozen backbone's features in the images' place.

    Raises FloatingPointError after ``patience`` training steps in a row in which the logits of no image differ: the sigmoids are
    all 0, or all 1, and send no gradient. The loss stays finite then, and would not tell.
    """
    still = 0

    def step(batch, training):
        nonlocal still
        images, labels = batch[0].to(device), batch[1].to(device)
        slots = scouter.look(images) if encoded else scouter.attend(scouter.preprocess(images))
        if training:
            logits = slots.logits.detach()
            apart = summed([float((logits.amax(1) - logits.amin(1)).amax())], logits.device)[0]
            still = still + 1 if apart < 0.01 else 0
            if still >= patience:
                area = float(slots.attention.detach().mean())
                raise FloatingPointError(
                    f"the slots died: for {still} steps all classes had the same logit, at a mean attention of {area:.1g}; start "
                    f"from a backbone trained with its own head, or take lam below {lam:g} or a smaller learning rate"
                )
        return scouter_loss(*slots, labels, lam, power), slots, labels

    return step


class _Mean:
    """A mean over images."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.sum, self.seen = 0.0, 0

    @torch.no_grad()
    def update(self, target: Tensor, slots: Slots) -> None:
        values = self.values(target, slots)
        self.sum, self.seen = self.sum + float(values.sum()), self.seen + len(values)

    def compute(self) -> float:
        return self.sum / self.seen if self.seen else math.nan


class Area(_Mean):
    """Raw area: the mean attention of all classes' slots, in [0, 1]."""

    def values(self, target, slots):
        return exact(slots.attention).flatten(1).mean(1)


class OwnArea(_Mean):
    """Raw area of the label's class, in [0, 1]."""

    def values(self, target, slots):
        return exact(slots.attention[torch.arange(len(target)), target]).flatten(1).mean(1)


class LogitRange(_Mean):
    """How far an image's logits lie apart, largest less smallest. It falls to 0 when the slots die."""

    def values(self, target, slots):
        return slots.logits.amax(1) - slots.logits.amin(1)
