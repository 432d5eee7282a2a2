"""Train what ships in data/checkpoints, from nothing: the Signs classifier and its SCAN decoder.

python data/make_checkpoints.py                 # both, about 3 minutes on 2 CPU cores
python data/make_checkpoints.py signs_cnn       # one of them
"""

import sys
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from scanlib import SCAN, Signs, SmallResNet, Trainer, load_target
from scanlib.checkpoint import save_checkpoint
from scanlib.models import CHECKPOINTS, Normalize
from scanlib.trainer import Accuracy, classifier_step


def in_memory(scenes: Signs) -> TensorDataset:
    """Draw every scene once."""
    images, labels = zip(*scenes, strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def train_signs_cnn() -> None:
    torch.manual_seed(0)
    model, epochs = SmallResNet().to(memory_format=torch.channels_last), 8
    loader = DataLoader(in_memory(Signs(3000)), batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * len(loader))
    step = classifier_step(model, Normalize())
    trainer = Trainer(model, step, optimizer, scheduler, scheduler_interval="step", metrics=[Accuracy()])
    trainer.fit(loader, epochs)
    save_checkpoint(
        {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()},
        CHECKPOINTS / "signs_cnn.pt",
    )


def train_signs_cnn_decoder() -> None:
    torch.manual_seed(0)
    target, epochs = load_target("signs_cnn"), 4
    loader = DataLoader(in_memory(Signs(3000)), batch_size=16, shuffle=True)
    scanner = SCAN(target.model, target.layer, image_size=target.image_size, device="cpu").set_preprocess(target.preprocess)
    scanner.set_dataset(loader).generate_decoder()
    schedule = {"max_lr": 8e-3, "total_steps": epochs * len(loader)}
    # alpha 6: a map of 1/7 of the picture; a sign covers about a tenth
    scanner.compile(
        6.0, scheduler_class=torch.optim.lr_scheduler.OneCycleLR, scheduler_kwargs=schedule, scheduler_interval="step"
    )
    scanner.fit(epochs)
    scanner.save_decoder(
        CHECKPOINTS / "signs_cnn_decoder.pt", half=True, notes={"model": "signs_cnn", "weights": "DEFAULT", "layer": target.layer}
    )


RECIPES = {"signs_cnn": train_signs_cnn, "signs_cnn_decoder": train_signs_cnn_decoder}

if __name__ == "__main__":
    for name in sys.argv[1:] or RECIPES:
        if name not in RECIPES:
            raise SystemExit(f"nothing makes {name!r}; take one of {', '.join(RECIPES)}")
        start = time.time()
        RECIPES[name]()
        print(f"made {CHECKPOINTS / name}.pt in {time.time() - start:.0f} s")
