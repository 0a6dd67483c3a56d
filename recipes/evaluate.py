"""Accuracy on a benchmark through lm-evaluation-harness, in the very prompts that training uses; or the loss there.

From the command line, for a saved run (adapter or full model) or any other model:

    python recipes/evaluate.py --model runs/quickstart --task siqa --eval_samples 300
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a script: in recipes/, this file would hide the library of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: CPU threads that wait do not keep a core busy

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import PeftConfig, PeftModel
from transformers import DataCollatorForSeq2Seq, HfArgumentParser, PreTrainedTokenizerBase

from recipes.console import configure_logging
from recipes.data import evaluation_rows, find_task, load_split
from recipes.models import load_model, load_tokenizer, locate_model
from recipes.tasks.formats import Row

logger = logging.getLogger(__name__)

METRICS = ("acc", "acc_norm")


def _argument(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class EvaluateArguments:
    """What is evaluated, and on what."""

    model: str = _argument(
        "Run directory (adapter or full model), other local directory, or hub id.", "runs/quickstart"
    )
    base_model: str | None = _argument("The adapter's base model; default: the one that adapter_config.json names.")
    dtype: str = _argument("Type of the weights; auto: as saved.", "auto")
    task: str = _argument("Benchmark: a name in recipes/tasks/formats.py.", "siqa")
    data_dir: str | None = _argument("Directory with <task>/<split>.jsonl.gz; default: the hub.")
    eval_split: str = _argument("Split to measure the accuracy on.", "validation")
    eval_samples: int | None = _argument("Number of rows, the same ones as in finetune.py; default: all.")
    batch_size: int = _argument("Choices scored at a time.", 16)


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Row],
    batch_size: int,
) -> dict[str, float]:
    """Zero-shot accuracy of `model` on `rows`.

    A choice is scored by the log-likelihood of its tokens after the prompt; `acc` takes the highest sum, `acc_norm` the
    highest sum divided by the number of characters of the choice. The model is left in the mode (train or eval) it was
    in.

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
    # `evaluate`, not `simple_evaluate`: that one also seeds the global generators, and an evaluation must not
    # change the run that it is a part of.
    results = lm_eval.evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        task_dict=TaskManager(include_defaults=False).load([spec]),
        log_samples=False,
    )
    model.train(training)
    scores = results["results"][task]
    accuracy = {name: float(scores[f"{name},none"]) for name in METRICS}
    stderr = {f"{name}_stderr": float(scores[f"{name}_stderr,none"]) for name in METRICS}
    return {**accuracy, **stderr, "rows": len(rows)}


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict[str, list[int]]],
    batch_size: int,
) -> dict[str, float]:
    """The mean loss (in nats) of all tokens that have a label.

    Args:
        model: Causal language model, left in the mode (train or eval) it was in.
        tokenizer: What pads.
        examples: What `recipes.examples.encode` makes of the rows.
        batch_size: Examples at a time.

    Returns:
        `loss`, `tokens` and `rows`.
    """
    training = model.training
    model.eval()
    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = collate([dict(example) for example in examples[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:].to(device)
        logits = model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        total, tokens = total + losses.double().item(), tokens + int((labels != -100).sum())
    model.train(training)
    return {"loss": total / tokens, "tokens": tokens, "rows": len(examples)}


def mean_scores(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The scores of one benchmark as they are; of several their means, with each benchmark's own under `tasks`."""
    if len(scores) == 1:
        return dict(next(iter(scores.values())))
    parts = list(scores.values())
    result: dict[str, Any] = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name in ("rows", "tokens"):
            result[name] = sum(values)
        elif name.endswith("_stderr"):  # of the mean of independent estimates
            result[name] = sum(value**2 for value in values) ** 0.5 / len(values)
        else:
            result[name] = sum(values) / len(values)
    return {**result, "tasks": {name: dict(part) for name, part in scores.items()}}


def load(
    model: str, base_model: str | None = None, dtype: str = "auto"
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A saved model, or an adapter on its base model, with the tokenizer that was saved beside it.

    Raises:
        ValueError: the model, or the adapter's base model, is not to be found.
    """
    location, source = locate_model(model)
    logger.info("model: %s", source)
    tokenizer = load_tokenizer(location)
    if not (Path(location) / "adapter_config.json").is_file():
        return load_model(location, dtype), tokenizer
    base = base_model or str(PeftConfig.from_pretrained(location).base_model_name_or_path)
    try:
        base_location, base_source = locate_model(base)
    except ValueError as error:
        raise ValueError(
            f"{model} is an adapter, and its base model is missing: {error} Or pass --base_model."
        ) from error
    logger.info("base model: %s", base_source)
    return PeftModel.from_pretrained(load_model(base_location, dtype), location), tokenizer


def main(argv: list[str] | None = None) -> None:
    """The command: prints the scores as JSON."""
    configure_logging()
    parser: Any = HfArgumentParser(cast("Any", EvaluateArguments), allow_abbrev=False)
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    try:
        task = find_task(arguments.task)
        split = load_split(task, arguments.eval_split, arguments.data_dir)
        rows = evaluation_rows(split, arguments.eval_samples)
        logger.info("evaluation rows: %s", split.source)
        model, tokenizer = load(arguments.model, arguments.base_model, arguments.dtype)
    except ValueError as error:
        sys.exit(f"evaluate.py: error: {error}")
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    sys.stdout.write(json.dumps(evaluate(model, tokenizer, task.name, rows, arguments.batch_size), indent=2) + "\n")


if __name__ == "__main__":
    main()
