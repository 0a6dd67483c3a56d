"""The example rows of the benchmarks, what they become, and files that hold rows like them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from recipes import pypi

ROWS: dict[str, dict[str, Any]] = json.loads(
    Path(pypi.__file__).with_name("tasks").joinpath("examples.json").read_text(encoding="utf-8")
)
FORMATTED: dict[str, tuple[str, list[str], int]] = {
    "boolq": ("Glass is an amorphous solid.\nQuestion: is glass a liquid?\nAnswer:", ["no", "yes"], 0),
    "piqa": ("Question: Keep bread fresh\nAnswer:", ["Leave it in the sun.", "Put it in a box."], 1),
    "siqa": ("Q: Mia lent Tom a pen. How would Tom feel?\nA:", ["thankful", "angry", "asleep"], 0),
    "hellaswag": (
        "Baking: How to bake. Start early. Then the baker",
        ["lights the oven. Wait.", "sings."],
        0,
    ),
    "winogrande": (
        "The cup did not fit in the box because",
        ["the cup was too big.", "the box was too big."],
        0,
    ),
    "openbookqa": ("Frozen water is", ["ice", "steam", "sand"], 0),
    "arc_challenge": ("Question: What is hot?\nAnswer:", ["ice", "steam", "sand"], 1),
    "arc_easy": ("Question: What is a grain?\nAnswer:", ["ice", "steam", "sand"], 2),
}
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_THINGS = ("ball", "book", "cake", "coat", "drum", "fish", "game", "hat")


def siqa_rows(number: int, skip: int = 0) -> list[dict[str, Any]]:
    """Different rows in SIQA's columns; the rows of two calls with other `skip` ranges share no text."""
    rows = []
    for index in range(skip, skip + number):
        giver, thing = _NAMES[index % 8], _THINGS[index // 8 % 8]
        rows.append(
            {
                "context": f"{giver} gave a {thing} to child number {index}.",
                "question": "How did the child feel?",
                "answerA": "happy",
                "answerB": "very sad",
                "answerC": f"like a {thing}",
                "label": str(index % 3 + 1),
            }
        )
    return rows


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines, compressed if the name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
    return file


def siqa_dir(folder: Path, train: int = 48, validation: int = 12) -> Path:
    """A data directory with disjoint rows for the task siqa."""
    write_jsonl(folder / "siqa" / "train.jsonl.gz", siqa_rows(train))
    write_jsonl(folder / "siqa" / "validation.jsonl.gz", siqa_rows(validation, skip=1000))
    return folder


# The column that a task's prompt begins with or ends in.
_ASKED = {
    "boolq": "passage", "piqa": "goal", "siqa": "context", "hellaswag": "ctx_a", "winogrande": "sentence",
    "openbookqa": "question_stem", "arc_challenge": "question", "arc_easy": "question",
}  # fmt: skip


def task_rows(task: str, number: int, skip: int = 0) -> list[dict[str, Any]]:
    """Different rows in the columns of any task; as in `siqa_rows`."""
    column, row = _ASKED[task], ROWS[task]
    return [{**row, column: f"{task} number {index}: {row[column]}"} for index in range(skip, skip + number)]


def all_tasks_dir(folder: Path, train: int = 8, validation: int = 3) -> Path:
    """A data directory with disjoint rows for all eight tasks."""
    for task in ROWS:
        write_jsonl(folder / task / "train.jsonl.gz", task_rows(task, train))
        write_jsonl(folder / task / "validation.jsonl.gz", task_rows(task, validation, skip=1000))
    return folder
