import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from scanlib.layers import Layout, resolve_layer


def test_resolve_layer_by_name_module_and_index(tiny):
    for layer in ("back.0", tiny.back[0], list(tiny.modules())[1:].index(tiny.back[0])):
        assert resolve_layer(tiny, layer) == ("back.0", tiny.back[0])
    with pytest.raises(ValueError, match=r"target_layer 'bakc' not found; close matches: back"):
        resolve_layer(tiny, "bakc")
    with pytest.raises(ValueError, match=r"out of range: this model has layers 0\.\."):
        resolve_layer(tiny, 99)
    with pytest.raises(ValueError, match="not part of the model"):
        resolve_layer(tiny, nn.ReLU())
    with pytest.raises(TypeError, match="name, a module or an index, got float"):
        resolve_layer(tiny, 1.5)


@given(
    st.sampled_from(["BCHW", "BHWC", "BTC"]),
    st.integers(2, 12),
    st.integers(2, 12),
    st.sampled_from([4, 8, 16]),
    st.integers(0, 5),
)
def test_layout_is_inferred_from_the_shape(kind, h, w, patch, prefix):
    channels = 40  # more than any grid side here, so a 4-D shape reads one way only
    truth = torch.randn(2, channels, h, w)
    tokens = truth.flatten(2).transpose(1, 2)
    x = {"BCHW": truth, "BHWC": truth.permute(0, 2, 3, 1), "BTC": torch.cat([torch.zeros(2, prefix, channels), tokens], 1)}[kind]
    count = h * w + prefix
    if kind == "BTC" and h != w and prefix > 2 and count - math.isqrt(count) ** 2 < 2:  # or a square grid, a class token
        with pytest.raises(ValueError, match="pass layout"):
            Layout.infer(x.shape, (h * patch, w * patch))
        return
    layout = Layout.infer(x.shape, (h * patch, w * patch))
    torch.testing.assert_close(layout.to_maps(x), truth)
    torch.testing.assert_close(layout.to_tokens(x)[:, layout.prefix :], tokens)
    assert layout.channels == channels and layout.grid == (h, w)
    assert layout.prefix == (prefix if kind == "BTC" else 0)


@pytest.mark.parametrize(
    ("size", "patch", "prefix"), [(224, 16, 1), (224, 14, 5), (100, 16, 1), (56, 16, 1), (384, 16, 2), (518, 14, 5)]
)
def test_layout_of_common_vision_transformers(size, patch, prefix):
    side = size // patch
    layout = Layout.infer((1, side * side + prefix, 64), (size, size))
    assert layout.grid == (side, side) and layout.prefix == prefix
