"""Training rows read back from evaluation requests: the documents of each task, in the hub's columns."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from recipes.olmes import SOURCES, _read_requests
from recipes.tasks.formats import TASKS

from .rows import ROWS

QUESTION = {"query": "Question: What is hot?\nAnswer:", "choices": ["ice", "steam", "sand"], "gold": 1, "id": "2"}
DOCS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "boolq": (
        {
            "query": "Glass -- Glass is -- mostly -- solid.\nQuestion: is glass a liquid?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 1,
        },
        {"question": "is glass a liquid", "answer": False, "passage": "Glass is -- mostly -- solid."},
    ),
    "arc_easy": (
        QUESTION,
        {
            "id": "2",
            "question": "What is hot?",
            "choices": {"text": ["ice", "steam", "sand"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        QUESTION,
        {
            "id": "2",
            "question_stem": "What is hot?",
            "choices": {"text": ["ice", "steam", "sand"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "hellaswag": (
        {
            "query": "Baking: Start early. Then the baker",
            "choices": ["lights the oven.", " sings."],
            "gold": 1,
            "ind": 4,
        },
        {
            "ind": 4,
            "activity_label": "Baking",
            "ctx_a": "Start early. Then the baker",
            "ctx_b": "",
            "ctx": "Start early. Then the baker",
            "endings": ["lights the oven.", "sings."],
            "label": "1",
        },
    ),
    **{name: (ROWS[name] | {"query": "", "index": 0}, ROWS[name]) for name in ("piqa", "siqa", "winogrande")},
}
DOCS["arc_challenge"] = DOCS["arc_easy"]


@pytest.mark.parametrize("task", list(SOURCES))
def test_each_document_gives_one_row(task: str) -> None:
    doc, row = DOCS[task]
    requests = [{"doc_id": number, "doc": doc} for number in (0, 0, 1_000_000, 1_000_000, 1, 1, 2)]
    packed = gzip.compress("".join(json.dumps(request) + "\n" for request in requests).encode())
    rows = _read_requests(packed, task, SOURCES[task][2])
    assert rows == [row] * 3
    assert set(TASKS[task].columns) <= set(row)


def test_every_task_has_a_source() -> None:
    assert set(SOURCES) == set(TASKS)
