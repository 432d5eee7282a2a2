"""Classifiers to explain: two small teaching models for Signs, and any torchvision classifier.

target = load_classifier("signs_cnn")                   # trained; its checkpoint ships
target = load_classifier("resnet50", "DEFAULT")         # torchvision's weights
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

from scanlib.data import Signs
from scanlib.layers import find_default_layer
from scanlib.models.small import Normalize, SmallResNet, build_small_vit
from scanlib.training.checkpoint import load_checkpoint

_PACKAGE = Path(__file__).parents[1]
# a wheel holds the checkpoints as scanlib/checkpoints, the repository as data/checkpoints
CHECKPOINTS = next((path for path in [_PACKAGE / "checkpoints"] if path.is_dir()), _PACKAGE.parent / "data" / "checkpoints")


@dataclass(frozen=True)
class Classifier:
    """A classifier ready to be explained.

    model: in eval mode. preprocess: images (N, 3, H, W) in [0, 255] -> model input, no resizing or cropping. layer: default
    target layer. classes: their names. image_size: (H, W) the model was trained at.
    """

    model: nn.Module
    preprocess: Callable[[Tensor], Tensor]
    layer: str
    classes: list[str]
    image_size: tuple[int, int]


SIGNS_MODELS = {"signs_cnn": (SmallResNet, "layer4"), "signs_vit": (build_small_vit, "encoder.layers.encoder_layer_1")}


def load_classifier(name: str, weights: str | os.PathLike | None = "DEFAULT") -> Classifier:
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
        layer = find_default_layer(model, size)
    if path is not None:
        load_weights(model, path, name)
    return Classifier(model.eval(), preprocess, layer, classes, (size, size))


def parse_weights(given: str) -> str | None:
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
