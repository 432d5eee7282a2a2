"""A backbone whose first stages stay as they are while the rest is trained: weights, and statistics of batch norms.

model = FrozenStages(resnet18(), count=2)     # stem, layer1 and layer2; model.train() leaves them in eval mode
"""

import re
from collections.abc import Iterator

from torch import Tensor, nn

from scanlib.layers import HEAD_NAMES


def list_stages(model: nn.Module) -> list[str]:
    """Names of a model's stages, front to back: the numbered siblings with the most parameters, heads left out, as layer1 ...
    layer4, features.0 ..., encoder.layers.encoder_layer_0 ..., inception3a ..."""
    families: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if (numbered := re.fullmatch(r"(|.*\D)\d+[a-z]?", name)) and name.split(".")[0] not in HEAD_NAMES:
            families.setdefault(numbered[1], {})[name] = sum(p.numel() for p in module.parameters())
    sizes = max(families.values(), key=lambda sizes: sum(sizes.values()), default={})
    return [name for name, size in sizes.items() if size]


class FrozenStages(nn.Module):
    """A model with its first ``count`` stages frozen, and all in front of them and between them; 0 freezes nothing.

    Raises ValueError for more stages than there are.
    """

    def __init__(self, model: nn.Module, count: int = 0):
        super().__init__()
        names = list_stages(model)
        if not 0 <= count <= len(names):
            raise ValueError(f"freeze {count} is out of range: the backbone has {len(names)} stages, {', '.join(names)}")
        self.model = model
        front = set(self._front(names[count - 1])) if count else set()
        # what is around trained parts too keeps its mode: its own forward may drop out
        self._frozen = [module for module in front if front.issuperset(module.modules())]
        for module in front:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        for module in self._frozen:
            module.training = False

    def _front(self, last: str) -> Iterator[nn.Module]:
        end = [name for name, _ in self.model.named_modules() if f"{name}.".startswith(f"{last}.")][-1]
        for name, module in self.model.named_modules():
            if name.split(".")[0] not in HEAD_NAMES:
                yield module  # those around a stage too: they hold loose parameters, as class token and position code
            if name == end:
                return

    def train(self, mode: bool = True) -> "FrozenStages":
        """As any module's, but that frozen parts stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
