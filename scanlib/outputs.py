"""What a model answers, asked as it is: in eval mode, and its logits out of whatever it returns.

with torch.no_grad(), evaluating(model):
    logits = logits_of(model(inputs))       # (N, K)
"""

import contextlib
from collections.abc import Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """Put every module into eval mode, and back as each was, exceptions included."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def logits_of(output):
    """What scores are made of: logits (B, K) out of a tensor, a tuple led by one, an object with ``.logits`` (Inception, Hugging
    Face), or a dictionary with "out" (segmentation); a list of dictionaries, one per image (detection), stays as it is."""
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    if isinstance(output, (tuple, list)) and len(output) and isinstance(output[0], Mapping):
        return list(output)
    output = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}; wrap it so that it returns logits (B, K)")
    return output if output.ndim > 1 else output.reshape(-1, 1)  # a binary model with one output per image
