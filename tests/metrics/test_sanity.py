import copy

import pytest
import torch
import torchvision
from torch import nn

from scanlib import GradCAM, SmallResNet
from scanlib.metrics import (
    compute_rank_correlation,
    compute_ssim,
    iterate_randomised_models,
    list_parameter_groups,
    randomise_parameters,
)
from scanlib.metrics.sanity import randomise_tensors


def test_rank_correlation_known_values():
    a = torch.tensor([[[1.0, 2], [3, 4]]] * 3)
    b = torch.tensor([[[10.0, 20], [40, 30]], [[-1.0, -2], [-3, -4]], [[7.0, 7], [7, 7]]])
    assert compute_rank_correlation(a, b).tolist() == pytest.approx(
        [0.8, -1, torch.nan], abs=1e-6, nan_ok=True
    )  # 1 - 6 * 2 / (4 * 15)
    assert compute_rank_correlation(a, a.exp()).tolist() == pytest.approx([1, 1, 1])  # only ranks count


def test_rank_correlation_with_ties_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 5, (4, 6, 6), generator=generator).float() for _ in range(2))
    expected = [stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert compute_rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-6)


def test_ssim_known_values():
    a = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert compute_ssim(a, a).tolist() == pytest.approx([1, 1])
    x, y = torch.full((1, 16, 16), 0.2).double(), torch.full((1, 16, 16), 0.6).double()
    assert compute_ssim(x, y).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4))  # constant maps: luminance alone
    assert compute_ssim(a, 1 - a).max() < 0 and torch.allclose(compute_ssim(a, 1 - a), compute_ssim(1 - a, a))
    ramp = torch.arange(121.0, dtype=torch.float64).view(1, 11, 11) / 121  # a single window: its weighted moments
    offsets = torch.arange(-5.0, 6, dtype=torch.float64)
    weight = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    weight = weight / weight.sum()
    u, v = ramp[0], ramp[0].T ** 2
    mean_u, mean_v = (weight * u).sum(), (weight * v).sum()
    var_u, var_v, cov = (
        (weight * p * q).sum() - m for p, q, m in ((u, u, mean_u**2), (v, v, mean_v**2), (u, v, mean_u * mean_v))
    )
    expected = (2 * mean_u * mean_v + 1e-4) * (2 * cov + 9e-4) / ((mean_u**2 + mean_v**2 + 1e-4) * (var_u + var_v + 9e-4))
    assert compute_ssim(ramp, v[None]).item() == pytest.approx(expected.item())
    with pytest.raises(ValueError, match=r"maps must be at least 11 x 11 .* got \(8, 8\)"):
        compute_ssim(a[:, :8, :8], a[:, :8, :8])


def test_parameter_groups_are_listed_from_the_output_down():
    assert list_parameter_groups(SmallResNet()) == ["head", "layer4", "layer3", "layer2", "layer1", "stem"]
    assert list_parameter_groups(torchvision.models.resnet18()) == ["fc", "layer4", "layer3", "layer2", "layer1", "bn1", "conv1"]
    vit = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=4)
    blocks = [f"encoder.layers.encoder_layer_{k}" for k in (2, 1, 0)]
    assert list_parameter_groups(vit) == ["heads", "encoder.ln", *blocks, "conv_proj"]
    assert list_parameter_groups(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))) == ["2", "0"]


def test_randomise_tensors_keeps_the_scale_and_is_seeded():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200))
    layer[1].running_var.uniform_(0.5, 2)
    before = copy.deepcopy(layer.state_dict())
    randomise_tensors(layer.state_dict(), seed=1)
    after = layer.state_dict()
    assert not torch.equal(before["0.weight"], after["0.weight"]) and (after["1.running_var"] >= 0).all()
    torch.testing.assert_close(before["0.weight"].std(), after["0.weight"].std(), rtol=0.02, atol=0)
    again = nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200))
    again.load_state_dict(before)
    randomise_tensors(again.state_dict(), seed=1)
    torch.testing.assert_close(again.state_dict(), after)


def test_randomised_running_variances_are_positive():
    """Most entries are near 0, with a few large ones, so that a third of the normal draws are negative."""
    norm = nn.BatchNorm1d(200)
    norm.running_var.copy_(torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 8)
    randomise_tensors(norm.state_dict())
    assert (norm.running_var > 0).all()
    assert (norm.running_mean == 0).all()  # equal entries do not change


def test_only_cascading_randomisation_accumulates():
    model = SmallResNet().eval()
    state = copy.deepcopy(model.state_dict())

    def changed(copied):
        return {name.split(".")[0] for name, value in copied.state_dict().items() if not torch.equal(value, state[name])}

    assert [changed(copied) for _, copied in iterate_randomised_models(model, ["head", "layer4"])] == [
        {"head"},
        {"head", "layer4"},
    ]
    assert [changed(copied) for _, copied in iterate_randomised_models(model, ["head", "layer4"], cascading=False)] == [
        {"head"},
        {"layer4"},
    ]
    torch.testing.assert_close(model.state_dict(), state)


def test_parameters_of_no_stage_come_last_and_other_buffers_do_not_change():
    vit = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=4)
    torch.nn.init.normal_(vit.class_token)
    vit.register_buffer("constant", torch.rand(4))
    *_, (before, almost), (last, whole) = iterate_randomised_models(vit)
    assert (before, last) == ("conv_proj", "the rest") and torch.equal(almost.class_token, vit.class_token)
    assert not torch.equal(whole.class_token, vit.class_token) and torch.equal(whole.constant, vit.constant)
    assert not torch.equal(whole.encoder.pos_embedding, vit.encoder.pos_embedding)
    assert [stage for stage, _ in iterate_randomised_models(nn.Linear(3, 4))] == ["the rest"]


def test_randomise_parameters_detects_a_map_of_the_image_only():
    torch.manual_seed(0)
    model = SmallResNet().eval()
    images, classes = torch.rand(3, 3, 64, 64) * 255, torch.tensor([1, 2, 3])
    state = copy.deepcopy(model.state_dict())
    edges = randomise_parameters(lambda m: lambda x, target: x[:, 0] / 255, model, images, classes)
    torch.testing.assert_close(edges.rank_correlation, torch.ones(7, 3))
    torch.testing.assert_close(edges.ssim, torch.ones(7, 3))
    for cascading in (True, False):
        found = randomise_parameters(lambda m: GradCAM(m, "layer3"), model, images, classes, cascading=cascading)
        assert found.stages == ["trained", *list_parameter_groups(model)] and found.maps.shape == (7, 3, 64, 64)
        torch.testing.assert_close(found.rank_correlation[0], torch.ones(3))
        assert (found.rank_correlation[1:].mean(1) < 0.95).any() and (found.ssim[-1] < 0.95).all()
    torch.testing.assert_close(model.state_dict(), state)
    assert not any(p.grad is not None for p in model.parameters())


def test_blank_maps_have_no_correlation():
    torch.manual_seed(0)
    model, images = SmallResNet().eval(), torch.rand(3, 3, 32, 32) * 255

    def build(net):
        empty = not torch.equal(net.head.weight, model.head.weight)  # blank for the second image once the head is random
        keep = torch.tensor([1.0, 0.0, 1.0] if empty else [1.0, 1.0, 1.0])
        return lambda x, target: x.mean(1) / 255 * keep[:, None, None]

    found = randomise_parameters(build, model, images, [0, 1, 2], stages=["layer1", "head"])
    assert found.blank.tolist() == [[False] * 3, [False] * 3, [False, True, False]]
    for metric in (found.rank_correlation, found.ssim):
        assert metric.isnan().tolist() == found.blank.tolist()
        assert metric[~found.blank].tolist() == pytest.approx([1] * 8, abs=1e-5)
