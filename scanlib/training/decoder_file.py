"""Decoders with what is known about them, built for a layer, saved and loaded.

    write_decoder(path, DecoderState(decoder, config, is_trained=True), identity, compute_fingerprint(model))
    state = read_decoder(path, identity)        # the module is state.module

identity: plain values that must agree between saving and loading.
"""

import copy
import math
import numbers
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scanlib.decoders import ConvolutionalDecoder, TransformerDecoder
from scanlib.layers import Layout
from scanlib.loss import split_outputs
from scanlib.masking import mask_features
from scanlib.structure.eval_copy import make_eval_copy
from scanlib.training.checkpoint import is_plain, is_same, load_checkpoint, load_state, save_checkpoint


@dataclass
class DecoderState:
    """A decoder and what is known about it.

    config: a decoder's class name and arguments; None for a module of the user. is_trained: whether it can be used. fingerprint:
    of the model that it was trained for, if it comes from a file. notes: plain values saved with it.
    """

    module: nn.Module
    config: dict | None = None
    is_trained: bool = False
    fingerprint: int | None = None
    notes: dict = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        layout: Layout,
        image_size: Sequence[int],
        is_transformer: bool | None = None,
        ch_per_lv: Sequence[int] | None = None,
        output_stride: int | None = None,
        upsampling: str | None = None,
        depth: int = 1,
    ) -> "DecoderState":
        """Build an untrained decoder for a layer; None chooses what fits the layer. See ``ConvolutionalDecoder``."""
        has_tokens = layout.kind == "BTC"
        is_transformer = has_tokens if is_transformer is None else is_transformer
        is_bilinear = has_tokens or is_transformer  # transposed convolutions leave a checkerboard on tokens
        config = {
            "decoder": "TransformerDecoder" if is_transformer else "ConvolutionalDecoder",
            "in_channels": layout.channels,
            "grid": list(layout.grid),
            "image_size": list(image_size),
            "ch_per_lv": None if ch_per_lv is None else list(ch_per_lv),
            "output_stride": output_stride,
            "upsampling": upsampling or ("bilinear" if is_bilinear else "transposed"),
            "full_widths_from": 256 if is_bilinear else 512,
        }
        if is_transformer:
            config |= {"prefix": layout.prefix, "depth": depth}
        return cls(build_decoder(config), config)

    @property
    def uses_tokens(self) -> bool:
        """Whether the decoder takes tokens (N, T, C) instead of maps (N, C, h, w)."""
        return isinstance(self.module, TransformerDecoder)

    def measure_output_size(self, layout: Layout, device: torch.device) -> tuple[int, int]:
        """Return the size of the decoder's output, by one run on zeros. Raises ValueError if it is not (N, 4, h, w)."""
        shape = (layout.prefix + math.prod(layout.grid), layout.channels) if self.uses_tokens else (layout.channels, *layout.grid)
        with torch.no_grad():
            outputs = make_eval_copy(self.module)(torch.zeros(1, *shape, device=device))
        if outputs.ndim != 4 or outputs.shape[1] != 4:
            raise ValueError(f"decoder_model must return (N, 4, h, w), got {tuple(outputs.shape)} for one image")
        return outputs.shape[2], outputs.shape[3]

    def require_trained(self) -> nn.Module:
        """Return the module. Raises RuntimeError if it is not trained."""
        if not self.is_trained:
            raise RuntimeError("the decoder is not trained; call fit(), or load_decoder(path)")
        return self.module

    def decode(self, features: Tensor, scores: Tensor, percentile: float | Sequence[float] = 95) -> Tensor:
        """Decode masked features into confidence in [0, 1] and reconstruction in [-1, 1], (N, 4, h', w').

        Of several percentiles the mean is returned. Raises RuntimeError if the decoder is not trained.
        """
        percentiles = (
            list(percentile)
            if isinstance(percentile, (list, tuple, np.ndarray, Tensor)) and np.ndim(percentile)
            else [percentile]
        )
        if not percentiles:
            raise ValueError("percentile must be a number in [0, 100] or several, got an empty sequence")
        decoder = make_eval_copy(self.require_trained())
        outputs = [decoder(mask_features(features, scores, p)).float() for p in map(validate_percentile, percentiles)]
        return torch.stack([torch.cat(split_outputs(each), 1) for each in outputs]).mean(0)


def write_decoder(
    path: str | os.PathLike,
    state: DecoderState,
    identity: dict,
    fingerprint: int,
    *,
    half: bool = False,
    notes: dict | None = None,
) -> None:
    """Save a trained decoder for the model with this fingerprint.

    ``half`` stores 16-bit weights. Raises RuntimeError if it is not trained, ValueError for weights that are not finite.
    """
    weights = {key: value.detach().cpu() for key, value in state.require_trained().state_dict().items()}
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise ValueError("the decoder's weights must be finite, got NaN or infinite values; train with a smaller learning rate")
    if half:
        weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    content = {"format": 1, "kind": "scan decoder", "identity": identity, "weights": fingerprint}
    save_checkpoint(content | {"config": state.config, "notes": notes or {}, "state_dict": weights}, path)


def read_decoder(path: str | os.PathLike, identity: dict, module: nn.Module | None = None) -> DecoderState:
    """Load a decoder that ``write_decoder`` saved.

    A file without a config is loaded into a copy of ``module``. Raises FileNotFoundError, and ValueError if the file is damaged,
    contains code, or has another identity.
    """
    saved = load_checkpoint(path, ("identity", "weights", "config", "state_dict"))
    trained_for = saved["identity"] if isinstance(saved["identity"], dict) else {}
    for name, value in identity.items():
        if not is_same(trained_for.get(name), value):
            raise ValueError(
                f"{path} must be a decoder for {name} = {value}, got {trained_for.get(name)}; build the scanner as it was when "
                "the decoder was saved, or train a new decoder"
            )
    config = saved["config"]
    if config is None and module is None:
        raise ValueError(f"{path} holds a user-defined decoder; pass that module as decoder_model first")
    wrong = f"{path} holds a decoder that does not match its own config; train a new decoder"
    try:
        if config is not None:
            own = [config["in_channels"], config["grid"]]
            if not is_same(own, [identity["channels"], identity["grid"]]):
                raise ValueError("config and identity differ")
            _check_config(config, saved["state_dict"])
        decoder = build_decoder(config) if module is None or config is not None else copy.deepcopy(module)
    except Exception as error:  # a config may hold anything
        raise ValueError(wrong) from error
    load_state(decoder, saved["state_dict"], path)
    fingerprint, notes = saved["weights"], saved.get("notes", {})
    if not isinstance(fingerprint, int) or not is_plain(notes):
        raise ValueError(f"{path} must hold a fingerprint and plain notes, got {type(fingerprint).__name__}; train a new decoder")
    return DecoderState(decoder.eval(), config, True, fingerprint, notes)


def _check_config(config: dict, state: dict) -> None:
    """Raise an error unless the config is that of a decoder with these weights. Nothing of the size that it names is built."""
    values = [each for value in config.values() for each in (value if isinstance(value, list) else [value])]
    if (
        not is_plain(config)
        or len(values) > 30
        or any(isinstance(each, (int, float)) and not 0 <= each <= 65536 for each in values)
    ):
        raise ValueError("config holds values out of range")
    if config.get("depth", 1) > 100:
        raise ValueError("config holds values out of range")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_decoder(config).state_dict().items()}
    if shapes != {name: value.shape for name, value in state.items()}:
        raise ValueError("config and weights differ")


def compute_fingerprint(model: nn.Module) -> int:
    """Compute a checksum of all parameters and buffers. Two models with the same weights have the same fingerprint."""
    checksum = 0
    for tensor in (*model.parameters(), *model.buffers()):
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        checksum = zlib.crc32(values, checksum)  # type: ignore[arg-type]  # it takes any buffer
    return checksum


def validate_percentile(percentile: Any) -> float:
    """Return a percentile as a float. Raises ValueError if it is not a number in [0, 100]; numbers of NumPy and torch count."""
    is_scalar = isinstance(percentile, (numbers.Real, np.generic, Tensor)) and not isinstance(
        percentile, (bool, np.bytes_, np.str_)
    )
    if not is_scalar or np.ndim(percentile) or not 0 <= float(percentile) <= 100:
        raise ValueError(f"percentile must be a number in [0, 100], got {percentile!r}")
    return float(percentile)


def build_decoder(config: dict) -> nn.Module:
    """Build an untrained decoder from its class name, under "decoder", and its arguments. Raises KeyError for another name."""
    arguments = {name: value for name, value in config.items() if name != "decoder"}
    kinds = {kind.__name__: kind for kind in (ConvolutionalDecoder, TransformerDecoder)}
    with torch.inference_mode(False):  # parameters created in inference mode cannot be trained
        return kinds[config["decoder"]](**arguments).float()  # whatever the default precision is: the features are float32
