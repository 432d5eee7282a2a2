"""Train what ships in data/checkpoints, from nothing: the Signs classifiers, their SCAN decoders, and a SCOUTER of either sign.

python data/make_checkpoints.py                 # all, about 12 minutes on 2 CPU cores
python data/make_checkpoints.py signs_cnn       # one of them
"""

import sys
import time
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, Signs, SmallResNet, Trainer, build_small_vit, load_classifier
from scanlib.models import CHECKPOINTS, Normalize
from scanlib.scouter.recipes import PRESETS, save_trained, train_recipe
from scanlib.trainer import Accuracy, build_classifier_step
from scanlib.training import save_checkpoint


def in_memory(scenes: Signs) -> TensorDataset:
    """Draw every scene once."""
    images, labels = zip(*scenes, strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def train_classifier(name: str, model: nn.Module, scenes: int, epochs: int, learning_rate: float, mirror: bool = False) -> None:
    loader = DataLoader(in_memory(Signs(scenes)), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, epochs * len(loader))
    plain = build_classifier_step(model, Normalize())

    def step(batch, training):
        images, labels = batch
        if training and mirror:
            images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
        return plain((images, labels), training)

    trainer = Trainer(model, step, optimizer, scheduler, scheduler_interval="step", metrics=[Accuracy()])
    trainer.fit(loader, epochs)
    half = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    save_checkpoint(half, CHECKPOINTS / f"{name}.pt")


def train_signs_cnn() -> None:
    torch.manual_seed(0)
    train_classifier("signs_cnn", SmallResNet().to(memory_format=torch.channels_last), 3000, 8, 3e-3)


def train_signs_vit() -> None:
    torch.manual_seed(0)
    train_classifier("signs_vit", build_small_vit(), 10_000, 9, 1e-3, mirror=True)


def train_decoder(
    name: str, alpha: float, epochs: int, batch_size: int, learning_rate: float, percentiles, mask_by: str = "gradient", **decoder
) -> None:
    torch.manual_seed(0)
    target = load_classifier(name)
    loader = DataLoader(in_memory(Signs(3000)), batch_size=batch_size, shuffle=True)
    scanner = SCAN(target.model, target.layer, target.image_size, device="cpu", mask_by=mask_by)
    scanner.set_preprocess(target.preprocess).set_dataset(loader, use_augmentation=percentiles).generate_decoder(**decoder)
    schedule = {"max_lr": learning_rate, "total_steps": epochs * len(loader)}
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    scanner.compile(alpha, scheduler_class=one_cycle, scheduler_kwargs=schedule, scheduler_interval="step")
    scanner.fit(epochs)
    notes = {"model": name, "weights": "DEFAULT", "layer": target.layer}
    scanner.save_decoder(CHECKPOINTS / f"{name}_decoder.pt", half=True, notes=notes)


def train_scouter(head: str) -> None:
    path, recipe = CHECKPOINTS / f"signs_scouter_{head}.pt", PRESETS[f"signs-{head}"]
    model, history = train_recipe(recipe, path, "cpu")
    save_trained(model, recipe, Signs.classes, path, {name: values[-1] for name, values in history.items()}, half=True)


RECIPES = {
    "signs_cnn": train_signs_cnn,
    "signs_cnn_decoder": partial(
        train_decoder, "signs_cnn", 6.0, 4, 16, 8e-3, (70, 100)
    ),  # alpha 6: a map of 1/7; a sign covers a tenth
    "signs_vit": train_signs_vit,
    "signs_vit_decoder": partial(train_decoder, "signs_vit", 8.0, 6, 32, 5e-3, (90, 100), "relevance", is_Transformer=False),
    "signs_scouter_positive": partial(train_scouter, "positive"),
    "signs_scouter_negative": partial(train_scouter, "negative"),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"nothing makes {name!r}; take one of {', '.join(RECIPES)}")
        start = time.time()
        RECIPES[name]()
        print(f"made {CHECKPOINTS / name}.pt in {time.time() - start:.0f} s")
