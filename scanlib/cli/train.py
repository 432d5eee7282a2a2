"""The command line of SCAN's training: a decoder for one layer of a classifier, on a folder of pictures.

python -m scanlib train --model squeezenet1_1 --layer features.12 --data photos --out decoder.pt
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, random_split

from scanlib.data import PhotoFolder, Signs
from scanlib.masking import MASK_METHODS
from scanlib.models.zoo import load_classifier, parse_weights
from scanlib.scan import SCAN


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to train for, on what, and how."""
    parser.add_argument("--model", required=True, help="signs_cnn, signs_vit, vit_tiny, or any torchvision classifier")
    parser.add_argument("--weights", default="DEFAULT", help="a state dict's path, DEFAULT, or none for random weights")
    parser.add_argument("--layer", help="target layer by name; left out, the model's default layer")
    parser.add_argument("--data", required=True, help="a folder of pictures (flat, or one folder a class), or signs")
    parser.add_argument("--out", required=True, type=Path, help="where the decoder goes; a killed run goes on from OUT.run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=8e-3, help="peak of the one-cycle schedule")
    parser.add_argument("--alpha", type=float, default=4.0, help="the map should cover 1 / (1 + alpha) of the picture")
    parser.add_argument("--mask-by", choices=MASK_METHODS, default="gradient", help="what the percentile ranks")
    parser.add_argument(
        "--percentiles", type=float, nargs=2, default=(70, 100), metavar=("LOW", "HIGH"), help="drawn from while training"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", help="decoder widths at strides 4, 8, 16, 32; left out, they fit the layer"
    )
    parser.add_argument("--decoder-kind", choices=("convolutional", "transformer"), help="left out, it fits the layer")
    parser.add_argument("--output-stride", type=int, help="picture pixels per decoded pixel; left out, 4x the feature grid")
    parser.add_argument("--upsampling", choices=("bilinear", "transposed"), help="left out, it fits the decoder")
    parser.add_argument("--image-size", type=int, help="pixels a side; left out, the model's own")
    parser.add_argument("--scenes", type=int, default=3000, help="number of scenes with --data signs")
    parser.add_argument("--validation", type=float, default=0.1, help="share of the pictures kept for validation")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")


class _Unlabelled(Dataset):
    """A data set whose labels mean nothing to the model."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index][0], -1


def train_command(options) -> None:
    """Train, save the decoder, and say so."""
    if not 0 <= options.validation < 1:
        raise ValueError(f"--validation {options.validation} is no share of the pictures; give 0 up to, not including, 1")
    if options.epochs < 1 or options.learning_rate <= 0:
        raise ValueError(f"--epochs {options.epochs}, --learning-rate {options.learning_rate}: both must be positive")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; give the file to write, as {options.out / 'decoder.pt'}")
    weights = parse_weights(options.weights)
    target = load_classifier(options.model, weights)
    size = (options.image_size, options.image_size) if options.image_size else target.image_size
    if options.data == "signs":
        data = Signs(options.scenes, size[0])
        if target.classes != list(Signs.classes):
            data = _Unlabelled(data)
    else:
        data = PhotoFolder(options.data, size[0], target.classes)
    kept = round(options.validation * len(data))
    train, validation = random_split(data, [len(data) - kept, kept], torch.Generator().manual_seed(options.seed))

    torch.manual_seed(options.seed)
    layer = options.layer or target.layer
    scanner = SCAN(target.model, layer, size, device=options.device, mask_by=options.mask_by).set_preprocess(target.preprocess)
    loader = DataLoader(train, options.batch_size, shuffle=True, num_workers=options.workers)
    scanner.set_dataset(loader, tuple(options.percentiles))
    if kept:
        scanner.set_validation_dataset(DataLoader(validation, options.batch_size, num_workers=options.workers))
    transformer = options.decoder_kind and options.decoder_kind == "transformer"
    scanner.generate_decoder(transformer, options.widths, output_stride=options.output_stride, upsampling=options.upsampling)
    layer = scanner.layer_name  # it may have moved
    schedule = {"max_lr": options.learning_rate, "total_steps": max(1, options.epochs * len(loader))}
    scanner.compile(
        options.alpha, scheduler_class=torch.optim.lr_scheduler.OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step"
    )
    run = options.out.with_name(options.out.name + ".run")
    scanner.fit(options.epochs, checkpoint=run, seed=options.seed, amp=options.amp)
    where = str(Path(weights).resolve()) if weights not in (None, "DEFAULT") else weights
    scanner.save_decoder(options.out, notes={"model": options.model, "weights": where, "layer": layer})
    run.unlink(missing_ok=True)
    print(f"{options.out}: decoder of {options.model}, layer {layer}, from {len(train)} pictures")
