"""Freeze the first stages of a model while the rest is trained: their weights and the statistics of their batch norms.

model = FrozenStages(resnet18(), count=2)     # stem, layer1 and layer2; model.train() leaves them in eval mode
"""

import re
from collections.abc import Callable

from torch import Tensor, nn

from scanlib.layers import HEAD_NAMES


def list_stages(model: nn.Module) -> list[str]:
    """Return the names of a model's stages, front to back: the numbered siblings with the most parameters, without heads.
    Examples are layer1 ... layer4, features.0 ..., encoder.layers.encoder_layer_0 ... and inception3a ..."""
    families: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        if (numbered := re.fullmatch(r"(|.*\D)\d+[a-z]?", name)) and name.split(".")[0] not in HEAD_NAMES:
            families.setdefault(numbered[1], {})[name] = sum(p.numel() for p in module.parameters())
    sizes = max(families.values(), key=lambda sizes: sum(sizes.values()), default={})
    return [name for name, size in sizes.items() if size]


class FrozenStages(nn.Module):
    """A model whose first ``count`` stages are frozen, with all modules in front of them and between them.

    count: 0 freezes nothing. preprocess: kept as an attribute, for whoever calls the model; ``forward`` does not apply it.
    Raises ValueError if the model has fewer stages.
    """

    def __init__(self, model: nn.Module, count: int = 0, preprocess: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        stages = list_stages(model)
        if not 0 <= count <= len(stages):
            raise ValueError(f"number of frozen stages must be in 0..{len(stages)}, got {count}; stages: {', '.join(stages)}")
        self.model, self.preprocess = model, preprocess or nn.Identity()
        front: set[nn.Module] = set()
        if count:
            named = list(model.named_modules())
            end = max(i for i, (name, _) in enumerate(named, 1) if f"{name}.".startswith(f"{stages[count - 1]}."))
            # also modules that contain the stage: they may own the class token and position embedding
            front = {module for name, module in named[:end] if name.split(".")[0] not in HEAD_NAMES}
        # a module that also contains trained ones keeps its mode, because its own forward may apply dropout
        self._frozen = [module for module in front if front.issuperset(module.modules())]
        for module in front:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train(model.training)

    def train(self, mode: bool = True) -> "FrozenStages":
        """Set the mode of all modules but the frozen ones, which stay in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
