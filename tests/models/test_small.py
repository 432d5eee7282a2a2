import pytest
import torch

from scanlib import SmallResNet, build_small_vit
from scanlib.models.small import Normalize


def test_small_models_have_ten_classes_and_about_a_million_parameters():
    for model in (SmallResNet(), build_small_vit()):
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
        assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6


def test_normalize_known_answer():
    x = torch.full((1, 3, 1, 1), 51.0, dtype=torch.float64)
    assert Normalize((0.1,) * 3, (0.5,) * 3)(x).flatten().tolist() == pytest.approx([0.2] * 3)
