"""A backbone whose first stages stay as they are while the rest is trained: weights, and statistics of batch norms.

model = Frozen(resnet18(), count=2)     # stem, layer1 and layer2; model.train() leaves them in eval mode
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

HEADS = ("classifier", "aux_classifier", "head", "heads", "fc", "AuxLogits", "aux1", "aux2")


def stages(model: nn.Module) -> list[str]:
    """Names of a model's stages, front to back: the numbered siblings with the most parameters, heads left out, as layer1 ...
    layer4, features.0 ..., encoder.layers.encoder_layer_0 ..."""
    families: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if (numbered := re.fullmatch(r"(|.*\D)\d+", name)) and name.split(".")[0] not in HEADS:
            families.setdefault(numbered[1], {})[name] = sum(p.numel() for p in module.parameters())
    sizes = max(families.values(), key=lambda sizes: sum(sizes.values()), default={})
    return [name for name, size in sizes.items() if size]


class Frozen(nn.Module):
    """A model with its stem, all in front of the first stage, and its first ``count`` stages frozen; 0 freezes nothing.

    Raises ValueError for more stages than there are.
    """

    def __init__(self, model: nn.Module, count: int = 0):
        super().__init__()
        names = stages(model)
        if not 0 <= count <= len(names):
            raise ValueError(f"freeze {count} is out of range: the backbone has {len(names)} stages, {', '.join(names)}")
        self.model = model
        self._frozen = list(self._front(names, count)) if count else []
        for module in self._frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)

    def _front(self, names: list[str], count: int) -> Iterator[nn.Module]:
        stem = True
        for name, module in self.model.named_modules():
            stem = stem and name != names[0]
            if stem or any(f"{name}.".startswith(f"{stage}.") for stage in names[:count]):
                yield module  # those around a stage too: they hold loose parameters, as class token and position code

    def train(self, mode: bool = True) -> "Frozen":
        """As any module's, but that frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
