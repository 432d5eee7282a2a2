import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from scanlib import AttentionRelevance, AttentionRollout, EigenCAM, FullGrad, LeGrad, Libra, libra
from scanlib.explainers.attention import RelevanceTap
from scanlib.explainers.libra import find_blocks
from scanlib.hooks import FeatureTap
from scanlib.models import SmallResNet, build_small_vit


def build_vit(depth=2):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 4, depth, 2, 16, 32, num_classes=5)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit.double().eval()


IMAGES = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_map_is_input_times_gradient_at_every_block():
    vit = build_vit()
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    inputs, kept = IMAGES.clone().requires_grad_(), []
    for block in vit.encoder.layers:
        block.register_forward_pre_hook(lambda module, arguments: kept.append(arguments[0]))
    with libra(vit):
        score = vit(inputs)[:, 2].sum()
    for x, gradient in zip(kept, torch.autograd.grad(score, kept), strict=True):
        expected += (x * gradient).sum(2)[:, 1:].unflatten(1, (4, 4)).detach()
    for block in vit.encoder.layers:
        block._forward_pre_hooks.clear()
    torch.testing.assert_close(Libra(vit)(IMAGES, target=2, normalize=False), expected)
    assert not torch.allclose(Libra(vit, libra=False)(IMAGES, target=2, normalize=False), expected)


def test_one_block_and_its_biases_sum_to_the_score():
    vit = build_vit(1)
    for name, parameter in vit.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    tokens = []
    vit.encoder.layers[0].register_forward_pre_hook(lambda module, arguments: tokens.append(arguments[0]))
    inputs = IMAGES.clone().requires_grad_()
    with libra(vit):
        score = vit(inputs)[:, 2]
    (gradient,) = torch.autograd.grad(score.sum(), tokens)
    torch.testing.assert_close((tokens[0] * gradient).sum((1, 2)), score)  # with the class token; no biases
    patches = Libra(vit)(IMAGES, target=2, normalize=False).sum((1, 2))
    torch.testing.assert_close(patches + (tokens[0] * gradient)[:, 0].sum(1), score)


def test_blocks_of_models():
    assert find_blocks(build_vit()) == ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    assert find_blocks(torchvision.models.resnet18())[::4] == ["layer1.0", "layer3.0"]
    assert find_blocks(torchvision.models.squeezenet1_1())[0] == "features.3"
    assert find_blocks(torchvision.models.vgg11())[:2] == ["features.0", "features.3"]


@pytest.mark.parametrize("build", [build_small_vit, SmallResNet, torchvision.models.swin_t])
def test_maps_of_models_of_several_kinds(build):
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)  # the head is 0 at first
    maps = Libra(model)(torch.rand(2, 3, 64, 64) * 255)
    assert maps.shape == (2, 64, 64) and maps.amax((1, 2)).eq(1).all()


def test_fullgrad_of_a_transformer_is_complete_up_to_its_tokens():
    vit = build_vit()
    nn.init.zeros_(vit.class_token)
    nn.init.zeros_(vit.encoder.pos_embedding)
    maps = FullGrad(vit, libra=True)(IMAGES, target=1)  # warns, which is an error here, unless the terms sum to the score
    assert maps.shape == (3, 16, 16)


@pytest.mark.parametrize("method", [AttentionRelevance, LeGrad])
def test_attention_explainers_take_libra(method):
    vit = build_vit()
    plain, changed = (method(vit, libra=value)(IMAGES, target=1, normalize=False) for value in (False, True))
    assert plain.shape == changed.shape and not torch.allclose(plain, changed)


def test_taps_take_libra():
    vit, layer = build_vit(), "encoder.layers.encoder_layer_0"
    found = []
    for kind in (FeatureTap, RelevanceTap):
        with kind(vit, layer, libra=True) as tap:
            tap(IMAGES)
            found.append(tap.gradient(2))
    torch.testing.assert_close(found[0], found[1])


def test_methods_without_gradients_refuse_libra():
    for method in (EigenCAM, AttentionRollout):
        with pytest.raises(ValueError, match=f"libra must be False for {method.__name__}, which takes no gradient"):
            method(build_vit(), libra=True)


def test_logits_in_float32_stay_close():
    vit = build_vit().float()
    with libra(vit):
        found = vit(IMAGES.float())
    torch.testing.assert_close(found, vit(IMAGES.float()), atol=1e-6, rtol=1e-6)


def test_biases_complete_the_sum():
    """Input x gradient at the first block and the biases behind it add up to the logit, for a model without a class token."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            return x + self.down(F.gelu(self.up(self.norm(x))))

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.blocks, self.head = (
                nn.Conv2d(3, 6, 4, 4),
                nn.Sequential(Block(), Block()),
                nn.Linear(6, 5, bias=False),
            )

        def forward(self, x):
            return self.head(self.blocks(self.embed(x).flatten(2).mT).mean(1))

    model = Mixer().double().eval()
    images = torch.rand(2, 3, 16, 12, dtype=torch.float64)
    with_biases = Libra(model, "blocks.0", biases=True)(images, target=3, normalize=False)
    without = Libra(model, "blocks.0")(images, target=3, normalize=False)
    embedded = model.embed.bias  # before the block: counted in its input, and once more as a bias
    with libra(model):
        start = model.embed(images).detach().requires_grad_()
        logits = model.head(model.blocks(start.flatten(2).mT).mean(1))[:, 3]
    (gradient,) = torch.autograd.grad(logits.sum(), start)
    first = torch.einsum("c,nc...->n", embedded, gradient)
    assert without.shape == with_biases.shape == (2, 4, 3)
    torch.testing.assert_close(without.sum((1, 2)), (start * gradient).sum((1, 2, 3)).detach())
    torch.testing.assert_close(with_biases.sum((1, 2)) - first.detach(), logits.detach(), atol=1e-9, rtol=0)
    assert (without.sum((1, 2)) - logits).abs().min() > 1e-3
