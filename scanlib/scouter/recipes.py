"""Train a SCOUTER, or the classifier it starts from, from one description; the paper's runs have names.

scouter, history = train_recipe(PRESETS["mnist-positive"], "mnist.pt")    # data, backbone, slots, loss, optimizer: all in the Recipe
scouter, history = train_recipe(replace(PRESETS["signs-positive"], lam=0), "blind.pt")
scouter = load_scouter("mnist.pt")                                  # as it was built, with its weights; .explain(images, target)

Presets follow the commands of the released code (github.com/wbw520/scouter, README): AdamW 1e-4, a tenth of it every 70 epochs.
Rows are not rescaled, as in the paper; rescale=True does as the code did. The two for Signs begin with open slots (bias=2),
so that an empty background is the area term's doing, and not half there before training.
"""

import itertools
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from scanlib.data import PhotoFolder, Signs, published
from scanlib.models.backbones import build_classifier
from scanlib.models.freezing import FrozenStages
from scanlib.scouter.model import Scouter
from scanlib.scouter.training import Area, LogitRange, OwnArea, build_scouter_step
from scanlib.trainer import Accuracy, Trainer, build_classifier_step
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint
from scanlib.training.distributed import get_world_size, is_distributed, is_main_process, main_process_first, shard_loader
from scanlib.training.feature_cache import FeatureCache

DATASETS = {
    "mnist": published.MNIST,
    "context": published.ConText,
    "cub200": published.CUB200,
    "imagenet": published.ImageNetSubset,
}
CACHE_BYTES = 2e9  # a frozen backbone's features are kept when they need no more
HEAD_SIGNS = {"base": 0, "positive": 1, "negative": -1}
SCHEDULES = ("step", "one-cycle")


def _option(default, about: str):
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Recipe:
    """What a run is made of. Its fields are the command line's options, and what a checkpoint remembers."""

    data: str = _option("signs", f"signs, {', '.join(DATASETS)}, or a folder with one folder a class")
    folder: str = _option("data/downloads", "where a published data set lies")
    scenes: int = _option(3000, "of signs, to train on")
    classes: int | None = _option(None, "of a published data set, the first so many; left out, as many as it is known for")
    backbone: str = _option("resnet18", "signs_cnn, any torchvision classifier, or one of timm's, as resnest26d")
    weights: str | None = _option("DEFAULT", "the backbone's: a state dict's path, DEFAULT, or none")
    start: str | None = _option(None, "a base trained before, whose backbone is taken")
    layer: str | None = _option(None, "where the slots look; left out, the last with a spatial extent")
    head: str = _option("positive", "base (a linear head), positive or negative")
    slots: int = _option(1, "per class")
    channels: int = _option(64, "of slots and values")
    key_layers: int = _option(1, "linear layers that make keys")
    iterations: int = _option(3, "how often the slots look")
    rescale: bool = _option(False, "rescale rows of scores, as the released code does")
    bias: float = _option(0.0, "added to every score: above 0 the slots begin by looking at nearly everything")
    lam: float = _option(1.0, "weight of the area in the loss")
    power: float = _option(2.0, "of the area in the loss")
    freeze: int = _option(2, "stages of the backbone to freeze, the stem with them; 0 none")
    image_size: int = _option(260, "pixels a side")
    augment: bool = _option(True, "mirror, turn, shift and scale the training pictures")
    epochs: int = _option(20, "times through the data")
    batch_size: int = _option(64, "of all processes together")
    learning_rate: float = _option(1e-4, "of AdamW")
    schedule: str = _option("step", "step: a tenth every 70 epochs; one-cycle: up and down once")
    amp: bool = _option(False, "bfloat16 autocast")
    seed: int = _option(0, "of weights, order and augmentation")

    def __post_init__(self):
        for entry in fields(self):  # plain values, whatever they come as: a checkpoint holds nothing else
            value = getattr(self, entry.name)
            if value is not None:
                kind = int if entry.name == "classes" else str if entry.default is None else type(entry.default)
                object.__setattr__(self, entry.name, kind(value))
        for name, known in (("head", tuple(HEAD_SIGNS)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; take {' or '.join(known)}")
        for name in ("scenes", "classes", "epochs", "batch_size", "image_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is no count; give 1 or more")


_MNIST = Recipe(data="mnist", classes=10, augment=False, epochs=10)
_CONTEXT = Recipe(data="context", backbone="resnest26d", classes=30, batch_size=200, epochs=100, slots=3, key_layers=3)
_CUB = Recipe(data="cub200", backbone="resnest50d", classes=25, epochs=150, key_layers=3)
_IMAGENET = Recipe(data="imagenet", classes=10, backbone="resnest26d", batch_size=70, epochs=20, freeze=0, key_layers=3)
_SIGNS = Recipe(backbone="signs_cnn", layer="layer3", freeze=3, lam=10.0, power=1.0, image_size=64, augment=False, epochs=8)
_SIGNS = replace(_SIGNS, learning_rate=3e-3, schedule="one-cycle", bias=2.0)
PRESETS = {
    "imagenet-base": replace(_IMAGENET, head="base"),
    "imagenet-positive": _IMAGENET,
    "imagenet-negative": replace(_IMAGENET, head="negative"),
    "mnist-base": replace(_MNIST, head="base"),
    "mnist-positive": replace(_MNIST, power=1.0),
    "mnist-negative": replace(_MNIST, head="negative", slots=2, lam=1.5, freeze=3),
    "context-base": replace(_CONTEXT, head="base"),
    "context-positive": replace(_CONTEXT, lam=0.2),
    "context-negative": replace(_CONTEXT, head="negative"),
    "cub200-base": replace(_CUB, head="base"),
    "cub200-positive": replace(_CUB, slots=5, lam=10.0),
    "cub200-negative": replace(_CUB, head="negative", slots=3),
    "signs-positive": _SIGNS,
    "signs-negative": replace(_SIGNS, head="negative"),
}
FROM_BASE = {name for name in PRESETS if name.split("-")[0] in ("context", "cub200") and "base" not in name} | {"mnist-positive"}


def load_datasets(recipe: Recipe) -> tuple[Dataset, Dataset, list[str]]:
    """Training and test pictures, and the classes' names. A folder of pictures is split four to one by the seed."""
    if recipe.data not in DATASETS and recipe.classes is not None:
        raise ValueError(f"classes {recipe.classes} chooses from {', '.join(DATASETS)}; {recipe.data} is taken with all it has")
    if recipe.data == "signs":
        train, test = _drawn(recipe.scenes, recipe.image_size, 0), _drawn(500, recipe.image_size, 1)
        return train, test, list(Signs.classes)
    if recipe.data in DATASETS:
        chosen = {} if recipe.classes is None else {"classes": recipe.classes}
        made = [DATASETS[recipe.data](recipe.folder, train, recipe.image_size, **chosen) for train in (True, False)]
        return *made, made[0].classes
    if not Path(recipe.data).is_dir():
        raise FileNotFoundError(f"data {recipe.data!r} is no folder, and not one of signs, {', '.join(DATASETS)}")
    folder = PhotoFolder(recipe.data, recipe.image_size)
    stray = [path for path, label in zip(folder.files, folder.labels, strict=True) if label < 0]
    if stray or len(folder) < 5:
        raise ValueError(
            f"data {recipe.data}: {stray[0]} lies in no class's folder; put every picture into one"
            if stray
            else f"data {recipe.data} holds {len(folder)} pictures; give 5 or more, in one folder a class"
        )
    kept = len(folder) - len(folder) // 5
    train, test = torch.utils.data.random_split(folder, [kept, len(folder) - kept], torch.Generator().manual_seed(recipe.seed))
    return train, test, folder.classes


@lru_cache(maxsize=2)
def _drawn(count: int, size: int, seed: int) -> Dataset:
    """Scenes, drawn once for all runs where they are small."""
    scenes = Signs(count, size, seed)
    if count * size**2 > 3e7:
        return scenes
    images, labels = zip(*scenes, strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


class AugmentedDataset(Dataset):
    """Pictures mirrored, turned by up to 10 degrees, shifted and scaled by up to a tenth, anew each time."""

    def __init__(self, data: Dataset):
        from torchvision.transforms import v2

        self.data = data
        affine = v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=127)
        self.change = v2.Compose([v2.RandomHorizontalFlip(), affine])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index][:2]
        return self.change(image), label


def build_model(recipe: Recipe, classes: int) -> FrozenStages | Scouter:
    """The model to train: a classifier with a linear head, or a Scouter on its backbone. ``.preprocess`` comes with it."""
    if recipe.head == "base":
        base = build_classifier(recipe.backbone, classes, recipe.weights, recipe.image_size)
        model = FrozenStages(base.model, recipe.freeze)
        model.preprocess = base.preprocess
        return model
    if recipe.start:
        started, base = load_trained(recipe.start)
        if (base.head, base.backbone) != ("base", recipe.backbone):
            raise ValueError(
                f"start {recipe.start} is a {base.head} {base.backbone}, and a base {recipe.backbone} is wanted; "
                f"train one with head = base, or take another backbone"
            )
        backbone, preprocess = started.model.requires_grad_(True), started.preprocess  # what freezes now is this recipe's
    else:
        base = build_classifier(recipe.backbone, classes, recipe.weights, recipe.image_size)
        backbone, preprocess = base.model, base.preprocess
    names = ("layer", "channels", "slots", "key_layers", "iterations", "rescale", "bias", "freeze", "image_size")
    options = {name: getattr(recipe, name) for name in names}
    return Scouter(backbone, classes, sign=HEAD_SIGNS[recipe.head], preprocess=preprocess, **options)


def train_recipe(recipe: Recipe, out: str | Path, device=None, workers: int = 0, verbose: bool = True) -> tuple[nn.Module, dict]:
    """Train what the recipe says and save it to ``out``; a killed run goes on from ``out``.run. The model, in eval mode, and its
    history: loss, Accuracy, and of slots Area, OwnArea and LogitRange; of the test pictures with "val_" before it.

    Raises FileNotFoundError for data or weights that are not there, FloatingPointError when the slots die.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(recipe.seed)
    with main_process_first():
        data, test, names = load_datasets(recipe)
        model = build_model(recipe, len(names)).to(device)
    slots = recipe.head != "base"
    frozen = (
        slots and not recipe.augment and not is_distributed() and not any(p.requires_grad for p in model.backbone.parameters())
    )
    encoded = frozen and _fits(model, data, test)
    loaders = [shard_loader(loader) for loader in _loaders(recipe, data, test, workers, encoded)]
    if encoded:
        loaders = [FeatureCache.filled(loader, partial(_encoded, model), recipe.seed, device, verbose) for loader in loaders]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate)
    if recipe.schedule == "step":
        scheduler, interval = torch.optim.lr_scheduler.StepLR(optimizer, 70), "epoch"
    else:
        steps = recipe.epochs * len(loaders[0])
        scheduler, interval = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, steps), "step"
    if slots:
        step = build_scouter_step(model, recipe.lam, recipe.power, device, encoded=encoded)
    else:
        step = build_classifier_step(model, model.preprocess, device)
    run = Path(f"{out}.run")
    trainer = Trainer(
        model,
        step,
        optimizer,
        scheduler,
        scheduler_interval=interval,
        metrics=[Accuracy(), *([Area(), OwnArea(), LogitRange()] if slots else [])],
        device=device,
        checkpoint=run,
        config=asdict(recipe) | {"names": names},
        seed=recipe.seed,
        amp=recipe.amp,
    )
    history = trainer.fit(loaders[0], recipe.epochs, loaders[1], verbose)
    if is_main_process():
        save_trained(model, recipe, names, out, {name: values[-1] for name, values in history.items()})
        run.unlink(missing_ok=True)
    return model.eval(), history


def _loaders(recipe: Recipe, data: Dataset, test: Dataset, workers: int, encoded: bool) -> tuple[DataLoader, DataLoader]:
    size = recipe.batch_size
    if is_distributed() and size < 2 * get_world_size():
        raise ValueError(f"batch_size {size} is too small for {get_world_size()} processes; give {2 * get_world_size()} or more")
    lonely = len(data) % size < 2 * get_world_size() and not encoded  # what is left at the end is too little for a batch norm
    changed = AugmentedDataset(data) if recipe.augment else data
    train = DataLoader(changed, size, shuffle=True, num_workers=workers, drop_last=lonely and len(data) > size)
    return train, DataLoader(test, size, num_workers=workers)


@torch.no_grad()
def _encoded(scouter: Scouter, batch) -> tuple[Tensor, Tensor]:
    device = next(scouter.parameters()).device
    return scouter.eval().features(scouter.preprocess(batch[0].to(device))), batch[1].to(device)


def _fits(scouter: Scouter, *data: Dataset) -> bool:
    """May a frozen backbone's features be kept?"""
    features, _ = _encoded(scouter, (data[0][0][0][None], torch.zeros(1)))
    return features.nbytes * sum(map(len, data)) < CACHE_BYTES


def save_trained(
    model: nn.Module, recipe: Recipe, names: list[str], out: str | Path, figures: dict[str, float], half: bool = False
) -> Path:
    """The model's weights with the recipe that builds it, and the last figures of its training; ``half``: in half precision."""
    state = {key: value.half() if half and value.is_floating_point() else value for key, value in model.state_dict().items()}
    content = {"format": 1, "kind": "scouter", "recipe": asdict(recipe), "classes": list(names), "state_dict": state}
    content["figures"] = dict(figures)
    return save_checkpoint(content, out)


def load_trained(path: str | Path) -> tuple[nn.Module, Recipe]:
    """What ``train_recipe`` saved, in eval mode, a Scouter or a base classifier, with ``.preprocess`` and ``.classes``; and its recipe.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    saved = load_checkpoint(path, ("recipe", "classes", "state_dict"))
    known = {f.name for f in fields(Recipe)}
    try:
        recipe = Recipe(**{name: value for name, value in saved["recipe"].items() if name in known})
        model = build_model(replace(recipe, weights=None, start=None), len(saved["classes"]))
        model.load_state_dict(saved["state_dict"])
    except (TypeError, AttributeError, RuntimeError) as error:
        reason = [line.strip() for line in str(error).splitlines() if not line.endswith(":")] or [type(error).__name__]
        raise ValueError(f"{path} is no Scouter and no base: {reason[0][:120]}") from error
    model.classes = list(saved["classes"])
    return model.eval(), recipe


def read_finished_metrics(recipe: Recipe, path: str | Path) -> dict[str, float] | None:
    """The figures of a run that is done already: those of ``path`` when it holds this recipe, else None."""
    if not Path(path).is_file():
        return None
    saved = load_checkpoint(path)
    same = isinstance(saved, dict) and asdict(Recipe()) | saved.get("recipe", {}) == asdict(recipe)  # older ones lack new options
    return saved.get("figures") if same else None


def load_scouter(path: str | Path) -> Scouter:
    """A Scouter that ``train_recipe`` saved, in eval mode, on the CPU; ``.classes`` are the classes' names."""
    model, recipe = load_trained(path)
    if recipe.head == "base":
        raise ValueError(f"{path} is a base classifier without slots; train one with head = positive or negative, start = {path}")
    return model


def expand_sweep(recipe: Recipe, **values) -> list[Recipe]:
    """A recipe for every combination: expand_sweep(recipe, lam=[1, 10], slots=[1, 3]) -> four."""
    return [replace(recipe, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]
