"""Accuracy on a benchmark through lm-evaluation-harness, in the very prompts that training uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> dict[str, float]:
    """Zero-shot accuracy of a model, which is left in the mode (train or eval) that it was in.

    A choice is scored by the log-likelihood of its tokens after the prompt: `acc` takes the highest sum, `acc_norm` the
    highest sum divided by the number of characters of the choice.

    Args:
        model: A causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        task: The name of a task file beside this one.
        rows: Rows in the hub's columns.
        batch_size: Choices scored at a time.

    Returns:
        `acc` and `acc_norm` as fractions, and of more than one row their standard errors `acc_stderr` and
        `acc_norm_stderr`.
    """
    import lm_eval  # takes seconds, and only benchmarks need it
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    spec = load_yaml(Path(__file__).parent / f"{task}.yaml")
    spec |= {"custom_dataset": lambda **_: {spec["validation_split"]: list(rows)}, "training_split": None}
    # What the harness says of every run (that it was handed a model and a data set) is no news here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    training = model.training
    # `evaluate`, not `simple_evaluate`: that one also seeds the global generators, and an evaluation must not
    # change the run that it is a part of.
    results = lm_eval.evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        task_dict=TaskManager(include_defaults=False).load([spec]),
        log_samples=False,
    )
    model.train(training)
    scores = results["results"][task]
    found = {f"{name}{end}": scores[f"{name}{end},none"] for end in ("", "_stderr") for name in METRICS}
    return {name: float(value) for name, value in found.items() if value != "N/A"}  # one row has no standard error


def mean(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The scores of one benchmark as they are; of several their means, with each benchmark's own under `tasks`."""
    if len(scores) == 1:
        return dict(next(iter(scores.values())))
    parts, number = list(scores.values()), len(scores)
    result: dict[str, Any] = {"tasks": {name: dict(part) for name, part in scores.items()}}
    for name in METRICS:
        result[name] = sum(part[name] for part in parts) / number
        if errors := [part[f"{name}_stderr"] for part in parts if f"{name}_stderr" in part]:
            result[f"{name}_stderr"] = sum(error**2 for error in errors) ** 0.5 / number
    return result
