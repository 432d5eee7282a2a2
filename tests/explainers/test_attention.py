"""Attention maps: the formulas by hand, the recording against torch, and torchcam as a second opinion."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from scanlib import AttentionRelevance, AttentionRollout, LeGrad, build_small_vit
from scanlib.explainers.attention import (
    AttentionWeights,
    NoAttentionError,
    RelevanceTap,
    attention_relevance,
    attention_rollout,
    legrad,
)
from scanlib.hooks import FeatureTap
from scanlib.models.small import Normalize

EXPLAINERS = [AttentionRollout, AttentionRelevance, LeGrad]


class OneHeadBlock(nn.Module):
    """Attention and a layer for each token, with residuals; written with a softmax, or fused."""

    def __init__(self, width, fused):
        super().__init__()
        self.qkv, self.mlp, self.fused = nn.Linear(width, 3 * width), nn.Linear(width, width), fused

    def forward(self, x):
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        x = x + mixed[:, 0]
        return x + self.mlp(x).tanh()


class TinyTransformer(nn.Module):
    """4 patches of 4 px and a class token, two blocks; the head reads the class token or the mean of the patches."""

    def __init__(self, pool="class", fused=True, width=6):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.blocks = nn.ModuleList([OneHeadBlock(width, fused), OneHeadBlock(width, fused)])
        self.norm, self.head, self.pool = nn.LayerNorm(width), nn.Linear(width, 3), pool

    def forward_head(self, x):
        return self.head(x[:, 0] if self.pool == "class" else x[:, 1:].mean(1))

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.forward_head(self.norm(x))


@pytest.fixture(params=["class", "mean"])
def transformer(request):
    torch.manual_seed(0)
    return TinyTransformer(request.param).double().eval()


@pytest.fixture
def images_8px():
    return torch.rand(3, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def vit():
    torch.manual_seed(0)
    model = build_small_vit().eval()
    nn.init.normal_(model.heads.head.weight)
    return model


# two tokens, two blocks, two heads
FIRST = torch.tensor([[0.5, 0.5], [0, 1]], dtype=torch.float64).expand(1, 2, 2, 2)
SECOND = torch.tensor([[0.2, 0.8], [1, 0]], dtype=torch.float64).expand(1, 2, 2, 2)


def test_rollout_by_hand():
    # (I + A1) / 2 = [[.75, .25], [0, 1]]; (I + A2) / 2 = [[.6, .4], [.5, .5]]
    expected = torch.tensor([[[0.45, 0.55], [0.375, 0.625]]], dtype=torch.float64)
    torch.testing.assert_close(attention_rollout([FIRST, SECOND]), expected, rtol=0, atol=1e-15)


def test_relevance_by_hand():
    at_first = torch.tensor([[[2, -1], [1, 1]], [[0, 4], [0, -1]]], dtype=torch.float64)[None]
    at_second = torch.tensor([[[5, 0], [1, 3]], [[0, 1], [-1, 0]]], dtype=torch.float64)[None]
    # mean relu(G1 A1) = [[.5, 1], [0, .5]], so R = [[1.5, 1], [0, 1.5]]; mean relu(G2 A2) = [[.5, .4], [.5, 0]]
    expected = torch.tensor([[[2.25, 2.1], [0.75, 2.0]]], dtype=torch.float64)
    torch.testing.assert_close(attention_relevance([FIRST, SECOND], [at_first, at_second]), expected, rtol=0, atol=1e-15)


def test_legrad_by_hand():
    one = torch.tensor([[[2, -1], [1, 1]], [[0, 4], [0, -1]]], dtype=torch.float64)[None]
    # positive part, mean over heads and queries: keys get (2 + 1) / 4 and (1 + 4) / 4; the other block's are 0
    assert legrad([one, -one.abs()]).tolist() == [[0.375, 0.625]]


def by_hand(model, images, target):
    """Compute rollout and relevance of TinyTransformer, (N, 2, 2) each, without the recorder."""
    x = model.embed(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.token.expand(len(x), -1, -1), x], 1)
    weights = []
    for block in model.blocks:
        q, k, v = block.qkv(x).chunk(3, -1)
        weights.append(torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1))
        x = x + weights[-1] @ v
        x = x + block.mlp(x).tanh()
    scores = model.forward_head(model.norm(x))[torch.arange(len(images)), target]
    gradients = torch.autograd.grad(scores.sum(), weights)
    rows = [0] if model.pool == "class" else [1, 2, 3, 4]
    rollouts, relevances = [], []
    for i in range(len(images)):
        identity = torch.eye(5, dtype=torch.float64)
        first, second = (weight[i].detach() for weight in weights)
        rollout = (0.5 * identity + 0.5 * second) @ (0.5 * identity + 0.5 * first)
        relevance = identity + (gradients[0][i] * first).clamp_min(0)
        relevance = relevance + (gradients[1][i] * second).clamp_min(0) @ relevance
        rollouts.append(rollout[rows].mean(0)[1:].reshape(2, 2))
        relevances.append(relevance[rows].mean(0)[1:].reshape(2, 2))
    return torch.stack(rollouts), torch.stack(relevances)


def test_maps_of_two_block_transformer_equal_reference(transformer, images_8px):
    target = [2, 0, 1]
    rollout, relevance = by_hand(transformer, images_8px, target)
    torch.testing.assert_close(AttentionRollout(transformer)(images_8px, target, normalize=False), rollout)
    torch.testing.assert_close(AttentionRelevance(transformer)(images_8px, target, normalize=False), relevance)


def test_fused_and_explicit_attention_give_equal_maps(images_8px):
    torch.manual_seed(0)
    fused = TinyTransformer().double().eval()
    explicit = TinyTransformer(fused=False).double().eval()
    explicit.load_state_dict(fused.state_dict())
    for explainer in EXPLAINERS:
        torch.testing.assert_close(explainer(fused)(images_8px, 1), explainer(explicit)(images_8px, 1))


@pytest.mark.parametrize("batch_first", [False, True])
def test_recorder_does_not_change_multi_head_attention(batch_first):
    torch.manual_seed(0)
    x = torch.randn(5, 5, 8, dtype=torch.float64, requires_grad=True)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.zeros(5, 5, dtype=torch.bool)
    padding[:, 3] = True
    calls = [{}, {"attn_mask": hidden}, {"attn_mask": hidden.double() * -3}]  # recorded
    others = [{"key_padding_mask": padding}, {"attn_mask": torch.randn(10, 5, 5, dtype=torch.float64)}]  # not recorded
    for made in ({}, {"add_zero_attn": True}, {"add_bias_kv": True}, {"kdim": 8, "vdim": 4}):
        attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **made).double().eval()
        value = x[..., :4] if "vdim" in made else x
        for i, call in enumerate([*calls, *others]):
            for shown in ({"need_weights": False}, {"average_attn_weights": False}, {}):
                expected = attention(x, x, value, **call, **shown)
                with AttentionWeights() as recorder:
                    got = attention(x, x, value, **call, **shown)
                torch.testing.assert_close(got, expected)
                is_recorded = not made and i < len(calls)
                assert (len(recorder.weights), recorder.missed) == (is_recorded, not is_recorded)
                if is_recorded:
                    torch.testing.assert_close(recorder.weights[0], attention(x, x, x, **call, average_attn_weights=False)[1])


def test_recorder_keeps_masks_and_scale_of_fused_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 4, 6, dtype=torch.float64)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    for options in ({}, {"attn_mask": seen}, {"attn_mask": seen * 2.0}, {"is_causal": True}, {"scale": 0.3}):
        with AttentionWeights() as recorder:
            output = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, **options))
        torch.testing.assert_close(recorder.weights[0].sum(-1), torch.ones(2, 2, 4, dtype=torch.float64))


def test_legrad_equals_torchcam(vit):
    torchcam = pytest.importorskip("torchcam.methods", reason="torchcam is not installed")
    if not hasattr(torchcam, "LeGrad"):
        pytest.skip("this torchcam has no LeGrad")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for chosen in (None, ["encoder.layers.encoder_layer_3", "encoder.layers.encoder_layer_5"]):
        ours = LeGrad(vit, chosen)(images, [1, 2, 3], normalize=False)
        with torchcam.LeGrad(vit, chosen or list(vit.encoder.layers)) as peer:
            scores = vit(images)
            theirs = peer.compute_cams([1, 2, 3], scores, normalized=False)[0]
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


@pytest.mark.parametrize("explainer", EXPLAINERS)
def test_call_follows_the_explainer_protocol(vit, explainer):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 255
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    vit.train()
    vit.encoder.ln.eval()
    vit.conv_proj.weight.requires_grad_(False)
    with explainer(vit, preprocess=Normalize()) as explain:
        maps = explain(images)
        assert maps.shape == (3, 64, 64) and maps.dtype == torch.float32 and not maps.requires_grad
        torch.testing.assert_close(maps.amax((1, 2)), torch.ones(3))
        torch.testing.assert_close(maps.amin((1, 2)), torch.zeros(3))
        assert explain(images, normalize=False).shape == (3, 8, 8)
        predicted = vit.eval()(Normalize()(images)).argmax(1)
        vit.train()
        vit.encoder.ln.eval()
        torch.testing.assert_close(explain(images, predicted), maps)
        torch.testing.assert_close(explain(images, [lambda row, k=k: row[k] for k in predicted]), maps)
        torch.testing.assert_close(explain(images[1:2]), maps[1:2], rtol=1e-3, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(explain(images), maps)
        with pytest.raises(ValueError, match="got 2 classes for 3 images"):
            explain(images, [1, 2])
        with pytest.raises(ValueError, match=r"target class 10 is out of range: the model has classes 0\.\.9"):
            explain(images, 10)
        torch.testing.assert_close(explain(images[0], predicted[:1]), maps[0], rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=r"images must be a tensor \(N, 3, H, W\)"):
            explain(images[0, 0])
    assert vit.training and not vit.encoder.ln.training and not vit.conv_proj.weight.requires_grad
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())


def test_relevance_and_legrad_depend_on_the_class_and_rollout_does_not(vit):
    images = torch.rand(1, 3, 64, 64)
    for explainer, differs in ((AttentionRollout, False), (AttentionRelevance, True), (LeGrad, True)):
        explain = explainer(vit)
        assert torch.allclose(explain(images, 1), explain(images, 2), atol=1e-4) != differs


def test_explainers_accept_frozen_models_and_other_grids(vit):
    torch.manual_seed(0)
    wide = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4).requires_grad_(False).eval()
    nn.init.normal_(wide.heads.head.weight)
    for explainer in EXPLAINERS:
        assert explainer(wide)(torch.rand(2, 3, 32, 32), 1).max() == 1


def test_maps_of_chosen_blocks_equal_reference(transformer, images_8px):
    both = AttentionRollout(transformer, ["blocks.0", "blocks.1"])(images_8px, normalize=False)
    torch.testing.assert_close(both, AttentionRollout(transformer)(images_8px, normalize=False))
    rows = [0] if transformer.pool == "class" else [1, 2, 3, 4]  # what the head reads, for every block
    with AttentionWeights() as recorder:
        transformer(images_8px)
    for i, name in enumerate(("blocks.0", "blocks.1")):
        expected = (torch.eye(5, dtype=torch.float64) + recorder.weights[i].detach()[:, 0]) / 2
        expected = expected[:, rows].mean(1)[:, 1:].unflatten(1, (2, 2))
        torch.testing.assert_close(AttentionRollout(transformer, name)(images_8px, normalize=False), expected)
    assert not torch.allclose(*(AttentionRelevance(transformer, f"blocks.{i}")(images_8px, normalize=False) for i in (0, 1)))


def test_half_precision_maps_are_float32(vit):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    exact = [explainer(vit)(images, 1, normalize=False) for explainer in EXPLAINERS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = vit.bfloat16()
    for explainer, expected in zip(EXPLAINERS, exact, strict=True):
        maps = explainer(half, preprocess=lambda x: x.bfloat16())(images, 1, normalize=False)
        assert maps.dtype == torch.float32 and torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_score_without_gradient_warns(vit):
    nn.init.zeros_(vit.heads.head.weight)
    for explainer in (AttentionRollout, AttentionRelevance):
        with pytest.warns(UserWarning, match="the score of 2 images has no gradient at the last attention"):
            assert explainer(vit)(torch.rand(2, 3, 64, 64)).eq(0).all()


class ChannelAttention(nn.Module):
    """Attention over 32 channels: the shapes are valid, but the tokens are not patches."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2)[:, None]  # (B, 1, 32, T)
        x = (x @ x.transpose(-2, -1)).softmax(-1) @ x
        return self.head(x[:, 0].mean(2))


class Attending(nn.Module):
    """Tokens through one multi-head attention for each entry of ``heads``; other arguments are passed to MultiheadAttention."""

    def __init__(self, heads, **made):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.attentions = nn.ModuleList([nn.MultiheadAttention(8, count, batch_first=True, **made) for count in heads])

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for attention in self.attentions:
            x = x + attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def test_unreadable_or_inconsistent_attention_raises():
    images = torch.rand(2, 3, 16, 16)
    assert AttentionRelevance(Attending([2, 2]))(images).shape == (2, 16, 16)
    with pytest.raises(
        ValueError, match="AttentionRelevance needs blocks .*seen: no self-attention and 2 that cannot be recorded for 2 images"
    ):
        AttentionRelevance(Attending([2, 2], add_zero_attn=True))(images)
    with pytest.raises(ValueError, match=r"attention of \(2, 1, 16, 16\), \(2, 2, 16, 16\) for 2 images"):
        AttentionRollout(Attending([1, 2]))(images)


def test_models_without_attention_over_the_image_raise(tiny, images, vit):
    needed = r"needs blocks that attend over the whole image, \(images, heads, tokens, tokens\), and"
    with pytest.raises(
        ValueError, match=rf"AttentionRollout {needed} TinyNet has none; use SCAN or a CAM \(seen: no self-attention for 4 images"
    ):
        AttentionRollout(tiny)(images)
    swin = torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=3)
    with pytest.raises(ValueError, match=rf"{needed} SwinTransformer has none; use SCAN or a CAM \(seen: attention of "):
        AttentionRelevance(swin)(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="ChannelAttention has none; .*over 32 tokens that are not a grid of patches"):
        AttentionRollout(ChannelAttention())(torch.rand(2, 3, 16, 16))
    with pytest.raises(
        ValueError, match=r"target_layer must be blocks that run with one attention each, got blocks with \[0\] attentions"
    ):
        LeGrad(TinyTransformer(), "blocks", head=lambda tokens: tokens)(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got blocks with \[0\] attentions"):
        AttentionRollout(vit, "encoder.ln")(torch.rand(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"target_layer must be a block, a list of blocks, or None for all, got \[\]"):
        AttentionRollout(vit, [])
    with pytest.raises(TypeError, match="target_layer must be a name, a module or an index, got float"):
        AttentionRollout(vit, 1.5)
    with pytest.raises(ValueError, match="images must be a tensor .N, 3, H, W. or .3, H, W., got list"):
        AttentionRollout(vit)([1])
    with pytest.raises(TypeError, match="target must be a class index, .*, got 'dog'"):
        AttentionRollout(vit)(torch.rand(1, 3, 64, 64), "dog")
    with pytest.raises(ValueError, match="the blocks and the head of TinyNet are not known; pass target_layer="):
        LeGrad(tiny)
    with pytest.raises(ValueError, match="target_layer 'encoder.layer' not found; close matches: encoder.layers"):
        AttentionRollout(vit, "encoder.layer")


def test_hooks_are_removed_after_an_error(vit):
    explain = AttentionRollout(vit, "encoder.layers.encoder_layer_1", preprocess=lambda images: images[:, :2])
    with pytest.raises(ValueError, match=r"the number of channels that the model takes, got \(1, 2, 64, 64\)"):
        explain(torch.rand(1, 3, 64, 64))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vit.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_relevance_tap_equals_attention_relevance(transformer, images_8px):
    target = [2, 0, 1]
    with RelevanceTap(transformer, "blocks.0") as tap, FeatureTap(transformer, "blocks.0") as plain:
        tap(images_8px), plain(images_8px)
        gradient, relevance = tap.gradient_and_relevance(target)
        expected, no_relevance = plain.gradient_and_relevance(target)
        torch.testing.assert_close(tap.features, plain.features)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(relevance, AttentionRelevance(transformer)(images_8px, target, normalize=False))
    assert no_relevance is None


def test_relevance_tap_raises_without_readable_attention(tiny, images):
    message = "mask_by 'relevance' needs attention over the whole image, and {} has none that can be read; use gradient, "
    with (
        RelevanceTap(tiny, "back") as tap,
        pytest.raises(NoAttentionError, match=message.format("TinyNet") + ".*no self-attention for 4 images"),
    ):
        tap(images)
    with (
        RelevanceTap(ChannelAttention(), "embed") as tap,
        pytest.raises(NoAttentionError, match=message.format("ChannelAttention") + ".*32 tokens that are not a grid"),
    ):
        tap(torch.rand(2, 3, 16, 16))
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=3).eval()
    with RelevanceTap(vit, "conv_proj") as tap:
        tap(torch.rand(2, 3, 32, 32))
        with pytest.raises(NoAttentionError, match="attention that does not influence the score"):
            tap.gradient_and_relevance(lambda row: tap.captured[0].sum() + 0 * row.detach()[0])
