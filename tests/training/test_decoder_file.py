"""A decoder on disk, without a scanner; what a scanner makes of it is in test_scan.py."""

import pytest
import torch
from torch import nn

from scanlib.decoders import build_decoder
from scanlib.training.decoder_file import compute_fingerprint, read_decoder, write_decoder

CONFIG = {"decoder": "ConvolutionalDecoder", "in_channels": 6, "grid": [4, 4], "image_size": [16, 16]}
IDENTITY = {"layer": "features", "channels": 6, "grid": [4, 4]}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_is_written_is_read(tmp_path):
    torch.manual_seed(0)
    decoder = build_decoder(CONFIG)
    write_decoder(tmp_path / "d.pt", decoder, CONFIG, IDENTITY, 7, notes={"who": "me"})
    found, config, saved = read_decoder(tmp_path / "d.pt", IDENTITY)
    assert same(found, decoder) and not found.training and config == CONFIG
    assert saved["weights"] == 7 and saved["notes"] == {"who": "me"}
    with pytest.raises(ValueError, match=r"was trained for layer = features, this scanner has conv1"):
        read_decoder(tmp_path / "d.pt", IDENTITY | {"layer": "conv1"})
    with pytest.raises(ValueError, match="does not fit its own description"):  # the identity says so, the config does not
        write_decoder(tmp_path / "lie.pt", decoder, CONFIG | {"in_channels": 5}, IDENTITY, 7)
        read_decoder(tmp_path / "lie.pt", IDENTITY)


def test_a_module_of_ones_own_is_copied(tmp_path):
    own = nn.Conv2d(6, 4, 1)
    write_decoder(tmp_path / "d.pt", own, None, IDENTITY, 7)
    with pytest.raises(ValueError, match="pass that module as decoder_model first"):
        read_decoder(tmp_path / "d.pt", IDENTITY)
    other = nn.Conv2d(6, 4, 1)
    before = other.weight.clone()
    found, config, _ = read_decoder(tmp_path / "d.pt", IDENTITY, other)
    assert config is None and same(found, own) and torch.equal(other.weight, before)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    decoder = nn.Conv2d(6, 4, 1)
    decoder.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite, so it was not saved"):
        write_decoder(tmp_path / "d.pt", decoder, None, IDENTITY, 7)
    assert not (tmp_path / "d.pt").exists()


def test_decoders_built_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        decoder = build_decoder(CONFIG)
    assert not any(parameter.is_inference() for parameter in decoder.parameters())


def test_fingerprints_tell_weights_apart():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert compute_fingerprint(a) != compute_fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert compute_fingerprint(a) == compute_fingerprint(b) and compute_fingerprint(nn.ReLU()) == compute_fingerprint(
        nn.Tanh()
    )  # no weights, no difference
