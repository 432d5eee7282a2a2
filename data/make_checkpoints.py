"""Train the checkpoints in data/checkpoints: the classifiers for Signs, SCAN decoders, and two SCOUTERs.

python data/make_checkpoints.py                 # all, about 14 minutes on 2 CPU cores
python data/make_checkpoints.py signs_cnn       # one of them
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, Signs, SmallResNet, Trainer, build_small_vit, load_classifier
from scanlib.models import CHECKPOINTS, Normalize
from scanlib.scouter import PRESETS, train_recipe
from scanlib.trainer import Accuracy, build_classifier_step
from scanlib.training import load_checkpoint, save_checkpoint


def draw_scenes(count: int) -> TensorDataset:
    images, labels = zip(*Signs(count), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def convert_to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def build_cnn() -> SmallResNet:
    return SmallResNet().to(memory_format=torch.channels_last)


def train_classifier(name: str, build: Callable[[], nn.Module], scenes: int, epochs: int, rate: float, mirror: bool) -> None:
    torch.manual_seed(0)
    model = build()
    loader = DataLoader(draw_scenes(scenes), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    scheduler = OneCycleLR(optimizer, rate, epochs * len(loader))
    classifier_step = build_classifier_step(model, Normalize())

    def step(batch: tuple[Tensor, Tensor], training: bool) -> tuple:
        images, labels = batch
        if training and mirror:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        return classifier_step((images, labels), training)

    Trainer(model, step, optimizer, scheduler, scheduler_interval="step", metrics=[Accuracy()]).fit(loader, epochs)
    save_checkpoint(convert_to_half(model.state_dict()), CHECKPOINTS / f"{name}.pt")


def train_decoder(
    name: str,
    alpha: float,
    epochs: int,
    batch_size: int,
    rate: float,
    percentiles: tuple[int, int],
    mask_by: str = "gradient",
    score: str = "logit",
    upsampling: str | None = None,
    seed: int = 0,
    path: Path | None = None,
    weights: str | None = "DEFAULT",
) -> None:
    torch.manual_seed(seed)
    classifier = load_classifier(name, weights)
    loader = DataLoader(draw_scenes(3000), batch_size=batch_size, shuffle=True)
    own = {"device": "cpu", "mask_by": mask_by, "score": score}
    scanner = SCAN(classifier.model, classifier.layer, classifier.image_size, **own)
    scanner.set_preprocess(classifier.preprocess).set_dataset(loader, use_augmentation=percentiles)
    scanner.generate_decoder(is_Transformer=False, upsampling=upsampling)
    schedule = {"max_lr": rate, "total_steps": epochs * len(loader)}
    scanner.compile(alpha, scheduler_class=OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step")
    scanner.fit(epochs, seed=seed)
    notes = {"model": name, "weights": weights, "layer": classifier.layer}
    file = f"{name}_class_decoder.pt" if score == "log_probability" else f"{name}_decoder.pt"
    scanner.save_decoder(path or CHECKPOINTS / file, half=True, notes=notes)


def train_photos_decoder(images: Tensor, mask_by: str = "position", score: str = "log_probability", seed: int = 0) -> SCAN:
    """Train a decoder of EfficientNet-Lite0 on images (N, 3, 224, 224) in [0, 255], for the predicted classes."""
    torch.manual_seed(seed)
    classifier = load_classifier("efficientnet_lite0")
    classifier.model.requires_grad_(False)
    scanner = SCAN(classifier.model, classifier.layer, 224, device="cpu", mask_by=mask_by, score=score)
    scanner.set_preprocess(classifier.preprocess)
    scanner.generate_decoder(is_Transformer=False, ch_per_lv=(64, 64), output_stride=8, upsampling="bilinear")
    loader, epochs = DataLoader(TensorDataset(images), batch_size=32, shuffle=True), 11
    schedule = {"max_lr": 3e-3, "total_steps": epochs * len(loader)}
    scanner.set_dataset(loader, use_augmentation=(90, 99))
    scanner.compile(4.0, torch.optim.AdamW, scheduler_class=OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step")
    scanner.fit(epochs, seed=seed, verbose=False)
    return scanner


def train_shipped_photos_decoder() -> None:
    images = torch.stack([image.round().to(torch.uint8) for image, _ in Signs(2000, 224)])
    notes = {"model": "efficientnet_lite0", "weights": "DEFAULT", "evidence": "GradCAM", "percentiles": [80, 85, 90, 95, 98]}
    scanner = train_photos_decoder(images)
    scanner.save_decoder(CHECKPOINTS / "efficientnet_lite0_decoder.pt", half=True, notes=notes | {"layer": scanner.layer_name})


def train_scouter(head: str) -> None:
    path = CHECKPOINTS / f"signs_scouter_{head}.pt"
    train_recipe(PRESETS[f"signs-{head}"], path, "cpu")
    checkpoint = load_checkpoint(path)
    save_checkpoint(checkpoint | {"state_dict": convert_to_half(checkpoint["state_dict"])}, path)


RECIPES = {
    "signs_cnn": partial(train_classifier, "signs_cnn", build_cnn, 3000, 8, 3e-3, mirror=False),
    # alpha 6 allows a map of 1/7 of the image; a sign covers about a tenth
    "signs_cnn_decoder": partial(train_decoder, "signs_cnn", 6.0, 4, 16, 8e-3, (70, 100)),
    "signs_vit": partial(train_classifier, "signs_vit", build_small_vit, 10_000, 9, 1e-3, mirror=True),
    "signs_vit_decoder": partial(train_decoder, "signs_vit", 8.0, 6, 32, 5e-3, (90, 100), mask_by="relevance"),
    "signs_cnn_class_decoder": partial(
        train_decoder, "signs_cnn", 6.0, 4, 16, 8e-3, (90, 100), mask_by="libra", score="log_probability", upsampling="bilinear"
    ),
    "signs_vit_class_decoder": partial(
        train_decoder, "signs_vit", 8.0, 6, 32, 5e-3, (90, 100), mask_by="libra", score="log_probability"
    ),
    "efficientnet_lite0_decoder": train_shipped_photos_decoder,
    "signs_scouter_positive": partial(train_scouter, "positive"),
    "signs_scouter_negative": partial(train_scouter, "negative"),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"checkpoint {name!r} not found; choose from {', '.join(RECIPES)}")
        start = time.time()
        RECIPES[name]()
        print(f"wrote {CHECKPOINTS / name}.pt in {time.time() - start:.0f} s")
