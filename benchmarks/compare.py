"""Run a grid of arms x tasks x seeds, or what is left of it, and compare.

    python -m benchmarks.compare --config benchmarks/configs/study_stories260k.yaml --model DIR --data_dir DIR \\
        --arms none es grades stop short peer --tasks siqa boolq --seeds 1 2 3 --output runs/study

Each cell is a run of `benchmarks.train` in a process of its own, in `OUTPUT/TASK/ARM/seed-N`: `arguments.json` (the
arguments, the config's text, versions), `log.txt`, and what the run leaves, `results.json` last. A finished cell is
not run again; one that was killed goes on from its newest checkpoint, the arm `peer` from the beginning. One cell after
another, so that their times compare. Then `comparison.csv`, `comparison.md` and `comparison.png` are written in OUTPUT.

An arm is one of `benchmarks/arms.py`, or such a one with options under a name of its own:
`"patient=grades --patience 3 --tau 0.5"`. A task is a benchmark, or several mixed: `siqa,boolq`. Arguments that are not
listed below go to the run in every cell.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import train
from benchmarks.comparison import compare, comparison_csv, comparison_markdown, plot_comparison
from recipes.arguments import command

logger = logging.getLogger("recipes.compare")

ROOT = Path(__file__).resolve().parent.parent

# What every cell gets unless the command line says otherwise.
DEFAULTS = ["--disable_tqdm", "true", "--report_to", "none"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "lm_eval", "grades-hf", "grades")


@dataclass(frozen=True)
class Arm:
    """A way of training: an arm of `benchmarks/arms.py` under a name, with options."""

    name: str
    arm: str
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Arm:
        """`"es"`, or `"name=es --option value"`.

        Raises:
            ValueError: the name is no plain word, or no arm follows it.
        """
        name, equals, rest = text.partition("=")
        words = shlex.split(rest) if equals else [name]
        if not re.fullmatch(r"[\w.+-]+", name) or not words or words[0].startswith("-"):
            raise ValueError(
                f"arms: {text!r} must be an arm, or a name and an arm as in 'patient=grades --patience 2'."
            )
        return cls(name, words[0], tuple(words[1:]))


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    arm: Arm
    task: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]  # of benchmarks.train, but for resuming

    @property
    def audit(self) -> Path:
        """What it was run with."""
        return self.folder / "arguments.json"

    def results(self) -> dict[str, Any] | None:
        """What its results.json holds; None if it has not ended."""
        try:
            results: dict[str, Any] = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return results if "steps_run" in results else None

    def check(self, config: str) -> None:
        """Refuse to mix runs with different arguments.

        Raises:
            ValueError: what lies in the folder was run with others.
        """
        if self.audit.is_file():
            before = json.loads(self.audit.read_text(encoding="utf-8"))
            if (before["arguments"], before["config"]) != (list(self.arguments), config):
                raise ValueError(
                    f"{self.folder} holds a run with other arguments (see arguments.json); pass another --output, or "
                    "remove it."
                )


def make_grid(options: argparse.Namespace, rest: Sequence[str]) -> list[Cell]:
    """All cells: seed by seed, so that a grid that is cut short has whole seeds.

    Raises:
        ValueError: an arm, task or seed comes twice, or an arm cannot be read.
    """
    arms = [Arm.parse(text) for text in options.arms]
    for what, values in (("arms", [arm.name for arm in arms]), ("tasks", options.tasks), ("seeds", options.seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"{what}={' '.join(map(str, values))} must differ.")
    cells = []
    for seed in options.seeds:
        for task in options.tasks:
            for arm in arms:
                folder = Path(options.output) / task.replace(",", "+") / arm.name / f"seed-{seed}"
                arguments = ["--config", options.config, *DEFAULTS, *rest, "--arm", arm.arm, *arm.options]
                arguments += ["--task", task, "--seed", str(seed), "--output_dir", str(folder)]
                cells.append(Cell(arm, task, seed, folder, tuple(arguments)))
    return cells


def run_cell(cell: Cell, config: str) -> bool:
    """Run or resume one cell; whether it has ended well.

    Raises:
        ValueError: another process is running it.
    """
    cell.folder.mkdir(parents=True, exist_ok=True)
    arguments = list(cell.arguments)
    checkpoint = None if cell.arm.arm == "peer" else train.newest_checkpoint(cell.folder)
    if checkpoint is not None:
        arguments += ["--resume_from_checkpoint", str(checkpoint)]
    with open(cell.folder / ".lock", "w") as lock, open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child holds it too, should this process be killed
        except BlockingIOError:
            raise ValueError(f"another process is running {cell.folder}; wait for it, or end it.") from None
        audit = {"arguments": list(cell.arguments), "config": config, "versions": _versions(), "commit": _commit()}
        cell.audit.write_text(json.dumps(audit, indent=2) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.train", *arguments]
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}\n")
        log.flush()
        environment = {
            **os.environ,
            "COLUMNS": "120",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, pass_fds=[lock.fileno()])
    return done.returncode == 0 and cell.results() is not None


def report(cells: Sequence[Cell], output: Path, metric: str | None, command: str) -> None:
    """Write the table and the figure of all cells that have ended."""
    runs: list[dict[str, Any]] = []
    for cell in cells:
        results = cell.results()
        if results is not None:
            runs.append({"arm": cell.arm.name, "task": cell.task, "seed": cell.seed, "results": results})
    if not runs:
        raise ValueError("no cell has ended, so there is nothing to compare.")
    metric = metric or ("loss" if "loss" in runs[0]["results"]["evaluation"]["after"] else "acc")
    ways = compare(runs, metric)
    if not ways:
        raise ValueError("no arm has ended all tasks with any seed, so there is nothing to compare.")
    page = (
        f"# Comparison\n\n    {command}\n\n{len(runs)} of {len(cells)} runs. Means over seeds ± standard error; steps, "
        "FLOPs and seconds are sums over the tasks that are trained one by one. Bold: no other arm is at least as good "
        "for at most as much compute, and better in one of both. FLOPs are counted (`grades_hf.flops`). Seconds of "
        "training are without validation and checkpoints; of an arm whose run was resumed, they are those of the steps "
        f"that count.\n\n{comparison_markdown(ways, metric)}\n{_provenance(cells)}\n"
    )
    (output / "comparison.md").write_text(page, encoding="utf-8")
    (output / "comparison.csv").write_text(comparison_csv(ways, metric), encoding="utf-8")
    plot_comparison(ways, metric, output / "comparison.png")
    sys.stdout.write(comparison_markdown(ways, metric))
    logger.info("In %s: comparison.md, comparison.csv, comparison.png", output)


def _provenance(cells: Sequence[Cell]) -> str:
    """At which commits and with which versions the cells were run, in one line."""
    audits = [json.loads(cell.audit.read_text(encoding="utf-8")) for cell in cells if cell.results() is not None]
    commits = sorted({str(audit["commit"]) for audit in audits})
    found = {name: sorted({audit["versions"].get(name, "none") for audit in audits}) for name in audits[0]["versions"]}
    versions = (f"{name} {' and '.join(numbers)}" for name, numbers in found.items())
    return f"Run at commit {' and '.join(commits)} with {', '.join(versions)}."


def main(argv: Sequence[str] | None = None) -> None:
    """The command: bad input ends it with one line, cells that failed with exit status 1."""
    with command("compare.py"):
        _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="a config of recipes/finetune.py")
    parser.add_argument("--arms", nargs="+", default=["none", "es", "grades", "stop", "short"], metavar="ARM")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], metavar="SEED")
    parser.add_argument("--output", default="runs/compare", help="default: runs/compare")
    parser.add_argument("--metric", choices=["acc", "acc_norm", "loss"], help="default: loss if measured, else acc")
    parser.add_argument("--report_only", action="store_true", help="run nothing, compare what is there")
    options, rest = parser.parse_known_args(argv)
    output, failed = Path(options.output), []
    try:
        cells = make_grid(options, rest)
        config = Path(options.config).read_text(encoding="utf-8")
        for cell in cells:
            cell.check(config)
        left = [] if options.report_only else [cell for cell in cells if cell.results() is None]
        for cell in left:
            if cell.seed == left[0].seed:  # better refused now than after hours
                train.prepare(list(cell.arguments))
        for number, cell in enumerate(left, start=1):
            started = time.perf_counter()
            logger.info("[%d/%d] %s, %s, seed %d", number, len(left), cell.task, cell.arm.name, cell.seed)
            if not run_cell(cell, config):
                failed.append(cell)
                logger.error("failed after %.0f s: see %s", time.perf_counter() - started, cell.folder / "log.txt")
        report(cells, output, options.metric, f"python -m benchmarks.compare {shlex.join(argv)}")
    except OSError as error:
        raise ValueError(str(error)) from error
    if failed:
        sys.exit(f"compare.py: {len(failed)} of {len(cells)} cells failed; the next call runs them again.")


def _versions() -> dict[str, str]:
    """Of Python and of the packages that are installed."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    found["cpu cores"] = str(os.cpu_count())
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """What `git describe` says of these recipes, None outside of a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
