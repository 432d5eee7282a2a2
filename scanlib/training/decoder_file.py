"""A decoder on disk: its weights, how to build it, and what it belongs to.

write_decoder(path, decoder, config, identity, compute_fingerprint(model))
decoder, config, saved = read_decoder(path, identity)               # in eval mode

config: a decoder's kind and arguments, None for a module of one's own. identity: plain values that must agree.
"""

import copy
import os
import zlib

import torch
from torch import nn

from scanlib.decoders import build_decoder
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint


def write_decoder(
    path: str | os.PathLike,
    decoder: nn.Module,
    config: dict | None,
    identity: dict,
    weights: int,
    *,
    half: bool = False,
    notes: dict | None = None,
) -> None:
    """weights: the model's ``compute_fingerprint``. half: 16-bit weights. Raises ValueError for weights that are not finite."""
    if not all(bool(torch.isfinite(value).all()) for value in decoder.state_dict().values()):
        raise ValueError("the decoder's weights are not finite, so it was not saved; train one with a smaller learning rate")
    state = {key: value.detach().cpu() for key, value in decoder.state_dict().items()}
    if half:
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    content = {"format": 1, "kind": "scan decoder", "identity": identity, "weights": weights}
    save_checkpoint(content | {"config": config, "notes": notes or {}, "state_dict": state}, path)


def read_decoder(path: str | os.PathLike, identity: dict, own: nn.Module | None = None) -> tuple[nn.Module, dict | None, dict]:
    """The decoder in eval mode, its config, and all that the file holds ("weights", "notes").

    own: the module to copy where the file has no config. Raises FileNotFoundError, and ValueError when the file is damaged,
    holds code, or belongs to another identity.
    """
    saved = load_checkpoint(path, ("identity", "weights", "config", "state_dict"))
    fits = isinstance(saved["identity"], dict)
    for name, value in identity.items():
        if fits and saved["identity"].get(name) != value:
            raise ValueError(
                f"{path} was trained for {name} = {saved['identity'].get(name)}, this scanner has {value}; "
                "build the scanner as it was when the decoder was saved, or train a new decoder"
            )
    config = saved["config"]
    if config is None and own is None:
        raise ValueError(f"{path} holds a decoder of one's own making; pass that module as decoder_model first")
    try:
        if config is not None and (config["in_channels"], config["grid"]) != (identity["channels"], identity["grid"]):
            fits = False
        decoder = copy.deepcopy(own) if config is None else build_decoder(config) if fits else None
        decoder.load_state_dict(saved["state_dict"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} holds a decoder that does not fit its own description; train a new one") from error
    return decoder.eval(), config, saved


def compute_fingerprint(model: nn.Module) -> int:
    """A checksum of a few values of each parameter: tells whether two models hold the same weights."""
    parts = [parameter.detach().flatten()[:8].float().cpu() for parameter in model.parameters()]
    values = torch.cat(parts).tolist() if parts else []
    return zlib.crc32(" ".join(f"{value:.5g}" for value in values).encode())
