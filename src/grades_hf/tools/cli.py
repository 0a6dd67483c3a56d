"""The command `grades-hf`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .history import History
from .inspect import inspect, parse_lora, pattern_or_names
from .report.page import load_runs, to_html, write_plots
from .report.status import show
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

    command = commands.add_parser(
        "status",
        help="how a run stands, in the terminal",
        description="Print what is frozen, what that has saved and how near the rest is to its thresholds.",
    )
    command.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="directory with grades_history.json")
    command.add_argument(
        "--follow", action="store_true", help="wait for the run, show it while it trains, and end with it"
    )
    command.set_defaults(run=_status)

    command = commands.add_parser(
        "report",
        help="one HTML page on a run, or on several compared",
        description="Write one HTML page that needs no network: what froze when, the statistic, how training went. "
        "With several runs also how they compare. Needs the extra `plots`.",
    )
    command.add_argument(
        "run_dirs",
        metavar="RUN_DIR",
        nargs="+",
        type=Path,
        help="directory with grades_history.json, or the --output of recipes/compare.py",
    )
    command.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    command.add_argument("--plots", metavar="DIR", type=Path, help="also write each plot to a file in DIR")
    command.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="of those files; default: svg")
    command.set_defaults(run=_report)
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


def _status(arguments: argparse.Namespace) -> str:
    show(arguments.run_dir, follow=arguments.follow)
    return ""


def _report(arguments: argparse.Namespace) -> str:
    runs = load_runs(arguments.run_dirs)
    try:
        arguments.output.write_text(to_html(runs), encoding="utf-8")
        files = [arguments.output]
        if arguments.plots is not None:
            files += write_plots(runs, arguments.plots, arguments.format)
    except ImportError as error:
        raise ValueError(str(error)) from error
    except OSError as error:
        raise ValueError(f"the report cannot be written: {error}") from error
    return "".join(f"{file}\n" for file in files)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends it with one line on stderr and exit status 2, Ctrl-C with status 130."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        text = arguments.run(arguments)
    except ValueError as error:
        parser.exit(2, f"grades-hf {arguments.command}: error: {error}\n")
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
