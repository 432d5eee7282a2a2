"""Build a classifier for your own classes from torchvision's, timm's or scanlib's models.

classifier = build_classifier("resnet18", classes=10, weights="DEFAULT")    # ImageNet's weights, a new head for 10 classes
logits = classifier.model(classifier.preprocess(images))                    # (N, 10)
"""

import difflib
import os
from typing import Any

from torch import nn
from torchvision import models

from scanlib.layers import HEAD_NAMES, find_default_layer
from scanlib.models.small import Normalize
from scanlib.models.zoo import OTHER_WEIGHTS, Classifier, list_classifiers, load_classifier, load_weights

Weights = str | os.PathLike | None


def build_classifier(name: str, classes: int, weights: Weights = "DEFAULT", image_size: int | None = None) -> Classifier:
    """Build a classifier by name. Its head is new if the number of classes differs from the published one.

    weights: "DEFAULT", None, or the path of a state dict with the published head. image_size: in pixels, by default the model's.
    Raises ValueError if the name is unknown or the model does not accept the size, FileNotFoundError if the weights are missing
    or cannot be downloaded, ImportError if torchvision does not have the model and timm is not installed.
    """
    if classes < 1:
        raise ValueError(f"classes must be 1 or more, got {classes}")
    if name not in list_classifiers():
        return _build_timm_classifier(name, classes, weights, image_size)
    classifier = load_classifier(name, weights)
    model, size = classifier.model, (image_size, image_size) if image_size else classifier.image_size
    if len(classifier.classes) != classes:
        replace_head(model, classes)
    if isinstance(model, (models.GoogLeNet, models.Inception3)):  # with side heads they return a tuple in train mode
        model.aux_logits = False
        for side_head in [child for child, _ in model.named_children() if child.lower().startswith("aux")]:
            setattr(model, side_head, None)
    if isinstance(model, models.VisionTransformer) and model.image_size != size[0]:
        raise ValueError(f"image_size must be {model.image_size} for {name}, got {size[0]}")
    return Classifier(model, classifier.preprocess, classifier.layer, [str(c) for c in range(classes)], size)


def replace_head(model: nn.Module, classes: int) -> nn.Module:
    """Replace the last linear layer or 1x1 convolution of the head by a new one for ``classes`` classes; return the model.

    The new layer has the device, dtype and mode of the old one. Raises ValueError if the model has no such head.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    heads = [(n, module) for n, module in layers if n.split(".")[0] in HEAD_NAMES and not n.lower().startswith("aux")]
    if not heads:
        reason = f"must have a linear layer or a convolution in {', '.join(HEAD_NAMES)}"
        raise ValueError(f"model {reason}, got {type(model).__name__}; replace its head yourself")
    name, head = heads[-1]
    if isinstance(head, nn.Linear):
        new: nn.Module = nn.Linear(head.in_features, classes, head.bias is not None)
    else:
        new = nn.Conv2d(head.in_channels, classes, 1, bias=head.bias is not None)
    model.set_submodule(name, new.to(head.weight).train(head.training))
    return model


def _build_timm_classifier(name: str, classes: int, weights: Weights, image_size: int | None) -> Classifier:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"model {name!r} not found in torchvision; for timm's models, `pip install timm`") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, {*list_classifiers(), *timm.list_models()}, n=5) or list_classifiers()[-3:]
        raise ValueError(f"model {name!r} not found in torchvision or timm; close matches: {', '.join(close)}")
    try:
        model: Any = timm.create_model(name, pretrained=weights == "DEFAULT")
    except Exception as error:  # offline: timm and its hub raise many kinds
        if weights != "DEFAULT":
            raise
        raise FileNotFoundError(f"weights of {name} could not be downloaded ({type(error).__name__}); {OTHER_WEIGHTS}") from error
    if weights is not None and weights != "DEFAULT":
        load_weights(model, weights, name)
    if model.num_classes != classes:
        model.reset_classifier(classes)
    config = model.pretrained_cfg
    size = (image_size, image_size) if image_size else tuple(config["input_size"][1:])
    try:
        layer = find_default_layer(model, size)
    except ValueError as error:  # a vision transformer accepts one size only
        raise ValueError(f"image_size must fit {name}, got {size[0]}: {error}") from error
    return Classifier(model.eval(), Normalize(config["mean"], config["std"]), layer, [str(c) for c in range(classes)], size)
