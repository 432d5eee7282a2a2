"""Classifiers to explain: two small teaching models for Signs, and any torchvision classifier.

target = load_target("signs_cnn")                   # trained; its checkpoint ships
target = load_target("resnet50", "DEFAULT")         # torchvision's weights
logits = target.model(target.preprocess(images))    # images (N, 3, H, W) in [0, 255]
target.layer, target.classes, target.image_size     # "layer4", ["tench", ...], (224, 224)
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from scanlib.checkpoint import load_checkpoint
from scanlib.data import Signs
from scanlib.freezing import HEADS
from scanlib.outputs import evaluating

CHECKPOINTS = Path(__file__).parent.parent / "data" / "checkpoints"


class Normalize(nn.Module):
    """Images in [0, 255] -> (x / 255 - mean) / std per channel."""

    def __init__(self, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images / 255 - self.mean.to(images.device)) / self.std.to(images.device)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)),
            *(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)),
        )
        same = in_channels == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.body(x))


class SmallResNet(nn.Module):
    """A residual CNN for 64 px, about 0.7 M parameters: (B, 3, 64, 64) -> (B, classes).

    stem and layer1 32 channels at 32x32, layer2 64 and layer3 96 at 16x16, layer4 192 at 8x8; mean over the grid; linear.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.layer1 = _Block(32, 32)
        self.layer2 = _Block(32, 64, stride=2)
        self.layer3 = _Block(64, 96)
        self.layer4 = _Block(96, 192, stride=2)
        self.head = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def small_vit(classes: int = 10) -> nn.Module:
    """torchvision's VisionTransformer for 64 px: patches of 8, six blocks, 128 wide, four heads, about 1.2 M parameters."""
    return torchvision.models.VisionTransformer(
        64, 8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=512, num_classes=classes
    )


@dataclass(frozen=True)
class Target:
    """A classifier ready to be explained.

    model: in eval mode. preprocess: images (N, 3, H, W) in [0, 255] -> model input, no resizing or cropping. layer: default
    target layer. classes: their names. image_size: (H, W) the model was trained at.
    """

    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    layer: str
    classes: list[str]
    image_size: tuple[int, int]


BLOCK_NORMS = ("ln_1", "norm1", "layernorm_before")  # a transformer block's first LayerNorm: torchvision, timm, Hugging Face
NOT_FEATURES = (nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.Identity, nn.LayerNorm, torchvision.ops.Permute)

SIGNS_MODELS = {"signs_cnn": (SmallResNet, "layer4"), "signs_vit": (small_vit, "encoder.layers.encoder_layer_1")}


def load_target(name: str, weights: str | os.PathLike | None = "DEFAULT") -> Target:
    """Build a classifier by name: "signs_cnn", "signs_vit", any torchvision classifier ("resnet50", "squeezenet1_1"), or
    "vit_tiny", torchvision's VisionTransformer in a size that it does not list (12 blocks, 192 wide, patches of 16).

    weights: "DEFAULT" for the shipped or torchvision's weights, None for random ones, or the path of a state dict.

    Raises ValueError for an unknown name or weights of another model, FileNotFoundError when weights can not be had, with a line
    that says which file to put where.
    """
    if name in SIGNS_MODELS:
        build, layer = SIGNS_MODELS[name]
        model, size, classes, preprocess = build(), 64, list(Signs.classes), Normalize()
        path = CHECKPOINTS / f"{name}.pt" if weights == "DEFAULT" else weights
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(
                f"no weights at {path}; `python data/make_checkpoints.py` makes those that ship, or pass a path, or weights=None"
            )
    else:
        model, path, size, classes, preprocess = _torchvision_target(name, weights)
        layer = default_layer(model, size)
    if path is not None:
        load_weights(model, path, name)
    return Target(model.eval(), preprocess, layer, classes, (size, size))


def named_weights(given: str) -> str | None:
    """As a command line has them: a path, DEFAULT, or None for none, however they are written."""
    return {"none": None, "default": "DEFAULT"}.get(given.lower(), given)


def _vit_tiny_target(weights):
    if weights == "DEFAULT" or (weights is not None and not Path(weights).is_file()):
        raise FileNotFoundError(
            f"no weights of vit_tiny at {weights}; torchvision publishes none: pass a state dict in its layout, or None"
        )
    model = torchvision.models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
    classes = torchvision.models.ViT_B_16_Weights.DEFAULT.meta["categories"]
    return model, weights, 224, list(classes), Normalize((0.5,) * 3, (0.5,) * 3)


def _torchvision_target(name: str, weights):
    if name == "vit_tiny":
        return _vit_tiny_target(weights)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        close = difflib.get_close_matches(name, [*names, *SIGNS_MODELS, "vit_tiny"], n=5) or list(SIGNS_MODELS)
        raise ValueError(f"model {name!r} is not known; close matches: {', '.join(close)}")
    # these two scale their input themselves, as their weights were trained; torchvision says so only when it loads them
    options = {"init_weights": True, "transform_input": weights is not None} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    known = torchvision.models.get_model_weights(name).DEFAULT
    transform = known.transforms()
    path = _downloaded(name, known.url) if weights == "DEFAULT" else weights
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(
            f"no weights at {path}; put a state dict of {name} there (torchvision's is {Path(known.url).name})"
        )
    return model, path, transform.crop_size[0], list(known.meta["categories"]), Normalize(transform.mean, transform.std)


def _downloaded(name: str, url: str) -> Path:
    """torchvision's weights file in torch.hub's cache, downloaded when it is not there yet."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except Exception as error:  # offline, proxy, disk: urllib and torch.hub raise many kinds
            reason = f"could not be downloaded ({type(error).__name__})"
            raise FileNotFoundError(
                f"the weights of {name} {reason}; put {path.name} into {path.parent}, or pass weights=PATH"
            ) from error
    return path


def load_weights(model: nn.Module, path, name: str) -> None:
    """A state dict's file into the model called ``name``. Raises ValueError when it is none, or another model's."""
    state = load_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no state dict; it must map parameter names of {name} to tensors")
    try:
        model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {str(error).splitlines()[1].strip()[:160]}") from error


def default_layer(model: nn.Module, size: int | tuple[int, ...] = 224, channels: int = 3) -> str:
    """The last layer with a spatial extent in front of the head, found by one forward pass of zeros of ``size``: pixels, (H, W),
    the (L,) of a signal, or the (D, H, W) of a volume.

    For a vision transformer (torchvision, timm, Hugging Face): the last block's first LayerNorm. The block's own output sends
    no gradient to the patch tokens where the head reads the class token only. Raises ValueError when no layer has a spatial
    extent.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    maps, norms, handles = [], [], []

    def note(name):
        def hook(module, inputs, output):
            if not isinstance(output, Tensor):
                return
            spatial = output.shape[1:3] if len(size) == 2 else output.shape[2:]  # (N, h, w, C) too: Swin
            if output.ndim == 3 and len(size) == 2 and name.rpartition(".")[2] in BLOCK_NORMS:
                norms.append(name)
            elif output.ndim == len(size) + 2 and min(spatial) > 1 and not isinstance(module, NOT_FEATURES):
                maps.append(name)

        return hook

    with evaluating(model), torch.no_grad():
        try:
            for name, module in model.named_modules():
                if name and name.split(".")[0] not in HEADS:
                    handles.append(module.register_forward_hook(note(name)))
            first = next(model.parameters())
            model(torch.zeros(1, channels, *size, device=first.device, dtype=first.dtype))
        finally:
            for handle in handles:
                handle.remove()
    if not norms and not maps:
        raise ValueError(f"{type(model).__name__} has no layer with a spatial extent; give target_layer by name")
    return (norms or maps)[-1]
