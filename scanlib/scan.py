"""SCAN: train a decoder to rebuild pictures from one layer's gradient-masked features; where it is sure is the explanation.

Lee, Jeong, Jhang, "SCAN: Visual Explanations with Self-Confidence and Analysis Networks", IEEE TAI 2026, arXiv 2603.06523.

    scanner = SCAN(model, "layer4", image_size=(224, 224)).set_preprocess(preprocess)
    scanner.set_dataset(loader).generate_decoder().compile().fit(epochs=2)
    confidence, reconstruction = scanner(image, percentile=95)      # (H, W) float in [0, 1], (H, W, 3) uint8

For features F at the layer and the class's gradient there, G = relu(dy_c / dF), the decoder sees F * [G >= Q] with Q the
P-th percentile of G's positive entries (Eq. 1). Its target is the picture blurred to the layer's grid.
"""

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib import decoders
from scanlib.decoders import build_decoder
from scanlib.explainers.attention import NoAttentionError, RelevanceTap
from scanlib.explainers.base import normalize_map, resize_map, to_channels_last
from scanlib.explainers.weighted import compute_evidence, find_empty_maps, weight_by_confidence
from scanlib.hooks import FeatureTap
from scanlib.layers import Layout, find_default_layer, resolve_layer
from scanlib.loss import ConfidentMAE, NonConfidentMAE, SelfConfidenceLoss, split_outputs
from scanlib.masking import MASK_METHODS, blur_to_grid, compute_mask_scores, compute_threshold
from scanlib.targets import Target, is_callable_target, resolve_classes
from scanlib.trainer import Trainer
from scanlib.training.decoder_file import compute_fingerprint, read_decoder, write_decoder
from scanlib.training.feature_cache import EncodedLoader, FeatureCache, count_images, is_repeatable


class SCAN:
    """The published interface; set-up calls chain.

    Args:
        target_model: the classifier; put in eval mode and used frozen. (N, 3, H, W) preprocessed -> (N, K) logits.
        target_layer: name, module, or index into ``list(model.modules())[1:]``.
        image_size: (H, W) the pictures are resized to.
        use_gradient_mask: False decodes all features and needs no gradient.
        decoder_model: a decoder of your own: masked features -> (N, 4, h', w').
        device: where to work; None takes CUDA if there is one, else the CPU.
        num_classes: kept for compatibility; the number of classes is read off the logits.
        mask_by: what the percentile ranks: "gradient" (published), "attribution", "position", or for transformers that attend
            over the whole picture "relevance", which keeps all attention and takes longer; see ``compute_mask_scores``.

    Images everywhere are (N, 3, H, W) or (3, H, W), uint8 or float, in [0, 255].
    """

    def __init__(
        self,
        target_model: nn.Module,
        target_layer: str | int | nn.Module,
        image_size: tuple[int, int] = (224, 224),
        use_gradient_mask: bool = True,
        decoder_model: nn.Module | None = None,
        device: torch.device | str | None = None,
        num_classes: int = 1000,
        *,
        mask_by: str = "gradient",
    ):
        if mask_by not in MASK_METHODS:
            raise ValueError(f"mask_by {mask_by!r} is not known; take one of {', '.join(MASK_METHODS)}")
        self.layer_name, _ = resolve_layer(target_model, target_layer)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = target_model.to(self.device).eval()
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(map(int, image_size))
        if len(self.image_size) != 2 or min(self.image_size) < 2:
            raise ValueError(f"image_size {image_size} is no size; give (height, width) in pixels, as (224, 224)")
        self.use_gradient_mask, self.mask_by, self.num_classes = use_gradient_mask, mask_by, num_classes
        self.decoder = decoder_model.to(self.device) if decoder_model is not None else None
        self.preprocess: Callable[[Tensor], Tensor] = lambda images: images
        self.dataset = self.valid_dataset = None
        self.use_augmentation: tuple[float, float] | bool = (70, 100)
        self.criterion = self.optimizer = self.scheduler = self.trainer = None
        self.metrics: list = []
        self._layout: Layout | None = None
        self._own_size: tuple[int, int] | None = None
        self._decoder_config: dict | None = None
        self._warned: set[str] = set()
        self._trained = decoder_model is not None
        self.notes: dict = {}

    # --- set-up ---

    def set_preprocess(self, function: Callable[[Tensor], Tensor]) -> "SCAN":
        """What turns images in [0, 255] into the model's input (scaling and normalising; it must not crop)."""
        self.preprocess, self._layout = function, None
        return self

    def set_dataset(self, dataloader: Iterable, use_augmentation: tuple[float, float] | bool = (70, 100)) -> "SCAN":
        """Training pictures: batches of (images, labels), or of images alone; a label below 0 means "not known". SCAN masks
        by the label's gradient, by the predicted class's where there is none.

        use_augmentation: the range the percentile is drawn from, per picture and visit; False masks by G > 0, True is (70, 100).
        For several decoders on the same pictures give what ``encoded`` returned: the model runs once for all of them.
        """
        if use_augmentation is True:
            use_augmentation = (70, 100)
        if use_augmentation is not False:
            if not isinstance(use_augmentation, (tuple, list)) or len(use_augmentation) != 2:
                raise ValueError(f"use_augmentation {use_augmentation} is no range; give (low, high), as (70, 100), or False")
            low, high = map(_checked_percentile, use_augmentation)
            if low > high:
                raise ValueError(f"use_augmentation {use_augmentation} runs backwards; give (low, high), as (70, 100)")
        self.dataset, self.use_augmentation = dataloader, use_augmentation
        return self

    def encoded(self, dataloader: Iterable, seed: int = 0, verbose: bool = True) -> FeatureCache:
        """A loader's pictures as the decoder takes them, in memory, for ``set_dataset``: of this scanner, or of others with the
        same model, preprocessing, layer, ``mask_by``, device, and decoder's size and kind (tokens or maps). One draw of what is
        random in the loader; the order is drawn anew each epoch if the loader shuffles. Raises RuntimeError without a decoder.
        """
        self._need_decoder("generate_decoder() or load_decoder(path)")  # it decides the target's size
        cache = FeatureCache.filled(dataloader, self._encode_batch, seed, self.device, verbose)
        cache.belongs_to = self._encoding() | {"pictures": len(cache.tensors[0]), "seed": seed}
        return cache

    def _encoding(self) -> dict:
        """What encoded pictures depend on, in plain values."""
        decoder = {"tokens": self._is_tokens, "decoded": list(self._decoded_size()), "device": str(self.device)}
        return self._identity() | {"weights": compute_fingerprint(self.model)} | decoder

    def set_validation_dataset(self, dataloader: Iterable) -> "SCAN":
        """Pictures to validate on after each epoch, masked by G > 0."""
        self.valid_dataset = dataloader
        return self

    def generate_decoder(
        self,
        is_Transformer: bool | None = None,
        ch_per_lv: Sequence[int] | None = None,
        *,
        output_stride: int | None = None,
        upsampling: str | None = None,
        depth: int = 1,
    ) -> "SCAN":
        """Build the decoder for this layer.

        is_Transformer: None takes the transformer decoder for token layers and the convolutional one else. False on a token layer
        folds the tokens to their grid first. depth: encoder blocks of the transformer decoder, published 4. The other
        arguments are the decoders', None their defaults: see ``ConvolutionalDecoder``; tokens are up-sampled bilinearly.
        """
        layout = self.layout
        tokens = layout.kind == "BTC"
        transformer = tokens if is_Transformer is None else is_Transformer
        config = {
            "decoder": "TransformerDecoder" if transformer else "ConvolutionalDecoder",
            "in_channels": layout.channels,
            "grid": list(layout.grid),
            "image_size": list(self.image_size),
            "ch_per_lv": list(ch_per_lv) if ch_per_lv is not None else None,
            "output_stride": output_stride,
            "upsampling": upsampling or ("bilinear" if tokens or transformer else "transposed"),
            "full_widths_from": 256 if tokens or transformer else 512,
        }
        if transformer:
            config |= {"prefix": layout.prefix, "depth": depth}
        self._adopt(build_decoder(config), config)
        self._trained = False
        return self

    def _adopt(self, decoder: nn.Module, config: dict | None) -> None:
        layout = {} if config is None else {"memory_format": torch.channels_last}
        with torch.inference_mode(False):  # weights moved in inference mode could never be trained
            self.decoder, self._decoder_config = decoder.to(self.device, **layout), config
        self.optimizer = self.trainer = None

    def compile(
        self,
        loss_alpha: float = 4.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        learning_rate: float = 1e-3,
        metrics: Sequence[type] | None = None,
        scheduler_class=None,
        scheduler_kwargs: dict | None = None,
        *,
        scheduler_interval: str = "epoch",
    ) -> "SCAN":
        """Choose loss and optimizer.

        loss_alpha: the map should cover 1 / (1 + alpha) of the picture.
        metrics: classes with reset(), update(target, outputs), compute(); None takes ConfidentMAE and NonConfidentMAE.
        scheduler_interval: the scheduler steps once an "epoch" or once a "step".
        """
        self._need_decoder("generate_decoder() or load_decoder(path)")
        self.criterion = SelfConfidenceLoss(loss_alpha)
        fused = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters and self.device.type != "mps" else {}
        self.optimizer = optimizer_class(self.decoder.parameters(), lr=learning_rate, **fused)  # one pass over the weights
        self.scheduler = scheduler_class(self.optimizer, **(scheduler_kwargs or {})) if scheduler_class else None
        self.metrics = [metric() for metric in (metrics if metrics is not None else (ConfidentMAE, NonConfidentMAE))]
        self._scheduler_interval, self._schedule = scheduler_interval, {}
        if scheduler_class:
            plain = {name: value for name, value in (scheduler_kwargs or {}).items() if isinstance(value, (int, float, str))}
            self._schedule = {"scheduler": scheduler_class.__name__, "scheduler_interval": scheduler_interval} | plain
        self.trainer = None
        return self

    # --- training ---

    def fit(
        self,
        epochs: int = 2,
        verbose: bool = True,
        *,
        checkpoint: str | os.PathLike | None = None,
        cache: bool | str = "auto",
        cache_budget: float = 4e9,
        seed: int = 0,
        amp: bool = False,
        on_step: Callable[[Trainer], None] | None = None,
    ) -> dict[str, list[float]]:
        """Train the decoder. Returns {"loss", "val_loss", each metric's name and "val_" + it: one value an epoch}.

        checkpoint: a file to save to and resume from; a run killed at any moment and started again ends with the same weights.
        cache: keep the features, so that the frozen model runs once: True, False, or "auto", which does when several epochs
            are to come, cache_budget bytes suffice and the pictures come the same each time.
        amp: bfloat16 autocast. on_step: called with the trainer after each step.
        """
        if self.dataset is None:
            raise RuntimeError("there is nothing to train on; call set_dataset(loader) first")
        if self.optimizer is None:
            raise RuntimeError("the decoder is not compiled; call compile() after generate_decoder() or load_decoder(path)")
        if self.trainer is None:
            self.trainer = Trainer(
                self.decoder,
                self._decode_step,
                self.optimizer,
                self.scheduler,
                scheduler_interval=self._scheduler_interval,
                metrics=self.metrics,
                device=self.device,
            )
        trainer = self.trainer
        trainer.checkpoint, trainer.seed, trainer.amp = checkpoint, seed, amp

        def stepped(trainer: Trainer) -> None:
            self._trained = True  # from the first step on, what was learnt can be looked at
            if on_step is not None:
                on_step(trainer)

        trainer.on_step = stepped
        with torch.inference_mode(False), torch.enable_grad():
            training, left = self._prepared(self.dataset, epochs, cache, cache_budget, verbose)
            validation = None
            if self.valid_dataset is not None:
                validation, _ = self._prepared(self.valid_dataset, epochs, cache, left, verbose)
            trainer.config = self._run_config(training)
            try:
                history = trainer.fit(training, epochs, validation, verbose)
            finally:
                self._trained = self._trained or trainer.epoch > 0  # a finished run may be resumed without a step
                self.decoder.eval()
        return {"loss": [], "val_loss": []} | history

    def _run_config(self, training) -> dict:
        """What must agree for a killed run to be resumed, in plain values."""
        try:
            batches = len(training)
        except (TypeError, NotImplementedError):
            batches = None
        return {**self._identity(), "weights": compute_fingerprint(self.model), "decoder": self._decoder_config} | {
            "percentiles": list(self.use_augmentation) if self.use_augmentation else False,
            "alpha": self.criterion.alpha,
            "optimizer": type(self.optimizer).__name__,
            "learning_rate": self.optimizer.defaults["lr"],
            "metrics": [type(metric).__name__ for metric in self.metrics],
            "batches": batches,
            "cached": isinstance(training, FeatureCache) and [training.belongs_to[key] for key in ("pictures", "seed")],
            "amp": self.trainer.amp,
            **self._schedule,
        }

    def _decode_step(self, batch, training):
        features, scores, target = batch
        percentile: Tensor | float = 0.0  # of the positive entries: the smallest of them, so G > 0
        if training and self.use_augmentation:
            low, high = self.use_augmentation
            percentile = low + (high - low) * torch.rand(len(features), device=features.device)
        outputs = self.decoder(self._masked(features, scores, percentile))
        return self.criterion(outputs.float(), target), outputs, target

    def _encode_batch(self, batch) -> tuple[Tensor, Tensor, Tensor]:
        """A loader's batch -> features, mask scores, and the blurred picture at the decoder's resolution in [-1, 1]."""
        if isinstance(batch, dict):
            raise TypeError(
                f"the loader gives dictionaries ({', '.join(map(str, batch))}); give (images, labels), or images alone"
            )
        images, labels = (*batch, None)[:2] if isinstance(batch, (tuple, list)) else (batch, None)
        images = self._images(images)
        return *self._extract(images, labels, unknown=True), self._target(images)

    def target_image(self, images: Tensor) -> Tensor:
        """What the decoder shall rebuild: images (N, 3, H, W) in [0, 255] -> blurred to the grid, at its size, in [-1, 1]."""
        return self._target(self._images(images))

    def _target(self, images: Tensor) -> Tensor:
        blurred = blur_to_grid(images, self.layout.grid) / 127.5 - 1
        return F.interpolate(blurred, size=self._decoded_size(), mode="bilinear", align_corners=False)

    def _decoded_size(self) -> tuple[int, int]:
        if self._decoder_config is None:  # a decoder of the user's own: ask it, once
            if self._own_size is None:
                layout, training = self.layout, self.decoder.training
                with torch.no_grad():
                    outputs = self.decoder.eval()(torch.zeros(1, layout.channels, *layout.grid, device=self.device))
                self.decoder.train(training)
                if outputs.ndim != 4 or outputs.shape[1] != 4:
                    raise ValueError(f"decoder_model returns {tuple(outputs.shape)} for one picture; it must return (N, 4, h, w)")
                self._own_size = tuple(outputs.shape[-2:])
            return self._own_size
        _, doublings = decoders.count_doublings(self.layout.grid, self.image_size, self._decoder_config["output_stride"])
        return tuple(cells * 2**doublings for cells in self.layout.grid)

    def _prepared(self, loader, epochs, cache, budget, verbose) -> tuple[Iterable, float]:
        """The loader with its batches encoded, from memory where that pays, else as they come; and what is left of the budget."""
        if cache not in (True, False, "auto"):
            raise ValueError(f"cache {cache!r} is not known; take True, False or 'auto'")
        if isinstance(loader, FeatureCache):
            for name, value in self._encoding().items():
                if loader.belongs_to.get(name) != value:
                    found = f"{name} = {loader.belongs_to.get(name)}, this scanner has {value}"
                    raise ValueError(f"the pictures were encoded for {found}; encode them anew")
            return loader, budget - loader.nbytes
        if cache == "auto":
            layout = self.layout
            entries = layout.channels * (math.prod(layout.grid) + layout.prefix) * (2 if self.use_gradient_mask else 1)
            size = 4 * (entries + 3 * math.prod(self._decoded_size()))  # bytes a picture
            cache = epochs > 1 and count_images(loader) * size <= budget and is_repeatable(loader)
        if not cache:
            return EncodedLoader(loader, self._encode_batch), budget
        cached = self.encoded(loader, self.trainer.seed, verbose)
        return cached, budget - cached.nbytes

    # --- explaining ---

    @torch.no_grad()
    def __call__(self, image: Tensor, class_idx=None, percentile: float | Sequence[float] = 95) -> tuple[Tensor, Tensor]:
        """Explain: image (3, H, W) or (N, 3, H, W) in [0, 255] -> confidence (H, W) float32 in [0, 1] and reconstruction (H,
        W, 3) uint8 at ``image_size``, on the CPU; both with a leading N when the input has one.

        class_idx: a class, one per image, or None for the predicted one. percentile: share of the positive gradient entries
        that is masked away, 0..100; high values leave the strongest evidence only. Several: the mean of their maps.
        """
        features, scores = self.extract(image, class_idx)
        confidence, reconstruction = self.decode(features, scores, percentile)
        if image.ndim == 3:
            confidence, reconstruction = confidence[0], reconstruction[0]
        return confidence.cpu(), reconstruction.cpu()

    def explain(
        self,
        images: Tensor,
        target=None,
        percentile: float | Sequence[float] = 95,
        normalize: bool = True,
        *,
        evidence: Callable[[Tensor, Target], Tensor] | None = None,
    ) -> Tensor:
        """The call every explainer answers: images (N, 3, H, W) -> maps (N, H, W) at the images' size, on their device.

        target: None (predicted class), a class, one per image, or callables on an image's outputs. percentile: as in ``decode``.
        normalize=True stretches each map to [0, 1]; False gives the confidence as it is, at the decoder's resolution.
        evidence: another explainer. Its map E in [0, 1] is weighed by the confidence C: E (1 + C / mean(C)), so C raises what
        it is sure of and vetoes nothing. Where E is empty C stands alone, and a warning says so. Raises ValueError for maps
        that are not (N, h, w), or negative.
        """
        pictures = self._images(images)
        clues = None if evidence is None else compute_evidence(evidence, pictures, target)
        if clues is not None and (missing := int(find_empty_maps(clues).sum())):
            self._warn("evidence", f"the evidence of {missing} images is empty; their maps are SCAN's alone")
        with torch.no_grad():
            maps = self._outputs(*self._extract(pictures, target), percentile)[:, 0]
            maps = maps if clues is None else weight_by_confidence(clues, maps)
            maps = normalize_map(maps, images.shape[-2:]) if normalize else maps
        return maps.to(images.device)

    def extract(self, images: Tensor, target=None) -> tuple[Tensor, Tensor]:
        """Features and mask scores of images (N, 3, H, W), as the decoder takes them: (N, C, h, w), or tokens (N, T, C); float32.

        With them, ``decode`` at any percentile needs no further run of the model. Without a gradient mask the scores are ones.
        """
        return self._extract(self._images(images), target)

    def _extract(self, images: Tensor, target, unknown: bool = False) -> tuple[Tensor, Tensor]:
        """``extract`` of checked images; unknown: let class -1 mean the predicted one, as for training labels."""
        layout = self.layout  # before the layer's name is read: it may move
        with self._tap() as tap:
            logits = tap(to_channels_last(self.preprocess(images)))
            if not is_callable_target(target):
                target = resolve_classes(logits, target, unknown)
            features = self._arranged(tap.features).float()
            if not self.use_gradient_mask:
                return features, features.new_ones(len(features), *[1] * (features.ndim - 1))
            if isinstance(tap, RelevanceTap):
                gradient, relevance = tap.gradient_and_relevance(target)
                relevance = self._placed(relevance.float())
            else:
                gradient, relevance = tap.gradient(target), None
        gradient = self._arranged(gradient).float()
        scores = compute_mask_scores(features, gradient, self.mask_by, -1 if self._is_tokens else 1, relevance)
        patches = scores[:, layout.prefix :] if self._is_tokens else scores
        silent = int((patches.flatten(1) <= 0).all(1).sum())
        if silent:
            self._warn(
                "nothing positive",
                f"{silent} of {len(images)} images have no positive {self.mask_by} at any place of layer {self.layer_name!r}, so "
                "their maps say nothing of the class; take an earlier layer",
            )
        return features, scores

    def _tap(self) -> FeatureTap:
        """The target layer's, with attention relevance where the masks rank by it."""
        kind = RelevanceTap if self.mask_by == "relevance" and self.use_gradient_mask else FeatureTap
        return kind(self.model, self.layer_name)

    def _placed(self, relevance: Tensor) -> Tensor:
        """Relevance (N, h, w) of patches, arranged as the features, with one channel; 0 for prefix tokens."""
        places = resize_map(relevance, self.layout.grid)[:, None]
        return F.pad(places.flatten(2).mT, (0, 0, self.layout.prefix, 0)) if self._is_tokens else places

    @torch.no_grad()
    def decode(self, features: Tensor, scores: Tensor, percentile: float | Sequence[float] = 95) -> tuple[Tensor, Tensor]:
        """Of ``extract``: confidence (N, H, W) float32 in [0, 1], reconstruction (N, H, W, 3) uint8, at ``image_size``.

        percentile: 0..100, or several, whose maps are averaged: places that stand harder masks rank higher.
        """
        outputs = self._outputs(features, scores, percentile)
        both = F.interpolate(outputs, size=self.image_size, mode="bilinear", align_corners=False)
        pixels = ((both[:, 1:] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return both[:, 0], pixels.permute(0, 2, 3, 1)

    def _outputs(self, features: Tensor, scores: Tensor, percentile: float | Sequence[float]) -> Tensor:
        """(N, 4, h', w'): confidence and reconstruction at a percentile, or the mean of several."""
        several = [percentile] if isinstance(percentile, (int, float, str)) else [float(p) for p in percentile]
        if not several:
            raise ValueError("percentile is empty; give a number in 0..100, or several")
        found = [self._decode(self._masked(features, scores, p)) for p in map(_checked_percentile, several)]
        return torch.stack([torch.cat(split_outputs(outputs), 1) for outputs in found]).mean(0)

    def _decode(self, masked: Tensor) -> Tensor:
        self._need_decoder("generate_decoder() and fit(), or load_decoder(path)")
        if not self._trained:
            raise RuntimeError("the decoder is not trained yet; call fit(), or load_decoder(path)")
        self.decoder.eval()
        return self.decoder(masked).float()

    def _masked(self, features: Tensor, scores: Tensor, percentile: Tensor | float) -> Tensor:
        return features * (scores >= compute_threshold(scores, percentile))

    # --- decoders on disk ---

    def save_decoder(self, path: str | os.PathLike, *, half: bool = False, notes: dict | None = None) -> None:
        """Write the decoder: a state dict and what it belongs to. half: 16-bit weights. notes: plain values to keep with it."""
        self._need_decoder("generate_decoder() and fit()")
        if not self._trained:
            raise RuntimeError("the decoder is not trained yet; call fit() before save_decoder(path)")
        belongs = self._decoder_config, self._identity(), compute_fingerprint(self.model)
        write_decoder(path, self.decoder, *belongs, half=half, notes=notes)

    def load_decoder(self, path: str | os.PathLike) -> "SCAN":
        """Read a decoder that ``save_decoder`` wrote, onto this device; what was noted with it is in ``notes``.

        Raises FileNotFoundError, and ValueError when the file is damaged, holds code, or belongs to another layer or model; the
        scanner is then as it was.
        """
        decoder, config, saved = read_decoder(path, self._identity(), self.decoder)
        if saved["weights"] != compute_fingerprint(self.model):
            what = "was trained for other weights of the same architecture; its maps may mislead, train a decoder for these"
            self._warn("weights", f"{path} {what}")
        if config is None:  # into the module that was given
            self.decoder.load_state_dict(decoder.state_dict())
            decoder = self.decoder.eval()
        self._adopt(decoder, config)
        self._trained, self.notes = True, saved.get("notes", {})
        return self

    def _identity(self) -> dict:
        """What a decoder belongs to, in plain values."""
        layout = self.layout
        return {
            "model": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layer": self.layer_name,
            "channels": layout.channels,
            "grid": list(layout.grid),
            "image_size": list(self.image_size),
            "use_gradient_mask": self.use_gradient_mask,
            "mask_by": self.mask_by,
        }

    # --- small things ---

    @property
    def layout(self) -> Layout:
        """How the target layer arranges its features; found by one forward pass.

        Where the patch tokens get no gradient at all (a class-token transformer's last output), the target layer moves to
        ``find_default_layer`` with a warning.
        """
        if self._layout is None:
            probe = self.preprocess(torch.full((1, 3, *self.image_size), 127.5, device=self.device))
            with self._tap() as tap:
                self._try(tap, probe)
                layout = tap.layout
                unread = False
                if self.use_gradient_mask and layout.prefix:
                    gradient = tap.gradient()
                    unread = bool(gradient[:, : layout.prefix].any()) and not gradient[:, layout.prefix :].any()
            if unread:
                moved = find_default_layer(self.model, tuple(probe.shape[-2:]))
                reason = (
                    f"layer {self.layer_name!r} sends no gradient to the patch tokens (behind it the head reads the class token)"
                )
                if moved == self.layer_name:
                    raise ValueError(f"{reason}; give an earlier target_layer")
                self._warn("moved", f"{reason}; moved to {moved!r}")
                self.layer_name = moved
                return self.layout
            self._layout = layout
        return self._layout

    def _try(self, tap: FeatureTap, probe: Tensor) -> None:
        """Run it, and say now if there is no relevance to be had."""
        try:
            tap(probe)
            if isinstance(tap, RelevanceTap):
                tap.gradient_and_relevance()
        except NoAttentionError as error:
            ways = ", ".join(way for way in MASK_METHODS if way != "relevance")
            reason = f"needs attention over the whole picture, and {type(self.model).__name__} has none that can be read"
            raise ValueError(f"mask_by 'relevance' {reason}; take one of {ways}") from error

    @property
    def _is_tokens(self) -> bool:
        return isinstance(self.decoder, decoders.TransformerDecoder)

    def _arranged(self, features: Tensor) -> Tensor:
        return self.layout.to_tokens(features) if self._is_tokens else self.layout.to_maps(features)

    def _images(self, images: Tensor) -> Tensor:
        """Checked, float32, batched, on the device, at image_size."""
        if not isinstance(images, Tensor) or images.ndim not in (3, 4) or images.shape[-3] != 3:
            shape = tuple(images.shape) if hasattr(images, "shape") else type(images).__name__
            raise ValueError(f"image must be a tensor (3, H, W) or (N, 3, H, W) in [0, 255], not {shape}")
        integers = not images.is_floating_point()
        images = (images if images.ndim == 4 else images[None]).to(self.device, torch.float32)
        if images.numel():
            low, high = images.aminmax()
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise ValueError("image holds NaN or infinite values; expected finite pixels in [0, 255]")
            span = f"image values lie in [{float(low):.2g}, {float(high):.2g}], but [0, 255] is expected"
            if 0 < float(high) <= 1 and float(low) >= 0 and not integers:
                self._warn("range", f"{span}; multiply by 255")
            elif float(low) < 0 or float(high) > 256:
                self._warn("range", f"{span}, before normalising")
        if tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images, size=self.image_size, mode="bilinear", align_corners=False, antialias=True)
        return images

    def _need_decoder(self, how: str) -> None:
        if self.decoder is None:
            raise RuntimeError(f"there is no decoder yet; call {how}")

    def _warn(self, topic: str, message: str) -> None:
        if topic not in self._warned:  # once a scanner, not once a batch
            self._warned.add(topic)
            warnings.warn(message, stacklevel=3)


def _checked_percentile(percentile: float) -> float:
    if not isinstance(percentile, (int, float)) or not 0 <= percentile <= 100:
        raise ValueError(f"percentile {percentile!r} is out of range; give a number in 0..100")
    return float(percentile)
