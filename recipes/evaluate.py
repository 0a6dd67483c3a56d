"""Accuracy on a benchmark through lm-evaluation-harness, in the very prompts that training uses.

From the command line, for a saved run (adapter or full model) or any other model:

    python recipes/evaluate.py --model runs/quickstart --task siqa --eval_samples 300
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: in recipes/, this file would hide the library of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datasets
import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.tasks.formats import TASKS, Row

logger = logging.getLogger(__name__)

METRICS = ("acc", "acc_norm")


def evaluate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: str, rows: list[Row], batch_size: int
) -> dict[str, float]:
    """Zero-shot accuracy of `model` on `rows`.

    A choice is scored by the log-likelihood of its tokens after the prompt; `acc` takes the highest sum, `acc_norm` the
    highest sum divided by the length of the choice in bytes. The model is left in the mode (train or eval) it was in.

    Args:
        model: Causal language model, with or without adapters.
        tokenizer: Its tokenizer.
        task: Name of the task file in `recipes/tasks/`.
        rows: Rows in the hub's columns.
        batch_size: Choices scored at a time.

    Returns:
        `acc`, `acc_stderr`, `acc_norm`, `acc_norm_stderr` as fractions, and `rows`, the number of rows.
    """
    spec = load_yaml(Path(__file__).parent / "tasks" / f"{task}.yaml")
    spec |= {"custom_dataset": lambda **_: {spec["validation_split"]: rows}, "training_split": None}
    # What the harness says of every run (that it was handed a model and a data set) is no news here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    training = model.training
    results = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=[spec],
        task_manager=TaskManager(include_defaults=False),
        log_samples=False,
        # The harness seeds the global generators unless told not to; an evaluation must not change the run.
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    model.train(training)
    scores = results["results"][task]
    accuracy = {name: float(scores[f"{name},none"]) for name in METRICS}
    stderr = {f"{name}_stderr": float(scores[f"{name}_stderr,none"]) for name in METRICS}
    return {**accuracy, **stderr, "rows": len(rows)}
