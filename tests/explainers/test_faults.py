"""Inputs and models that once gave a wrong map without a word: each is now right, or refused in one line."""

import copy
import pickle
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import scanlib
from scanlib import (
    SCAN,
    AblationCAM,
    FullGrad,
    GradCAM,
    ScoreCAM,
    SmallResNet,
)
from scanlib.explainers import Explainer, formulas
from scanlib.explainers.replay import Replay
from scanlib.models.small import Normalize

CNN_METHODS = [
    "GradCAM",
    "GradCAMPlusPlus",
    "SmoothGradCAMPlusPlus",
    "XGradCAM",
    "LayerCAM",
    "HiResCAM",
    "ShapleyCAM",
    "EigenCAM",
]
CNN_METHODS += ["EigenGradCAM", "FEM", "FinerCAM", "ScoreCAM", "ISCAM", "AblationCAM", "FullGrad"]
INPUT_METHODS = ["Saliency", "InputXGradient", "Libra", "RISE", "Occlusion"]
NO_LAYER = [*INPUT_METHODS, "FullGrad", "SmoothGrad", "IntegratedGradients"]
CNN_METHODS += INPUT_METHODS
VIT_METHODS = ["AttentionRollout", "AttentionRelevance", "LeGrad"]


def build(name, model, layer=None, **options):
    options |= {} if name in (*VIT_METHODS, *NO_LAYER) else {"target_layer": layer}
    return getattr(scanlib, name)(model, **options, **({"masks": 8} if name == "RISE" else {}))


class Net(nn.Module):
    def __init__(self, channels=3, classes=4):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, classes)

    def forward(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer4 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.layer4(self.layer3(x)).mean((2, 3)))


def build_vit():
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    return vit


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# --- threads ---


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_threads_get_their_own_maps_and_plain_predictions_stay(mode):
    """Eight threads run all explainers of one model, shared and their own, with plain inference beside them."""
    torch.manual_seed(0)
    cnn, vit = SmallCNN().train(mode == "train"), build_vit().train(mode == "train")
    images = [torch.rand(1, 3, 32, 32) * (i + 1) / 4 for i in range(4)]
    shared = {name: build(name, cnn, "layer3") for name in CNN_METHODS} | {name: build(name, vit) for name in VIT_METHODS}
    frozen = copy.deepcopy(cnn).eval()
    with torch.no_grad():
        plain = [frozen(image) for image in images]
    expected = {name: [explainer(image, 1, normalize=False) for image in images] for name, explainer in shared.items()}
    wrong, stop = [], threading.Event()

    def predict():
        while not stop.wait(0.001):  # without a pause this loop would hold back the others
            for image, want in zip(images, plain, strict=True):
                with torch.no_grad():
                    if mode == "eval" and not torch.allclose(cnn(image), want, atol=1e-5):
                        wrong.append("plain")
                if cnn.training != (mode == "train"):
                    wrong.append("mode")

    def explain(job):
        index, name = job % len(images), list(shared)[job % len(shared)]
        model = vit if name in VIT_METHODS else cnn
        explainer = shared[name] if job % 2 else build(name, model, "layer3")
        got, want = explainer(images[index], 1, normalize=False), expected[name][index]
        if (got - want).abs().max() > 1e-3 * want.abs().max():
            wrong.append(name)

    beside = threading.Thread(target=predict)
    beside.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(explain, range(4 * len(shared))))
    finally:
        stop.set()
        beside.join()
    assert not wrong
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*cnn.modules(), *vit.modules()])


def test_replay_does_not_change_what_the_model_computes(net, x):
    with Replay(net, "bn", x) as replay, torch.no_grad():
        before = net(x)
        replay(torch.zeros(3, 8, 16, 16), 0)
        assert torch.equal(net(x), before) and "forward" not in vars(net.bn)


@pytest.mark.parametrize("name", [*CNN_METHODS, *VIT_METHODS])
def test_an_interrupt_leaves_nothing_behind(name):
    """Ctrl-C at many moments of an explanation: modes, hooks and grad mode are as before, and the next map is right."""
    torch.manual_seed(0)
    model = build_vit().train() if name in VIT_METHODS else SmallCNN().train()
    explainer, x = build(name, model, "layer3"), torch.rand(1, 3, 32, 32)
    expected, modes = explainer(x, 1), [module.training for module in model.modules()]
    moment = 5
    while moment < 2000:
        calls = 0

        def interrupt(frame, event, argument, moment=moment):
            nonlocal calls
            calls += event == "call"
            if calls > moment and event == "call":
                raise KeyboardInterrupt

        finished, before = False, sys.gettrace()
        sys.settrace(interrupt)
        try:
            explainer(x, 1)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()
        assert not any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
        )
        if finished:
            break
        moment = int(moment * 1.5)
    torch.testing.assert_close(explainer(x, 1), expected)


# --- outputs ---


class Squeezes(Net):
    def forward(self, x):
        return super().forward(x).squeeze()


def test_a_squeezed_output_of_one_image_is_that_of_the_batch(net, x):
    model = Squeezes().eval()
    model.load_state_dict(net.state_dict())
    for name in CNN_METHODS:
        if name == "SmoothGradCAMPlusPlus":
            continue  # its noise depends on the number of images
        together, single = (build(name, model, "conv")(images, normalize=False) for images in (x, x[:1]))
        torch.testing.assert_close(single, together[:1], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(together, build(name, net, "conv")(x, normalize=False))
    one = Net(classes=1).eval()
    squeezed = Squeezes(classes=1).eval()
    squeezed.load_state_dict(one.state_dict())
    torch.testing.assert_close(GradCAM(squeezed, "conv")(x[:1], 0), GradCAM(one, "conv")(x[:1], 0))


class TwoOutputs(Net):
    def forward(self, x):
        logits = super().forward(x)
        return {"main": logits, "other": -logits}


def test_outputs_are_chosen_by_key_or_index(net, x):
    model = TwoOutputs().eval()
    model.load_state_dict(net.state_dict())
    with pytest.raises(TypeError, match=r"a dictionary with the keys 'main', 'other'; choose one with output="):
        GradCAM(model, "conv")(x, 1)
    for name in CNN_METHODS:
        expected = build(name, net, "conv")(x, 1, normalize=False)
        explainer = build(name, model, "conv", output="main")
        torch.testing.assert_close(explainer(x, 1, normalize=False), expected)
    negative = GradCAM(model, "conv", output="other")(x, lambda row: -row[1])
    torch.testing.assert_close(negative, GradCAM(net, "conv")(x, 1))
    with pytest.raises(
        ValueError, match=r"output 'third' not found; the model returns a dictionary with the keys 'main', 'other'"
    ):
        GradCAM(model, "conv", output="third")(x, 1)
    pair = nn.Sequential(net)
    pair.forward = lambda x: (net(x), -net(x))
    with pytest.raises(ValueError, match="output 2 not found; the model returns a tuple of 2 entries"):
        GradCAM(pair, "0.conv", output=2)(x, 1)


def test_logits_of_another_number_of_images_raise(x):
    class Crops(Net):
        def forward(self, x):
            return super().forward(x.repeat(5, 1, 1, 1))

    with pytest.raises(ValueError, match=r"logits \(B, K\) for 2 images, got \(10, 4\)"):
        GradCAM(Crops().eval(), "conv")(x, 1)


# --- inputs ---


class WritesIntoInput(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.25))


@pytest.mark.parametrize("name", [*CNN_METHODS, "SSCAM"])
def test_models_that_write_into_their_input(name, x):
    torch.manual_seed(0)
    model = WritesIntoInput().eval()
    clean = Net().eval()
    clean.load_state_dict(model.state_dict())
    kept, explainer = x.clone(), build(name, model, "conv")
    if name == "FullGrad":  # the subtraction is a bias that no layer holds
        with pytest.raises(ValueError, match="the model adds a bias"):
            explainer(x, 1)
        assert torch.equal(x, kept)
        return
    first = explainer(x, 1, normalize=False)
    assert torch.equal(x, kept) and torch.equal(explainer(x, 1, normalize=False), first)
    if name not in ("SmoothGradCAMPlusPlus", "ScoreCAM", "ISCAM", "SSCAM", *INPUT_METHODS):  # these change or read the input
        torch.testing.assert_close(first, build(name, clean, "conv")((x - 0.5) / 0.25, 1, normalize=False), atol=1e-5, rtol=1e-3)


def test_a_preprocess_may_write_into_its_argument(net, x):
    kept = x.clone()
    expected = GradCAM(net, "conv", lambda images: (images - 0.5) / 0.25)(x, 1)
    assert torch.equal(GradCAM(net, "conv", lambda images: images.sub_(0.5).div_(0.25))(x, 1), expected) and torch.equal(x, kept)


def test_uint8_images_do_not_wrap_around(net, x):
    pixels = (255 * x).to(torch.uint8)
    for preprocess in (lambda images: (images - 128) / 64, lambda images: images - 5, lambda images: images * 2):
        expected = GradCAM(net, "conv", preprocess)(pixels.float(), 1)
        assert expected.any() and torch.equal(GradCAM(net, "conv", preprocess)(pixels, 1), expected)


def test_torchvision_transforms_that_scale_integers_only_are_refused(net, x):
    from torchvision.transforms import v2

    scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.2] * 3)])
    for images in (255 * x, (255 * x).to(torch.uint8)):
        with pytest.raises(ValueError, match="this torchvision transform scales integers only; pass lambda images"):
            GradCAM(net, "conv", scale)(images, 1)
    normalize = v2.Normalize([127.0] * 3, [60.0] * 3)
    assert GradCAM(net, "conv", normalize)(255 * x, 1).shape == (2, 16, 16)


@pytest.mark.parametrize("channels", [1, 2, 6, 11])
def test_any_number_of_channels(channels):
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.stem = nn.Conv2d(16, 5, 1), nn.Conv2d(channels, 16, 3, padding=1)

        def forward(self, x):
            return self.head(F.relu(self.stem(x))).mean((2, 3))

    model, x = HeadFirst().eval(), torch.rand(2, channels, 20, 20)
    assert GradCAM(model, "stem")(x, 2).shape == (2, 20, 20) and GradCAM(model, "stem")(x[0], 2).shape == (20, 20)
    with pytest.raises(ValueError, match=rf"the number of channels that the model takes, got \(2, {channels + 1}, 20, 20\)"):
        GradCAM(model, "stem")(torch.rand(2, channels + 1, 20, 20), 2)


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.head(x.view(len(x), -1))


@pytest.mark.parametrize("name", CNN_METHODS)
def test_models_that_need_channels_first_in_memory(name, x):
    torch.manual_seed(0)
    model = Views().eval()
    reshaped = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), model.head).eval()
    torch.testing.assert_close(build(name, model, "conv")(x, 1), build(name, reshaped, "0")(x, 1), atol=1e-4, rtol=1e-4)


# --- numbers ---


@pytest.mark.parametrize("name", CNN_METHODS)
def test_nan_and_infinity_are_errors_that_name_the_place(name, net, x):
    broken = copy.deepcopy(net)
    nn.init.constant_(broken.conv.weight, torch.inf)
    with pytest.raises(ValueError, match="layer 'conv' returns NaN or infinite|logits hold NaN"):
        build(name, broken, "conv")(x, 1)
    broken = copy.deepcopy(net)
    nn.init.constant_(broken.head.bias, torch.nan)
    with pytest.raises(ValueError, match="the model's logits hold NaN"):
        build(name, broken, "conv")(x, 1)


def test_nan_gradients_name_the_layer(net, x):
    with pytest.raises(ValueError, match="the gradient at layer 'conv' holds NaN or infinite"):
        GradCAM(net, "conv")(x, lambda row: (row[1] - row[1]).sqrt())
    with pytest.raises(ValueError, match="the preprocessed images hold NaN"):
        GradCAM(net, "conv", lambda images: images / 0 * 0)(x, 1)


@pytest.mark.parametrize("name", ["GradCAM", "GradCAMPlusPlus", "SmoothGradCAMPlusPlus", "LayerCAM", "EigenGradCAM", "HiResCAM"])
def test_tiny_gradients_give_the_map_of_float64(name, net, x):
    """Logits scaled by 1e-23, whose squares and cubes are 0 in float32."""
    with torch.no_grad():
        net.head.weight.mul_(1e-23)
    expected = build(name, copy.deepcopy(net).double(), "conv")(x.double(), 1)
    assert expected.amax() == 1 and build(name, net, "conv")(x, 1).amax() == 1
    if name == "SmoothGradCAMPlusPlus":
        return  # its noise depends on the precision
    torch.testing.assert_close(build(name, net, "conv")(x, 1).double(), expected, atol=1e-3, rtol=1e-2)


def test_grad_cam_plus_plus_equals_the_papers_formula():
    torch.manual_seed(0)
    A, G = torch.rand(2, 5, 4, 4, dtype=torch.float64), torch.randn(2, 5, 4, 4, dtype=torch.float64)
    alpha = G**2 / (2 * G**2 + A.sum((2, 3), keepdim=True) * G**3)
    expected = ((alpha * G.relu()).sum((2, 3), keepdim=True) * A).sum(1).relu()
    torch.testing.assert_close(formulas.grad_cam_plus_plus(A, G), expected)


@pytest.mark.parametrize("name", VIT_METHODS)
def test_attention_maps_under_autocast_are_summed_in_float32(name):
    torch.manual_seed(0)
    vit, x = build_vit().eval(), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert build(name, vit)(x, 1).dtype == torch.float32


# --- models ---


def test_a_square_softmax_over_channels_is_no_attention(x):
    class ChannelSoftmax(Net):
        def forward(self, x):
            return self.head(self.conv(x).softmax(1).mean((2, 3)))  # (N, 8, 16, 16)

    class RowSoftmax(Net):
        def forward(self, x):
            return self.head(self.conv(x).softmax(-1).amax((2, 3)))

    for model in (ChannelSoftmax(), RowSoftmax()):
        for name in ("AttentionRollout", "AttentionRelevance"):
            with pytest.raises(ValueError, match="needs blocks that attend over the whole image"):
                build(name, model.eval())(x, 1)


class FunctionalBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.rand(8) + 1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.pool(F.relu(F.conv2d(x, self.weight, self.bias))).flatten(1))


def test_full_grad_checks_that_its_terms_sum_to_the_score(net, x):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FullGrad(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval())(
            x, 1
        )
        FullGrad(net)(x, 1)
    with pytest.raises(ValueError, match="the terms of FullGrad sum to .*, the score is .*: the model adds a bias"):
        FullGrad(FunctionalBias().eval())(x, 1)
    smooth = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    with pytest.warns(UserWarning, match="they are equal for networks of linear pieces only"):
        FullGrad(smooth)(x, 1)


def test_full_grad_includes_the_biases_of_attention():
    """With the queries and keys at 0 attention is the mean, so a block of it is linear and the terms are complete."""
    torch.manual_seed(0)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention = nn.Conv2d(3, 8, 8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)
            with torch.no_grad():
                self.attention.in_proj_weight[:16] = 0
                self.attention.in_proj_bias.normal_(), self.attention.out_proj.bias.normal_()

        def forward(self, x):
            x = self.embed(x).flatten(2).mT
            return self.head((x + self.attention(x, x, x)[0]).mean(1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FullGrad(Mean().eval())(torch.rand(2, 3, 64, 64), 1)


class NoGradBackbone(Net):
    def forward(self, x):
        with torch.no_grad():
            x = self.bn(self.conv(x))
        return self.head(F.relu(x).mean((2, 3)))


def test_models_without_a_gradient_are_refused_in_one_line(x):
    model = NoGradBackbone().eval()
    for explainer in (GradCAM(model, "conv"), FullGrad(model)):
        with pytest.raises(ValueError, match="no_grad"):
            explainer(x, 1)
    assert ScoreCAM(model, "bn")(x, 1).amax() > 0 and AblationCAM(model, "bn")(x, 1).shape == (2, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, torch.qint8)
    for explainer in (GradCAM(quantised, "conv"), FullGrad(quantised)):
        with pytest.raises(ValueError, match="no_grad|quantized"):
            explainer(x, 1)
    assert ScoreCAM(quantised, "conv")(x, 1).shape == (2, 16, 16)


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(lambda x: F.relu(self.bn(self.conv(x))), x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_right_or_refused(reentrant, net, x):
    model = Checkpointed(reentrant).eval()
    model.load_state_dict(net.state_dict())
    try:
        got = GradCAM(model, "conv")(x, 1)
    except ValueError as error:
        assert "checkpointing" in str(error) or "no_grad" in str(error)
    else:
        torch.testing.assert_close(got, GradCAM(net, "conv")(x, 1))


def test_weights_of_inference_mode(x):
    with torch.inference_mode():
        torch.manual_seed(0)
        model = Net().eval()
    torch.manual_seed(0)
    assert torch.equal(GradCAM(model, "conv")(x, 1), GradCAM(Net().eval(), "conv")(x, 1))


@pytest.mark.parametrize("name", [*CNN_METHODS, *VIT_METHODS])
def test_compiled_and_parallel_models_give_the_map_of_the_model(name):
    torch.manual_seed(0)
    model = build_vit().eval() if name in VIT_METHODS else SmallCNN().eval()
    x, layer = torch.rand(1, 3, 32, 32), "layer4"
    expected = build(name, model, layer)(x, 1)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(build(name, compiled, layer)(x, 1), expected)
    torch.testing.assert_close(build(name, nn.DataParallel(model), "module.layer4")(x, 1), expected)


# --- copies ---


def make_scanner(model):
    return SCAN(model, "layer4", (64, 64), device="cpu").set_preprocess(Normalize()).generate_decoder(ch_per_lv=(8,) * 4)


@pytest.mark.parametrize("name", [*CNN_METHODS, *VIT_METHODS])
def test_pickled_and_copied_explainers_are_independent(name):
    torch.manual_seed(0)
    model = build_vit().eval() if name in VIT_METHODS else SmallCNN().eval()
    x, explainer = torch.rand(1, 3, 32, 32), build(name, model, "layer4")
    expected = explainer(x, 1, normalize=False)
    copies = pickle.loads(pickle.dumps(explainer)), copy.deepcopy(explainer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for copied in copies:
        torch.testing.assert_close(copied(x, 1, normalize=False), expected)
    if expected.any():  # AblationCAM's map of these weights is empty
        assert not torch.allclose(explainer(x, 1, normalize=False), expected)


def test_a_fitted_scan_pickles():
    torch.manual_seed(0)
    scanner = make_scanner(SmallResNet(5).eval())
    scanner.set_dataset([(255 * torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]).compile().fit(1, verbose=False)
    image = 255 * torch.rand(3, 64, 64)
    for copied in (pickle.loads(pickle.dumps(scanner)), pickle.loads(pickle.dumps(scanner.as_explainer())).scanner):
        assert torch.equal(copied(image, 1)[0], scanner(image, 1)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scan_of_models_of_another_precision(dtype):
    torch.manual_seed(0)
    scanner = make_scanner(SmallResNet(5).eval().to(dtype))
    scanner.set_dataset([(255 * torch.rand(2, 3, 64, 64), torch.tensor([0, 1]))]).compile().fit(1, verbose=False)
    confidence, _ = scanner(255 * torch.rand(2, 3, 64, 64), [0, 1])
    assert confidence.isfinite().all() and confidence.dtype == torch.float32


def test_scan_without_a_gradient_mask_checks_targets():
    scanner = SCAN(SmallResNet(5).eval(), "layer4", (64, 64), use_gradient_mask=False, device="cpu")
    with pytest.raises(ValueError, match="got 3 callables for 2 images"):
        scanner.extract(255 * torch.rand(2, 3, 64, 64), [lambda row: row[0]] * 3)


def test_wrong_numbers_of_callables_raise_everywhere(net, x):
    for name in [*CNN_METHODS, "SSCAM", "SmoothGrad", "IntegratedGradients"]:
        if name == "FinerCAM":
            continue
        for count in (1, 3):
            with pytest.raises(ValueError, match=f"got {count} callables for 2 images"):
                build(name, net, "conv")(x, [lambda row: row[0]] * count)


def test_another_default_device_changes_nothing(net, x):
    names = [*CNN_METHODS, "SmoothGrad"]
    expected = {name: build(name, net, "conv")(x, 1) for name in names}
    torch.set_default_device("meta")
    try:
        for name in names:
            assert torch.equal(build(name, net, "conv")(x, 1), expected[name])
    finally:
        torch.set_default_device(None)


def test_every_explainer_is_in_these_lists():
    others = {
        "ExpectedGradients",
        "IntegratedGradients",
        "SmoothGrad",
        "CAM",
        "ISCAM",
        "SSCAM",
        "KPCACAM",
        "SegEigenCAM",
        "GradCAMElementWise",
        "RefineCAM",
        "DeepFeatureFactorization",
    }
    kinds = {name for name, kind in vars(scanlib).items() if isinstance(kind, type) and issubclass(kind, Explainer)}
    assert kinds == {*CNN_METHODS, *VIT_METHODS, *others}
