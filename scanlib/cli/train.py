"""The command ``train``: train SCAN's decoder for one layer of a classifier, on a folder of images."""

import argparse
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, random_split

from scanlib.data import PhotoFolder, RandomParts, Signs
from scanlib.masking import MASK_METHODS
from scanlib.models.zoo import Classifier, load_classifier, parse_weights
from scanlib.scan import SCAN
from scanlib.training.checkpoint import check_writable
from scanlib.training.encoding import SCORES


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: model, data, decoder and training."""
    add = parser.add_argument
    add("--model", required=True, help="signs_cnn, signs_vit, efficientnet_lite0, vit_tiny, or any torchvision classifier")
    add("--weights", type=parse_weights, default="DEFAULT", help="path of a state dict, DEFAULT, or none for random weights")
    add("--layer", help="name of the target layer; default: the model's default layer")
    add("--data", default="signs", help="signs, drawn scenes, or a folder of images (flat, or one folder per class)")
    add("--out", required=True, type=Path, help="file of the decoder; a killed run continues from OUT.run")
    add("--count", type=int, default=2000, help="number of drawn scenes; of fewer photographs random parts are added")
    add("--epochs", type=int, default=11)
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=3e-3, help="peak of the one-cycle schedule of AdamW")
    add("--alpha", type=float, default=4.0, help="the map should cover 1 / (1 + alpha) of the image")
    add("--mask-by", choices=MASK_METHODS, help="what the percentile ranks; default: position for feature maps, libra for tokens")
    add("--score", choices=SCORES, default="log_probability", help="the score of the class that is explained")
    add("--percentiles", type=float, nargs=2, default=(90, 99), metavar=("LOW", "HIGH"), help="range of the random percentile")
    add("--widths", type=int, nargs="+", default=[64] * 4, help="decoder channels at strides 4, 8, 16, 32")
    add("--decoder-kind", choices=("convolutional", "transformer"), help="default: chosen for the layer")
    add("--output-stride", type=int, help="image pixels per decoded pixel; default: decode at four times the feature grid")
    add("--upsampling", choices=("bilinear", "transposed"), default="bilinear")
    add("--image-size", type=int, help="pixels per side; default: the model's")
    add("--validation", type=float, default=0.1, help="share of the images for validation")
    add("--workers", type=int, default=0, help="number of processes that read images")
    add("--seed", type=int, default=0)
    add("--amp", action="store_true", help="bfloat16 autocast")


EVIDENCE = {"position": "GradCAM", "libra": "Libra"}  # mask_by: what explain and compare weight by the confidence
READ_AT = [80.0, 85.0, 90.0, 95.0, 98.0]  # percentiles whose mean map explain and compare show


class UnlabelledSigns(Signs):
    """Signs for a model with other classes. Item: (image, -1)."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.scene(index).image, -1


def run(options: argparse.Namespace) -> None:
    """Train the decoder and save it."""
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation must be in [0, 1), got {options.validation}")
    for name in ("epochs", "learning_rate", "count"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {options.out}; give {options.out / 'decoder.pt'}")
    check_writable(options.out)
    classifier = load_classifier(options.model, options.weights)
    size = (options.image_size, options.image_size) if options.image_size else classifier.image_size
    if options.data == "signs":
        kind = Signs if classifier.classes == list(Signs.classes) else UnlabelledSigns
        data: Signs | PhotoFolder = kind(options.count, size[0])
    else:
        data = PhotoFolder(options.data, size[0], classifier.classes)
    held_out = round(options.validation * len(data))
    train, validation = random_split(data, [len(data) - held_out, held_out], torch.Generator().manual_seed(options.seed))

    torch.manual_seed(options.seed)
    layer = options.layer or classifier.layer
    mask_by = options.mask_by or _choose_mask(classifier, layer, size)
    scanner = SCAN(classifier.model, layer, size, device=options.device, mask_by=mask_by, score=options.score)
    scanner.set_preprocess(classifier.preprocess)
    images = RandomParts(train, options.count) if len(train) < options.count and options.data != "signs" else train
    loader = DataLoader(images, options.batch_size, shuffle=True, num_workers=options.workers)
    scanner.set_dataset(loader, tuple(options.percentiles))
    if held_out:
        scanner.set_validation_dataset(DataLoader(validation, options.batch_size, num_workers=options.workers))
    is_transformer = None if options.decoder_kind is None else options.decoder_kind == "transformer"
    scanner.generate_decoder(is_transformer, options.widths, output_stride=options.output_stride, upsampling=options.upsampling)
    schedule = {"max_lr": options.learning_rate, "total_steps": max(1, options.epochs * len(loader))}
    scanner.compile(
        options.alpha, torch.optim.AdamW, scheduler_class=OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step"
    )
    files = [path.name for path in data.files] if isinstance(data, PhotoFolder) else [options.data]
    where = str(Path(options.data).resolve()) if isinstance(data, PhotoFolder) else options.data
    scanner.trainer.config["data"] = f"{where}, {len(data)} images, {zlib.crc32(' '.join(files).encode()):08x}"
    scanner.trainer.config |= {name: getattr(options, name) for name in ("batch_size", "validation", "count")}
    checkpoint = options.out.with_name(options.out.name + ".run")
    scanner.fit(options.epochs, checkpoint=checkpoint, seed=options.seed, amp=options.amp)
    weights = options.weights if options.weights in (None, "DEFAULT") else str(Path(options.weights).resolve())
    layer = scanner.layer_name  # may differ from --layer: SCAN moves it if the patch tokens get no gradient
    notes = {"model": options.model, "weights": weights, "layer": layer}
    if mask_by in EVIDENCE:
        notes |= {"evidence": EVIDENCE[mask_by], "percentiles": READ_AT}
    scanner.save_decoder(options.out, notes=notes)
    checkpoint.unlink(missing_ok=True)
    print(f"{options.out}: decoder of {options.model}, layer {layer}, from {len(train)} images")


def _choose_mask(classifier: Classifier, layer: str, size: tuple[int, int]) -> str:
    """Return "position" for a layer with channels first, "libra" for tokens and channels last."""
    probe = SCAN(classifier.model, layer, size, device="cpu").set_preprocess(classifier.preprocess)
    return "position" if probe.layout.kind == "BCHW" else "libra"
