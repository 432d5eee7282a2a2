"""A classifier for classes of your own, out of a published backbone: torchvision's, timm's, or the small ones for Signs.

base = build_classifier("resnet18", classes=10, weights="DEFAULT")        # ImageNet's weights, a new head for 10 classes
logits = base.model(base.preprocess(images))                        # (N, 10)
"""

import difflib

from torch import nn
from torchvision import models

from scanlib.layers import HEAD_NAMES, find_default_layer
from scanlib.models.small import Normalize
from scanlib.models.zoo import SIGNS_MODELS, Classifier, load_classifier, load_weights


def build_classifier(name: str, classes: int, weights: str | None = "DEFAULT", image_size: int | None = None) -> Classifier:
    """A classifier by name, its head made anew where its classes are others; any size of picture that the model takes.

    weights: "DEFAULT", None, or the path of a state dict with the published head, as for ``load_classifier``. image_size: pixels a
    side; left out, the model's own. Raises ValueError for an unknown name, FileNotFoundError when weights can not be had,
    ImportError for timm's names without timm.
    """
    if classes < 1:
        raise ValueError(f"classes {classes} is no count; give 1 or more")
    if name in SIGNS_MODELS or name == "vit_tiny" or name in models.list_models(module=models):
        target = load_classifier(name, weights)
        model = target.model if len(target.classes) == classes else replace_head(target.model, classes)
        if getattr(model, "aux_logits", False):  # of googlenet, inception_v3: they make a tuple of the output, in train mode
            model.aux_logits = False
            for child in [name for name, _ in model.named_children() if name.lower().startswith("aux")]:
                setattr(model, child, None)
        if hasattr(model, "transform_input"):  # of the same two: always, so that a model built anew is the same function
            model.transform_input = True
        size = (image_size, image_size) if image_size else target.image_size
        if getattr(model, "image_size", size[0]) != size[0]:  # torchvision's vision transformers
            raise ValueError(f"image_size {size[0]} does not fit {name}: it takes {model.image_size} px only")
        return Classifier(model, target.preprocess, target.layer, [str(c) for c in range(classes)], size)
    return _from_timm(name, classes, weights, image_size)


def replace_head(model: nn.Module, classes: int) -> nn.Module:
    """The model with its last linear layer or 1x1 convolution made anew, for so many classes."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    heads = [(n, module) for n, module in modules if n.split(".")[0] in HEAD_NAMES and not n.lower().startswith("aux")]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no head among {', '.join(HEAD_NAMES)}; replace it yourself")
    name, head = heads[-1]
    parent, _, own = name.rpartition(".")
    bias = head.bias is not None
    new = (
        nn.Linear(head.in_features, classes, bias)
        if isinstance(head, nn.Linear)
        else nn.Conv2d(head.in_channels, classes, 1, bias=bias)
    )
    setattr(model.get_submodule(parent), own, new.to(head.weight).train(head.training))
    return model


def _from_timm(name: str, classes: int, weights: str | None, image_size: int | None) -> Classifier:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbone {name!r} is not torchvision's; for timm's, `pip install timm`") from error
    if not timm.is_model(name):
        names = dict.fromkeys([*models.list_models(module=models), *SIGNS_MODELS, *timm.list_models()])
        close = difflib.get_close_matches(name, names, n=5) or list(SIGNS_MODELS)
        raise ValueError(f"backbone {name!r} is neither torchvision's nor timm's; close matches: {', '.join(close)}")
    own = weights not in (None, "DEFAULT")  # a file: it fits the published head, which is made anew when it is loaded
    try:
        model = timm.create_model(name, pretrained=weights == "DEFAULT", **({} if own else {"num_classes": classes}))
    except Exception as error:  # offline: timm and its hub raise many kinds
        if weights != "DEFAULT":
            raise
        raise FileNotFoundError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}); pass a state dict's path, or none"
        ) from error
    if own:
        load_weights(model, weights, name)
        if model.num_classes != classes:
            model.reset_classifier(classes)
    normal = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    size = (image_size, image_size) if image_size else tuple(model.pretrained_cfg["input_size"][1:])
    try:
        layer = find_default_layer(model, size)
    except AssertionError as error:
        raise ValueError(f"image_size {size[0]} does not fit {name}: {error}") from error
    return Classifier(model.eval(), normal, layer, [str(c) for c in range(classes)], size)
