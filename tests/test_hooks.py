import copy

import pytest
import torch
import torchvision
from torch import nn

from scanlib.hooks import FeatureTap, Layout, resolve_layer  # names that the design places there
from scanlib.models.small import Normalize, build_small_vit


def full_gradient(model, layer, x, classes):
    """The plain way: keep the whole graph, one backward through everything."""
    kept = {}
    handle = resolve_layer(model, layer)[1].register_forward_hook(lambda m, i, o: kept.update(f=o))
    logits = model(x)
    handle.remove()
    score = logits.gather(1, classes[:, None]).sum()
    return kept["f"], torch.autograd.grad(score, kept["f"])[0]


def test_gradient_by_hand():
    """y = w . relu(2 x) pooled: dy/dF = w / (h w) exactly, in float64."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    with FeatureTap(model, "0") as tap:
        tap(torch.rand(2, 3, 4, 4, dtype=torch.float64))
        gradient = tap.gradient(target=[0, 2])
    expected = model[3].weight.detach()[[0, 2]] / 16
    torch.testing.assert_close(gradient, expected[:, :, None, None].expand(2, 2, 4, 4), rtol=0, atol=1e-15)


@pytest.mark.parametrize("frozen", [False, True])
def test_detached_tail_equals_the_full_graph(tiny, images, frozen):
    x, classes = images / 255, torch.tensor([0, 1, 2, 3])
    # the layer's own output is changed in place by the ReLU behind it; the tap must keep what the layer returned
    model = copy.deepcopy(tiny)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    features, gradient = full_gradient(model, "back.0", x, classes)
    tiny.requires_grad_(not frozen)
    with FeatureTap(tiny, "back.0") as tap:
        logits = tap(x)
        torch.testing.assert_close(logits, model(x).detach())
        torch.testing.assert_close(tap.features, features.detach())
        torch.testing.assert_close(tap.gradient(classes), gradient)
    assert all(parameter.grad is None for parameter in tiny.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_is_neither_needed_nor_changed(tiny, images, mode):
    with FeatureTap(tiny, "front") as tap:
        tap(images)
        expected = tap.gradient(1)
    with mode():
        x = images.clone()
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with FeatureTap(tiny, "front") as tap:
            tap(x)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
            torch.testing.assert_close(tap.gradient(1), expected)
    with torch.inference_mode():
        inference_made = images.clone()
    with FeatureTap(tiny, "front") as tap:
        tap(inference_made)
        torch.testing.assert_close(tap.gradient(1), expected)


def test_one_forward_serves_many_targets(tiny, images):
    calls = []
    tiny.head.register_forward_hook(lambda *_: calls.append(1))
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        gradients = [tap.gradient(k) for k in range(5)]
        summed = tap.gradient(lambda row: row[1] + row[3])
        each = tap.gradient([lambda row, k=k: row[k] for k in (0, 1, 2, 3)])
    assert len(calls) == 1
    torch.testing.assert_close(summed, gradients[1] + gradients[3])
    torch.testing.assert_close(each, torch.stack([gradients[k][k] for k in range(4)]))


def test_model_left_as_found_even_on_an_exception(tiny, images):
    tiny.train()
    tiny.back.eval()
    before = copy.deepcopy(tiny.state_dict())
    with pytest.raises(RuntimeError, match="boom"), FeatureTap(tiny, "back") as tap:
        tap(images)
        raise RuntimeError("boom")
    assert not tiny.back._forward_hooks
    assert tiny.training and tiny.front.training and not tiny.back.training
    for key, value in tiny.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_open_tap_leaves_other_runs_of_the_model_alone(tiny, images):
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        features = tap.features
        with torch.no_grad():
            assert not tiny(images[:1]).requires_grad
        torch.testing.assert_close(tap.features, features)


def test_layers_that_can_not_be_tapped(tiny, images):
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"), FeatureTap(tiny, "unused") as tap:
        tap(images)
    with pytest.raises(ValueError, match="no spatial extent"), FeatureTap(tiny, "head") as tap:
        tap(images)
    with pytest.raises(RuntimeError, match="not active"):
        FeatureTap(tiny, "back")(images)


def test_side_branch_is_an_error_not_a_silent_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            self.side(x)
            return self.main(x).mean((2, 3))

    with pytest.raises(ValueError, match="does not depend on layer 'side'"), FeatureTap(Branch(), "side") as tap:
        tap(torch.rand(1, 3, 4, 4))
        tap.gradient(0)


def test_bad_targets(tiny, images):
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        with pytest.raises(ValueError, match=r"class 5 is out of range: the model has classes 0\.\.4"):
            tap.gradient(5)
        with pytest.raises(ValueError, match=r"class -3 is out of range: the model has classes 0\.\.4"):
            tap.gradient(-3)
        with pytest.raises(ValueError, match="3 classes for 4 images"):
            tap.gradient([0, 1, 2])
        with pytest.raises(ValueError, match=r"shape \(4, 1\) for 4 images; give one class, or a flat list"):
            tap.gradient(torch.zeros(4, 1, dtype=torch.long))
        with pytest.raises(TypeError, match="must map an image's outputs"):
            tap.gradient(lambda row: 3.0)
        with pytest.raises(ValueError, match="2 callables for 4 images"):
            tap.gradient([lambda row: row[0]] * 2)
        with pytest.raises(TypeError, match="integers"):
            tap.gradient(torch.tensor([0.0, 1, 2, 3]))


def test_a_binary_model_with_one_output_per_image():
    with FeatureTap(nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), "0") as tap:
        assert tap(torch.rand(2, 3, 4, 4)).shape == (2, 1)
        assert tap.gradient(0).eq(1 / 16).all()


def test_token_gradients_of_a_vit():
    torch.manual_seed(0)
    model = build_small_vit().eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero, where every gradient vanishes
    x = torch.rand(2, 3, 64, 64)
    classes = torch.tensor([1, 2])
    layer = "encoder.layers.encoder_layer_4"
    _, gradient = full_gradient(model, layer, x, classes)
    with FeatureTap(model, layer) as tap:
        tap(x)
        torch.testing.assert_close(tap.gradient(classes), gradient)
        assert tap.layout == Layout("BTC", 128, (8, 8), prefix=1)
    with FeatureTap(model, "encoder.layers.encoder_layer_5") as tap:  # the class token alone is read behind the last block
        tap(x)
        assert not tap.layout.to_maps(tap.gradient(classes)).any()


def test_channels_last_features_of_a_swin_and_a_logits_object():
    torch.manual_seed(0)
    swin = torchvision.models.swin_t(weights=None, num_classes=4).eval()

    class WithLogits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = swin

        def forward(self, x):
            return type("Output", (), {"logits": self.net(x)})()

    with FeatureTap(WithLogits(), "net.features.7") as tap:
        assert tap(Normalize()(torch.rand(1, 3, 64, 96) * 255)).shape == (1, 4)
        assert tap.layout == Layout("BHWC", 768, (2, 3))
        assert tap.layout.to_maps(tap.gradient(0)).shape == (1, 768, 2, 3)


def test_layers_and_models_that_return_tuples():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return x, x.mean()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            features, mean = self.pair(x)
            return features.mean((2, 3)) * 2, mean

    net = Net()
    with FeatureTap(net, "pair") as tap:
        x = torch.rand(2, 3, 4, 4)
        torch.testing.assert_close(tap(x), net(x)[0].detach())
        torch.testing.assert_close(tap.features, net.pair.conv(x).detach())
        assert tap.gradient(1)[:, 1].eq(2 / 16).all() and not tap.gradient(1)[:, 0].any()
    named = type("Output", (tuple,), {})  # any tuple class comes back as itself
    net.pair.register_forward_hook(lambda module, inputs, output: named(output))
    with FeatureTap(net, "pair") as tap:
        assert tap(x).shape == (2, 4)


def test_shared_modules_answer_to_each_name_and_keep_the_last_run(images):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 3, 1)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x)).mean((2, 3))

    model = Shared()
    with FeatureTap(model, "second") as tap:
        tap(images)
        torch.testing.assert_close(tap.features, model.first(model.first(images)).detach())


def test_misuse_of_a_tap(tiny, images):
    tap = FeatureTap(tiny, "back")
    with tap:
        with pytest.raises(RuntimeError, match="already open"), tap:
            pass
        tap(images)
    assert not tiny.back._forward_hooks
    with pytest.raises(RuntimeError, match="read it inside the `with`"):
        _ = tap.features
