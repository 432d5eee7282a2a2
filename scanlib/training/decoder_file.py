"""Decoders with what is known about them, built for a layer, saved and loaded.

    write_decoder(path, DecoderState(decoder, config, is_trained=True), identity, compute_fingerprint(model))
    state = read_decoder(path, identity)        # the module is state.module

identity: plain values that must agree between saving and loading.
"""

import copy
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scanlib.decoders import ConvolutionalDecoder, TransformerDecoder
from scanlib.layers import Layout
from scanlib.loss import split_outputs
from scanlib.masking import mask_features
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint


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
        was_training = self.module.training
        with torch.no_grad():
            outputs = self.module.eval()(torch.zeros(1, *shape, device=device))
        self.module.train(was_training)
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
        percentiles = [percentile] if isinstance(percentile, (int, float, str)) else [float(p) for p in percentile]
        if not percentiles:
            raise ValueError("percentile must be a number in [0, 100] or several, got an empty sequence")
        decoder = self.require_trained().eval()
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
        if trained_for.get(name) != value:
            raise ValueError(
                f"{path} must be a decoder for {name} = {value}, got {trained_for.get(name)}; build the scanner as it was when "
                "the decoder was saved, or train a new decoder"
            )
    config = saved["config"]
    if config is None and module is None:
        raise ValueError(f"{path} holds a user-defined decoder; pass that module as decoder_model first")
    try:
        if config is not None and (config["in_channels"], config["grid"]) != (identity["channels"], identity["grid"]):
            raise ValueError("config and identity differ")
        decoder = build_decoder(config) if module is None or config is not None else copy.deepcopy(module)
        decoder.load_state_dict(saved["state_dict"])
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} holds a decoder that does not match its own config; train a new decoder") from error
    return DecoderState(decoder.eval(), config, True, saved["weights"], saved.get("notes", {}))


def compute_fingerprint(model: nn.Module) -> int:
    """Compute a checksum of a few values of each parameter. Two models with the same weights have the same fingerprint."""
    parts = [parameter.detach().flatten()[:8].float().cpu() for parameter in model.parameters()]
    values = torch.cat(parts).tolist() if parts else []
    return zlib.crc32(" ".join(f"{value:.5g}" for value in values).encode())


def validate_percentile(percentile: float) -> float:
    """Return a percentile as a float. Raises ValueError if it is not a number in [0, 100]."""
    if not isinstance(percentile, (int, float)) or not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be a number in [0, 100], got {percentile!r}")
    return float(percentile)


def build_decoder(config: dict) -> nn.Module:
    """Build an untrained decoder from its class name, under "decoder", and its arguments. Raises KeyError for another name."""
    arguments = {name: value for name, value in config.items() if name != "decoder"}
    kinds = {kind.__name__: kind for kind in (ConvolutionalDecoder, TransformerDecoder)}
    with torch.inference_mode(False):  # parameters created in inference mode cannot be trained
        return kinds[config["decoder"]](**arguments)
