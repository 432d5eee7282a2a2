"""The formula of each class activation map: from one layer's activations A and the score's gradient G there to a map.

    with FeatureTap(model, "layer4") as tap:
        tap(inputs)
        maps = grad_cam(tap.features, tap.gradient(target))         # (B, C, h, w) each -> (B, h, w)

Any number of spatial axes may follow the channels; sums over i, j are over all of them. Most formulas sum a contribution over the
channels c. With ``combine=compute_first_component`` they use the contributions' first principal component instead of the sum.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from scanlib.explainers.base import resize_map, scale_to_unit_range

Reduction = Callable[..., Tensor]
MAX_LOCATIONS = 56 * 56  # of KPCA-CAM


def reduce_locations(x: Tensor, reduce: Reduction = torch.sum) -> Tensor:
    """Reduce each channel over its locations: (B, C, h, w) -> (B, C, 1, 1)."""
    return reduce(x, tuple(range(2, x.ndim)), keepdim=True)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Compute numerator / denominator; 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def sum_channels(contributions: Tensor) -> Tensor:
    return contributions.sum(1)


def compute_first_component(contributions: Tensor) -> Tensor:
    """Project each location's channels on their first principal component over all locations: (B, C, h, w) -> (B, h, w).

    The sign of a component is arbitrary. Here its third moment is positive: an object is smaller than its surroundings, so few
    locations have large values. Uses the smaller of the two Gram matrices instead of a singular value decomposition.
    """
    x = contributions.flatten(2)
    x = x - x.mean(2, keepdim=True)
    scale = x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # else the squares of tiny values are 0
    x = x / scale
    if x.shape[1] <= x.shape[2]:
        component = (_top_eigenvector(x @ x.mT)[0][:, None] @ x)[:, 0]
    else:
        vector, value = _top_eigenvector(x.mT @ x)
        component = vector * value.clamp_min(0).sqrt()[:, None]
    return _fix_sign(scale[:, 0] * component).unflatten(1, contributions.shape[2:])


def _top_eigenvector(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvector (B, n) with the largest eigenvalue (B,) of symmetric matrices (B, n, n)."""
    values, vectors = torch.linalg.eigh(matrices.cpu() if matrices.device.type == "mps" else matrices)
    return vectors[..., -1].to(matrices.device), values[..., -1].to(matrices.device)


def _fix_sign(component: Tensor) -> Tensor:
    """Give components (B, locations) of mean 0 the sign with a positive third moment."""
    unit = component / component.abs().amax(1, keepdim=True).clamp_min(torch.finfo(component.dtype).tiny)
    return component * torch.where((unit**3).sum(1, keepdim=True) < 0, -1, 1)


def grad_cam(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, Eqs. 1-2): relu(sum_c mean_ij(G_c) A_c)."""
    return combine(reduce_locations(G, torch.mean) * A).relu()


def grad_cam_plus_plus(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al. 2018, Eqs. 5, 19): weights sum_ij alpha relu(G), alpha = G^2 / (2 G^2 + sum_ij(A) G^3).

    Computed as relu(G) / (2 + sum_ij(A) G), which is the same, also where G^2 and G^3 are too small for the precision.
    """
    weights = safe_divide(G.relu(), 2 + reduce_locations(A) * G)
    return combine(reduce_locations(weights) * A).relu()


def smooth_grad_cam_plus_plus(A: Tensor, G1: Tensor, G2: Tensor, G3: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """SmoothGrad-CAM++ (Omeiza et al. 2019): Grad-CAM++ with G1, G2, G3, the means of G, G^2, G^3 over noisy images.

    The powers of small gradients need float64; the map is returned in the precision of A.
    """
    alpha = safe_divide(G2, 2 * G2 + reduce_locations(A) * G3).to(A.dtype)
    return combine(reduce_locations(alpha * G1.to(A.dtype).relu()) * A).relu()


def x_grad_cam(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """XGrad-CAM (Fu et al. 2020, Eq. 8): weights sum_ij(G A) / sum_ij(A)."""
    return combine(safe_divide(reduce_locations(G * A), reduce_locations(A)) * A).relu()


def layer_cam(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """Layer-CAM (Jiang et al. 2021, Eqs. 5-6): relu(sum_c relu(G_c) A_c)."""
    return combine(G.relu() * A).relu()


def hires_cam(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """HiResCAM (Draelos, Carin 2020, Eq. 3): relu(sum_c G_c A_c)."""
    return combine(G * A).relu()


def grad_cam_elementwise(A: Tensor, G: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """Element-wise Grad-CAM: sum_c relu(G_c A_c)."""
    return combine((G * A).relu())


def shapley_cam(A: Tensor, G: Tensor, hessian_times_A: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """ShapleyCAM (Cai 2025, arXiv 2501.06261): weights mean_ij(G - H A / 2), H the score's second derivative at the layer."""
    return grad_cam(A, G - hessian_times_A / 2, combine)


def eigen_cam(A: Tensor) -> Tensor:
    """Eigen-CAM (Muhammad, Yeasin 2020): the first principal component of A. The same for all classes."""
    return compute_first_component(A)


def eigen_grad_cam(A: Tensor, G: Tensor) -> Tensor:
    """Eigen-Grad-CAM: the first principal component of G A."""
    return compute_first_component(G * A)


def seg_eigen_cam(A: Tensor, G: Tensor) -> Tensor:
    """Seg-Eigen-CAM (Chung, Ying 2025, Eqs. 10-13): the first principal component of |G| A, with the sign that makes the entry of
    largest magnitude positive."""
    maps = compute_first_component(G.abs() * A)
    low, high = maps.flatten(1).aminmax(dim=1)
    return maps * torch.where(-low > high, -1, 1).view(-1, *[1] * (maps.ndim - 1))


def kpca_cam(A: Tensor, kernel: str = "sigmoid", gamma: float | None = None) -> Tensor:
    """KPCA-CAM (Karmani et al. 2024): the first component of kernel PCA over the locations. The same for all classes.

    kernel: "sigmoid", tanh(gamma x.y + 1); "rbf", exp(-gamma |x - y|^2); or "linear", which gives Eigen-CAM. gamma: None means
    1 / C. Raises ValueError for another kernel and above ``MAX_LOCATIONS`` locations.
    """
    x = A.flatten(2).mT
    if x.shape[1] > MAX_LOCATIONS:
        cost = f"its cost grows with the third power of the locations, of which there may be {MAX_LOCATIONS}"
        raise ValueError(f"target_layer must be a later layer for KPCA-CAM: {cost}, got {x.shape[1]}")
    x = x - x.mean(1, keepdim=True)
    gamma = 1 / x.shape[2] if gamma is None else gamma
    kernels = {
        "linear": lambda: x @ x.mT,
        "sigmoid": lambda: torch.tanh(gamma * (x @ x.mT) + 1),
        "rbf": lambda: torch.exp(-gamma * torch.cdist(x, x).square()),
    }
    if kernel not in kernels:
        raise ValueError(f"kernel must be one of {', '.join(kernels)}, got {kernel!r}")
    K = kernels[kernel]()
    K = K - K.mean(1, keepdim=True) - K.mean(2, keepdim=True) + K.mean((1, 2), keepdim=True)  # centred in feature space
    vector, value = _top_eigenvector(K)
    return _fix_sign(vector * value.clamp_min(0).sqrt()[:, None]).unflatten(1, A.shape[2:])


def fem(A: Tensor, k: float = 2.0, combine: Reduction = sum_channels) -> Tensor:
    """FEM (Fuad et al. 2020): w_c is the share of locations with A_c > mean + k standard deviations. The same for all classes."""
    threshold = reduce_locations(A, torch.mean) + k * reduce_locations(A, partial(torch.std, correction=0))
    return combine(reduce_locations((threshold < A).to(A.dtype), torch.mean) * A).relu()


def weighted_sum(A: Tensor, weights: Tensor, combine: Reduction = sum_channels) -> Tensor:
    """CAM (Zhou et al. 2016), Score-CAM, Ablation-CAM: relu(sum_c w_c A_c) with given weights (B, C)."""
    return combine(weights.view(*weights.shape, *[1] * (A.ndim - 2)) * A).relu()


def fuse_maps(maps: Sequence[Tensor], fuse: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Resize the maps (N, h, w) of several layers to the largest and fuse them; a single map is returned unchanged."""
    if len(maps) == 1:
        return maps[0]
    largest = max((layer.shape[1:] for layer in maps), key=lambda grid: grid.numel())
    return fuse([resize_map(layer, largest) for layer in maps])


def stack_normalized(maps: Sequence[Tensor]) -> Tensor:
    """Scale the positive part of each layer's map to [0, 1] and stack them: (layers, N, h, w)."""
    return torch.stack([scale_to_unit_range(layer.relu()) for layer in maps])


def fuse_by_tanh(maps: Sequence[Tensor]) -> Tensor:
    """Layer-CAM's fusion (Jiang et al. 2021, Eqs. 7-8): tanh(2 M / max M) of each layer's map M, then the maximum."""
    peaks = [M.amax(tuple(range(1, M.ndim)), keepdim=True).clamp_min(torch.finfo(M.dtype).tiny) for M in maps]
    return torch.stack([(2 * M / peak).tanh() for M, peak in zip(maps, peaks, strict=True)]).amax(0)


def fuse_by(reduce: Callable[..., Tensor], maps: Sequence[Tensor]) -> Tensor:
    """Fuse normalized maps by their mean, maximum or product."""
    return reduce(stack_normalized(maps), 0)


FUSIONS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "mean": partial(fuse_by, torch.mean),
    "max": partial(fuse_by, torch.amax),
    "product": partial(fuse_by, torch.prod),
    "tanh": fuse_by_tanh,
}
