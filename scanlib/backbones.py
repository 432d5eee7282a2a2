"""A classifier for classes of your own, out of a published backbone: torchvision's, timm's, or the small ones for Signs.

base = classifier("resnet18", classes=10, weights="DEFAULT")        # ImageNet's weights, a new head for 10 classes
logits = base.model(base.preprocess(images))                        # (N, 10)
"""

from torch import nn
from torchvision import models

from scanlib.freezing import HEADS
from scanlib.models import SIGNS_MODELS, Normalize, Target, default_layer, load_target, load_weights


def classifier(name: str, classes: int, weights: str | None = "DEFAULT", image_size: int = 224) -> Target:
    """A classifier by name, its head made anew where its classes are others; any size of picture that the model takes.

    weights: "DEFAULT", None, or the path of a state dict, as for ``load_target``. Raises ValueError for an unknown name,
    FileNotFoundError when weights can not be had, ImportError for timm's names without timm.
    """
    if name in SIGNS_MODELS or name == "vit_tiny" or name in models.list_models(module=models):
        target = load_target(name, weights)
        model = target.model if len(target.classes) == classes else with_head(target.model, classes)
        return Target(model, target.preprocess, target.layer, [str(c) for c in range(classes)], (image_size, image_size))
    return _from_timm(name, classes, weights, image_size)


def with_head(model: nn.Module, classes: int) -> nn.Module:
    """The model with its last linear layer or 1x1 convolution made anew, for so many classes."""
    heads = [(n, m) for n, m in model.named_modules() if n.split(".")[0] in HEADS and isinstance(m, (nn.Linear, nn.Conv2d))]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no head among {', '.join(HEADS)}; replace it yourself")
    for name, head in heads if len({m.weight.shape[0] for _, m in heads}) == 1 else heads[-1:]:
        parent, _, own = name.rpartition(".")
        bias = head.bias is not None
        new = (
            nn.Linear(head.in_features, classes, bias)
            if isinstance(head, nn.Linear)
            else nn.Conv2d(head.in_channels, classes, 1, bias=bias)
        )
        setattr(model.get_submodule(parent), own, new)
    return model


def _from_timm(name: str, classes: int, weights: str | None, image_size: int) -> Target:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbone {name!r} is not torchvision's; for timm's, `pip install timm`") from error
    if not timm.is_model(name):
        close = timm.list_models(f"*{name[:6]}*")[:5]
        raise ValueError(
            f"backbone {name!r} is neither torchvision's nor timm's; close matches: {', '.join(close) or 'resnet18'}"
        )
    try:
        model = timm.create_model(name, pretrained=weights == "DEFAULT", num_classes=classes)
    except Exception as error:  # offline: timm and its hub raise many kinds
        if weights != "DEFAULT":
            raise
        raise FileNotFoundError(
            f"the weights of {name} could not be downloaded ({type(error).__name__}); pass a state dict's path, or none"
        ) from error
    if weights not in (None, "DEFAULT"):
        load_weights(model, weights, name)
    normal = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    layer = default_layer(model, image_size)
    return Target(model.eval(), normal, layer, [str(c) for c in range(classes)], (image_size, image_size))
