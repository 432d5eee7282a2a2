import copy
import threading

import pytest
import torch
import torchvision
from torch import nn

from scanlib.hooks import FeatureTap, FeatureTaps
from scanlib.layers import Layout, resolve_layer
from scanlib.models.small import Normalize, build_small_vit


def compute_full_gradient(model, layer, x, classes):
    """Return a layer's features and the gradient there, from a backward pass through the whole model."""
    kept = {}
    handle = resolve_layer(model, layer)[1].register_forward_hook(lambda m, i, o: kept.update(f=o))
    logits = model(x)
    handle.remove()
    score = logits.gather(1, classes[:, None]).sum()
    return kept["f"], torch.autograd.grad(score, kept["f"])[0]


def test_gradient_by_hand():
    """For y = w . mean(F), dy/dF = w / (h w), in float64."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).double()
    with FeatureTap(model, "0") as tap:
        tap(torch.rand(2, 3, 4, 4, dtype=torch.float64))
        gradient = tap.gradient(target=[0, 2])
    expected = model[3].weight.detach()[[0, 2]] / 16
    torch.testing.assert_close(gradient, expected[:, :, None, None].expand(2, 2, 4, 4), rtol=0, atol=1e-15)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_equals_the_one_of_the_whole_graph(tiny, images, frozen):
    x, classes = images / 255, torch.tensor([0, 1, 2, 3])
    # in tiny the ReLU after the layer changes the layer's output in place; the tap must keep it unchanged
    model = copy.deepcopy(tiny)
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    features, gradient = compute_full_gradient(model, "back.0", x, classes)
    tiny.requires_grad_(not frozen)
    with FeatureTap(tiny, "back.0") as tap:
        logits = tap(x)
        torch.testing.assert_close(logits, model(x).detach())
        torch.testing.assert_close(tap.features, features.detach())
        torch.testing.assert_close(tap.gradient(classes), gradient)
    assert all(parameter.grad is None for parameter in tiny.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tap_works_in_any_grad_mode_and_does_not_change_it(tiny, images, mode):
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
        inference_images = images.clone()
    with FeatureTap(tiny, "front") as tap:
        tap(inference_images)
        torch.testing.assert_close(tap.gradient(1), expected)


def test_one_forward_pass_serves_many_targets(tiny, images):
    calls = []
    tiny.head.register_forward_hook(lambda *_: calls.append(1))
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        gradients = [tap.gradient(k) for k in range(5)]
        gradient_of_sum = tap.gradient(lambda row: row[1] + row[3])
        one_per_image = tap.gradient([lambda row, k=k: row[k] for k in (0, 1, 2, 3)])
    assert len(calls) == 1
    torch.testing.assert_close(gradient_of_sum, gradients[1] + gradients[3])
    torch.testing.assert_close(one_per_image, torch.stack([gradients[k][k] for k in range(4)]))


def test_model_is_unchanged_after_an_exception(tiny, images):
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


def test_open_tap_ignores_other_runs_of_the_model(tiny, images):
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        features = tap.features
        with torch.no_grad():
            assert not tiny(images[:1]).requires_grad
        torch.testing.assert_close(tap.features, features)


def test_open_tap_ignores_runs_in_other_threads(tiny, images):
    """While the tap's own run waits inside the model, another thread runs the same model."""
    entered, finished = threading.Event(), threading.Event()

    def wait(module, inputs):
        if threading.current_thread() is threading.main_thread():
            entered.set()
            assert finished.wait(60)

    def run_in_thread():
        assert entered.wait(60)
        tiny(images[:1])
        finished.set()

    expected = tiny.back(tiny.front(images)).detach()
    tiny.head.register_forward_pre_hook(wait)
    other = threading.Thread(target=run_in_thread)
    other.start()
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        torch.testing.assert_close(tap.features, expected)
    other.join()


@pytest.mark.parametrize("record", ["after", "all"])
def test_gradients_at_several_layers(tiny, images, record):
    classes = torch.tensor([0, 1, 2, 3])
    expected = [compute_full_gradient(tiny, name, images, classes) for name in ("back", "front")]
    with FeatureTaps(tiny, ["back", "front"], record=record) as taps:
        taps(images)
        gradients = taps.gradients(classes)
        for features, gradient, layout, (whole, whole_gradient) in zip(
            taps.features, gradients, taps.layouts, expected, strict=True
        ):
            assert features.requires_grad == (record == "all") and layout.kind == "BCHW"
            torch.testing.assert_close(features, whole)
            torch.testing.assert_close(gradient, whole_gradient)


def test_features_without_a_graph(tiny, images):
    with FeatureTaps(tiny, ["front", "back"], record=None) as taps:
        logits = taps(images)
        assert not any(features.requires_grad for features in taps.features)
        with pytest.raises(ValueError, match="does not depend on layer 'front'"):
            taps.gradients(0)
    torch.testing.assert_close(logits, tiny(images).detach())


def test_gradients_can_be_differentiated_again():
    """For y = sum F^3, dy/dF = 3 F^2, whose sum has the gradient 6 F."""

    class Cubes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(x).pow(3).sum((2, 3))

    inputs = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    with FeatureTaps(Cubes(), ["layer"], create_graph=True) as taps:
        taps(inputs)
        second = torch.autograd.grad(taps.gradients(1)[0].sum(), taps.captured[0])[0]
    torch.testing.assert_close(second[:, 1], 6 * inputs[:, 1], rtol=0, atol=1e-14)
    assert not second[:, [0, 2]].any()


def test_tap_raises_for_layers_that_cannot_be_tapped(tiny, images):
    with pytest.raises(RuntimeError, match="layer 'unused' did not run"), FeatureTap(tiny, "unused") as tap:
        tap(images)
    with pytest.raises(ValueError, match="no spatial extent"), FeatureTap(tiny, "head") as tap:
        tap(images)
    with pytest.raises(RuntimeError, match="not active"):
        FeatureTap(tiny, "back")(images)


def test_gradient_raises_for_a_layer_in_a_side_branch():
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


def test_gradient_raises_for_wrong_targets(tiny, images):
    with FeatureTap(tiny, "back") as tap:
        tap(images)
        with pytest.raises(ValueError, match=r"class 5 is out of range: the model has classes 0\.\.4"):
            tap.gradient(5)
        with pytest.raises(ValueError, match=r"class -3 is out of range: the model has classes 0\.\.4"):
            tap.gradient(-3)
        with pytest.raises(ValueError, match="3 classes for 4 images"):
            tap.gradient([0, 1, 2])
        with pytest.raises(ValueError, match=r"one class or a flat list with one per image, got shape \(4, 1\) for 4 images"):
            tap.gradient(torch.zeros(4, 1, dtype=torch.long))
        with pytest.raises(TypeError, match="must map an image's output to a scalar tensor"):
            tap.gradient(lambda row: 3.0)
        with pytest.raises(ValueError, match="2 callables for 4 images"):
            tap.gradient([lambda row: row[0]] * 2)
        with pytest.raises(TypeError, match="integers"):
            tap.gradient(torch.tensor([0.0, 1, 2, 3]))


def test_binary_model_with_one_output_per_image():
    with FeatureTap(nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(0)), "0") as tap:
        assert tap(torch.rand(2, 3, 4, 4)).shape == (2, 1)
        assert tap.gradient(0).eq(1 / 16).all()


def test_gradient_at_the_tokens_of_a_vision_transformer():
    torch.manual_seed(0)
    model = build_small_vit().eval()
    nn.init.normal_(model.heads.head.weight)  # torchvision initialises it to zero, where all gradients are zero
    x = torch.rand(2, 3, 64, 64)
    classes = torch.tensor([1, 2])
    layer = "encoder.layers.encoder_layer_4"
    _, gradient = compute_full_gradient(model, layer, x, classes)
    with FeatureTap(model, layer) as tap:
        tap(x)
        torch.testing.assert_close(tap.gradient(classes), gradient)
        assert tap.layout == Layout("BTC", 128, (8, 8), prefix=1)
    with FeatureTap(model, "encoder.layers.encoder_layer_5") as tap:  # after the last block the head reads only the class token
        tap(x)
        assert not tap.layout.to_maps(tap.gradient(classes)).any()


def test_channels_last_features_of_a_swin_transformer_that_returns_an_object_with_logits():
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
    named = type("Output", (tuple,), {})  # the layer's output keeps its tuple class
    net.pair.register_forward_hook(lambda module, inputs, output: named(output))
    with FeatureTap(net, "pair") as tap:
        assert tap(x).shape == (2, 4)


def test_shared_module_has_several_names_and_keeps_its_last_output(images):
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


def test_tap_raises_if_opened_twice_or_read_when_closed(tiny, images):
    tap = FeatureTap(tiny, "back")
    with tap:
        with pytest.raises(RuntimeError, match="already open"), tap:
            pass
        tap(images)
    assert not tiny.back._forward_hooks
    with pytest.raises(RuntimeError, match="read it inside the `with`"):
        _ = tap.features


def test_unknown_record_raises(tiny):
    with pytest.raises(ValueError, match="record must be 'after', 'all' or None, got 'before'"):
        FeatureTaps(tiny, ["back"], record="before")
