import pytest
import torch

from scanlib.explainers import formulas
from scanlib.explainers.base import normalize_map
from scanlib.explainers.formulas import grad_cam


def test_grad_cam_and_normalize_map_known_answers():
    acts = torch.tensor([[[[1.0, 2], [3, 4]], [[4.0, 3], [2, 1]]]], dtype=torch.float64)
    grads = torch.tensor([[[[2.0, 0], [0, 0]], [[-1.0, -1], [-1, -1]]]], dtype=torch.float64)
    # channel weights: 0.5 and -1
    assert grad_cam(acts, grads).tolist() == [[[0, 0], [0, 1]]]
    assert normalize_map(torch.tensor([[[2.0, 4], [3, 2]]]), (2, 2)).tolist() == [[[0, 1], [0.5, 0]]]
    assert normalize_map(torch.ones(1, 2, 2), (4, 4)).eq(0).all()


def test_kpca_cam_raises_where_it_would_not_end():
    with pytest.raises(ValueError, match="target_layer must be a later layer for KPCA-CAM: .* may be 3136, got 16384"):
        formulas.kpca_cam(torch.rand(1, 4, 128, 128))
