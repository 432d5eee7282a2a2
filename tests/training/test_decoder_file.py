"""Decoder files without a SCAN; test_scan.py tests them with one."""

import numpy as np
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


def test_fingerprint_covers_every_weight_and_buffer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)).to(torch.bfloat16)
    seen = {compute_fingerprint(model)}
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
        seen.add(compute_fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters())) + len(list(model.buffers()))
    assert compute_fingerprint(nn.Flatten()) == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config",), torch.zeros(3)),
        (("config", "image_size"), []),
        (("config", "depth"), 10**9),
        (("config", "grid"), [10**9, 10**9]),
        (("config", "ch_per_lv"), [10**9] * 4),
        (("config", "output_stride"), float("inf")),
        (("config", "decoder"), "Sequential"),
        (("identity",), []),
        (("identity", "channels"), torch.zeros(3)),
        (("weights",), torch.zeros(3)),
        (("notes",), {"a": torch.zeros(3)}),
        (("state_dict",), 5),
    ],
)
def test_odd_values_in_a_file_raise_value_errors_of_one_line(tmp_path, path, value):
    torch.manual_seed(0)
    write_decoder(tmp_path / "d.pt", DecoderState(build_decoder(CONFIG), dict(CONFIG), True), IDENTITY, 7)
    saved = torch.load(tmp_path / "d.pt", weights_only=True)
    place = saved
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    torch.save(saved, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt .*; (train|build|pass)|odd.pt must hold") as raised:
        read_decoder(tmp_path / "odd.pt", IDENTITY)
    assert "\n" not in str(raised.value)


def test_percentiles_may_be_numbers_of_numpy_and_torch():
    for percentile in (95, 95.0, np.float32(95), np.int64(95), torch.tensor(95.0)):
        assert validate_percentile(percentile) == 95.0
    for wrong in (b"95", "95", True, None, np.zeros(2), torch.zeros(2), float("nan")):
        with pytest.raises(ValueError, match="percentile must be a number in"):
            validate_percentile(wrong)


def test_decoders_are_float32_whatever_the_default_precision_is():
    torch.set_default_dtype(torch.float64)
    try:
        decoder = build_decoder(CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
