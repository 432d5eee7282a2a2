"""Decoder files without a SCAN; test_scan.py tests them with one."""

import pytest
import torch
from torch import nn

from scanlib.training.decoder_file import (
    DecoderState,
    build_decoder,
    compute_fingerprint,
    read_decoder,
    validate_percentile,
    write_decoder,
)

CONFIG = {"decoder": "ConvolutionalDecoder", "in_channels": 6, "grid": [4, 4], "image_size": [16, 16]}
IDENTITY = {"layer": "features", "channels": 6, "grid": [4, 4]}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_saved_decoder_is_loaded(tmp_path):
    torch.manual_seed(0)
    decoder = build_decoder(CONFIG)
    write_decoder(tmp_path / "d.pt", DecoderState(decoder, CONFIG, True), IDENTITY, 7, notes={"who": "me"})
    state = read_decoder(tmp_path / "d.pt", IDENTITY)
    assert same(state.module, decoder) and not state.module.training and state.config == CONFIG and state.is_trained
    assert state.fingerprint == 7 and state.notes == {"who": "me"}
    with pytest.raises(ValueError, match=r"must be a decoder for layer = conv1, got features"):
        read_decoder(tmp_path / "d.pt", IDENTITY | {"layer": "conv1"})
    with pytest.raises(ValueError, match="does not match its own config"):
        write_decoder(tmp_path / "lie.pt", DecoderState(decoder, CONFIG | {"in_channels": 5}, True), IDENTITY, 7)
        read_decoder(tmp_path / "lie.pt", IDENTITY)


def test_user_module_is_copied(tmp_path):
    own = nn.Conv2d(6, 4, 1)
    write_decoder(tmp_path / "d.pt", DecoderState(own, is_trained=True), IDENTITY, 7)
    with pytest.raises(ValueError, match="pass that module as decoder_model first"):
        read_decoder(tmp_path / "d.pt", IDENTITY)
    other = nn.Conv2d(6, 4, 1)
    before = other.weight.clone()
    state = read_decoder(tmp_path / "d.pt", IDENTITY, other)
    assert state.config is None and same(state.module, own) and torch.equal(other.weight, before)


def test_infinite_weights_are_not_saved(tmp_path):
    decoder = nn.Conv2d(6, 4, 1)
    decoder.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        write_decoder(tmp_path / "d.pt", DecoderState(decoder, is_trained=True), IDENTITY, 7)
    assert not (tmp_path / "d.pt").exists()


def test_decoders_built_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        decoder = build_decoder(CONFIG)
    assert not any(parameter.is_inference() for parameter in decoder.parameters())


def test_fingerprint_differs_between_weights():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert compute_fingerprint(a) != compute_fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert compute_fingerprint(a) == compute_fingerprint(b) and compute_fingerprint(nn.ReLU()) == compute_fingerprint(
        nn.Tanh()
    )  # no weights, no difference


@pytest.mark.parametrize("percentile", [-1, 100.5, float("nan"), "95", None, [90, 95]])
def test_validate_percentile_raises_outside_the_range(percentile):
    assert validate_percentile(95) == 95.0
    with pytest.raises(ValueError, match=r"percentile must be a number in \[0, 100\], got "):
        validate_percentile(percentile)
