"""What each class activation map is: a formula on one layer's activations A and the gradient g of the score there.

    with FeatureTap(model, "layer4") as tap:
        tap(inputs)
        maps = grad_cam(tap.features, tap.gradient(target))         # (B, C, h, w) twice -> (B, h, w)

Formulas take and return any number of axes behind the channels; sums over i, j mean all of them. Most are a sum over channels c
of what each channel contributes; with ``combine=first_component`` its first principal component stands for the sum ("eigen
smooth").
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from scanlib.explainers.base import resize_map, scale_to_unit_range


def reduce_locations(x: Tensor, reduce=torch.sum) -> Tensor:
    """Reduce each channel over its places: (B, C, h, w) -> (B, C, 1, 1)."""
    return reduce(x, tuple(range(2, x.ndim)), keepdim=True)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / torch.where(denominator == 0, 1, denominator))


def sum_channels(contributions: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w)."""
    return contributions.sum(1)


def compute_first_component(contributions: Tensor) -> Tensor:
    """Places as samples, channels as coordinates: each place's score on the first principal component, (B, C, h, w) -> (B, h, w).

    A component's sign is arbitrary. Here the few places that stand out are positive (its third moment is): an object is smaller
    than its surroundings. The smaller of the two Gram matrices is enough, so no singular value decomposition is made.
    """
    x = contributions.flatten(2)
    x = x - x.mean(2, keepdim=True)
    if x.shape[1] <= x.shape[2]:
        component = (_top_eigenvector(x @ x.mT)[0][:, None] @ x)[:, 0]
    else:
        vector, value = _top_eigenvector(x.mT @ x)
        component = vector * value.clamp_min(0).sqrt()[:, None]
    return _signed(component).unflatten(1, contributions.shape[2:])


def _top_eigenvector(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Of symmetric (B, n, n): the eigenvector (B, n) of the largest eigenvalue, and that, (B,)."""
    values, vectors = torch.linalg.eigh(matrices.cpu() if matrices.device.type == "mps" else matrices)
    return vectors[..., -1].to(matrices.device), values[..., -1].to(matrices.device)


def _signed(component: Tensor) -> Tensor:
    """A component (B, places) of mean 0, turned so that its third moment is positive."""
    return component * torch.where((component**3).sum(1, keepdim=True) < 0, -1, 1)


def grad_cam(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, Eqs. 1-2): relu(sum_c mean_ij(g_c) A_c)."""
    return combine(reduce_locations(g, torch.mean) * A).relu()


def grad_cam_plus_plus(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """Grad-CAM++ (Chattopadhyay et al. 2018, Eqs. 5, 19): weights sum_ij alpha relu(g), alpha = g^2 / (2 g^2 + sum_ij(A) g^3)."""
    alpha = safe_divide(g**2, 2 * g**2 + reduce_locations(A) * g**3)
    return combine(reduce_locations(alpha * g.relu()) * A).relu()


def smooth_grad_cam_plus_plus(A: Tensor, g1: Tensor, g2: Tensor, g3: Tensor, combine=sum_channels) -> Tensor:
    """SmoothGrad-CAM++ (Omeiza et al. 2019): Grad-CAM++ with g, g^2, g^3 each averaged over noisy copies of the image."""
    alpha = safe_divide(g2, 2 * g2 + reduce_locations(A) * g3)
    return combine(reduce_locations(alpha * g1.relu()) * A).relu()


def x_grad_cam(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """XGrad-CAM (Fu et al. 2020, Eq. 8): weights sum_ij(g A) / sum_ij(A)."""
    return combine(safe_divide(reduce_locations(g * A), reduce_locations(A)) * A).relu()


def layer_cam(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """Layer-CAM (Jiang et al. 2021, Eqs. 5-6): relu(sum_c relu(g_c) A_c)."""
    return combine(g.relu() * A).relu()


def hires_cam(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """HiResCAM (Draelos, Carin 2020, Eq. 3): relu(sum_c g_c A_c)."""
    return combine(g * A).relu()


def grad_cam_elementwise(A: Tensor, g: Tensor, combine=sum_channels) -> Tensor:
    """Element-wise Grad-CAM: sum_c relu(g_c A_c)."""
    return combine((g * A).relu())


def shapley_cam(A: Tensor, g: Tensor, hessian_times_A: Tensor, combine=sum_channels) -> Tensor:
    """ShapleyCAM (Cai 2025, arXiv 2501.06261): weights mean_ij(g - H A / 2), H the score's second derivative at the layer."""
    return grad_cam(A, g - hessian_times_A / 2, combine)


def eigen_cam(A: Tensor) -> Tensor:
    """Eigen-CAM (Muhammad, Yeasin 2020): the first principal component of the activations. Knows no class."""
    return compute_first_component(A)


def eigen_grad_cam(A: Tensor, g: Tensor) -> Tensor:
    """Eigen-Grad-CAM: the first principal component of g A."""
    return compute_first_component(g * A)


def seg_eigen_cam(A: Tensor, g: Tensor) -> Tensor:
    """Seg-Eigen-CAM (Chung, Ying 2025, Eqs. 10-13): the first principal component of |g| A, turned so that its largest entry in
    size is positive."""
    maps = compute_first_component(g.abs() * A)
    low, high = maps.flatten(1).aminmax(dim=1)
    return maps * torch.where(-low > high, -1, 1).view(-1, *[1] * (maps.ndim - 1))


def kpca_cam(A: Tensor, kernel: str = "sigmoid", gamma: float | None = None) -> Tensor:
    """KPCA-CAM (Karmani et al. 2024): the first component of kernel PCA over the places.

    kernel: "sigmoid", tanh(gamma x.y + 1); "rbf", exp(-gamma |x - y|^2); or "linear", which is Eigen-CAM. gamma: None is 1 / C.
    """
    x = A.flatten(2).mT
    x = x - x.mean(1, keepdim=True)
    gamma = 1 / x.shape[2] if gamma is None else gamma
    kernels = {
        "linear": lambda: x @ x.mT,
        "sigmoid": lambda: torch.tanh(gamma * (x @ x.mT) + 1),
        "rbf": lambda: torch.exp(-gamma * torch.cdist(x, x).square()),
    }
    if kernel not in kernels:
        raise ValueError(f"kernel {kernel!r} is not known; take one of {', '.join(kernels)}")
    K = kernels[kernel]()
    K = K - K.mean(1, keepdim=True) - K.mean(2, keepdim=True) + K.mean((1, 2), keepdim=True)  # centred in feature space
    vector, value = _top_eigenvector(K)
    return _signed(vector * value.clamp_min(0).sqrt()[:, None]).unflatten(1, A.shape[2:])


def fem(A: Tensor, k: float = 2.0, combine=sum_channels) -> Tensor:
    """FEM (Fuad et al. 2020): channels weighted by the share of their places above mean + k standard deviations. No class."""
    rare = reduce_locations(A, torch.mean) + k * reduce_locations(A, partial(torch.std, correction=0))
    return combine(reduce_locations((rare < A).to(A.dtype), torch.mean) * A).relu()


def weighted_sum(A: Tensor, weights: Tensor, combine=sum_channels) -> Tensor:
    """relu(sum_c w_c A_c), the weights (B, C) from elsewhere: CAM (Zhou et al. 2016), Score-CAM, Ablation-CAM."""
    return combine(weights.view(*weights.shape, *[1] * (A.ndim - 2)) * A).relu()


def fuse_maps(maps: Sequence[Tensor], fuse: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Each layer's map (N, h, w), resized to the finest -> one; a single one stays as it is."""
    if len(maps) == 1:
        return maps[0]
    finest = max((layer.shape[1:] for layer in maps), key=lambda grid: grid.numel())
    return fuse([resize_map(layer, finest) for layer in maps])


def fuse_by_mean(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their mean."""
    return torch.stack([scale_to_unit_range(layer.relu()) for layer in maps]).mean(0)


def fuse_by_max(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their maximum."""
    return torch.stack([scale_to_unit_range(layer.relu()) for layer in maps]).amax(0)


def fuse_by_product(maps: Sequence[Tensor]) -> Tensor:
    """Each layer's map stretched to [0, 1], then their product: what all layers agree on."""
    return torch.stack([scale_to_unit_range(layer.relu()) for layer in maps]).prod(0)


def fuse_by_tanh(maps: Sequence[Tensor]) -> Tensor:
    """Layer-CAM's fusion (Jiang et al. 2021, Eqs. 7-8): tanh(2 M / max M), then the maximum."""
    peaks = [M.amax(tuple(range(1, M.ndim)), keepdim=True).clamp_min(1e-12) for M in maps]
    return torch.stack([(2 * M / peak).tanh() for M, peak in zip(maps, peaks, strict=True)]).amax(0)


FUSIONS = {"mean": fuse_by_mean, "max": fuse_by_max, "product": fuse_by_product, "tanh": fuse_by_tanh}
