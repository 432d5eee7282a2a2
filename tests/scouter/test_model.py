import math

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from scanlib import FeatureTap, GradCAM
from scanlib.scouter.model import Scouter
from scanlib.scouter.slot_attention import SlotOutput, XSlotAttention, encode_positions
from scanlib.scouter.training import Area, LogitRange, OwnArea, build_scouter_step, compute_scouter_loss
from tests.conftest import TinyNet


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def attend_in_numpy(module, values, positions, classes, sign, rescale, bias):
    """Compute the paper's equations for one image, slot by slot: V (N, d), P (N, d) -> logits (K,), attention (K, slots, N)."""
    w = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
    N, d = values.shape
    keys = values + positions
    layers = [name for name in w if name.startswith("keys") and name.endswith("weight")]
    for number, name in enumerate(layers):
        keys = keys @ w[name].T + w[name.replace("weight", "bias")]
        keys = np.maximum(keys, 0) if number < len(layers) - 1 else keys
    slots = w["slots"].copy()
    for iteration in range(3):
        Z = np.array([[slots[s] @ keys[n] / np.sqrt(d) for n in range(N)] for s in range(len(slots))])
        if rescale:
            Z = np.array([row / row.sum() * Z.sum() for row in Z])
        A = sigmoid(Z + bias)
        U = A @ values / d
        if iteration < 2:
            for s in range(len(slots)):
                ri, zi, ni = np.split(w["update.weight_ih"] @ U[s] + w["update.bias_ih"], 3)
                rh, zh, nh = np.split(w["update.weight_hh"] @ slots[s] + w["update.bias_hh"], 3)
                r, z = sigmoid(ri + rh), sigmoid(zi + zh)
                slots[s] = (1 - z) * np.tanh(ni + r * nh) + z * slots[s]
    per_class = len(slots) // classes
    logits = np.array([sign * U[c * per_class : (c + 1) * per_class].sum() for c in range(classes)])
    return logits, A.reshape(classes, per_class, N)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("rescale", "bias"), [(False, 0), (True, 0), (False, 2)])
def test_slot_attention_equals_equations_in_numpy(slots, sign, rescale, bias):
    torch.manual_seed(slots)
    module = XSlotAttention(4, 8, slots, key_layers=slots, sign=sign, rescale=rescale, bias=bias).double()
    values, positions = torch.rand(2, 15, 8).double(), encode_positions(3, 5, 8).double()
    logits, attention = module(values, positions)
    for i in range(2):
        expected = attend_in_numpy(module, values[i].numpy(), positions.numpy(), 4, sign, rescale, bias)
        np.testing.assert_allclose(logits[i].detach(), expected[0], atol=1e-6)
        np.testing.assert_allclose(attention[i].detach(), expected[1], atol=1e-6)
    mass = torch.einsum("bksn,bn->bk", attention, values.mean(2))
    torch.testing.assert_close(logits, sign * mass, atol=1e-12, rtol=0)  # a logit is the sum over its own map
    assert (sign * logits >= 0).all() and attention.min() > 0 and attention.max() < 1


def test_gradients_of_attention_and_loss():
    torch.manual_seed(0)
    module = XSlotAttention(3, 4, 2, key_layers=2).double()
    values, positions = torch.rand(1, 6, 4).double().requires_grad_(), encode_positions(2, 3, 4).double()
    assert torch.autograd.gradcheck(lambda v: tuple(module(v, positions)), values)
    parameters = dict(module.named_parameters())

    def compute_loss(*weights):
        slots = torch.func.functional_call(module, dict(zip(parameters, weights, strict=True)), (values.detach(), positions))
        return compute_scouter_loss(*slots, torch.tensor([1]), lam=10.0)

    assert torch.autograd.gradcheck(compute_loss, tuple(parameters.values()))


def test_rescale_raises_for_zero_row_sum():
    module = XSlotAttention(3, 4, rescale=True)
    nn.init.zeros_(module.slots)
    with pytest.raises(FloatingPointError, match="rescale must be False .* sum to zero"):
        module(torch.rand(2, 6, 4), encode_positions(2, 3, 4))
    module.rescale = False
    assert module(torch.rand(2, 6, 4), encode_positions(2, 3, 4)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign": 0}, "sign must be .* got 0"),
        ({"slots": 0}, "slots must be .* got 0"),
        ({"key_layers": 0}, "key_layers must be .* got 0"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        XSlotAttention(3, 4, **options)
    with pytest.raises(ValueError, match="channels must be a multiple of 4 .* got 6"):
        Scouter(TinyNet(), 3, channels=6, image_size=32)


def test_encode_positions_equals_values_by_hand():
    code = encode_positions(2, 3, 8)  # (6, 8): two frequencies, 1 and 10000 ** -0.5
    assert code.shape == (6, 8)
    row, column = 2 * math.pi * 2 / 2, 2 * math.pi * 1 / 3  # the second row, the first column
    expected = [f(a * w) for a in (row, column) for w in (1, 0.01) for f in (math.sin, math.cos)]
    torch.testing.assert_close(code[3], torch.tensor(expected), atol=1e-6, rtol=0)


def test_loss_equals_values_by_hand():
    logits, attention = torch.tensor([[2.0, 0, 0]]), torch.tensor([0.2, 0.4]).expand(1, 3, 1, 2)
    entropy = math.log(math.exp(2) + 2) - 2
    labels = torch.tensor([0])
    assert compute_scouter_loss(logits, attention, labels, 10, 2).item() == pytest.approx(entropy + 10 * 0.3**2, abs=1e-6)
    assert compute_scouter_loss(logits, attention, labels, 5, 1).item() == pytest.approx(entropy + 5 * 0.3, abs=1e-6)
    assert compute_scouter_loss(logits, attention, labels, 0).item() == pytest.approx(entropy, abs=1e-6)


@pytest.fixture
def scouter():
    torch.manual_seed(0)
    return Scouter(TinyNet(), 5, slots=2, channels=8, image_size=32, preprocess=lambda x: x / 255).eval()


def test_backbone_is_copied_and_its_head_removed(scouter, tiny, images):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    other = Scouter(tiny, 7, "front", channels=8, image_size=32)
    assert other(images).shape == (4, 7)
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, before[name])
    names = [name for name, _ in other.backbone.named_parameters()]
    assert any("front" in name for name in names) and not any("back.0" in name or "head" in name for name in names)
    with FeatureTap(tiny, "front") as tap:
        tap(images)
        torch.testing.assert_close(other.eval().extract_features(images), tap.features)
    other.train()(images).sum().backward()
    assert other.backbone.model.front[0].weight.grad is not None and tiny.front[0].weight.grad is None


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (260, 260), (96, 64)])
def test_any_image_size(size):
    torch.manual_seed(0)
    scouter = Scouter(torchvision.models.resnet18(), 4, image_size=size, channels=16, freeze=2)
    with torch.no_grad():
        logits, attention = scouter.attend(torch.rand(2, 3, *size))
    grid = tuple(math.ceil(side / 32) for side in size)
    assert logits.shape == (2, 4) and attention.shape == (2, 4, 1, *grid)
    assert scouter.as_explainer()(255 * torch.rand(2, 3, *size), 1).shape == (2, *size)


def test_vision_transformer_as_backbone(images):
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    scouter = Scouter(vit, 3, channels=8, image_size=32, freeze=1)
    logits, attention = scouter.train().attend(images)
    assert attention.shape == (4, 3, 1, 4, 4)
    logits.sum().backward()
    assert vit.class_token.grad is None and scouter.backbone.model.class_token.grad is None  # frozen with the stem
    assert scouter.backbone.model.encoder.layers[1].ln_1.weight.grad is not None


def test_one_channel_and_double_precision():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 3))
    scouter = Scouter(net.double(), 3, "3", channels=8, image_size=31)
    assert scouter(torch.rand(2, 1, 31, 31).double()).dtype == torch.float64


def test_container_behind_the_layer_is_removed():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    net = nn.Sequential(nn.Conv2d(3, 8, 3), Listed(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    scouter = Scouter(net, 3, "0", channels=8, image_size=16)
    assert [name for name, _ in scouter.backbone.model.named_parameters()] == ["0.weight", "0.bias"]


def test_image_size_that_does_not_fit_raises():
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    with pytest.raises(ValueError, match="image_size must fit the backbone, got 48"):
        Scouter(vit, 3, image_size=48)


def test_maps_equal_attention(scouter, images):
    with torch.no_grad():
        logits, attention = scouter.attend(images / 255)
    raw = attention.sum(2)  # (4, 5, 8, 8)
    predicted = logits.argmax(1)
    torch.testing.assert_close(scouter.as_explainer()(images, normalize=False), raw[torch.arange(4), predicted])
    torch.testing.assert_close(scouter.as_explainer()(images, 3, normalize=False), raw[:, 3])
    torch.testing.assert_close(
        scouter.as_explainer()(images, [0, 1, 2, 3], normalize=False), raw[torch.arange(4), torch.arange(4)]
    )
    difference = scouter.as_explainer()(images, lambda row: row[3] - 2 * row[4], normalize=False)  # for 3 and against 4
    torch.testing.assert_close(difference, raw[:, 3] - 2 * raw[:, 4])

    maps = scouter.compute_all_maps(images)
    low, high = raw[1].min(), raw[1].max()  # one range for all classes of an image
    expected = torch.nn.functional.interpolate(
        ((raw[1] - low) / (high - low))[None], size=(32, 32), mode="bilinear", align_corners=False
    )[0]
    torch.testing.assert_close(maps[1], expected)
    assert maps.shape == (4, 5, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    torch.testing.assert_close(scouter.as_explainer()(images, 2), maps[:, 2])


def test_explainer_raises_for_bad_targets_and_leaves_model_unchanged(scouter, images):
    scouter.train()
    before = {name: value.clone() for name, value in scouter.state_dict().items()}
    scouter.as_explainer()(images)
    with pytest.raises(ValueError, match="got 2 classes for 4 images"):
        scouter.as_explainer()(images, [0, 1])
    with pytest.raises(ValueError, match="target class 5 is out of range"):
        scouter.as_explainer()(images, 5)
    with pytest.raises(ValueError, match="NaN"):
        scouter.as_explainer()(images * math.nan)
    assert scouter.training and all(torch.equal(value, before[name]) for name, value in scouter.state_dict().items())
    assert all(parameter.grad is None for parameter in scouter.parameters())
    with torch.inference_mode():
        assert scouter.as_explainer()(images).shape == (4, 32, 32)


def test_single_image_and_empty_batch(scouter, images):
    explainer = scouter.as_explainer()
    torch.testing.assert_close(explainer(images[1], 2), explainer(images, 2)[1])
    torch.testing.assert_close(scouter.compute_all_maps(images[1]), scouter.compute_all_maps(images)[1])
    assert explainer(images[:0]).shape == (0, 32, 32) and scouter.compute_all_maps(images[:0]).shape == (0, 5, 32, 32)


def test_class_names(scouter, tiny):
    named = Scouter(tiny, ["cat", "dog"], channels=8, image_size=32)
    assert named.classes == ["cat", "dog"] and scouter.classes == ["0", "1", "2", "3", "4"]
    assert named.slot_attention.classes == 2


def test_cam_explains_a_scouter(scouter, images):
    maps = GradCAM(scouter, "backbone.model.back", preprocess=lambda x: x / 255)(images)
    assert maps.shape == (4, 32, 32) and maps.max() > 0


def test_metrics_equal_values_by_hand():
    output = SlotOutput(
        torch.tensor([[3.0, 1], [0, 4]]), torch.tensor([[[[0.2, 0.4]], [[0.6, 0.8]]], [[[0.0, 0.0]], [[1.0, 0.0]]]])
    )
    labels = torch.tensor([0, 1])
    for metric, expected in ((Area(), (0.5 + 0.25) / 2), (OwnArea(), (0.3 + 0.5) / 2), (LogitRange(), (2 + 4) / 2)):
        metric.update(SlotOutput(*(x[:1] for x in output)), labels[:1])
        metric.update(SlotOutput(*(x[1:] for x in output)), labels[1:])
        assert metric.compute() == pytest.approx(expected)
        metric.reset()
        assert math.isnan(metric.compute())


def test_equal_logits_stop_training(scouter, images):
    nn.init.constant_(scouter.slot_attention.slots, 0)
    nn.init.zeros_(scouter.slot_attention.update.weight_hh)  # all classes have the same slot, so their logits are equal
    step = build_scouter_step(scouter, lam=30, patience=3)
    batch = (images, torch.tensor([0, 1, 2, 3]))
    step(batch, True)
    step(batch, True)
    step(batch, False)  # validation does not count
    with pytest.raises(FloatingPointError, match="the slots no longer learn: all logits were equal for 3 steps .* lam below 30"):
        step(batch, True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_half_precision_on_a_gpu(scouter, images):
    expected = scouter.as_explainer()(images, 1)
    half = scouter.cuda().half()
    torch.testing.assert_close(half.as_explainer()(images.cuda(), 1).cpu().float(), expected, atol=0.05, rtol=0)


def test_bfloat16_autocast(scouter, images):
    expected = scouter.attend(images / 255)
    with torch.autocast("cpu", torch.bfloat16):
        found = scouter.attend(images / 255)
    torch.testing.assert_close(found.attention.float(), expected.attention, atol=0.02, rtol=0)
    assert found.logits.dtype == torch.float32  # bfloat16 is too coarse for sums
    torch.testing.assert_close(found.logits, expected.logits, rtol=0.02, atol=0)
