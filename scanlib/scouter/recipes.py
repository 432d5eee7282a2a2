"""Train a SCOUTER, or its base classifier, as a ``Recipe`` describes; the presets are the experiments of the paper.

scouter, history = train_recipe(PRESETS["mnist-positive"], "mnist.pt")    # data, backbone, loss, optimizer: all in the Recipe
scouter, history = train_recipe(replace(PRESETS["signs-positive"], lam=0), "no_area_term.pt")
maps = load_scouter("mnist.pt").as_explainer()(images, target=3)

The presets follow the commands of the released code (github.com/wbw520/scouter, README): AdamW at 1e-4, divided by 10 every 70
epochs; but without rescaling, as in the paper. Those for Signs start with bias=2, so that a dark background comes from the area
term and not from initialization.
"""

import itertools
import math
import numbers
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from scanlib.data import CUB200, MNIST, ConText, ImageNetSubset, PhotoFolder, Signs
from scanlib.models.backbones import build_classifier
from scanlib.scouter.model import BaseClassifier, Scouter
from scanlib.scouter.slot_attention import XSlotAttention
from scanlib.scouter.training import Area, AugmentedDataset, LogitRange, OwnArea, build_scouter_step
from scanlib.trainer import Accuracy, Trainer, build_classifier_step
from scanlib.training.checkpoint import check_writable, load_checkpoint, load_state, save_checkpoint
from scanlib.training.distributed import get_world_size, is_distributed, is_main_process, main_process_first, shard_loader
from scanlib.training.feature_cache import FeatureCache
from scanlib.training.randomness import isolated_rng

DATASETS: dict[str, Callable[..., Any]] = {"mnist": MNIST, "context": ConText, "cub200": CUB200, "imagenet": ImageNetSubset}
CACHE_BYTES = 2e9  # features of a frozen backbone are kept in memory up to this size
_LIMITS = {  # the largest values of a recipe; a file may name any
    "scenes": 10**8,
    "classes": 10**6,
    "epochs": 10**6,
    "batch_size": 10**6,
    "image_size": 2048,
    "freeze": 1000,
    "slots": 100,
    "channels": 4096,
}
HEAD_SIGNS = {"base": 0, "positive": 1, "negative": -1}


def _option(default, description: str):
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run. The fields are options of the command line and are stored in checkpoints.

    Values are converted to plain types. Raises ValueError for an unknown head or schedule and for counts below 1.
    """

    data: str = _option("signs", f"signs, {', '.join(DATASETS)}, or a folder with one folder per class")
    folder: str = _option("data/downloads", "folder of a published data set")
    scenes: int = _option(3000, "number of training images of signs")
    classes: int | None = _option(None, "use the first classes of a published data set only; default: as in the paper")
    backbone: str = _option("resnet18", "signs_cnn, a torchvision classifier, or a timm classifier such as resnest26d")
    weights: str | None = _option("DEFAULT", "of the backbone: DEFAULT, none, or the path of a state dict")
    start: str | None = _option(None, "checkpoint of a base classifier whose backbone to start from")
    layer: str | None = _option(None, "layer that the slots attend to; default: the last with a spatial extent")
    head: str = _option("positive", "base (a linear head), positive or negative")
    slots: int = _option(1, "slots per class")
    channels: int = _option(64, "channels of slots and values")
    key_layers: int = _option(1, "number of linear layers that compute the keys")
    iterations: int = _option(3, "number of attention steps")
    rescale: bool = _option(False, "rescale the rows of scores, as the released code does")
    bias: float = _option(0.0, "added to every score; above 0 the attention starts high everywhere")
    lam: float = _option(1.0, "weight of the area term in the loss")
    power: float = _option(2.0, "power of the area in the loss")
    freeze: int = _option(2, "number of backbone stages to freeze, with the stem; 0 freezes nothing")
    image_size: int = _option(260, "pixels per side")
    augment: bool = _option(True, "flip, rotate, shift and scale the training images")
    epochs: int = _option(20, "number of epochs")
    batch_size: int = _option(64, "images per step, of all processes together")
    learning_rate: float = _option(1e-4, "learning rate of AdamW")
    schedule: str = _option("step", "step (divide the learning rate by 10 every 70 epochs) or one-cycle")
    amp: bool = _option(False, "use bfloat16 autocast")
    seed: int = _option(0, "of weights, order and augmentation")

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not None:
                kind: Callable = int if entry.name == "classes" else str if entry.default is None else type(entry.default)
                object.__setattr__(self, entry.name, _convert(entry.name, value, kind))
        for name, known in (("head", tuple(HEAD_SIGNS)), ("schedule", ("step", "one-cycle"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {getattr(self, name)!r}")
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and value < (0 if name == "freeze" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'freeze' else 1}, got {value}")
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most}, got {value}")
        for name in ("bias", "lam", "power", "learning_rate"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")


def _convert(name: str, value: Any, kind: Callable) -> Any:
    """Convert a value to a plain type. Raises ValueError where that would change it."""
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = isinstance(value, bool) if kind is bool else isinstance(value, (str, Path)) if kind is str else is_number
    if isinstance(value, str) and kind in (int, float):
        fits = True
    try:
        converted = kind(value) if fits else None
    except (ValueError, OverflowError):  # text that is no number, or inf as an integer
        converted = None
    if converted is None or (kind is int and is_number and converted != value):
        raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
    return converted


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
# presets that start from the checkpoint of a base classifier
FROM_BASE = {"mnist-positive", "context-positive", "context-negative", "cub200-positive", "cub200-negative"}


def expand_sweep(recipe: Recipe, **values) -> list[Recipe]:
    """Return a recipe for every combination of values: expand_sweep(recipe, lam=[1, 10], slots=[1, 3]) returns four."""
    return [replace(recipe, **dict(zip(values, chosen, strict=True))) for chosen in itertools.product(*values.values())]


def load_datasets(recipe: Recipe) -> tuple[Dataset, Dataset, list[str]]:
    """Load training images, test images and class names. A folder of images is split 4 : 1, at random.

    Raises FileNotFoundError for missing data and ValueError for a folder with fewer than 5 images or images of no class.
    """
    if recipe.data not in DATASETS and recipe.classes is not None:
        raise ValueError(f"classes must be None for data {recipe.data!r}, got {recipe.classes}; it is for {', '.join(DATASETS)}")
    if recipe.data == "signs":
        size = recipe.image_size
        return _draw_scenes(recipe.scenes, size, 0), _draw_scenes(500, size, 1), list(Signs.classes)
    if recipe.data in DATASETS:
        options = {"size": recipe.image_size} | ({} if recipe.classes is None else {"classes": recipe.classes})
        train, test = (DATASETS[recipe.data](recipe.folder, is_train, **options) for is_train in (True, False))
        return train, test, train.classes
    if not Path(recipe.data).is_dir():
        raise FileNotFoundError(f"data must be a folder or one of signs, {', '.join(DATASETS)}, got {recipe.data!r}")
    images = PhotoFolder(recipe.data, recipe.image_size)
    for path, label in zip(images.files, images.labels, strict=True):
        if label < 0:
            raise ValueError(f"data must have every image in the folder of a class, got {path} in {recipe.data}")
    if len(images) < 5:
        raise ValueError(f"data must have at least 5 images, got {len(images)} in {recipe.data}; put each in its class's folder")
    train, test = torch.utils.data.random_split(images, [0.8, 0.2], torch.Generator().manual_seed(recipe.seed))
    return train, test, images.classes


@lru_cache(maxsize=2)
def _draw_scenes(count: int, size: int, seed: int) -> Dataset:
    """Return scenes of Signs, drawn once for all runs if they are small."""
    scenes = Signs(count, size, seed)
    return scenes if count * size**2 > 3e7 else TensorDataset(*default_collate([scenes[i] for i in range(count)]))


def build_model(recipe: Recipe, classes: list[str]) -> BaseClassifier | Scouter:
    """Build the model to train. Raises ValueError if ``recipe.start`` is not a base classifier of the same backbone."""
    if recipe.start and recipe.head != "base":
        base, base_recipe = load_model(recipe.start)
        if not isinstance(base, BaseClassifier) or base_recipe.backbone != recipe.backbone:
            found = f"{recipe.start}, a {base_recipe.head} {base_recipe.backbone}"
            raise ValueError(
                f"start must be a base {recipe.backbone}, got {found}; train one with head = base or change backbone"
            )
        backbone, preprocess = base.model.requires_grad_(True), base.preprocess  # this recipe chooses what is frozen
    else:
        classifier = build_classifier(recipe.backbone, len(classes), recipe.weights, recipe.image_size)
        backbone, preprocess = classifier.model, classifier.preprocess
    if recipe.head == "base":
        return BaseClassifier(backbone, recipe.freeze, preprocess, classes)
    names = ("layer", "channels", "slots", "key_layers", "iterations", "rescale", "bias", "freeze", "image_size")
    options = {name: getattr(recipe, name) for name in names}
    return Scouter(backbone, classes, sign=HEAD_SIGNS[recipe.head], preprocess=preprocess, **options)


def load_model(path: str | Path) -> tuple[BaseClassifier | Scouter, Recipe]:
    """Load a model that ``train_recipe`` saved, on the CPU and in eval mode, and its recipe.

    Raises FileNotFoundError, and ValueError for another kind of file.
    """
    saved = load_checkpoint(path, ("recipe", "classes", "state_dict"))
    classes = saved["classes"]
    try:
        recipe = Recipe(**{name: value for name, value in saved["recipe"].items() if name in Recipe.__dataclass_fields__})
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise TypeError("classes must be a list of names")
        _check_shapes(recipe, len(classes), saved["state_dict"])
        model = build_model(replace(recipe, weights=None, start=None), classes)
    except Exception as error:  # a file may hold anything
        reason = [line.strip() for line in str(error).splitlines() if not line.endswith(":")] or [type(error).__name__]
        raise ValueError(f"{path} must be the checkpoint of a Scouter or of its base classifier: {reason[0][:120]}") from error
    load_state(model, saved["state_dict"], path)
    return model.eval(), recipe


def _check_shapes(recipe: Recipe, classes: int, state: dict) -> None:
    """Raise ValueError unless the slots of the recipe have the shapes of the weights. It allocates nothing."""
    if recipe.key_layers > len(state) or recipe.iterations > 1000:
        raise ValueError(f"key_layers and iterations are out of range: {recipe.key_layers} and {recipe.iterations}")
    if recipe.head == "base":
        return
    with torch.device("meta"):
        options = {name: getattr(recipe, name) for name in ("slots", "iterations", "key_layers", "rescale", "bias")}
        slots = XSlotAttention(classes, recipe.channels, sign=HEAD_SIGNS[recipe.head], **options)
    prefix = "slot_attention."
    found = {name.removeprefix(prefix): value.shape for name, value in state.items() if name.startswith(prefix)}
    if found != {name: value.shape for name, value in slots.state_dict().items()}:
        raise ValueError("the slots of the recipe do not have the shapes of the weights")


def load_scouter(path: str | Path) -> Scouter:
    """Load a Scouter that ``train_recipe`` saved, on the CPU and in eval mode. Raises as ``load_model``, and for a base."""
    model, _ = load_model(path)
    if not isinstance(model, Scouter):
        raise ValueError(f"{path} is a base classifier without slots; train one with head = positive or negative, start = {path}")
    return model


def read_finished_metrics(recipe: Recipe, path: str | Path) -> dict[str, float] | None:
    """Read the last metrics of a finished run from its checkpoint. None if there is no file, or one of another recipe."""
    saved = load_checkpoint(path) if Path(path).is_file() else {}
    # a checkpoint from before a field was added has the field's default
    is_same = isinstance(saved, dict) and asdict(Recipe()) | saved.get("recipe", {}) == asdict(recipe)
    return saved.get("figures") if is_same else None


def train_recipe(
    recipe: Recipe, out: str | Path, device=None, workers: int = 0, verbose: bool = True
) -> tuple[BaseClassifier | Scouter, dict[str, list[float]]]:
    """Train the model of a recipe and save it to ``out``. An interrupted run continues from the checkpoint ``out``.run.

    Returns the model, in eval mode, and its history: loss, Accuracy, and for slots Area, OwnArea and LogitRange; those of the
    test images start with "val_". ``device`` None selects CUDA if available; ``workers`` processes read the images.

    Raises FileNotFoundError for missing data or weights, FloatingPointError if the slots no longer learn.
    """
    check_writable(out)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with isolated_rng():
        torch.manual_seed(recipe.seed)
        return _train(recipe, Path(out), device, workers, verbose)


def _train(
    recipe: Recipe, out: Path, device: torch.device, workers: int, verbose: bool
) -> tuple[BaseClassifier | Scouter, dict[str, list[float]]]:
    with main_process_first():
        train, test, classes = load_datasets(recipe)
        model = build_model(recipe, classes).to(device)
    use_features = isinstance(model, Scouter) and _can_cache_features(recipe, model, train, test)
    loaders: list[DataLoader | FeatureCache] = [*_build_loaders(recipe, train, test, workers, use_features)]
    metrics: list = [Accuracy()]
    if isinstance(model, Scouter):
        if use_features:
            encode = partial(_encode_batch, model)
            loaders = [FeatureCache.build(loader, encode, recipe.seed, device, verbose) for loader in loaders]
        step = build_scouter_step(model, recipe.lam, recipe.power, device, use_features=use_features)
        metrics += [Area(), OwnArea(), LogitRange()]
    else:
        step = build_classifier_step(model, model.preprocess, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], recipe.learning_rate)
    scheduler: LRScheduler = StepLR(optimizer, 70 * len(loaders[0]))
    if recipe.schedule == "one-cycle":
        scheduler = OneCycleLR(optimizer, recipe.learning_rate, recipe.epochs * len(loaders[0]))
    checkpoint = Path(f"{out}.run")
    trainer = Trainer(
        model,
        step,
        optimizer,
        scheduler,
        scheduler_interval="step",
        metrics=metrics,
        device=device,
        checkpoint=checkpoint,
        config=asdict(recipe) | {"names": classes},
        seed=recipe.seed,
        amp=recipe.amp,
    )
    history = trainer.fit(loaders[0], recipe.epochs, loaders[1], verbose)
    if is_main_process():
        content = {"format": 1, "kind": "scouter", "recipe": asdict(recipe), "classes": classes, "state_dict": model.state_dict()}
        save_checkpoint(content | {"figures": {name: values[-1] for name, values in history.items()}}, out)
        checkpoint.unlink(missing_ok=True)
    return model.eval(), history


def _build_loaders(recipe: Recipe, train: Dataset, test: Dataset, workers: int, use_features: bool) -> list[DataLoader]:
    size, least = recipe.batch_size, 2 * get_world_size()  # batch norm needs two images per process
    if is_distributed() and size < least:
        raise ValueError(f"batch_size must be at least {least} for {get_world_size()} processes, got {size}")
    count = len(train)  # type: ignore[arg-type]
    drop_last = count > size and count % size < least and not use_features
    images = AugmentedDataset(train) if recipe.augment else train
    loader = DataLoader(images, size, shuffle=True, num_workers=workers, drop_last=drop_last)
    return [shard_loader(loader), shard_loader(DataLoader(test, size, num_workers=workers))]


def _can_cache_features(recipe: Recipe, scouter: Scouter, *datasets: Dataset) -> bool:
    """Return whether the backbone's features do not change between epochs and fit into ``CACHE_BYTES``."""
    if recipe.augment or is_distributed() or any(p.requires_grad for p in scouter.backbone.parameters()):
        return False
    features, _ = _encode_batch(scouter, (datasets[0][0][0][None], torch.zeros(1)))
    return features.nbytes * sum(len(dataset) for dataset in datasets) < CACHE_BYTES  # type: ignore[arg-type, misc]


@torch.no_grad()
def _encode_batch(scouter: Scouter, batch) -> tuple[Tensor, Tensor]:
    device = next(scouter.parameters()).device
    return scouter.eval().extract_features(scouter.preprocess(batch[0].to(device))), batch[1].to(device)
