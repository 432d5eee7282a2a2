"""The command line: train a decoder or a SCOUTER, explain images, compare explainers.

python -m scanlib explain cat.jpg
python -m scanlib train --model squeezenet1_1 --layer features.12 --data photos --out decoder.pt
python -m scanlib train scouter --preset signs-negative --out negative.pt
python -m scanlib explain cat.jpg dog.jpg --decoder decoder.pt --percentile 95 --out map.png
python -m scanlib explain sign.png --scouter negative.pt
python -m scanlib explain cat.jpg --model resnet50 --method GradCAM
python -m scanlib compare photos --decoder decoder.pt --methods GradCAM LayerCAM ScoreCAM --out table.md
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from scanlib.cli import compare, explain, scouter, train


TRAIN = """Train SCAN's decoder for one layer of a classifier. The default masks by evidence for the class against all others; as
published is --mask-by gradient --score logit --percentiles 70 100. For SCOUTER: train scouter --help"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Errors in its arguments and files exit with a message of one line."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["train"] and arguments[1:2] not in (["decoder"], ["scouter"]):
        arguments.insert(1, "decoder")
    options = _build_parser().parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"scanlib {options.command}: {' '.join(str(error).split())}")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m scanlib", description="SCAN: see what a vision model saw.")
    commands = parser.add_subparsers(dest="command", required=True)
    kinds = commands.add_parser("train", help="train a decoder (default) or a SCOUTER").add_subparsers(required=True)
    for group, name, module, about in (
        (kinds, "decoder", train, TRAIN),
        (kinds, "scouter", scouter, "Train a SCOUTER, or the base classifier it starts from."),
        (commands, "explain", explain, "Draw maps, overlays and reconstructions."),
        (commands, "compare", compare, "Measure explainers and two baselines."),
    ):
        command = group.add_parser(name, help=about, description=about, formatter_class=_HelpFormatter)
        command.set_defaults(run=module.run)
        module.add_options(command)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or mps")
    return parser
