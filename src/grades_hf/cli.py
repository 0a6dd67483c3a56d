"""The command `grades-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .inspect import inspect, parse_lora, pattern_or_names


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
    return parser


def _inspect(arguments: argparse.Namespace) -> str:
    return inspect(
        arguments.model,
        lora=None if arguments.lora is None else parse_lora(arguments.lora),
        target_modules=arguments.target_modules and pattern_or_names(arguments.target_modules),
        exclude_modules=arguments.exclude_modules and pattern_or_names(arguments.exclude_modules),
    )


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
