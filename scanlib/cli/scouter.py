"""The command ``train scouter``. Every field of a ``Recipe`` is an option; several values, separated by commas, are a sweep.

python -m scanlib train scouter --preset mnist-base --out base.pt
python -m scanlib train scouter --preset mnist-positive --start base.pt --out positive.pt
python -m scanlib train scouter --preset signs-positive --lam 0,1,10 --slots 1,3 --out sweep.pt     # six runs and a table
torchrun --nproc-per-node 4 -m scanlib train scouter --preset cub200-base --out base.pt             # on four devices
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from scanlib.models.zoo import parse_weights
from scanlib.scouter.recipes import FROM_BASE, PRESETS, Recipe, expand_sweep, read_finished_metrics, train_recipe
from scanlib.training.checkpoint import check_writable
from scanlib.training.distributed import is_main_process, process_group

SWEEP_TYPES: dict[str, type] = {"lam": float, "power": float, "slots": int, "classes": int}
METRICS = ("loss", "Accuracy", "Area", "OwnArea", "LogitRange")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of ``Recipe``; its default is the preset's value, or else the field's."""
    parser.add_argument("--preset", choices=PRESETS, help="a run of the paper's code, or of a model that ships")
    parser.add_argument("--out", required=True, type=Path, help="file of the model; a killed run continues from OUT.run")
    for entry in fields(Recipe):
        default = "" if entry.default is None else f" (default: {entry.default})"
        settings: dict[str, Any] = {"help": f"{entry.metadata['help']}{default}"}
        if isinstance(entry.default, bool):
            settings["action"] = argparse.BooleanOptionalAction
        elif kind := SWEEP_TYPES.get(entry.name):
            settings["type"] = lambda text, kind=kind: [kind(part) for part in text.split(",")]
            settings["metavar"] = f"{entry.name.upper()}[,...]"
            settings["help"] += "; several values: a sweep"
        else:
            settings["type"] = str if entry.default is None else type(entry.default)
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **settings)
    parser.add_argument("--workers", type=int, default=0, help="number of processes that read images")


def parse_recipes(options: argparse.Namespace) -> list[Recipe]:
    """Return one recipe per run. Raises ValueError for a preset that needs ``--start`` and has none."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(Recipe) if getattr(options, entry.name) is not None}
    sweep = {name: given.pop(name) for name in SWEEP_TYPES if name in given}
    if "weights" in given:
        given["weights"] = parse_weights(given["weights"])
    recipe = replace(PRESETS[options.preset] if options.preset else Recipe(), **given)
    if options.preset in FROM_BASE and not recipe.start:
        base = f"{options.preset.split('-')[0]}-base"
        raise ValueError(f"--preset {options.preset} needs a base: train --preset {base} first, then pass it as --start")
    return expand_sweep(recipe, **sweep)


def run(options: argparse.Namespace) -> None:
    """Train each recipe that is not finished. After each run of a sweep, write the table of metrics next to the models."""
    if options.out.is_dir():
        raise ValueError(f"--out must be a file, got the folder {options.out}; give {options.out / 'scouter.pt'}")
    recipes = parse_recipes(options)
    check_writable(options.out)
    swept = [name for name in SWEEP_TYPES if len({getattr(recipe, name) for recipe in recipes}) > 1]
    table = [[*swept, *METRICS], ["---"] * (len(swept) + len(METRICS))]
    with process_group():
        for recipe in recipes:
            tag = "".join(f"-{name}{getattr(recipe, name):g}" for name in swept)
            out = options.out.with_name(f"{options.out.stem}{tag}{options.out.suffix}")
            metrics = _train(recipe, out, options, is_sweep=bool(swept))
            values = [f"{metrics[f'val_{name}']:.4f}" if f"val_{name}" in metrics else "-" for name in METRICS]
            table.append([*(f"{getattr(recipe, name):g}" for name in swept), *values])
            if swept and is_main_process():
                text = "\n".join(f"| {' | '.join(row)} |" for row in table)
                options.out.with_suffix(".md").write_text(f"{text}\n\nTest images, seed {recipe.seed}.\n", "utf-8")
        if swept and is_main_process():
            print(text)


def _train(recipe: Recipe, out: Path, options: argparse.Namespace, is_sweep: bool) -> dict[str, float]:
    """Return the last metrics of a run, trained or finished before; none if it fails in a sweep, which continues."""
    metrics = read_finished_metrics(recipe, out)
    if metrics is None:
        try:
            _, history = train_recipe(recipe, out, options.device, options.workers)
        except FloatingPointError as error:
            if not is_sweep:
                raise
            print(f"{out}: {error}")
            return {}
        metrics = {name: values[-1] for name, values in history.items()}
    if is_main_process():
        print(f"{out}: {recipe.head} of {recipe.backbone} on {recipe.data}, test accuracy {metrics['val_Accuracy']:.3f}")
    return metrics
