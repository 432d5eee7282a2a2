import struct
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image

import scanlib.scouter.recipes as recipes
from scanlib import Signs
from scanlib.cli import main
from scanlib.metrics.localisation import compute_energy_inside
from scanlib.models.zoo import CHECKPOINTS
from scanlib.scouter.model import Scouter
from scanlib.scouter.recipes import (
    FROM_BASE,
    PRESETS,
    AugmentedDataset,
    Recipe,
    build_model,
    expand_sweep,
    load_model,
    load_scouter,
    read_finished_metrics,
    train_recipe,
)
from scanlib.training.checkpoint import save_checkpoint

DIGITS = [str(digit) for digit in range(10)]
SMALL = {"image_size": 64, "batch_size": 16, "epochs": 1, "weights": None}


def write_image(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_idx(path, array):
    """Write the file format of MNIST."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.numpy().tobytes())


@pytest.fixture(scope="module")
def data_folders(tmp_path_factory):
    """Write each data set in its layout, with a few images per class."""
    root = tmp_path_factory.mktemp("data")
    for name, count in (("train", 20), ("t10k", 10)):
        digits = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
        write_idx(root / f"mnist/MNIST/raw/{name}-images-idx3-ubyte", digits)
        write_idx(root / f"mnist/MNIST/raw/{name}-labels-idx1-ubyte", torch.arange(count).remainder(10).byte())
    for label in range(10):
        for number in range(2):
            write_image(root / f"imagenet/train/n{label:08}/{number}.JPEG", number)
        write_image(root / f"imagenet/val/n{label:08}/0.JPEG", label)
    for label in range(30):
        for number in range(3):
            write_image(root / f"context/JPEGImages/class{label:02}/{number}.jpg", number)
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    for number in range(1, 51):
        label = (number + 1) // 2
        name = f"{label:03}.Bird/{number}.jpg"
        write_image(root / "cub200/images" / name, number)
        for entry, value in zip(lists, (name, label, number % 2, "4.0 4.0 20.0 20.0"), strict=True):
            lists[entry].append(f"{number} {value}")
    lists["classes"] = [f"{label} {label:03}.Bird" for label in range(1, 26)]
    for entry, lines in lists.items():
        (root / "cub200" / f"{entry}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("signs")])
def test_preset_trains_on_its_data_set(name, data_folders, tmp_path):
    recipe = replace(PRESETS[name], **SMALL, folder=str(data_folders / PRESETS[name].data))
    if recipe.backbone.startswith("resnest"):
        pytest.importorskip("timm")
    out = tmp_path / "model.pt"
    model, history = train_recipe(recipe, out, "cpu", verbose=False)
    again, saved = load_model(out)
    assert saved == recipe and len(again.classes) == recipe.classes
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not (tmp_path / "model.pt.run").exists() and len(history["val_loss"]) == 1
    if "base" not in name:
        assert isinstance(again, Scouter) and again.sign == (1 if recipe.head == "positive" else -1)
        assert 0 < history["val_Area"][0] < 1 and history["val_LogitRange"][0] >= 0


def test_presets_equal_released_code():
    """The expected values are those of the commands in its README."""
    names = ("backbone", "classes", "batch_size", "epochs", "slots", "power", "key_layers", "lam", "freeze")

    def row(preset):
        return [getattr(PRESETS[preset], name) for name in names]

    assert row("imagenet-positive") == row("imagenet-negative") == ["resnest26d", 10, 70, 20, 1, 2, 3, 1, 0]
    assert row("mnist-positive") == ["resnet18", 10, 64, 10, 1, 1, 1, 1, 2]
    assert row("mnist-negative") == ["resnet18", 10, 64, 10, 2, 2, 1, 1.5, 3]
    assert row("context-positive") == ["resnest26d", 30, 200, 100, 3, 2, 3, 0.2, 2]
    assert row("context-negative") == ["resnest26d", 30, 200, 100, 3, 2, 3, 1, 2]
    assert row("cub200-positive") == ["resnest50d", 25, 64, 150, 5, 2, 3, 10, 2]
    assert row("cub200-negative") == ["resnest50d", 25, 64, 150, 3, 2, 3, 1, 2]
    assert {"mnist-positive", "context-positive", "context-negative", "cub200-positive", "cub200-negative"} == FROM_BASE


def test_scouter_starts_from_its_base(data_folders, tmp_path):
    common = {**SMALL, "data": "mnist", "folder": str(data_folders / "mnist"), "augment": False, "freeze": 4}
    base, _ = train_recipe(Recipe(head="base", **common | {"freeze": 1}), tmp_path / "base.pt", "cpu", verbose=False)
    scouter, _ = train_recipe(Recipe(start=tmp_path / "base.pt", **common), tmp_path / "s.pt", "cpu", verbose=False)
    kept = scouter.backbone.model.state_dict()  # all four stages are frozen, so they are equal to the base's
    assert all(torch.equal(value, base.model.state_dict()[name]) for name, value in kept.items())
    torch.manual_seed(0)
    fresh = build_model(Recipe(**common), DIGITS).backbone.model.state_dict()
    assert not torch.equal(fresh["layer4.1.conv2.weight"], kept["layer4.1.conv2.weight"])
    trainable = build_model(Recipe(start=tmp_path / "base.pt", **common | {"freeze": 0}), DIGITS)
    assert all(parameter.requires_grad for parameter in trainable.parameters())  # although the base froze one stage
    with pytest.raises(ValueError, match="start must be a base resnet34, got .*base.pt, a base resnet18"):
        train_recipe(Recipe(start=str(tmp_path / "base.pt"), **common | {"backbone": "resnet34"}), tmp_path / "x.pt", "cpu")
    with pytest.raises(ValueError, match="base classifier without slots"):
        load_scouter(tmp_path / "base.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint of another kind"):
        load_scouter(tmp_path / "other.pt")


def test_cached_features_give_the_same_model(tmp_path, monkeypatch):
    recipe = replace(PRESETS["signs-positive"], scenes=60, epochs=2, batch_size=16)
    caches, real = [], recipes.FeatureCache.build
    monkeypatch.setattr(recipes.FeatureCache, "build", lambda *args: caches.append(1) or real(*args))
    _, history = train_recipe(recipe, tmp_path / "a.pt", "cpu", verbose=False)
    assert len(caches) == 2
    monkeypatch.setattr(recipes, "CACHE_BYTES", 0)
    plain, other = train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert len(caches) == 2
    untouched = load_model(tmp_path / "a.pt")[0].backbone.state_dict()
    assert all(torch.equal(value, plain.backbone.state_dict()[name]) for name, value in untouched.items())
    assert history["val_loss"] == pytest.approx(other["val_loss"], rel=0.1)  # the order of the images differs


def test_interrupted_run_continues(tmp_path, monkeypatch):
    recipe = replace(PRESETS["signs-negative"], scenes=60, epochs=2)
    whole, history = train_recipe(recipe, tmp_path / "a.pt", "cpu", verbose=False)
    real, epochs = recipes.Trainer._finish_epoch, []

    def interrupt(self, results):
        real(self, results)
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes.Trainer, "_finish_epoch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert (tmp_path / "b.pt.run").exists() and not (tmp_path / "b.pt").exists()
    resumed, again = train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_last_batch_of_one_image_is_dropped(tmp_path):
    # batches of 16, 16 and 1: ResNeSt's batch norms of pooled features need two images
    pytest.importorskip("timm")
    recipe = Recipe(**SMALL, backbone="resnest26d", freeze=0, scenes=33)
    assert len(train_recipe(recipe, tmp_path / "m.pt", "cpu", verbose=False)[1]["loss"]) == 1


def test_augmented_images_differ_each_time_and_repeat_by_seed():
    data = AugmentedDataset([(torch.rand(3, 16, 16) * 255, 4)])
    torch.manual_seed(0)
    first, second = data[0], data[0]
    torch.manual_seed(0)
    assert torch.equal(first[0], data[0][0]) and not torch.equal(first[0], second[0]) and first[1] == 4
    assert first[0].min() >= 0 and first[0].max() <= 255


def test_folder_of_images(tmp_path):
    for label in "ab":
        for number in range(5):
            write_image(tmp_path / "photos" / label / f"{number}.png", number)
    recipe = Recipe(**SMALL, data=str(tmp_path / "photos"))
    train_recipe(recipe, tmp_path / "m.pt", "cpu", verbose=False)
    assert load_scouter(tmp_path / "m.pt").classes == ["a", "b"]
    assert list(map(len, recipes.load_datasets(recipe)[:2])) == [8, 2]
    write_image(tmp_path / "photos" / "stray.png", 1)
    with pytest.raises(ValueError, match=r"data must have every image in the folder of a class, got .*stray.png"):
        recipes.load_datasets(recipe)
    for number in range(2):
        write_image(tmp_path / "few" / "a" / f"{number}.png", number)
    with pytest.raises(ValueError, match="data must have at least 5 images, got 2"):
        recipes.load_datasets(replace(recipe, data=str(tmp_path / "few")))
    with pytest.raises(FileNotFoundError, match="data must be a folder or one of signs, mnist.*, got 'minst'"):
        recipes.load_datasets(replace(recipe, data="minst"))
    with pytest.raises(ValueError, match="classes must be None for data .* got 5; it is for mnist"):
        recipes.load_datasets(replace(recipe, classes=5))


def test_expand_sweep_returns_all_combinations():
    assert [(r.lam, r.slots) for r in expand_sweep(Recipe(), lam=[1, 10], slots=[1, 3])] == [(1, 1), (1, 3), (10, 1), (10, 3)]
    assert expand_sweep(Recipe()) == [Recipe()]


def test_recipe_converts_to_plain_values(tmp_path):
    recipe = Recipe(folder=tmp_path, start=tmp_path / "b.pt", lam=np.float64(2), slots=np.int64(3), classes=np.int64(4))
    kinds = [type(getattr(recipe, name)) for name in ("folder", "start", "lam", "slots", "classes")]
    assert kinds == [str, str, float, int, int]


def test_bad_recipes_raise():
    for options, message in (
        ({"head": "both"}, "head must be base or positive or negative, got 'both'"),
        ({"schedule": "cosine"}, "schedule must be step or one-cycle, got 'cosine'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": float("inf")}, "epochs must be int, got inf"),
        ({"epochs": 1.5}, "epochs must be int, got 1.5"),
        ({"image_size": 12_000}, "image_size must be at most 2048, got 12000"),
        ({"rescale": "no"}, "rescale must be bool, got 'no'"),
        ({"lam": float("nan")}, "lam must be finite, got nan"),
        ({"slots": torch.zeros(3)}, "slots must be int, got tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**options)
    assert Recipe(rescale="False").rescale is False and Recipe(rescale="true").rescale is True


@pytest.mark.parametrize(
    "change",
    [
        *({"key_layers": 10**9}, {"iterations": 10**9}, {"image_size": 12_000}, {"slots": 7}, {"channels": 4096}, {"epochs": 0}),
        *({"epochs": float("inf")}, {"backbone": "vit_b_16"}, {"backbone": "nothing"}, {"head": torch.zeros(3)}, {"freeze": -1}),
    ],
)
def test_odd_recipes_in_a_file_raise_before_anything_is_built(change, tmp_path):
    saved = torch.load(CHECKPOINTS / "signs_scouter_positive.pt", weights_only=True)
    saved["recipe"] |= change
    torch.save(saved, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt must be the checkpoint of a Scouter or of its base classifier: ") as raised:
        load_scouter(tmp_path / "odd.pt")
    assert "\n" not in str(raised.value)


def test_odd_classes_in_a_file_raise(tmp_path):
    saved = torch.load(CHECKPOINTS / "signs_scouter_positive.pt", weights_only=True)
    for classes in ([], "abc", [1, 2], torch.zeros(3)):
        torch.save(saved | {"classes": classes}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match="odd.pt must be the checkpoint of a Scouter"):
            load_scouter(tmp_path / "odd.pt")


def test_training_leaves_the_global_random_state(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(())
    torch.manual_seed(7)
    recipe = replace(PRESETS["signs-positive"], scenes=16, epochs=1, backbone="signs_cnn")
    train_recipe(recipe, tmp_path / "s.pt", "cpu", verbose=False)
    assert torch.equal(torch.rand(()), expected)
    with pytest.raises(OSError, match="cannot be written"):
        train_recipe(recipe, tmp_path / "s.pt" / "inside.pt", "cpu", verbose=False)


# --- the command line ---


def test_finished_run_is_found_after_a_field_is_added(tmp_path):
    older = {name: value for name, value in asdict(Recipe()).items() if name != "bias"}
    save_checkpoint({"recipe": older, "figures": {"loss": 1.0}}, tmp_path / "old.pt")
    assert read_finished_metrics(Recipe(), tmp_path / "old.pt") == {"loss": 1.0}
    assert read_finished_metrics(Recipe(bias=2), tmp_path / "old.pt") is None


def test_train_and_explain_on_the_command_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.pt"
    main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,10 --slots 1,2 --seed 3 --out {out}".split())
    output = capsys.readouterr().out
    names = [f"s-lam{lam}-slots{slots}.pt" for lam in (0, 10) for slots in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(names)
    table = (tmp_path / "s.md").read_text("utf-8")
    assert table.splitlines()[0] == "| lam | slots | loss | Accuracy | Area | OwnArea | LogitRange |"
    assert "| 10 | 2 |" in table and "seed 3" in table and "| 10 | 2 |" in output
    _, recipe = load_model(tmp_path / names[3])
    assert (recipe.lam, recipe.slots, recipe.seed, recipe.head) == (10, 2, 3, "negative")

    def fail(*args):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:  # a finished run is not repeated; a run that fails does not end the sweep
        patched.setattr("scanlib.cli.scouter.train_recipe", fail)
        main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,10 --slots 1,2 --seed 3 --out {out}".split())
        assert (tmp_path / "s.md").read_text("utf-8") == table
        error = FloatingPointError("the slots no longer learn")
        patched.setattr("scanlib.cli.scouter.train_recipe", lambda *args: (_ for _ in ()).throw(error))
        main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,99 --slots 1 --seed 3 --out {out}".split())
    capsys.readouterr()

    write_image(tmp_path / "p.png", 0)
    for options, text in (
        ("", "area"),
        ("--class star", "star -"),
        ("--method GradCAM --layer backbone.model.layer3", "1 explained"),
    ):
        main(f"explain {tmp_path / 'p.png'} --scouter {tmp_path / names[3]} --out {tmp_path / 'map.png'} {options}".split())
        assert text in capsys.readouterr().out and Image.open(tmp_path / "map.png").size[0] > 300


def test_cam_of_the_base_on_the_command_line(data_folders, tmp_path, capsys):
    options = "--image-size 64 --batch-size 4 --epochs 1 --weights none"
    base = tmp_path / "base.pt"
    main(f"train scouter --preset mnist-base --folder {data_folders / 'mnist'} {options} --out {base}".split())
    write_image(tmp_path / "p.png", 0)
    main(f"explain {tmp_path / 'p.png'} --scouter {base} --method GradCAM --out {tmp_path / 'm.png'}".split())
    assert "1 explained" in capsys.readouterr().out
    main(f"explain {tmp_path / 'p.png'} --model signs_cnn --method LayerCAM --out {tmp_path / 'n.png'}".split())
    assert "1 explained" in capsys.readouterr().out
    for arguments, message in (
        (f"explain p.png --scouter {base}", "got the base"),
        (f"explain p.png --scouter {base} --model signs_cnn", "--decoder, --scouter or --model"),
        ("explain p.png --model signs_cnn --method GradCAM", "No such file or directory: 'p.png'"),
        ("explain p.png --model signs_cnn", "--model needs a --method"),
        ("explain p.png --model signs_cnn --method Gradcam", "--method must be among "),
        (f"train scouter --preset mnist-positive --out {tmp_path / 'x.pt'}", "train --preset mnist-base first"),
        (f"train scouter --out {tmp_path}", "--out must be a file, got the folder"),
        (f"train scouter --preset cub200-base --folder nowhere --weights none --out {tmp_path / 'x.pt'}", "nowhere"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments.split())
        assert message in str(raised.value) and "\n" not in str(raised.value)


# --- shipped checkpoints ---


@pytest.mark.parametrize("head", ["positive", "negative"])
def test_shipped_scouters_score_on_fresh_scenes(head):
    scouter = load_scouter(CHECKPOINTS / f"signs_scouter_{head}.pt")
    assert scouter.slot_attention.bias == PRESETS[f"signs-{head}"].bias == 2
    images, labels, masks = map(list, zip(*Signs(200, seed=7, masks=True), strict=True))
    images, labels, masks = torch.stack(images), torch.tensor(labels), torch.stack(masks)
    with torch.no_grad():
        logits, attention = scouter.attend(scouter.preprocess(images))
    assert (logits.argmax(1) == labels).float().mean() >= 0.97
    rows, lowest = torch.arange(200), logits.argmin(1)
    areas = attention.mean((2, 3, 4))
    target = labels if head == "positive" else lowest
    assert compute_energy_inside(scouter.as_explainer()(images, target), masks).mean() >= 0.7
    if head == "negative":
        assert areas[rows, labels].mean() < areas[rows, lowest].mean() / 3
