"""Each benchmark's prompt, choices and answer, as exact strings; and the harness's task files say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from recipes.tasks import formats

from .rows import FORMATTED, ROWS

TASK_FILES = Path(formats.__file__).parent


@pytest.mark.parametrize("name", list(formats.TASKS))
def test_a_row_becomes_exactly_this_prompt(name: str) -> None:
    prompt, choices, answer = FORMATTED[name]
    assert formats.TASKS[name].format(ROWS[name]) == {"prompt": prompt, "choices": choices, "answer": answer}
    assert set(formats.TASKS[name].columns) <= set(ROWS[name])


@pytest.mark.parametrize("name", list(formats.TASKS))
def test_the_harness_asks_the_same_question(name: str) -> None:
    spec = load_yaml(TASK_FILES / f"{name}.yaml")
    assert (spec["dataset_path"], spec.get("dataset_name")) == formats.TASKS[name].hub
    spec |= {"custom_dataset": lambda **_: {"validation": [ROWS[name]]}, "training_split": None}
    task = TaskManager(include_defaults=False).load([spec])["tasks"][name]
    (doc,) = task.validation_docs()
    prompt, choices, answer = FORMATTED[name]
    assert (task.doc_to_text(doc), task.doc_to_choice(doc), task.doc_to_target(doc)) == (prompt, choices, answer)
    requests = task.construct_requests(doc, prompt, metadata=(name, 0, 1))
    assert [request.args for request in requests] == [(prompt, f" {choice}") for choice in choices]


def test_there_is_one_file_per_task() -> None:
    assert {file.stem for file in TASK_FILES.glob("*.yaml")} == set(formats.TASKS)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("siqa", {"label": ""}),
        ("siqa", {"label": "4"}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("piqa", {"label": -1}),
        ("arc_easy", {"answerKey": "E"}),
    ],
)
def test_a_row_without_a_right_answer_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="answer|invalid literal"):
        formats.TASKS[name].format(ROWS[name] | changes)
