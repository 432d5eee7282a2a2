"""The command line: train a decoder or a SCOUTER, explain pictures, compare explainers.

python -m scanlib train --model squeezenet1_1 --layer features.12 --data photos --out decoder.pt
python -m scanlib train scouter --preset signs-negative --out negative.pt
python -m scanlib explain cat.jpg dog.jpg --decoder decoder.pt --percentile 95 --out map.png
python -m scanlib explain sign.png --scouter negative.pt
python -m scanlib explain cat.jpg --model resnet50 --method GradCAM
python -m scanlib compare photos --decoder decoder.pt --methods GradCAM LayerCAM ScoreCAM --out table.md
"""

import argparse
import sys

from scanlib.cli import compare as cli_compare, explain as cli_explain, scouter as cli_scouter, train as cli_train


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a bad argument or file ends it with one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"] and arguments[1:2] not in (["decoder"], ["scouter"]):
        arguments.insert(1, "decoder")
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"scanlib {options.name}: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m scanlib", description="SCAN: see what a vision model saw.")
    commands = parser.add_subparsers(dest="name", required=True)

    kinds = commands.add_parser("train", help="train a decoder (the default), or a SCOUTER").add_subparsers(required=True)
    scouter = kinds.add_parser("scouter", help="train a SCOUTER, or the base it starts from")
    scouter.set_defaults(command=cli_scouter.train_command)
    cli_scouter.add_options(scouter)
    decoder = kinds.add_parser(
        "decoder",
        help="train SCAN's decoder for one layer of a classifier",
        epilog="`train scouter --help` for SCOUTER",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    decoder.set_defaults(command=cli_train.train_command)
    cli_train.add_options(decoder)

    explain = commands.add_parser(
        "explain", help="draw map, overlay and reconstruction", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    explain.set_defaults(command=cli_explain.explain_command)
    cli_explain.add_options(explain)

    compare = commands.add_parser(
        "compare", help="measure explainers and both baselines", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    compare.set_defaults(command=cli_compare.compare_command)
    cli_compare.add_options(compare)
    return parser
