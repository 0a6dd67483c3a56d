"""The command `grades-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .history import History
from .inspect import inspect, parse_lora, pattern_or_names
from .suggest import BY, load_costs, suggest, to_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="grades-hf", description="Gradient-based early stopping of single matrices.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "inspect",
        help="what would be tracked of a model, and what not and why",
        description="Print what GradES would track of a model, by its configuration alone; no weight is loaded.",
    )
    command.add_argument("model", metavar="MODEL", help="hub id, local directory or config.json file")
    command.add_argument(
        "--lora",
        metavar="OPTIONS",
        help="put LoRA adapters on the model first: r=16,target_modules=all-linear (a list is joined by +), or JSON",
    )
    for option, meaning in (("--target-modules", "track these"), ("--exclude-modules", "leave these out")):
        command.add_argument(
            option,
            nargs="+",
            metavar="NAME",
            help=f"{meaning}: names or name endings, or one regular expression for the full name",
        )
    command.set_defaults(run=_inspect)

    command = commands.add_parser(
        "suggest",
        help="which tau would have given a recorded run a certain compute",
        description="Replay a run that froze nothing (recipes/finetune.py --observe) with thresholds, and print those "
        "with which it would have used a part of its compute, with the freezing map that they imply.",
    )
    command.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory with grades_history.json")
    command.add_argument(
        "--target-compute", type=float, required=True, metavar="PART", help="part of the run's compute, e.g. 0.7"
    )
    command.add_argument("--by", choices=BY, default="projection", help="what gets a tau each; default: projection")
    command.add_argument("--alpha", type=float, help="grace ratio; default: the run's")
    command.add_argument("--patience", type=int, help="checks below tau in a row; default: the run's")
    command.add_argument(
        "--freeze-prefix", action="store_true", default=None, help="as if freeze_prefix were on; default: the run's"
    )
    command.set_defaults(run=_suggest)
    return parser


def _inspect(arguments: argparse.Namespace) -> str:
    return inspect(
        arguments.model,
        lora=None if arguments.lora is None else parse_lora(arguments.lora),
        target_modules=arguments.target_modules and pattern_or_names(arguments.target_modules),
        exclude_modules=arguments.exclude_modules and pattern_or_names(arguments.exclude_modules),
    )


def _suggest(arguments: argparse.Namespace) -> str:
    try:
        history = History.load(arguments.run_dir)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"RUN_DIR={str(arguments.run_dir)!r} holds no record of a run: {error}") from error
    found = suggest(
        history,
        arguments.target_compute,
        costs=load_costs(arguments.run_dir),
        by=arguments.by,
        alpha=arguments.alpha,
        patience=arguments.patience,
        freeze_prefix=arguments.freeze_prefix,
    )
    return to_text(history, found, arguments.by)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends it with one line on stderr and exit status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        text = arguments.run(arguments)
    except ValueError as error:
        parser.exit(2, f"grades-hf {arguments.command}: error: {error}\n")
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
