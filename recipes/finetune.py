"""Fine-tune a causal language model on a benchmark, with GradES deciding when each weight matrix has learned enough.

    accelerate launch recipes/finetune.py --config recipes/configs/quickstart.yaml [--argument value ...]
    python recipes/finetune.py --help

Everything that can be refused is refused before the model is loaded, and before anything is written. What a run leaves
in `output_dir`: the adapter or model with its tokenizer, `grades_history.json`, `results.json` (all numbers),
`summary.md` (the same for people) and `grades.png`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: in recipes/, evaluate.py would hide the library of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: CPU threads that wait do not keep a core busy

import datasets
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from grades_hf import GradESConfig, GradESTrainer, History, find_components
from grades_hf.criterion import assign_thresholds
from grades_hf.report import plot_run, summarize, table_rows, to_markdown
from recipes.arguments import (
    DataArguments,
    EvaluationArguments,
    GradESArguments,
    ModelArguments,
    grades_config,
    parse,
)
from recipes.console import configure_logging, use_all_cores
from recipes.data import Rows, evaluation_rows, find_task, load_split, training_rows
from recipes.evaluate import evaluate
from recipes.examples import encode
from recipes.flops import FlopCounterCallback, compute
from recipes.models import load_model, load_tokenizer, locate_model
from recipes.tasks.formats import Task

logger = logging.getLogger("recipes.finetune")


@dataclasses.dataclass
class Plan:
    """A run whose arguments, files and data have been checked: nothing is loaded or written yet.

    `train`, `holdout` and `test` are rows to train on, to evaluate on during training, and to measure the accuracy on;
    `location` is what `from_pretrained` takes; `sources` says where model and rows come from.
    """

    model: ModelArguments
    data: DataArguments
    evaluation: EvaluationArguments
    training: TrainingArguments
    grades: GradESConfig | None
    task: Task
    train: Rows
    holdout: Rows
    test: Rows
    location: str
    sources: dict[str, str]
    output: Path


def prepare(argv: list[str], checkpoint_file: str = "trainer_state.json") -> Plan:
    """Parse the arguments, read the rows, find the model.

    Args:
        argv: The command line.
        checkpoint_file: What a directory must hold to be a checkpoint.

    Raises:
        ValueError: anything that cannot work; names the argument, its value and the remedy.
    """
    types = (ModelArguments, DataArguments, GradESArguments, EvaluationArguments, TrainingArguments)
    model, data, freezing, evaluation, training = parse(types, argv, description=(__doc__ or "").split("\n\n")[0])
    grades = grades_config(freezing)
    if model.method == "lora":
        model.lora_config()
    output = Path(training.output_dir)
    _check_output_dir(output)
    resume = training.resume_from_checkpoint
    if resume is not None and resume.lower() in ("true", "false"):
        training.resume_from_checkpoint = resume = True if resume.lower() == "true" else None
    if isinstance(resume, str) and not Path(resume, checkpoint_file).is_file():
        raise ValueError(
            f"resume_from_checkpoint={resume!r} holds no {checkpoint_file}; pass a checkpoint-N directory."
        )
    evaluates = training.eval_strategy != IntervalStrategy.NO
    if evaluates and data.holdout_samples < 1:
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value!r} needs rows: set holdout_samples, the number of training "
            "rows to set aside for it."
        )
    if data.train_split == evaluation.eval_split:
        raise ValueError(
            f"train_split and eval_split are both {data.train_split!r}; the accuracy must be measured on other rows "
            "than those that are trained on."
        )
    task = find_task(data.task)
    train_split = load_split(task, data.train_split, data.data_dir)
    test_split = load_split(task, evaluation.eval_split, data.data_dir)
    test = evaluation_rows(test_split, evaluation.eval_samples)
    seed = training.seed if training.data_seed is None else training.data_seed
    wanted = None if data.train_samples is None else data.train_samples + data.holdout_samples
    rows = training_rows(task, train_split, test_split, wanted, seed)
    if not 0 <= data.holdout_samples < len(rows):
        raise ValueError(f"holdout_samples={data.holdout_samples} must be between 0 and {len(rows) - 1}.")
    location, source = locate_model(model.model)
    return Plan(
        model, data, evaluation, training, grades, task,
        train=rows[data.holdout_samples :],
        holdout=rows[: data.holdout_samples],
        test=test,
        location=location,
        sources={"model": source, "training rows": train_split.source, "evaluation rows": test_split.source},
        output=output,
    )  # fmt: skip


def build(plan: Plan) -> Trainer:
    """Load the model and set up its trainer.

    Raises:
        ValueError: an option that does not fit this model: a threshold or a pattern that matches nothing, for example.
    """
    for what, source in plan.sources.items():
        logger.info("%s: %s", what, source)
    tokenizer = load_tokenizer(plan.location)
    train = encode(plan.task, plan.train, tokenizer, plan.data.max_length)
    holdout = encode(plan.task, plan.holdout, tokenizer, plan.data.max_length)
    model: Any = load_model(plan.location, plan.model.dtype)
    set_seed(plan.training.seed)
    if plan.model.method == "lora":
        model = get_peft_model(model, plan.model.lora_config())
    if plan.grades is not None:  # its thresholds fit this model: better refused now than after the first evaluation
        assign_thresholds(find_components(model, plan.grades), plan.grades.tau)

    if not torch.accelerator.is_available():
        plan.training.dataloader_pin_memory = False
    options: dict[str, Any] = {
        "model": model,
        "args": plan.training,
        "train_dataset": datasets.Dataset.from_list(train),
        "eval_dataset": datasets.Dataset.from_list(holdout) if holdout else None,
        "data_collator": DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        "processing_class": tokenizer,
    }
    if plan.grades is None:
        return Trainer(**options, callbacks=[FlopCounterCallback()])
    return GradESTrainer(**options, grades=plan.grades)


def run(plan: Plan, trainer: Trainer) -> dict[str, Any]:
    """Evaluate, train, evaluate, report; returns what `results.json` holds."""
    model: Any = trainer.model
    tokenizer: Any = trainer.processing_class
    output = plan.output
    seconds = {"training": 0.0, "evaluation": 0.0}
    scores: dict[str, Any] = {"task": plan.task.name, "rows": len(plan.test)}

    def measure(when: str) -> None:
        logger.info("Accuracy %s training, on %d rows of %s:", when, len(plan.test), plan.task.name)
        started = time.perf_counter()
        scores[when] = evaluate(model, tokenizer, plan.task.name, plan.test, plan.training.per_device_eval_batch_size)
        seconds["evaluation"] += time.perf_counter() - started

    main_process = plan.training.process_index == 0
    earlier = _earlier_scores(output, scores) if plan.training.resume_from_checkpoint else None
    if earlier is not None:
        scores["before"] = earlier
    elif plan.evaluation.evaluate_before and main_process:
        measure("before")
    if main_process:
        output.mkdir(parents=True, exist_ok=True)
        _write_json(output / "results.json", {"evaluation": scores})

    set_seed(plan.training.seed)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=plan.training.resume_from_checkpoint)
    seconds["training"] = time.perf_counter() - started
    trainer.save_model()
    trainer.save_state()
    results: dict[str, Any] = {}
    if main_process:
        if plan.evaluation.evaluate_after:
            measure("after")
        results = _report(plan, trainer, scores, seconds)
    return results


def _report(
    plan: Plan,
    trainer: Trainer,
    scores: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Write results.json, summary.md and grades.png, and print the table."""
    output = plan.output
    steps = {"steps_run": trainer.state.global_step, "steps_planned": trainer.state.max_steps}
    if isinstance(trainer, GradESTrainer):
        engine = trainer.grades_callback.engine
        meter = engine.meter if engine is not None else None
    else:
        meter = next(c.meter for c in trainer.callback_handler.callbacks if isinstance(c, FlopCounterCallback))
    extras = {"evaluation": scores, "seconds": seconds, "compute": compute(meter, steps["steps_planned"])}
    files = ["summary.md", "results.json"]
    if plan.grades is None:
        results = {**steps, **extras}
    else:
        history = History.load(output)
        results = summarize(history, steps_run=steps["steps_run"], **extras)
        plot_run(history, output / "grades.png")
        files += ["grades_history.json", "grades.png"]
    results["sources"] = plan.sources
    results["seed"] = plan.training.seed
    _write_json(output / "results.json", results)
    title = f"{plan.model.model}, {plan.model.method}, {'GradES, ' if plan.grades else ''}{plan.task.name}"
    (output / "summary.md").write_text(to_markdown(results, title, notes=plan.sources), encoding="utf-8")

    table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
    for row in table_rows(results):
        table.add_row(*row)
    console = Console()
    console.print()
    console.print(table)
    weights = "adapter" if plan.model.method == "lora" else "model"
    console.print(f"In {output}: {weights} and tokenizer, {', '.join(files)}", soft_wrap=True)
    return results


def newest_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint in `output`; Trainer itself takes the newest, which a crash may have cut off.

    Raises:
        ValueError: there is none.
    """
    checkpoints = {path: path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")}
    numbered = {path: int(number) for path, number in checkpoints.items() if number.isdecimal()}
    for path in sorted(numbered, key=lambda path: -numbered[path]):
        try:  # Trainer writes this file last
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            logger.warning("%s is incomplete (the run ended while it was written) and passed over.", path)
            continue
        logger.info("Resuming from %s.", path)
        return path
    raise ValueError(
        f"resume_from_checkpoint=True, and output_dir={str(output)!r} holds no complete checkpoint; leave it out to "
        "start from the beginning."
    )


def _check_output_dir(output: Path) -> None:
    """Refuse a directory that cannot be written, without leaving a trace in one that can."""
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"output_dir={str(output)!r} cannot be written: {error}. Pass another one.") from error


def _earlier_scores(output: Path, scores: dict[str, Any]) -> dict[str, float] | None:
    """The accuracy before training that the interrupted run has measured on the same rows, if it got so far."""
    file = output / "results.json"
    if not file.is_file():
        return None
    evaluation = json.loads(file.read_text(encoding="utf-8")).get("evaluation", {})
    if any(evaluation.get(key) != value for key, value in scores.items()) or "before" not in evaluation:
        return None
    logger.info("Accuracy before training: taken from %s.", file)
    return dict(evaluation["before"])


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """The command: bad input ends it with one line and exit status 1."""
    configure_logging()
    use_all_cores()
    try:
        plan = prepare(sys.argv[1:] if argv is None else argv)
        resume: Any = plan.training.resume_from_checkpoint
        if resume is True:
            plan.training.resume_from_checkpoint = str(newest_checkpoint(plan.output))
        trainer = build(plan)
    except ValueError as error:
        sys.exit(f"finetune.py: error: {error}")
    with logging_redirect_tqdm():  # lines go above a progress bar, not into it
        run(plan, trainer)


if __name__ == "__main__":
    main()
