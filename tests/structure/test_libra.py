import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from scanlib.structure.libra import libra

ADDED = ("bias", "token", "pos_embed", "position", "cls")


def measure_gap(model, inputs, target=1):
    """Return the largest |sum(x dy/dx) + sum(b dy/db) - y| as a share of |y|, and the largest change of the logits."""
    for parameter in model.parameters():
        parameter.requires_grad_()
    inputs = inputs.clone().requires_grad_()
    with torch.no_grad():
        plain = model(inputs)
    plain = getattr(plain, "logits", plain)
    with libra(model):
        logits = model(inputs)
    logits = getattr(logits, "logits", logits)
    score = logits[:, target].sum()
    added = {name: parameter for name, parameter in model.named_parameters() if any(key in name for key in ADDED)}
    added = {name: parameter for name, parameter in added.items() if not name.endswith(("weight", "table"))}
    gradients = torch.autograd.grad(score, [inputs, *added.values()], allow_unused=True)
    total = sum((x * g).sum() for x, g in zip([inputs, *added.values()], gradients, strict=True) if g is not None)
    return abs(float((total - score).detach() / score.detach())), float((logits - plain).detach().abs().max())


class GatedMLP(nn.Module):
    """SwiGLU between norms, on flat images."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(48), nn.Linear(48, 32), nn.Linear(48, 32), nn.Linear(32, 5)

    def forward(self, x):
        x = self.norm(x.flatten(2).transpose(1, 2).flatten(1)[:, None].expand(-1, 2, -1))
        return self.down(F.silu(self.gate(x)) * self.up(x)).mean(1)


class ConvNeXtBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.block = torchvision.models.convnext.CNBlock(8, 1.0, 0.0)
        self.group, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.group(self.block(self.stem(x))).mean((2, 3)))


def build_vit():
    return torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=5)


def build_swin():
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=5)


def build_timm():
    timm = pytest.importorskip("timm")
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, reg_tokens=2, num_classes=5
    )


def build_dino():
    vit = pytest.importorskip("timm").models.vision_transformer
    options = {"mlp_layer": pytest.importorskip("timm").layers.SwiGLU, "init_values": 0.5, "qk_norm": True, "reg_tokens": 4}
    return vit.VisionTransformer(16, 4, embed_dim=16, depth=2, num_heads=2, num_classes=5, **options)


def build_hugging_face():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5))


def build_maxvit():
    return torchvision.models.MaxVit((32, 32), 8, 2, [8, 16], [1, 1], 4, 0.0, num_classes=5)  # running statistics 0 and 1


BUILDERS = [build_vit, build_swin, build_maxvit, build_timm, build_dino, build_hugging_face, GatedMLP, ConvNeXtBlock]


def randomize(model):
    """Draw all parameters, so that no head or scale is 0."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else 0.2)
    return model.double().eval()


@pytest.mark.parametrize("build", BUILDERS)
def test_input_times_gradient_and_biases_sum_to_the_logit(build):
    model = randomize(build())
    size = {GatedMLP: 4, build_maxvit: 32}.get(build, 16)
    gap, change = measure_gap(model, torch.randn(3, 3, size, size, dtype=torch.float64))
    assert gap < 1e-9 and change < 1e-12


def test_plain_gradients_do_not_add_up():
    model = randomize(build_vit())
    inputs = torch.randn(3, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    score = model(inputs)[:, 1].sum()
    added = [parameter for name, parameter in model.named_parameters() if "bias" in name or "token" in name or "pos_" in name]
    tensors = [inputs, *added]
    found = sum((x * g).sum() for x, g in zip(tensors, torch.autograd.grad(score, tensors), strict=True))
    assert abs(float((found - score).detach() / score.detach())) > 0.05


@pytest.mark.parametrize("function", [F.gelu, F.silu, F.hardswish, F.mish, F.elu, torch.tanh])
def test_activations_keep_their_value_and_are_linear(function):
    x = torch.tensor([[-3.0, -1e-3, 0.0, 0.4, 2.0]], dtype=torch.float64, requires_grad=True)
    with libra(nn.Identity()):
        y = function(x)
    assert torch.equal(y, function(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y, atol=1e-12, rtol=0)
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(gradient[0, 2], plain[0, 2], atol=1e-3, rtol=0)


def test_in_place_activation_changes_its_input():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with libra(nn.Identity()):
        before = x * 1
        after = F.silu(before, inplace=True)
    assert before is after and torch.equal(after, F.silu(x))
    (gradient,) = torch.autograd.grad(before.sum(), x)
    torch.testing.assert_close(gradient, torch.sigmoid(x))


def test_layer_norm_by_hand():
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    norm = nn.LayerNorm(6).double()
    with libra(norm):
        y = norm(x)
    assert torch.equal(y, norm(x))
    weight = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((y * weight).sum(), x)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(gradient, (weight - weight.mean(-1, keepdim=True)) / deviation.detach())


def test_products_count_half_and_parameters_count_fully():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    scale = nn.Parameter(torch.tensor([2.0, 3.0, 4.0, 5.0], dtype=torch.float64))
    with libra(nn.Identity()):
        product, scaled = (x * 2) * (x * 3), (x * 1) * scale
    torch.testing.assert_close(torch.autograd.grad(product.sum(), x)[0] * x, product)
    torch.testing.assert_close(torch.autograd.grad(scaled.sum(), x)[0] * x, scaled)


def test_what_it_cannot_reach_is_named():
    x = torch.randn(2, 3, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="cannot reach exp, softplus"), libra(nn.Identity()):
        F.softplus(x * 1), torch.exp(x * 2)
    with pytest.raises(TypeError, match="TorchScript"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        libra(torch.jit.script(nn.Linear(2, 2)))


def test_other_threads_and_later_gradients_are_plain():
    x, found = torch.randn(2, 8, requires_grad=True), []

    def run():
        found.append(torch.autograd.grad(F.gelu(x).sum(), x)[0])

    run()
    with libra(nn.Identity()):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    run()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_an_exception_leaves_torch_as_it_was():
    before = torch._C._len_torch_function_stack()
    with pytest.raises(RuntimeError), libra(nn.Identity()):
        F.layer_norm(torch.ones(2, 3, requires_grad=True), (4,))
    assert torch._C._len_torch_function_stack() == before


@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Hardswish(inplace=True)])
def test_outputs_may_be_changed_in_place(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), change, nn.Flatten(), nn.Linear(64, 2)).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = model(x)
    with libra(model):
        logits = model(x.requires_grad_())
    assert torch.equal(logits, expected)
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    parts = torch.autograd.grad(logits[:, 1].sum(), [x, *biases])
    total = sum((value * part).sum() for value, part in zip([x, *biases], parts, strict=True))
    torch.testing.assert_close(total, logits[:, 1].sum(), atol=1e-9, rtol=0)
