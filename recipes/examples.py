"""Training examples: prompt and right answer as one token sequence, with the loss on the answer, or on all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from recipes.tasks.formats import Task

IGNORE = -100  # label of a token without loss, torch's default `ignore_index`


def encode(
    task: Task,
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    objective: str = "answer",
) -> list[dict[str, list[int]]]:
    """Rows as `{"input_ids", "attention_mask", "labels"}`, each a list of at most `max_length` integers.

    Prompt and answer are tokenized together, as lm-evaluation-harness does when it scores them. A token belongs to the
    answer if it ends after the prompt does; all others get the label -100. A text that is too long loses the
    beginning of its prompt, never a part of the answer.

    Args:
        task: What makes a prompt and an answer of a row.
        rows: Rows in the hub's columns.
        tokenizer: A fast one.
        max_length: Tokens.
        objective: `"answer"`, or `"text"`: the loss is on all tokens but the first, and a text that is too long loses
            its end, like any text.

    Raises:
        ValueError: an answer alone is longer than `max_length`, or the tokenizer knows no character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer gives no character offsets; use a model with a fast tokenizer.")
    examples = []
    for row in rows:
        question = task.format(row)
        prompt, answer = question["prompt"], question["choices"][question["answer"]]
        encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if objective == "text":
            ids = ids[:max_length]
            examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)})
            continue
        labels = [
            token if end > len(prompt) else IGNORE
            for token, (_, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        if sum(label != IGNORE for label in labels) >= max_length:
            raise ValueError(f"max_length={max_length} tokens are too few for the answer {answer[:60]!r}; raise it.")
        ids, labels = ids[-max_length:], labels[-max_length:]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return examples
