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
    load_scouter,
    load_trained,
    read_finished_metrics,
    train_recipe,
)
from scanlib.training.checkpoint import save_checkpoint

SMALL = {"image_size": 64, "batch_size": 16, "epochs": 1, "weights": None}


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def idx(path, array):
    """The format MNIST comes in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.numpy().tobytes())


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Each data set's layout, with a picture or two a class."""
    root = tmp_path_factory.mktemp("data")
    for name, count in (("train", 20), ("t10k", 10)):
        digits = torch.randint(0, 256, (count, 28, 28), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
        idx(root / f"mnist/MNIST/raw/{name}-images-idx3-ubyte", digits)
        idx(root / f"mnist/MNIST/raw/{name}-labels-idx1-ubyte", torch.arange(count).remainder(10).byte())
    for label in range(10):
        for number in range(2):
            picture(root / f"imagenet/train/n{label:08}/{number}.JPEG", number)
        picture(root / f"imagenet/val/n{label:08}/0.JPEG", label)
    for label in range(30):
        for number in range(3):
            picture(root / f"context/JPEGImages/class{label:02}/{number}.jpg", number)
    lists = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    for number in range(1, 51):
        label = (number + 1) // 2
        name = f"{label:03}.Bird/{number}.jpg"
        picture(root / "cub200/images" / name, number)
        for entry, value in zip(lists, (name, label, number % 2, "4.0 4.0 20.0 20.0"), strict=True):
            lists[entry].append(f"{number} {value}")
    lists["classes"] = [f"{label} {label:03}.Bird" for label in range(1, 26)]
    for entry, lines in lists.items():
        (root / "cub200" / f"{entry}.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("signs")])
def test_every_preset_trains_on_its_data_sets_layout(name, trees, tmp_path):
    recipe = replace(PRESETS[name], **SMALL, folder=str(trees / PRESETS[name].data))
    if recipe.backbone.startswith("resnest"):
        pytest.importorskip("timm")
    out = tmp_path / "made.pt"
    model, history = train_recipe(recipe, out, "cpu", verbose=False)
    again, saved = load_trained(out)
    assert saved == recipe and len(again.classes) == recipe.classes
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert not (tmp_path / "made.pt.run").exists() and len(history["val_loss"]) == 1
    if "base" not in name:
        assert isinstance(again, Scouter) and again.sign == (1 if recipe.head == "positive" else -1)
        assert 0 < history["val_Area"][0] < 1 and history["val_LogitRange"][0] >= 0


def test_the_table_of_the_released_code():
    """reference: the commands in its README."""
    row = lambda name: [getattr(PRESETS[name], f) for f in ("backbone", "classes", "batch_size", "epochs", "slots", "power", "key_layers", "lam", "freeze")]  # noqa: E731  # fmt: skip
    assert row("imagenet-positive") == row("imagenet-negative") == ["resnest26d", 10, 70, 20, 1, 2, 3, 1, 0]
    assert row("mnist-positive") == ["resnet18", 10, 64, 10, 1, 1, 1, 1, 2]
    assert row("mnist-negative") == ["resnet18", 10, 64, 10, 2, 2, 1, 1.5, 3]
    assert row("context-positive") == ["resnest26d", 30, 200, 100, 3, 2, 3, 0.2, 2]
    assert row("context-negative") == ["resnest26d", 30, 200, 100, 3, 2, 3, 1, 2]
    assert row("cub200-positive") == ["resnest50d", 25, 64, 150, 5, 2, 3, 10, 2]
    assert row("cub200-negative") == ["resnest50d", 25, 64, 150, 3, 2, 3, 1, 2]
    assert {"mnist-positive", "context-positive", "context-negative", "cub200-positive", "cub200-negative"} == FROM_BASE


def test_a_scouter_starts_from_its_base(trees, tmp_path):
    common = {**SMALL, "data": "mnist", "folder": str(trees / "mnist"), "augment": False, "freeze": 4}
    base, _ = train_recipe(Recipe(head="base", **common | {"freeze": 1}), tmp_path / "base.pt", "cpu", verbose=False)
    made, _ = train_recipe(Recipe(start=tmp_path / "base.pt", **common), tmp_path / "s.pt", "cpu", verbose=False)
    kept = made.backbone.model.state_dict()  # all four stages are frozen, so they are still the base's
    assert all(torch.equal(value, base.model.state_dict()[name]) for name, value in kept.items())
    torch.manual_seed(0)
    fresh = build_model(Recipe(**common), 10).backbone.model.state_dict()
    assert not torch.equal(fresh["layer4.1.conv2.weight"], kept["layer4.1.conv2.weight"])
    freed = build_model(Recipe(start=tmp_path / "base.pt", **common | {"freeze": 0}), 10)
    assert all(parameter.requires_grad for parameter in freed.parameters())  # what the base froze is its own business
    with pytest.raises(ValueError, match="is a base resnet18, and a base resnet34 is wanted"):
        train_recipe(Recipe(start=str(tmp_path / "base.pt"), **common | {"backbone": "resnet34"}), tmp_path / "x.pt", "cpu")
    with pytest.raises(ValueError, match="base classifier without slots"):
        load_scouter(tmp_path / "base.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint of another kind"):
        load_scouter(tmp_path / "other.pt")


def test_cached_features_change_nothing(tmp_path, monkeypatch):
    recipe = replace(PRESETS["signs-positive"], scenes=60, epochs=2, batch_size=16)
    filled, real = [], recipes.FeatureCache.filled
    monkeypatch.setattr(recipes.FeatureCache, "filled", lambda *args: filled.append(1) or real(*args))
    _, history = train_recipe(recipe, tmp_path / "a.pt", "cpu", verbose=False)
    assert len(filled) == 2
    monkeypatch.setattr(recipes, "CACHE_BYTES", 0)
    plain, other = train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert len(filled) == 2
    untouched = load_trained(tmp_path / "a.pt")[0].backbone.state_dict()
    assert all(torch.equal(value, plain.backbone.state_dict()[name]) for name, value in untouched.items())
    assert history["val_loss"] == pytest.approx(other["val_loss"], rel=0.1)  # the order of the pictures differs


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    recipe = replace(PRESETS["signs-negative"], scenes=60, epochs=2)
    whole, history = train_recipe(recipe, tmp_path / "a.pt", "cpu", verbose=False)
    real, seen = recipes.Trainer._finish_epoch, []

    def killed(self, validated):
        real(self, validated)
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes.Trainer, "_finish_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert (tmp_path / "b.pt.run").exists() and not (tmp_path / "b.pt").exists()
    resumed, again = train_recipe(recipe, tmp_path / "b.pt", "cpu", verbose=False)
    assert again == history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_a_last_batch_of_one_picture_is_left_out(tmp_path):
    # 16, 16 and 1: ResNeSt's batch norms of pooled features need two
    pytest.importorskip("timm")
    recipe = Recipe(**SMALL, backbone="resnest26d", freeze=0, scenes=33)
    assert len(train_recipe(recipe, tmp_path / "m.pt", "cpu", verbose=False)[1]["loss"]) == 1


def test_augmented_pictures_differ_each_time_and_by_seed():
    data = AugmentedDataset([(torch.rand(3, 16, 16) * 255, 4)])
    torch.manual_seed(0)
    first, second = data[0], data[0]
    torch.manual_seed(0)
    assert torch.equal(first[0], data[0][0]) and not torch.equal(first[0], second[0]) and first[1] == 4
    assert first[0].min() >= 0 and first[0].max() <= 255


def test_a_folder_of_pictures(tmp_path):
    for label in "ab":
        for number in range(5):
            picture(tmp_path / "photos" / label / f"{number}.png", number)
    recipe = Recipe(**SMALL, data=str(tmp_path / "photos"))
    train_recipe(recipe, tmp_path / "m.pt", "cpu", verbose=False)
    assert load_scouter(tmp_path / "m.pt").classes == ["a", "b"]
    assert list(map(len, recipes.load_datasets(recipe)[:2])) == [8, 2]
    picture(tmp_path / "photos" / "stray.png", 1)
    with pytest.raises(ValueError, match=r"stray.png lies in no class's folder"):
        recipes.load_datasets(recipe)
    for number in range(2):
        picture(tmp_path / "few" / "a" / f"{number}.png", number)
    with pytest.raises(ValueError, match="holds 2 pictures; give 5 or more"):
        recipes.load_datasets(replace(recipe, data=str(tmp_path / "few")))
    with pytest.raises(FileNotFoundError, match="data 'minst' is no folder, and not one of signs, mnist"):
        recipes.load_datasets(replace(recipe, data="minst"))
    with pytest.raises(ValueError, match="classes 5 chooses from mnist"):
        recipes.load_datasets(replace(recipe, classes=5))


def test_sweep():
    assert [(r.lam, r.slots) for r in expand_sweep(Recipe(), lam=[1, 10], slots=[1, 3])] == [(1, 1), (1, 3), (10, 1), (10, 3)]
    assert expand_sweep(Recipe()) == [Recipe()]


def test_a_recipe_holds_plain_values(tmp_path):
    recipe = Recipe(folder=tmp_path, start=tmp_path / "b.pt", lam=np.float64(2), slots=np.int64(3), classes=np.int64(4))
    kinds = [type(getattr(recipe, name)) for name in ("folder", "start", "lam", "slots", "classes")]
    assert kinds == [str, str, float, int, int]


def test_bad_recipes():
    for options, words in (
        ({"head": "both"}, "head 'both' is not known; take base or positive or negative"),
        ({"schedule": "cosine"}, "schedule 'cosine'"),
        ({"epochs": 0}, "epochs 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Recipe(**options)


# --- the command line ---


def test_what_is_done_stays_done_when_an_option_is_added(tmp_path):
    before = {name: value for name, value in asdict(Recipe()).items() if name != "bias"}
    save_checkpoint({"recipe": before, "figures": {"loss": 1.0}}, tmp_path / "old.pt")
    assert read_finished_metrics(Recipe(), tmp_path / "old.pt") == {"loss": 1.0}
    assert read_finished_metrics(Recipe(bias=2), tmp_path / "old.pt") is None


def test_train_and_explain_on_the_command_line(tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.pt"
    main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,10 --slots 1,2 --seed 3 --out {out}".split())
    said = capsys.readouterr().out
    names = [f"s-lam{lam}-slots{slots}.pt" for lam in (0, 10) for slots in (1, 2)]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(names)
    table = (tmp_path / "s.md").read_text("utf-8")
    assert table.splitlines()[0] == "| lam | slots | loss | Accuracy | Area | OwnArea | LogitRange |"
    assert "| 10 | 2 |" in table and "seed 3" in table and "| 10 | 2 |" in said
    _, recipe = load_trained(tmp_path / names[3])
    assert (recipe.lam, recipe.slots, recipe.seed, recipe.head) == (10, 2, 3, "negative")

    def never(*args):
        raise AssertionError("trained again")

    with monkeypatch.context() as patched:  # what is done is not done again; a run that dies does not end the sweep
        patched.setattr("scanlib.cli.scouter.train_recipe", never)
        main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,10 --slots 1,2 --seed 3 --out {out}".split())
        assert (tmp_path / "s.md").read_text("utf-8") == table
        dies = FloatingPointError("the slots died")
        patched.setattr("scanlib.cli.scouter.train_recipe", lambda *args: (_ for _ in ()).throw(dies))
        main(f"train scouter --preset signs-negative --epochs 1 --scenes 60 --lam 0,99 --slots 1 --seed 3 --out {out}".split())
    capsys.readouterr()

    picture(tmp_path / "p.png", 0)
    for options, words in (
        ("", "area"),
        ("--class star", "star -"),
        ("--method GradCAM --layer backbone.model.layer3", "1 explained"),
    ):
        main(f"explain {tmp_path / 'p.png'} --scouter {tmp_path / names[3]} --out {tmp_path / 'map.png'} {options}".split())
        assert words in capsys.readouterr().out and Image.open(tmp_path / "map.png").size[0] > 300


def test_a_cam_of_the_base(trees, tmp_path, capsys):
    options = "--image-size 64 --batch-size 4 --epochs 1 --weights none"
    base = tmp_path / "base.pt"
    main(f"train scouter --preset mnist-base --folder {trees / 'mnist'} {options} --out {base}".split())
    picture(tmp_path / "p.png", 0)
    main(f"explain {tmp_path / 'p.png'} --scouter {base} --method GradCAM --out {tmp_path / 'm.png'}".split())
    assert "1 explained" in capsys.readouterr().out
    main(f"explain {tmp_path / 'p.png'} --model signs_cnn --method LayerCAM --out {tmp_path / 'n.png'}".split())
    assert "1 explained" in capsys.readouterr().out
    for arguments, words in (
        (f"explain p.png --scouter {base}", "is a base without slots; give a --method"),
        ("explain p.png", "--decoder, --scouter or --model"),
        ("explain p.png --model signs_cnn", "--model: give a --method too"),
        ("explain p.png --model signs_cnn --method Gradcam", "--method Gradcam: not known; there are CAM"),
        (f"train scouter --preset mnist-positive --out {tmp_path / 'x.pt'}", "train --preset mnist-base first"),
        (f"train scouter --out {tmp_path}", "is a folder; give the file to write"),
        (f"train scouter --preset cub200-base --folder nowhere --weights none --out {tmp_path / 'x.pt'}", "nowhere"),
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments.split())
        assert words in str(raised.value) and "\n" not in str(raised.value)


# --- what ships ---


@pytest.mark.parametrize("head", ["positive", "negative"])
def test_shipped_scouters_score_on_fresh_scenes(head):
    scouter = load_scouter(CHECKPOINTS / f"signs_scouter_{head}.pt")
    assert scouter.slot_attention.bias == PRESETS[f"signs-{head}"].bias == 2
    images, labels, masks = map(list, zip(*Signs(200, seed=7, masks=True), strict=True))
    images, labels, masks = torch.stack(images), torch.tensor(labels), torch.stack(masks)
    with torch.no_grad():
        logits, attention = scouter.attend(scouter.preprocess(images))
    assert (logits.argmax(1) == labels).float().mean() >= 0.97
    each, lowest = torch.arange(200), logits.argmin(1)
    areas = attention.mean((2, 3, 4))
    shown = labels if head == "positive" else lowest
    assert compute_energy_inside(scouter.explain(images, shown), masks).mean() >= 0.7
    if head == "negative":
        assert areas[each, labels].mean() < areas[each, lowest].mean() / 3
