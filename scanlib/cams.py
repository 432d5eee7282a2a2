"""Class activation maps: each method its formula, on one layer's activations A and the gradient of the score there.

with FeatureTap(model, layer) as tap:
    tap(inputs)
    maps = grad_cam(tap.features, tap.gradient(target))      # (B, C, h, w) twice -> (B, h, w)
"""

from torch import Tensor


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, Eqs. 1-2): relu(sum_c mean(g_c) A_c); (B, C, h, w) twice -> (B, h, w)."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * activations).sum(1).relu()


def layer_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Layer-CAM (Jiang et al. 2021, Eqs. 5-6): relu(sum_c relu(g_c) A_c); (B, C, h, w) twice -> (B, h, w)."""
    return (gradients.relu() * activations).sum(1).relu()
