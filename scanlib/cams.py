"""Class activation maps: each method its formula, on one layer's activations A and the gradient of the score there.

with FeatureTap(model, layer) as tap:
    tap(inputs)
    maps = grad_cam(tap.features, tap.gradient(target))      # (B, C, h, w) twice -> (B, h, w)
"""

import torch.nn.functional as F
from torch import Tensor


def grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, Eqs. 1-2): relu(sum_c mean(g_c) A_c); (B, C, h, w) twice -> (B, h, w)."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * activations).sum(1).relu()


def stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), resized bilinearly and stretched to [0, 1] each; a constant map becomes 0."""
    maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12))[:, 0]
