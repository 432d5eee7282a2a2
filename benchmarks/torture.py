"""Try to make scanlib lose something: a map, a model, a file, a run. `make torture` writes benchmarks/FAULTS.md.

python benchmarks/torture.py [--only threads files] [--scale 0.1] [--seed 0]        # a part of it prints, and writes nothing

Each row tries one fault many times. It survives if the result is right, or if it is refused by an exception with a message of one
line. Everything else is lost: a wrong result without a word, a changed model, a torn file, a traceback. Lost cases are printed.
"""

import argparse
import contextlib
import copy
import errno
import gc
import io
import multiprocessing
import os
import pickle
import platform
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

import scanlib
from scanlib import SCAN, GradCAM, Signs, compare, load_classifier, load_scouter
from scanlib.cli import main as run_command
from scanlib.cli.shared import METHODS
from scanlib.explorer.view import STRIPS
from scanlib.explorer.widgets import Explorer
from scanlib.models import CHECKPOINTS
from scanlib.scouter.recipes import PRESETS, train_recipe
from scanlib.training.checkpoint import load_checkpoint, save_checkpoint

ATTENTION = ("AttentionRollout", "AttentionRelevance", "LeGrad")
REFUSALS = (ValueError, TypeError, OSError, RuntimeError)


@dataclass
class Row:
    """A fault, how often it was tried, and what was lost."""

    fault: str
    survived: int = 0
    lost: list[str] = field(default_factory=list)

    def check(self, is_right: bool, case: str) -> None:
        if is_right:
            self.survived += 1
        else:
            self.lost.append(case)

    def expect_refusal(self, action: Callable[[], object], case: str, kinds: tuple = (ValueError, TypeError, OSError)) -> None:
        """Count as survived if the action raises an exception with a message of one line."""
        try:
            action()
        except kinds as error:
            self.check(len(str(error)) > 0 and "\n" not in str(error), f"{case}: {str(error)[:200]!r}")
        except BaseException as error:
            self.check(False, f"{case}: {type(error).__name__}: {str(error)[:200]}")
        else:
            self.check(False, f"{case}: not refused")


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def build_model(name: str, seed: int = 0) -> nn.Module:
    """Build the small model that an explainer can explain."""
    torch.manual_seed(seed)
    if name not in ATTENTION:
        return SmallCNN()
    vit = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, dropout=0.1, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)
    return vit


def build_explainer(name: str, model: nn.Module, prefix: str = ""):
    return getattr(scanlib, name)(model, *(() if name in (*ATTENTION, "FullGrad") else (f"{prefix}layer2",)))


def is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).abs().max()) <= 1e-3 * max(float(b.abs().max()), 1e-6)


def describe_state(model: nn.Module) -> tuple:
    """Return what an explanation must leave as it was."""
    modules = list(model.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks) for module in modules)
    own = sum("forward" in vars(module) for module in modules)
    return [module.training for module in modules], hooks, own, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


# --- runs that are killed ---


def train_decoder(folder: Path, cache: bool) -> None:
    model = build_model("GradCAM").eval()
    images = 255 * torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(images, torch.arange(48) % 5), 8, shuffle=True)
    torch.manual_seed(2)
    scanner = SCAN(model, "layer2", (32, 32), device="cpu").set_preprocess(lambda images: images / 255)
    scanner.set_dataset(loader).generate_decoder(ch_per_lv=(8, 8, 8, 8)).compile()
    scanner.trainer.save_every = 0.0  # after each step
    scanner.fit(4, verbose=False, checkpoint=folder / "run", cache=cache)
    scanner.save_decoder(folder / "out.pt")


def train_scouter(folder: Path, cache: bool) -> None:
    recipe = replace(PRESETS["signs-positive"], scenes=64, batch_size=16, epochs=2, freeze=3 if cache else 2)
    train_recipe(recipe, folder / "out.pt", "cpu", verbose=False)


def run_process(target: Callable, folder: Path, cache: bool, kill_after: float | None = None) -> float:
    """Run a training in a process of its own, kill it after some seconds, and return how long it ran."""
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    process = context.Process(target=target, args=(folder, cache))
    start = time.perf_counter()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return time.perf_counter() - start


def read_weights(path: Path) -> Tensor:
    return torch.cat([value.double().flatten() for value in load_checkpoint(path)["state_dict"].values()])


def torture_kills(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Kill training, caching and saving with SIGKILL; the restarted run must end with the weights of an uninterrupted one."""
    rows = []
    for name, train in (("decoder", train_decoder), ("SCOUTER", train_scouter)):
        row = Row(f"kill -9 during training, caching and saving of a {name}")
        for cache in (True, False):
            (whole := folder / f"{name}{cache}").mkdir()
            seconds = run_process(train, whole, cache)
            expected = read_weights(whole / "out.pt")
            for number in tqdm(range(max(1, round(10 * scale))), row.fault, leave=False):
                (run := folder / f"{name}{cache}{number}").mkdir()
                run_process(train, run, cache, draw.uniform(0, seconds))
                run_process(train, run, cache)
                case = f"seed {number}, cache {cache}"
                row.check((run / "out.pt").exists() and torch.equal(read_weights(run / "out.pt"), expected), case)
        rows.append(row)
    return rows


# --- files ---


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def torture_files(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Full disks, folders that cannot be written to, two writers, hostile and damaged files."""
    rows, decoder, scouter = [], CHECKPOINTS / "signs_cnn_decoder.pt", CHECKPOINTS / "signs_scouter_positive.pt"
    classifier = load_classifier("signs_cnn")
    scanner = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    readers = {
        "load_checkpoint": load_checkpoint,
        "load_decoder": scanner.load_decoder,
        "load_scouter": load_scouter,
        "load_classifier": lambda path: load_classifier("signs_cnn", path),
    }

    row, real_save = Row("full disk while a checkpoint is saved"), torch.save
    for number in range(max(1, round(20 * scale))):
        path = save_checkpoint({"number": number}, folder / "full" / f"{number}.pt")

        def fill_disk(content, file, number=number):
            file.write(b"x" * draw.randrange(10_000))
            raise OSError(errno.ENOSPC, "No space left on device")

        torch.save = fill_disk
        try:
            row.expect_refusal(lambda path=path: save_checkpoint({"number": -1}, path), f"{number}")
        finally:
            torch.save = real_save
        is_whole = load_checkpoint(path) == {"number": number} and not list(path.parent.glob(".*"))
        row.check(is_whole, f"{number}: the old file changed, or a part of the new one stayed")
    rows.append(row)

    row = Row("paths that cannot be written to")
    (folder / "file").touch()
    for path in (folder, folder / "file" / "c.pt", folder / "file" / "deep" / "c.pt", folder / "nul\0l.pt"):
        row.expect_refusal(lambda path=path: save_checkpoint({}, path), str(path))
    rows.append(row)

    row, path = Row("several threads write to one path and read it"), folder / "shared.pt"

    def write_and_read(value: int) -> None:
        for number in range(max(1, round(25 * scale))):
            save_checkpoint({"values": torch.full((30_000,), float(value))}, path)
            row.check(len(load_checkpoint(path)["values"].unique()) == 1, f"writer {value}, {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_read, range(4)))
    rows.append(row)

    row, marker = Row("hostile pickles"), folder / "marker"
    bombs = [Bomb(marker), {"state_dict": Bomb(marker)}, [Bomb(marker)], {Bomb(marker): 1}]
    valid = load_checkpoint(decoder)
    bombs += [valid | {name: Bomb(marker)} for name in valid] + [valid["state_dict"] | {"x": Bomb(marker)}]
    for number, bomb in enumerate(bombs):
        for way, save in (("torch", torch.save), ("pickle", lambda content, path: path.write_bytes(pickle.dumps(content)))):
            save(bomb, folder / "bomb.pt")
            for name, read in readers.items():
                row.expect_refusal(lambda read=read: read(folder / "bomb.pt"), f"{name}, bomb {number}, {way}")
                if marker.exists():
                    row.lost.append(f"{name}, bomb {number}, {way}: it ran")
                    marker.rmdir()
    rows.append(row)

    row = Row("truncated files and flipped bits")
    for number in range(max(2, round(100 * scale))):
        source, reader = ((decoder, scanner.load_decoder), (scouter, load_scouter))[number // 2 % 2]
        damaged = bytearray(source.read_bytes())
        if number % 2:
            del damaged[draw.randrange(len(damaged)) :]
        else:
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (folder / "damaged.pt").write_bytes(damaged)
        try:
            reader(folder / "damaged.pt")
        except ValueError as error:
            row.check("\n" not in str(error), f"{number}: {error}")
        except Exception as error:
            row.check(False, f"{number}: {type(error).__name__}: {error}")
        else:  # a bit that nothing reads
            row.check(torch.equal(read_weights(folder / "damaged.pt"), read_weights(source)), f"{number}: other weights")
    rows.append(row)
    return rows


# --- explainers ---


def torture_interrupts(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Raise KeyboardInterrupt or MemoryError at a random Python call of an explanation."""
    row = Row("Ctrl-C and exceptions inside every explainer")
    for name in tqdm(METHODS, row.fault, leave=False):
        model, x = build_model(name).train(), torch.rand(1, 3, 32, 32)
        explainer = build_explainer(name, model)
        expected, before, calls = explainer(x, 1), describe_state(model), 0

        def count(frame, event, argument):
            nonlocal calls
            calls += event == "call"

        sys.settrace(count)
        explainer(x, 1)
        sys.settrace(None)
        for number in range(max(1, round(20 * scale))):
            moment, kind, seen = draw.randrange(calls), (KeyboardInterrupt, MemoryError)[number % 2], 0

            def interrupt(frame, event, argument, moment=moment, kind=kind):
                nonlocal seen
                seen += event == "call"
                if event == "call" and seen > moment:
                    raise kind

            sys.settrace(interrupt)
            try:
                explainer(x, 1)
            except (KeyboardInterrupt, MemoryError):
                pass  # it is the fault that was injected
            finally:
                sys.settrace(None)
            row.check(describe_state(model) == before and is_close(explainer(x, 1), expected), f"{name}, call {moment}")
    return [row]


def torture_threads(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Eight threads explain two models by all methods, with plain inference beside them."""
    row, models = Row("8 threads, all explainers, plain inference beside them"), {}
    for name in ("GradCAM", "LeGrad"):
        models[name] = build_model(name).eval()
    images = [torch.rand(1, 3, 32, 32) * (i + 1) / 8 for i in range(8)]
    shared = {name: build_explainer(name, models["LeGrad" if name in ATTENTION else "GradCAM"]) for name in METHODS}
    expected = {name: [explainer(image, 1, normalize=False) for image in images] for name, explainer in shared.items()}
    with torch.no_grad():
        plain = {name: [model(image) for image in images] for name, model in models.items()}
    stop = threading.Event()

    def predict() -> None:
        while not stop.is_set():
            for name, model in models.items():
                for index, image in enumerate(images):
                    with torch.no_grad():
                        row.check(torch.allclose(model(image), plain[name][index], atol=1e-5), f"prediction of {name}, {index}")

    def explain(job: tuple[str, int, bool]) -> None:
        name, index, own = job
        explainer = build_explainer(name, shared[name].model) if own else shared[name]
        try:
            row.check(is_close(explainer(images[index], 1, normalize=False), expected[name][index]), f"{name}, image {index}")
        except Exception as error:
            row.check(False, f"{name}, image {index}: {type(error).__name__}: {error}")

    beside = threading.Thread(target=predict)
    beside.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            jobs = [(draw.choice(list(METHODS)), draw.randrange(8), draw.random() < 0.5) for _ in range(round(2000 * scale))]
            list(pool.map(explain, jobs))
    finally:
        stop.set()
        beside.join()
    return [row]


def torture_repetition(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Explain 10,000 times: the map, the hooks and the number of live tensors stay."""
    row, names = (
        Row("10,000 explanations: map, hooks and live tensors"),
        [name for name in METHODS if name not in ("SSCAM", "ISCAM")],
    )
    models = {name: build_model(name).eval() for name in names}
    explainers = {name: build_explainer(name, model) for name, model in models.items()}
    x = torch.rand(1, 3, 32, 32)
    expected = {name: explainer(x, 1) for name, explainer in explainers.items()}
    states = {name: describe_state(model) for name, model in models.items()}

    def count_tensors() -> int:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    before = count_tensors()
    for number in tqdm(range(round(10_000 * scale)), row.fault, leave=False):
        name = names[number % len(names)]
        row.check(is_close(explainers[name](x, 1), expected[name]), f"{name}, {number}")
    for name, model in models.items():
        row.check(describe_state(model) == states[name], f"{name}: the model changed")
    after = count_tensors()
    row.check(after <= before + 10, f"{before} tensors before, {after} after")
    return [row]


def torture_variants(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Pickled and copied explainers; compiled, scripted, quantised and parallel models."""
    row, x = Row("pickled, copied, compiled, scripted, quantised and parallel models"), torch.rand(2, 3, 32, 32)
    for name in tqdm(METHODS, row.fault, leave=False):
        model = build_model(name).eval()
        explainer = build_explainer(name, model)
        expected = explainer(x, 1)
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        variants: dict[str, Callable] = {
            "pickled": lambda explainer=explainer: pickle.loads(pickle.dumps(explainer)),
            "copied": lambda explainer=explainer: copy.deepcopy(explainer),
            "compiled": lambda name=name, model=model: build_explainer(name, torch.compile(model, backend="eager")),
            "parallel": lambda name=name, model=model: build_explainer(name, nn.DataParallel(model), "module."),
            "traced": lambda name=name, model=model: build_explainer(name, torch.jit.trace(model, x, check_trace=False)),
            "quantised": lambda name=name, model=quantised: build_explainer(name, model),
        }
        for variant, build in variants.items():
            try:
                maps = build()(x, 1)
            except (ValueError, TypeError) as error:
                may_refuse = variant in ("traced", "quantised")
                row.check(may_refuse and "\n" not in str(error), f"{name}, {variant}: {error}")
            except Exception as error:
                row.check(False, f"{name}, {variant}: {type(error).__name__}: {error}")
            else:
                is_right = is_close(maps, expected) if variant != "quantised" else bool(maps.isfinite().all())
                row.check(is_right and variant != "traced", f"{name}, {variant}: another map")
    return [row]


def torture_inputs(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Sixty arguments that no explanation can have."""
    row, model, x = Row("bad inputs"), build_model("GradCAM").eval(), torch.rand(2, 3, 32, 32)
    nan, cam = torch.full_like(x, torch.nan), GradCAM(model, "layer2")
    images = [x[0, 0], x[0, 0, 0], x[:, :2], x.movedim(1, -1)[0], nan, x / 0, x.numpy(), [x], None, "x", 3, x[0, :2], nan[0]]
    targets = [
        -1,
        5,
        99,
        1.5,
        "1",
        True,
        [1],
        [1, 2, 3],
        [[1, 2]],
        torch.rand(2),
        b"1",
        {1: 2},
        [lambda row: row[0]] * 3,
        object(),
    ]
    layers = ["", "layer9", 99, -99, 1.5, b"layer2", nn.ReLU(), [], ["layer2", "x"], True, {}]
    for number, wrong in enumerate(images):
        row.expect_refusal(lambda wrong=wrong: cam(wrong, 1), f"images {number}")
    for number, wrong in enumerate(targets):
        row.expect_refusal(lambda wrong=wrong: cam(x, wrong), f"target {number}")
    for number, wrong in enumerate(layers):
        row.expect_refusal(lambda wrong=wrong: GradCAM(model, wrong)(x, 1), f"layer {number}")
    for options in (
        {"fuse": "sum"},
        {"eigen_smooth": True, "differentiable": True},
        {"layout": "NCHW"},
        {"output": "x"},
        {"output": 7},
    ):
        row.expect_refusal(lambda options=options: GradCAM(model, "layer2", **options)(x, 1), f"{options}")
    for arguments in (
        (x[0], {"a": cam}),
        (x.numpy(), {"a": cam}),
        (x, [cam]),
        (x, {"a": GradCAM}),
        (x, {"random": cam}),
        (x[:0], {"a": cam}),
    ):
        row.expect_refusal(lambda arguments=arguments: compare(model, *arguments, progress=False), f"compare {arguments[1]}")
    for options in ({"steps": 0}, {"patch": 99}, {"metrics": ["x"]}, {"target": 9}, {"masks": x > 2}, {"batch_size": 0}):
        row.expect_refusal(lambda options=options: compare(model, x, {"a": cam}, progress=False, **options), f"compare {options}")
    for percentile in (-1, 101, None, "95", b"95", [], float("nan")):
        classifier = load_classifier("signs_cnn")
        scanner = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
        scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
        row.expect_refusal(
            lambda p=percentile, scanner=scanner: scanner(255 * torch.rand(3, 64, 64), 1, p), f"percentile {percentile!r}"
        )
    return [row]


def torture_commands(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Command lines that must exit with one line on stderr."""
    from PIL import Image

    row = Row("bad command lines")
    Image.fromarray(Signs(1)[0][0].permute(1, 2, 0).numpy().astype("uint8")).save(folder / "a.png")
    (folder / "text.png").write_text("no image"), (folder / "junk.pt").write_bytes(b"junk"), (folder / "empty").mkdir()
    a, decoder, scouter = folder / "a.png", CHECKPOINTS / "signs_cnn_decoder.pt", CHECKPOINTS / "signs_scouter_positive.pt"
    cam, out = "--model signs_cnn --method GradCAM", f"--out {folder / 'm.png'}"
    lines = [f"explain {image} {cam} {out}" for image in (folder / "none.png", folder / "text.png", folder, folder / "junk.pt")]
    lines += [
        f"explain {a} {rest} {out}"
        for rest in ("", "--model signs_cnn", f"--decoder {decoder} --model signs_cnn", "--model none")
    ]
    lines += [f"explain {a} {cam} --class {c} {out}" for c in ("99", "-1", "²", "nothing", "1.5")]
    lines += [f"explain {a} {cam} --out {path}" for path in (folder / "empty", folder / "x.docx", a / "x.png", ".")]
    lines += [f"explain {a} --decoder {path} {out}" for path in (folder / "junk.pt", folder / "none.pt", a, scouter, folder)]
    lines += [f"explain {a} --scouter {path} {out}" for path in (folder / "junk.pt", folder / "none.pt", decoder)]
    lines += [
        f"explain {a} --decoder {decoder} {rest} {out}"
        for rest in ("--percentile 101", "--layer layer3", "--weights none", "--evidence X")
    ]
    lines += [
        f"explain {a} {cam} {rest} {out}"
        for rest in ("--layer none", "--weights none.pt", f"--weights {decoder}", "--evidence GradCAM")
    ]
    lines += [f"compare {where} --model signs_cnn" for where in (folder / "none", folder / "empty", a)]
    lines += [
        f"compare signs --model signs_cnn --limit 2 {rest}"
        for rest in ("--limit 0", "--methods X", "--metrics X", "--out x.txt", "--patch 999")
    ]
    train = "train --model signs_cnn --count 8 --data signs"
    lines += [
        f"{train} --epochs 0 --out {folder / 't.pt'}",
        f"{train} --out {a / 't.pt'}",
        f"{train} --out {folder}",
        f"{train} --layer x --out {folder / 't.pt'}",
    ]
    lines += [
        f"train --model x --data signs --out {folder / 't.pt'}",
        f"train --model signs_cnn --data {folder / 'none'} --out {folder / 't.pt'}",
    ]
    lines += [
        f"train scouter --preset mnist-positive --out {folder / 't.pt'}",
        f"train scouter --data {folder / 'none'} --out {folder / 't.pt'}",
    ]
    for line in tqdm(lines, row.fault, leave=False):
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                run_command([part for part in line.split(" ") if part])
        except SystemExit as error:
            text = str(error.code)
            row.check(
                error.code not in (0, None) and "\n" not in text and "Traceback" not in printed.getvalue(),
                f"{line}: {text[:150]}",
            )
        except BaseException as error:
            row.check(False, f"{line}: {type(error).__name__}: {str(error)[:150]}")
        else:
            row.check(False, f"{line}: not refused")
    return [row]


def torture_explorer(scale: float, draw: random.Random, folder: Path) -> list[Row]:
    """Random changes of the explorer, a fifth of them wrong."""
    row, classifier = Row("500 moves of the explorer"), load_classifier("signs_cnn")
    images = torch.stack([image for image, _ in Signs(4)])
    scanner = SCAN(classifier.model, "layer4", (64, 64), device="cpu").set_preprocess(classifier.preprocess)
    scanner.load_decoder(CHECKPOINTS / "signs_cnn_decoder.pt")
    cams = {layer: GradCAM(classifier.model, layer, classifier.preprocess) for layer in ("layer4", "layer3")}
    explainers = {"SCAN": {"layer4": scanner.as_explainer()}, "Grad-CAM": cams}
    explorer = Explorer(classifier.model, images, explainers, preprocess=classifier.preprocess, save_to=folder)
    right = {
        "image": [0, 1, 2, 3],
        "layer": list(cams),
        "target": list(range(10)),
        "percentile": [0, 50.0, 95, 100],
        "opacity": [0, 0.5, 1],
        "shared": [True, False],
        "top": [0, 10, 100],
        "keep": [True, False],
        "strip": list(STRIPS),
        "methods": [("SCAN",), ("Grad-CAM",), ()],
    }
    wrong = {
        "image": [9, -1, "x", 0.5],
        "layer": ["x", 3],
        "target": [99, -1, "x"],
        "percentile": [101, "x"],
        "shared": ["x", 1],
        "strip": ["x"],
    }
    for number in tqdm(range(round(500 * scale)), row.fault, leave=False):
        before, is_wrong = explorer.view, draw.random() < 0.2
        name = draw.choice(list(wrong if is_wrong else right))
        value = draw.choice((wrong if is_wrong else right)[name])
        try:
            explorer.set(**{name: value})
        except ValueError:
            row.check(is_wrong and explorer.view == before, f"move {number}, {name} = {value!r}: refused")
            continue
        view = explorer.view
        shown = explorer.renderer.compute_map(view, "Grad-CAM")
        fresh = cams[view.layer](images[view.image : view.image + 1], view.target)[0]
        is_consistent = all(control.value == getattr(view, key) for key, control in explorer.controls.items())
        row.check(not is_wrong and is_close(shown, fresh) and is_consistent, f"move {number}, {name} = {value!r}")
    return [row]


GROUPS = {
    "kills": torture_kills,
    "files": torture_files,
    "interrupts": torture_interrupts,
    "threads": torture_threads,
    "repetition": torture_repetition,
    "variants": torture_variants,
    "inputs": torture_inputs,
    "commands": torture_commands,
    "explorer": torture_explorer,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tries")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked processes need it
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rows, start = [], time.time()
    for name in options.only:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            rows += GROUPS[name](options.scale, random.Random(options.seed), Path(folder))
    lines = [f"| {row.fault} | {row.survived + len(row.lost)} | {row.survived} | {len(row.lost)} |" for row in rows]
    minutes, machine = (
        (time.time() - start) / 60,
        f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}",
    )
    text = f"""# Faults

`make torture`, {time.strftime("%Y-%m-%d")}, {machine}, torch {torch.__version__}, seed {options.seed}, {minutes:.0f} minutes.

A case survives if the result is right, or if it is refused in one line. It is lost if a result is wrong without a word, a model
has changed, a file is torn, or a traceback appears.

| fault | tried | survived | lost |
|---|---|---|---|
""" + "\n".join(lines)
    print(text)
    for row in rows:
        for case in row.lost[:20]:
            print(f"lost: {row.fault}: {case}")
    if options.scale == 1 and len(options.only) == len(GROUPS):
        (Path(__file__).parent / "FAULTS.md").write_text(text + "\n", "utf-8", newline="\n")
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
