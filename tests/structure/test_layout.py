import warnings

import pytest
import torch
import torchvision
from torch import nn

from scanlib import FeatureTap, GradCAM
from scanlib.layers import Layout, find_default_layer
from scanlib.models.small import Normalize


def follow_spots(model, layer, size, channels=3):
    """Return where the response of a layer to two spots has its peak, as shares of the grid, and where the spots are."""
    spots, found = [(0.25, 0.75), (0.75, 0.25)], []
    images = torch.zeros(3, channels, *size)
    for index, place in enumerate(spots, 1):
        region = tuple(slice(int(p * s) - s // 10, int(p * s) + s // 10 + 1) for p, s in zip(place, size, strict=False))
        images[(index, slice(None), *region)] = 3
    with FeatureTap(model, layer) as tap:
        tap(images)
        features = tap.layout.to_maps(tap.features)
    for index in (1, 2):
        response = (features[index] - features[0]).square().sum(0)
        total = response.sum()
        axes = range(response.ndim)
        steps = [torch.linspace(0, 1, length) for length in response.shape]
        found.append([float((response.sum([a for a in axes if a != axis]) * steps[axis]).sum() / total) for axis in axes])
    return found, features.shape[2:]


def assert_follows(model, layer, size, channels=3):
    (first, second), grid = follow_spots(model, layer, size, channels)
    for axis, (a, b) in enumerate(zip(first, second, strict=True)):
        assert grid[axis] < 3 or (b - a) * (0.5 if axis == 0 else -0.5) > 0.01, (
            f"axis {axis} of {layer} at {size}: {a:.2f} to {b:.2f}"
        )


@pytest.mark.parametrize(
    ("layer", "size"),
    [("layer4", (1024, 70)), ("layer3", (512, 68)), ("layer2", (256, 66)), ("layer4", (70, 1024)), ("layer2", (300, 97))],
)
def test_tall_and_wide_images_of_a_resnet(layer, size):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    with FeatureTap(model, layer) as tap:
        tap(torch.rand(1, 3, *size))
        assert tap.layout.kind == "BCHW" and tap.layout.grid == tuple(tap.features.shape[2:])


FAMILIES = {
    "alexnet": ("features.5", "features"),
    "convnext_tiny": ("features.1", "features.3"),
    "densenet121": ("features.denseblock2", "features.transition1"),
    "mobilenet_v3_small": ("features.3", "features"),
    "squeezenet1_1": ("features.7",),
    "swin_t": ("features.0", "features.1", "features.3"),
    "vit_b_32": ("encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_2.ln_1"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_responses_follow_a_moved_spot(name):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    sizes = (
        [(224, 224)]
        if name.startswith("vit")
        else [(96, 96), (128, 72), (70, 160), (384, 384) if name == "swin_t" else (99, 131)]
    )
    for size in sizes:
        for layer in FAMILIES[name]:
            assert_follows(model, layer, size)


@pytest.mark.parametrize(("name", "kind"), [("swin_t", "BHWC"), ("convnext_tiny", "BCHW")])
def test_equal_sides_and_channels_are_told_apart(name, kind):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    with FeatureTap(model, "features.1") as tap:
        tap(torch.rand(1, 3, 384, 384))
        assert tuple(tap.features.shape[1:]) == (96, 96, 96) and tap.layout == Layout(kind, 96, (96, 96))


class SignalTransformer(nn.Module):
    def __init__(self, channels, length):
        super().__init__()
        self.embed = nn.Conv1d(1, channels, 10, 10)
        self.positions = nn.Parameter(0.02 * torch.randn(1, length // 10, channels))
        self.block = nn.TransformerEncoderLayer(channels, 2, 64, batch_first=True)
        self.plain = nn.Identity()
        self.lstm, self.head = nn.LSTM(channels, channels, batch_first=True), nn.Linear(channels, 3)

    def forward(self, x):
        x = self.plain(self.block(self.embed(x).mT + self.positions))
        return self.head(self.lstm(x)[0].mean(1))


@pytest.mark.parametrize(("channels", "length"), [(32, 500), (50, 500), (100, 500)])  # ties: 50 and 100 divide 500
@pytest.mark.parametrize("layer", ["block", "plain", "lstm"])
def test_tokens_of_signals(channels, length, layer):
    torch.manual_seed(0)
    model = SignalTransformer(channels, length).eval()
    with FeatureTap(model, layer) as tap:
        tap(torch.randn(2, 1, length))
        assert tap.layout == Layout("BHWC", channels, (50,))
        assert tap.layout.to_maps(tap.features).shape == (2, channels, 50)
    with FeatureTap(model, "embed") as tap:
        tap(torch.randn(2, 1, length))
        assert tap.layout == Layout("BCHW", channels, (50,))


def test_implausible_layouts_are_refused_and_layout_overrules():
    for shape, size in (
        ((1, 12, 197, 64), (224, 224)),
        ((1, 8, 16, 4), (64, 64)),
        ((1, 512, 1, 1), (224, 224)),
        ((1, 5000, 3), (64, 200)),
    ):
        with pytest.raises(ValueError, match=r"no spatial extent that fits the image: .* or pass layout"):
            Layout.infer(shape, size)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, (4, 1), 1), nn.ReLU(), nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.rand(2, 3, 64, 64)
    with pytest.raises(ValueError, match="layer '2' has no spatial extent that fits the image: it returns"):
        GradCAM(model, "2")(x, 1)
    torch.testing.assert_close(GradCAM(model, "2", layout="BCHW")(x, 1), GradCAM(model, "0")(x, 1))  # of a certain type
    given = Layout("BCHW", 8, (16, 64))
    torch.testing.assert_close(GradCAM(model, "2", layout=given)(x, 1), GradCAM(model, "0")(x, 1))
    for wrong in ("BTC", "NCHW", 3):
        with pytest.raises(ValueError, match="layout must be 'BCHW', 'BHWC', 'BTC' or a Layout"):
            GradCAM(model, "2", layout=wrong)(x, 1)


def test_unrolled_tokens_are_refused():
    class Unroll(nn.Module):
        """As in Hiera: tokens in another order than the image's."""

        def forward(self, x):
            return x.flatten(2).mT.flip(1)

    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), Unroll(), nn.LayerNorm(8), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(1, 3, 64, 64)
    model(x)
    with pytest.raises(ValueError, match="layer '2' holds its tokens in another order than the image"):
        GradCAM(model, "2")(x, 1)
    assert GradCAM(model, "0")(x, 1).shape == (1, 64, 64)


def test_a_first_axis_that_is_not_the_batch_is_refused():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 8, 8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.norm(self.conv(x).flatten(2).permute(2, 0, 1)).mean(0))

    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"returns \(64, {count}, 8\) for {count} images: its first axis is not the batch"):
            GradCAM(SequenceFirst().eval(), "norm")(torch.rand(count, 3, 64, 64), 1)


# --- default layer ---


class Attention(nn.Module):
    """Attention whose softmax and dropout are modules, as in many hand-written transformers."""

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.queries = nn.Conv2d(3, width, 8, 8), nn.Linear(width, 2 * width)
        self.attend, self.drop, self.head = nn.Softmax(-1), nn.Dropout(0.1), nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        q, k = self.queries(x).unflatten(2, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        weights = self.drop(self.attend(q @ k.mT))  # (B, heads, T, T)
        return self.head((weights.mean(1) @ x).mean(1))


class RegionsFirst(nn.Module):
    """Its last spatial output has regions, not images, along the first axis."""

    def __init__(self):
        super().__init__()
        self.body, self.pool, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(2), nn.Linear(8, 3)

    def forward(self, x):
        regions = self.pool(self.body(x).repeat_interleave(5, 0))
        return self.last(regions.mean((2, 3)).unflatten(0, (-1, 5)).mean(1))


def test_default_layer_is_neither_attention_nor_regions():
    assert find_default_layer(Attention().eval(), 64) == "embed"
    assert find_default_layer(RegionsFirst().eval(), 64) == "body"


@pytest.mark.parametrize("build", [torchvision.models.resnet18, torchvision.models.squeezenet1_1])
def test_default_layer_inside_wrappers(build):
    torch.manual_seed(0)
    inner = build(num_classes=5).eval()
    name, x = find_default_layer(inner, 64), 255 * torch.rand(2, 3, 64, 64)
    expected = GradCAM(inner)(x / 255, 1)
    for wrapped, prefix in (
        (nn.DataParallel(inner), "module."),
        (torch.compile(inner, backend="eager"), "_orig_mod."),
        (nn.Sequential(Normalize((0, 0, 0), (1, 1, 1)), inner), "1."),
    ):
        assert find_default_layer(wrapped, 64) == prefix + name
        images = x if isinstance(wrapped, nn.Sequential) else x / 255
        torch.testing.assert_close(GradCAM(wrapped)(images, 1), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=f"'{name}' not found; close matches: module.{name}"):
        GradCAM(nn.DataParallel(inner), name)
    torch.testing.assert_close(GradCAM(torch.compile(inner, backend="eager"), name)(x / 255, 1), expected)


@pytest.mark.parametrize("size", [(1, 128), (128, 1)])
def test_images_of_one_row(size):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    assert find_default_layer(model, size) == "2" and GradCAM(model)(torch.rand(2, 3, *size), 1).shape == (2, *size)


def test_model_without_a_spatial_layer_raises():
    with pytest.raises(ValueError, match="Sequential has no layer with a spatial extent; give target_layer by name"):
        find_default_layer(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), 4)


@pytest.mark.parametrize(("size", "count"), [((240, 320), 196), ((240, 320), 197), ((480, 160), 196)])
def test_tokens_of_a_model_that_resizes_to_a_square_are_refused_for_wide_images(size, count):
    with pytest.raises(ValueError, match="pass layout"):
        Layout.infer((1, count, 192), size, is_channels_first=False)
    with pytest.raises(ValueError, match=r"does not tell the grid of .*; pass Layout\('BTC'"):
        Layout.parse("BTC", (1, count, 192), size)
    given = Layout("BTC", 192, (14, 14), count - 196)
    assert Layout.parse(given, (1, count, 192), size) is given


@pytest.mark.parametrize(("size", "grid"), [((224, 256), (14, 16)), ((224, 448), (14, 28)), ((320, 240), (20, 15))])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_of_wide_images_are_still_read(size, grid, prefix):
    layout = Layout.infer((1, grid[0] * grid[1] + prefix, 192), size, is_channels_first=False)
    assert layout.grid == grid and layout.prefix == prefix


class States(nn.Module):
    """Tokens that are no patches: each state attends to the whole image."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks, self.states, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.queries = nn.Parameter(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        tokens = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        states = self.states((self.queries @ tokens.mT).softmax(-1) @ tokens)
        return self.head(states.mean(1))


def test_tokens_that_do_not_follow_the_image_give_a_warning_once():
    torch.manual_seed(0)
    model, images = States().eval(), torch.rand(2, 3, 16, 16)
    with FeatureTap(model, "states") as tap:
        with pytest.warns(UserWarning, match="16 tokens of layer 'states' do not follow"):
            tap(images)
        assert tap.layout.grid == (4, 4)
    with FeatureTap(model, "states") as tap, warnings.catch_warnings():
        warnings.simplefilter("error")
        tap(images)
        assert tap.layout.grid == (4, 4)  # warned before
    with FeatureTap(model, "blocks") as tap, warnings.catch_warnings():
        warnings.simplefilter("error")
        tap(images)
        assert tap.layout.grid == (4, 4)  # patches
