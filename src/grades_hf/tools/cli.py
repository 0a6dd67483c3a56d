"""The command `grades-hf`. Each command imports what it needs when it runs, so that help answers at once."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..config import helps
from ..report.summary import visible


class _Parser(argparse.ArgumentParser):
    """A parser that names the nearest option or command where one is misspelt."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # which sub-parsers are called with
        found, rest = super().parse_known_args(args, namespace)
        options = [option for action in self._actions for option in action.option_strings]
        for word in rest:
            if word.startswith("-"):
                self.error(f"unknown option {word}{_nearest(word.partition('=')[0], options)}")
        if rest:
            self.error(f"{' '.join(rest)} is too much")
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {visible(message)} ({self.prog} --help)\n")


def _nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean X?"`, or `"; there are X, Y and Z."` where nothing is near."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}."


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="grades-hf",
        description="Gradient-based early stopping of Hugging Face fine-tunes: look at models and recorded runs.",
    )
    parser.add_argument("--version", action="version", version=f"grades-hf {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    where: dict[str, Any] = {"metavar": "RUN_DIR", "type": Path, "help": "output directory of a run with GradES"}

    command = commands.add_parser(
        "status",
        help="how a run stands, in the terminal",
        description="Print how a run stands: what is frozen, or how many matrices vote and what the looks at held-out "
        "rows said.",
    )
    command.add_argument("run_dir", **where)
    command.add_argument("--follow", action="store_true", help="wait for the run, show it while it trains, end with it")
    command.set_defaults(run=_status)

    command = commands.add_parser(
        "report",
        help="one HTML page on a run, or on several side by side",
        description="Write one HTML page that needs no network: why the run ended, the statistic, how training went. "
        "With several runs also their losses in one chart; runs without GradES count if Trainer has left a "
        "trainer_state.json. Needs the extra `plots`.",
    )
    command.add_argument("run_dirs", **{**where, "nargs": "+"})
    command.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: report.html")
    command.add_argument("--plots", metavar="DIR", type=Path, help="also write each plot to a file in DIR")
    command.add_argument("--format", choices=("svg", "png", "pdf"), default="svg", help="of those files; default: svg")
    command.set_defaults(run=_report)

    command = commands.add_parser(
        "suggest",
        help="which tau would have given a recorded run a certain compute",
        description="Replay a run that froze nothing (record one with tau=1e-30) with thresholds, and print those with "
        "which it would have used a part of its compute, with the steps of freezing that they imply.",
    )
    command.add_argument("run_dir", **where)
    text = "part of the run's compute, e.g. 0.7"
    command.add_argument("--target-compute", type=float, required=True, metavar="PART", help=text)
    text, kinds = "what gets a tau each; default: %(default)s", ("all", "group", "projection")
    command.add_argument("--by", choices=kinds, default="projection", help=text)
    command.add_argument("--alpha", type=float, help="grace ratio; default: the run's")
    command.add_argument("--patience", type=int, help="checks below tau in a row; default: the run's")
    text = "as if freeze_prefix were on; default: the run's"
    command.add_argument("--freeze-prefix", action="store_true", default=None, help=text)
    command.set_defaults(run=_suggest)

    command = commands.add_parser(
        "inspect",
        help="what would be tracked of a model, and what not and why",
        description="Print what GradES would track of a model, by its configuration alone; no weight is loaded.",
    )
    command.add_argument("model", metavar="MODEL", help="hub id, local directory or config.json file")
    lora = "put LoRA adapters on the model first: r=16,target_modules=all-linear (a list is joined by +), or JSON"
    command.add_argument("--lora", metavar="OPTIONS", help=lora)
    for option, meaning in (("--target-modules", "track these"), ("--exclude-modules", "leave these out")):
        text = f"{meaning}: names or name endings, or one regular expression for the full name"
        command.add_argument(option, nargs="+", metavar="NAME", help=text)
    command.set_defaults(run=_inspect)

    text = "what each option of GradESConfig means"
    command = commands.add_parser("options", help=text, description=f"Print {text}.")
    command.add_argument("names", metavar="NAME", nargs="*", help="only these options")
    command.set_defaults(run=_options)
    parser.set_defaults(parsers=commands.choices)
    return parser


def _status(arguments: argparse.Namespace) -> str:
    from ..report.status import show

    show(arguments.run_dir, follow=arguments.follow)
    return ""


def _report(arguments: argparse.Namespace) -> str:
    from ..report.page import to_html, write_plots
    from ..report.runs import load_runs

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


def _suggest(arguments: argparse.Namespace) -> str:
    from ..report.runs import read_history
    from .suggest import suggest, to_text

    history = read_history(arguments.run_dir)
    if history is None:
        raise ValueError(f"RUN_DIR={str(arguments.run_dir)!r} holds no record of GradES.")
    options = {name: getattr(arguments, name) for name in ("by", "alpha", "patience", "freeze_prefix")}
    found = suggest(history, arguments.target_compute, **options)
    return to_text(history, found, arguments.by)


def _inspect(arguments: argparse.Namespace) -> str:
    import warnings

    for name, value in (("TRANSFORMERS_VERBOSITY", "error"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1")):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries have to say is not asked for
        from .inspect import inspect, parse_lora, pattern_or_names

        return inspect(
            arguments.model,
            lora=None if arguments.lora is None else parse_lora(arguments.lora),
            target_modules=arguments.target_modules and pattern_or_names(arguments.target_modules),
            exclude_modules=arguments.exclude_modules and pattern_or_names(arguments.exclude_modules),
        )


def _options(arguments: argparse.Namespace) -> str:
    options = {name: (default, text) for name, default, text in helps()}
    lines = []
    for name in arguments.names or options:
        if name not in options:
            raise ValueError(f"GradESConfig has no option {name}{_nearest(name, options)}")
        default, text = options[name]
        lines += [
            f"{name}  (default: {default})",
            textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    "),
        ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends it with one line on stderr and exit status 2, Ctrl-C with status 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    known = parser.get_default("parsers")
    if not argv:
        parser.print_help()
        return 2
    if argv[0] not in known and not argv[0].startswith("-"):
        parser.error(f"unknown command {argv[0]}{_nearest(argv[0], known)}")
    arguments = parser.parse_args(argv)
    try:
        text = arguments.run(arguments)
    except ValueError as error:
        known[arguments.command].exit(
            2, f"grades-hf {arguments.command}: error: {visible(' '.join(str(error).split()))}\n"
        )
    except KeyboardInterrupt:
        return 130
    try:
        sys.stdout.write(visible(text))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
