"""SCAN: train a decoder to reconstruct images from one layer's masked features. Its confidence is the explanation.

Lee, Jeong, Jhang, "SCAN: Visual Explanations with Self-Confidence and Analysis Networks", IEEE TAI 2026, arXiv 2603.06523.

    scanner = SCAN(model, "layer4", image_size=(224, 224)).set_preprocess(preprocess)
    scanner.set_dataset(loader).generate_decoder().compile().fit(epochs=2)
    confidence, reconstruction = scanner(image, percentile=95)      # (H, W) float in [0, 1], (H, W, 3) uint8
    maps = scanner.as_explainer(percentile=95)(images, target=3)    # (N, H, W) in [0, 1], like every other explainer

Let F be the layer's features and G = relu(dy_c / dF) the positive gradient of the class score. The decoder sees F * [G >= Q],
where Q is the P-th percentile of G's positive entries (Eq. 1). It reconstructs the image blurred to the layer's grid.
"""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scanlib.explainers.attention import RelevanceTap
from scanlib.explainers.libra import LibraTap
from scanlib.explainers.weighted import SCANExplainer
from scanlib.hooks import FeatureTap
from scanlib.layers import Layout
from scanlib.loss import ConfidentMAE, NonConfidentMAE, SelfConfidenceLoss
from scanlib.masking import mask_features
from scanlib.targets import Target
from scanlib.trainer import Trainer
from scanlib.training.decoder_file import DecoderState, compute_fingerprint, read_decoder, validate_percentile, write_decoder
from scanlib.training.encoding import BatchEncoder, FeatureEncoder
from scanlib.training.feature_cache import FeatureCache

TAPS = {"relevance": RelevanceTap, "libra": LibraTap}  # what reads the layer, where a mask needs more than the gradient


class SCAN:
    """SCAN with the interface of the authors' code. Each set-up method returns the scanner.

    Args:
        target_model: the classifier, (N, 3, H, W) preprocessed -> logits (N, K). Its weights and its mode are not changed.
        target_layer: name, module, or index into ``list(model.modules())[1:]``.
        image_size: (H, W) that images are resized to.
        use_gradient_mask: False decodes all features and needs no gradient.
        decoder_model: a decoder of your own, masked features -> (N, 4, h', w'). It is used as it is, trained or not.
        device: None uses CUDA if available, else the CPU. The model is moved there.
        num_classes: kept for compatibility; the number of classes is read from the logits.
        mask_by: what the percentile ranks: "gradient" (published), "attribution", "position", "libra", or, for transformers that
            attend over the whole image, "relevance"; see ``compute_mask_scores``.
        score: the score of the class whose gradient the mask uses: its "logit" (published) or its "log_probability", the
            evidence for the class against all others.

    Images are (N, 3, H, W) or (3, H, W), uint8 or float, in [0, 255].
    """

    def __init__(
        self,
        target_model: nn.Module,
        target_layer: str | int | nn.Module,
        image_size: tuple[int, int] | int = (224, 224),
        use_gradient_mask: bool = True,
        decoder_model: nn.Module | None = None,
        device: torch.device | str | None = None,
        num_classes: int = 1000,
        *,
        mask_by: str = "gradient",
        score: str = "logit",
    ):
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(map(int, image_size))
        if len(size) != 2 or min(size) < 2:
            raise ValueError(f"image_size must be (height, width) in pixels, such as (224, 224), got {image_size}")
        self.image_size, self.num_classes = (size[0], size[1]), num_classes
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = target_model.to(self.device)
        self.encoder = FeatureEncoder(
            self.model,
            target_layer,
            self.image_size,
            self.device,
            use_gradient_mask=use_gradient_mask,
            mask_by=mask_by,
            score=score,
            tap_type=TAPS.get(mask_by, FeatureTap) if use_gradient_mask else FeatureTap,
        )
        self.dataset: Iterable | None = None
        self.valid_dataset: Iterable | None = None
        self.use_augmentation: tuple[float, float] | bool = (70, 100)
        self._trainer: Trainer | None = None
        self._criterion = SelfConfidenceLoss()
        self._state = None if decoder_model is None else DecoderState(decoder_model.to(self.device), is_trained=True)

    # --- set-up ---

    def set_preprocess(self, function: Callable[[Tensor], Tensor]) -> "SCAN":
        """Set the function from images in [0, 255] to the model's input. It scales and normalizes; it must not crop."""
        self.encoder.set_preprocess(function)
        return self

    def set_dataset(self, dataloader: Iterable, use_augmentation: tuple[float, float] | bool = (70, 100)) -> "SCAN":
        """Set the training images: batches of (images, labels), or of images alone.

        Masks use the gradient of the label, or of the predicted class where there is no label or it is -1. To train several
        decoders on the same images pass the result of ``encode_dataset``: the model then runs once for all of them.

        use_augmentation: range of the percentile, drawn each time an image is used. False masks by score > 0.
        """
        if use_augmentation is True:
            use_augmentation = (70, 100)
        if use_augmentation is not False:
            is_pair = isinstance(use_augmentation, (tuple, list)) and len(use_augmentation) == 2
            if not is_pair or validate_percentile(use_augmentation[0]) > validate_percentile(use_augmentation[1]):
                raise ValueError(f"use_augmentation must be (low, high), such as (70, 100), or False, got {use_augmentation}")
            use_augmentation = (use_augmentation[0], use_augmentation[1])
        self.dataset, self.use_augmentation = dataloader, use_augmentation
        return self

    def set_validation_dataset(self, dataloader: Iterable) -> "SCAN":
        """Set the images to validate on after each epoch. They are masked by score > 0."""
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
        """Build the decoder for the target layer.

        is_Transformer: None chooses the transformer decoder for token layers and the convolutional one otherwise. False on a
        token layer arranges the patch tokens as a grid first. For the other arguments see ``ConvolutionalDecoder``.
        """
        options = (is_Transformer, ch_per_lv, output_stride, upsampling, depth)
        self._set_decoder(DecoderState.build(self.layout, self.image_size, *options))
        return self

    def compile(
        self,
        loss_alpha: float = 4.0,
        optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        learning_rate: float = 1e-3,
        metrics: Sequence[type] | None = None,
        scheduler_class=None,
        scheduler_kwargs: dict | None = None,
        *,
        scheduler_interval: str = "epoch",
    ) -> "SCAN":
        """Choose loss, optimizer and scheduler.

        loss_alpha: the map should cover 1 / (1 + alpha) of the image.
        metrics: classes with reset(), update(preds, target), compute(). None is ConfidentMAE and NonConfidentMAE.
        scheduler_interval: step the scheduler once an "epoch" or once a "step".
        """
        self._criterion = SelfConfidenceLoss(loss_alpha)
        can_fuse = "fused" in inspect.signature(optimizer_class).parameters and self.device.type != "mps"
        optimizer = optimizer_class(self.decoder.parameters(), lr=learning_rate, **({"fused": True} if can_fuse else {}))
        kwargs = scheduler_kwargs or {}
        scheduler = scheduler_class(optimizer, **kwargs) if scheduler_class else None
        metric_types = (ConfidentMAE, NonConfidentMAE) if metrics is None else metrics
        self._trainer = Trainer(
            self.decoder,
            self._run_step,
            optimizer,
            scheduler,
            scheduler_interval=scheduler_interval,
            metrics=[metric() for metric in metric_types],
            device=self.device,
        )
        config = {"alpha": loss_alpha, "optimizer": type(optimizer).__name__, "learning_rate": learning_rate}
        config["metrics"] = [metric.__name__ for metric in metric_types]
        if scheduler_class:
            plain = {name: value for name, value in kwargs.items() if isinstance(value, (int, float, str))}
            config |= {"scheduler": scheduler_class.__name__, "scheduler_interval": scheduler_interval} | plain
        self._trainer.config = config
        return self

    def _run_step(self, batch, training: bool):  # a method: a deep copy of the scanner trains its own decoder
        features, scores, reference = batch
        percentile: Tensor | float = 0.0  # keeps all positive scores
        if training and isinstance(self.use_augmentation, tuple):
            low, high = self.use_augmentation
            percentile = low + (high - low) * torch.rand(len(features), device=features.device)
        outputs = self.decoder(mask_features(features, scores, percentile))
        return self._criterion(outputs.float(), reference), outputs, reference

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
        """Train the decoder. Return one value per epoch for "loss", "val_loss", each metric's class name and "val_" + that name.

        checkpoint: file to save to and resume from. A killed and resumed run ends with the weights of an uninterrupted one.
        cache: True keeps the features in memory, so that the frozen model runs once. "auto" does if there are several epochs, the
            features fit into ``cache_budget`` bytes and the images are the same in each epoch.
        amp: use bfloat16 autocast. on_step: called with the trainer after each step.
        """
        if self.dataset is None:
            raise RuntimeError("there is nothing to train on; call set_dataset(loader) first")
        trainer, state, encode = self.trainer, self.decoder_state, self._build_batch_encoder()

        def after_step(trainer: Trainer) -> None:
            state.is_trained = True
            if on_step is not None:
                on_step(trainer)

        trainer.checkpoint, trainer.seed, trainer.amp, trainer.on_step = checkpoint, seed, amp, after_step
        cache = False if cache == "auto" and epochs == 1 else cache
        with torch.inference_mode(False), torch.enable_grad():
            batches, left = encode.encode_loader(self.dataset, cache, cache_budget, seed, verbose)
            validation = None
            if self.valid_dataset is not None:
                validation, _ = encode.encode_loader(self.valid_dataset, cache, left, seed, verbose)
            percentiles = list(self.use_augmentation) if isinstance(self.use_augmentation, tuple) else False
            trainer.config |= encode.describe(batches) | {"decoder": state.config, "percentiles": percentiles, "amp": amp}
            try:
                history = trainer.fit(batches, epochs, validation, verbose)
            finally:
                trainer.on_step = None
                state.is_trained = state.is_trained or trainer.epoch > 0  # a finished run is resumed without a step
                state.module.eval()
        return {"loss": [], "val_loss": []} | history

    def encode_dataset(self, dataloader: Iterable, seed: int = 0, verbose: bool = True) -> FeatureCache:
        """Encode a loader's images once, for ``set_dataset``.

        The cache serves all scanners with the same model, layer, image size, masks, device, and decoder size and kind. Random
        augmentation is drawn once.
        """
        return self._build_batch_encoder().build_cache(dataloader, seed, verbose)

    def _build_batch_encoder(self) -> BatchEncoder:
        size = self.decoder_state.measure_output_size(self.layout, self.device)
        return BatchEncoder(self.encoder, self.decoder_state.uses_tokens, size)

    # --- explaining ---

    @torch.no_grad()
    def __call__(self, image: Tensor, class_idx=None, percentile: float | Sequence[float] = 95) -> tuple[Tensor, Tensor]:
        """Explain images (3, H, W) or (N, 3, H, W) in [0, 255].

        Returns the confidence (H, W), float32 in [0, 1], and the reconstruction (H, W, 3), uint8, at ``image_size`` on the CPU;
        both with a leading N if the input has one.

        class_idx: a class, one per image, None for the predicted class, or callables. percentile: see ``decode``.
        """
        features, scores = self.extract(image, class_idx)
        confidence, reconstruction = self.decode(features, scores, percentile)
        if image.ndim == 3:
            confidence, reconstruction = confidence[0], reconstruction[0]
        return confidence.cpu(), reconstruction.cpu()

    def as_explainer(self, percentile: float | Sequence[float] = 95, evidence: Callable | None = None) -> SCANExplainer:
        """Return an explainer like any other, ``explainer(images, target) -> maps``; see ``SCANExplainer``."""
        return SCANExplainer(self, percentile, evidence)

    def extract(self, images: Tensor, target: Target = None) -> tuple[Tensor, Tensor]:
        """Return the features and mask scores of images, float32: (N, C, h, w), or tokens (N, T, C).

        Pass them to ``decode``, which does not run the model. Without a gradient mask the scores are ones, (N, 1, 1, 1).
        """
        as_tokens = self._state is not None and self._state.uses_tokens
        return self.encoder.encode(self.encoder.prepare_images(images), target, as_tokens=as_tokens)

    @torch.no_grad()
    def decode(self, features: Tensor, scores: Tensor, percentile: float | Sequence[float] = 95) -> tuple[Tensor, Tensor]:
        """Return confidence (N, H, W), float32 in [0, 1], and reconstruction (N, H, W, 3), uint8, at ``image_size``.

        percentile: share of the positive mask scores to mask, in [0, 100]. High values keep the strongest evidence only. Of
        several percentiles the mean of the maps is returned.
        """
        outputs = self.decoder_state.decode(features, scores, percentile)
        outputs = F.interpolate(outputs, size=self.image_size, mode="bilinear", align_corners=False)
        pixels = ((outputs[:, 1:] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return outputs[:, 0], pixels.permute(0, 2, 3, 1)

    def blur_images(self, images: Tensor) -> Tensor:
        """Return the reference images that the decoder must reconstruct, in [-1, 1] at its resolution."""
        return self.encoder.blur(self.encoder.prepare_images(images), self._build_batch_encoder().output_size)

    # --- decoders on disk ---

    def save_decoder(self, path: str | os.PathLike, *, half: bool = False, notes: dict | None = None) -> None:
        """Save the decoder and what it was trained for. ``half`` stores 16-bit weights; ``notes`` are plain values."""
        identity, fingerprint = self.encoder.get_identity(), compute_fingerprint(self.model)
        write_decoder(path, self.decoder_state, identity, fingerprint, half=half, notes=notes)

    def load_decoder(self, path: str | os.PathLike) -> "SCAN":
        """Load a decoder that ``save_decoder`` wrote; its notes are in ``decoder_state.notes``.

        Raises FileNotFoundError, and ValueError if the file is damaged, contains code, or belongs to another layer or model; the
        scanner is then unchanged. Warns if it was trained for other weights of the same architecture.
        """
        own = None if self._state is None else self._state.module
        saved = read_decoder(path, self.encoder.get_identity(), own)
        if saved.fingerprint != compute_fingerprint(self.model):
            advice = "so its maps may be misleading; train a decoder for these weights"
            self.encoder.warn_once("weights", f"{path} was trained for other weights of the same architecture, {advice}")
        if saved.config is None and own is not None:  # a module of the user: load into it
            own.load_state_dict(saved.module.state_dict())
            saved.module = own.eval()
        self._set_decoder(saved)
        return self

    # --- state ---

    @property
    def preprocess(self) -> Callable[[Tensor], Tensor]:
        """Function from images in [0, 255] to the model's input."""
        return self.encoder.preprocess

    @property
    def layer_name(self) -> str:
        """Name of the layer that is read; see ``layout``."""
        return self.encoder.layer_name

    @property
    def layout(self) -> Layout:
        """How the target layer arranges its features; see ``FeatureEncoder.layout``."""
        return self.encoder.layout

    @property
    def decoder_state(self) -> DecoderState:
        """The decoder with its config and notes. Raises RuntimeError if there is none."""
        if self._state is None:
            raise RuntimeError("there is no decoder; call generate_decoder() and fit(), or load_decoder(path)")
        return self._state

    @property
    def decoder(self) -> nn.Module:
        """The decoder. Raises RuntimeError if there is none."""
        return self.decoder_state.module

    @property
    def trainer(self) -> Trainer:
        """The decoder's trainer. Raises RuntimeError before ``compile``."""
        if self._trainer is None:
            raise RuntimeError("the decoder is not compiled; call compile() after generate_decoder() or load_decoder(path)")
        return self._trainer

    def _set_decoder(self, state: DecoderState) -> None:
        with torch.inference_mode(False):  # weights moved in inference mode could never be trained
            state.module.to(self.device)
            if state.config is not None:
                state.module.to(memory_format=torch.channels_last)
        self._state, self._trainer = state, None
