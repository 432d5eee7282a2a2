"""The command line of SCOUTER's training: every field of a ``Recipe`` is an option, presets have names, commas make a sweep.

python -m scanlib train scouter --preset mnist-base --out base.pt
python -m scanlib train scouter --preset mnist-positive --start base.pt --out positive.pt
python -m scanlib train scouter --preset signs-positive --lam 0,1,10 --slots 1,3 --out sweep.pt     # six runs and a table
torchrun --nproc-per-node 4 -m scanlib train scouter --preset cub200-base --out base.pt             # on four devices
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from scanlib.models.zoo import parse_weights
from scanlib.scouter.recipes import FROM_BASE, PRESETS, Recipe, expand_sweep, read_finished_metrics, train_recipe
from scanlib.training.distributed import is_main_process, process_group

SWEPT = ("lam", "power", "slots", "classes")
FIGURES = ("loss", "Accuracy", "Area", "OwnArea", "LogitRange")


def _several(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a field; what is not given comes from the preset, or from the recipe's defaults."""
    parser.add_argument("--preset", choices=PRESETS, help="a run of the paper's code, or one of those that ship")
    parser.add_argument("--out", required=True, type=Path, help="where the model goes; a killed run goes on from OUT.run")
    for entry in fields(Recipe):
        name, kind, about = f"--{entry.name.replace('_', '-')}", type(entry.default), entry.metadata["help"]
        text = f"{about} (default: {entry.default})"
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif entry.name in SWEPT:
            parser.add_argument(
                name,
                type=_several(int if entry.name in ("slots", "classes") else float),
                metavar=f"{entry.name.upper()}[,...]",
                help=f"{text}; several: a sweep",
            )
        else:
            parser.add_argument(name, type=str if entry.default is None else kind, help=text)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--device", help="cpu, cuda, mps; left out, cuda if there is one")


def parse_recipes(options: argparse.Namespace) -> list[Recipe]:
    """What the options ask for, one recipe a run."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(Recipe) if getattr(options, entry.name) is not None}
    swept = {name: given.pop(name) for name in SWEPT if name in given}
    if "weights" in given:
        given["weights"] = parse_weights(given["weights"])
    start = replace(PRESETS[options.preset] if options.preset else Recipe(), **given)
    if options.preset in FROM_BASE and not start.start:
        base = f"{options.preset.split('-')[0]}-base"
        raise ValueError(f"--preset {options.preset} starts from a base: train --preset {base} first, then give it as --start")
    return expand_sweep(start, **swept)


def train_command(options: argparse.Namespace) -> None:
    """Train each recipe that is not done already; of a sweep, write a table of what came of it beside the models, run by run."""
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; give the file to write, as {options.out / 'scouter.pt'}")
    runs = parse_recipes(options)
    several = [name for name in SWEPT if len({getattr(run, name) for run in runs}) > 1]
    table = [[*several, *FIGURES], ["---"] * (len(several) + len(FIGURES))]
    with process_group():
        for run in runs:
            tag = "".join(f"-{name}{getattr(run, name):g}" for name in several)
            out = options.out.with_name(f"{options.out.stem}{tag}{options.out.suffix}")
            figures = _trained(run, out, options, go_on=bool(several))
            row = [f"{figures[f'val_{name}']:.4f}" if f"val_{name}" in figures else "-" for name in FIGURES]
            table.append([f"{getattr(run, name):g}" for name in several] + row)
            if several and is_main_process():
                text = "\n".join(f"| {' | '.join(row)} |" for row in table)
                options.out.with_suffix(".md").write_text(f"{text}\n\nTest pictures, seed {run.seed}.\n", "utf-8")
        if several and is_main_process():
            print(text)


def _trained(run: Recipe, out: Path, options: argparse.Namespace, go_on: bool) -> dict[str, float]:
    """A run's last figures; those of one that died are none, where others follow."""
    found = read_finished_metrics(run, out)
    if found is None:
        try:
            _, history = train_recipe(run, out, options.device, options.workers)
        except FloatingPointError as error:
            if not go_on:
                raise
            print(f"{out}: {error}")
            return {}
        found = {name: values[-1] for name, values in history.items()}
    if is_main_process():
        print(f"{out}: {run.head} of {run.backbone} on {run.data}, accuracy {found['val_Accuracy']:.3f} on the test pictures")
    return found
