"""What every explainer does last: bring its raw map to the picture's size and to [0, 1].

maps = stretched(raw, size=images.shape[-2:])       # (B, h, w) -> (B, H, W)
"""

import torch.nn.functional as F
from torch import Tensor


def stretched(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, h, w) -> (B, H, W), resized bilinearly and stretched to [0, 1] each; a constant map becomes 0."""
    maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12))[:, 0]
