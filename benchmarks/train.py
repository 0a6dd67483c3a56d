"""One run of one arm, as `benchmarks.compare` runs it in a process of its own.

    python -m benchmarks.train --config benchmarks/configs/study_stories260k.yaml --model DIR --data_dir DIR --arm es

Arguments are those of `recipes/finetune.py` and those of an arm (`benchmarks/arms.py`). Quality is measured on
validation rows, which no arm sees while it trains. A run leaves in `output_dir` the model, `results.json` and, with
GradES, `grades_history.arrow`.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTTrainer

from benchmarks.arms import ArmArguments, make_trainer, peer_summary, set_up, unfinished
from benchmarks.flops import FlopCounterCallback, compute
from grades_hf import History
from grades_hf.report import summarize
from recipes import finetune
from recipes.arguments import command
from recipes.tasks import accuracy
from recipes.tasks.formats import TASKS

logger = logging.getLogger("recipes.train")


def prepare(argv: list[str]) -> tuple[finetune.Plan, ArmArguments]:
    """The checked arguments and rows of a run.

    Raises:
        ValueError: something cannot work.
    """
    arm = next((after for word, after in itertools.pairwise(argv) if word == "--arm"), "grades")
    plan = finetune.prepare([*argv, *([] if arm == "grades" else ["--grades", "false"])], ArmArguments)
    (arguments,) = plan.more
    arguments.check(plan.arguments.observe)
    if not plan.tests:
        raise ValueError("task is missing: the quality is measured on a benchmark, so pass --task.")
    set_up(arm, arguments, plan.training, alpha=plan.arguments.alpha, held_out=plan.held_out is not None)
    return plan, arguments


def run(plan: finetune.Plan, arguments: ArmArguments, trainer: Any) -> dict[str, Any]:
    """Train, measure, save; returns what `results.json` holds."""
    output = Path(trainer.args.output_dir)
    trainer.train(resume_from_checkpoint=_resumable(trainer))
    seconds = trainer.clock.split()
    trainer.save_model()
    trainer.save_state()
    started = time.perf_counter()
    scores = {name: _quality(plan, arguments, trainer, name) for name in plan.tests}
    seconds["evaluation"] = time.perf_counter() - started
    evaluation = {
        "task": "+".join(plan.tests),
        "rows": sum(map(len, plan.tests.values())),
        "after": _mean(scores),
    }
    steps = {"steps_run": trainer.state.global_step, "steps_planned": trainer.planned_steps}
    if plan.grades is not None:
        engine = trainer.grades_callback.engine
        meter = engine.meter
    else:
        meter = next(c.meter for c in trainer.callback_handler.callbacks if isinstance(c, FlopCounterCallback))
    used = compute(meter, trainer.planned_steps)
    if trainer.clock.validations and trainer.clock.flops is not None:
        used["validation"] = float(trainer.clock.flops * trainer.clock.validations)
    extras = {"evaluation": evaluation, "seconds": seconds, "compute": used}
    if plan.grades is None:
        results: dict[str, Any] = {**steps, **extras}
    else:
        results = summarize(History.load(output), steps_run=steps["steps_run"], **extras)
    if arguments.arm == "peer":
        results |= peer_summary(output)
    method = "lora" if plan.model.use_peft else "full"
    results |= {"seed": plan.training.seed, "arm": arguments.arm, "method": method}
    results["sources"] = {"model": plan.recipe.model}
    _write_json(output / "results.json", results)
    return results


def _quality(plan: finetune.Plan, arguments: ArmArguments, trainer: Any, task: str) -> dict[str, float]:
    """Accuracy, loss, or both on the validation rows of one benchmark."""
    rows, scores = plan.tests[task], {}
    if arguments.measure != "loss":
        batch_size = plan.training.per_device_eval_batch_size
        scores |= accuracy.measure(trainer.model, trainer.processing_class, task, list(rows), batch_size)
    if arguments.measure != "accuracy":
        pairs = Dataset.from_list(TASKS[task].pairs(rows))
        # Not the arm's own evaluation, which counts validations.
        scores["loss"] = SFTTrainer.evaluate(trainer, pairs, metric_key_prefix="test")["test_loss"]
    return scores


def _mean(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The scores of one benchmark as they are; of several their means, with each benchmark's own under `tasks`."""
    if len(scores) == 1:
        return next(iter(scores.values()))
    losses = [part["loss"] for part in scores.values() if "loss" in part]
    result = accuracy.mean(scores) if any("acc" in part for part in scores.values()) else {"tasks": scores}
    return {**result, **({"loss": sum(losses) / len(losses)} if losses else {})}


def _resumable(trainer: Any) -> str | None:
    """The checkpoint to resume from: the one that was chosen, or where it is the end of its run, an earlier one.

    The run was interrupted after its last step, then, and takes the last steps again; from the beginning (None) if
    there is no earlier checkpoint. A run that GradES has ended is resumed at its end, and takes no step.
    """
    if trainer.args.resume_from_checkpoint is None:
        return None
    steps = trainer.args.max_steps if trainer.args.max_steps > 0 else trainer.planned_steps
    chosen = Path(trainer.args.resume_from_checkpoint)
    if unfinished(json.loads((chosen / "trainer_state.json").read_text(encoding="utf-8")), steps):
        return str(chosen)
    earlier = newest_checkpoint(chosen.parent, lambda state: unfinished(state, steps))
    return None if earlier is None else str(earlier)


def newest_checkpoint(output: Path, usable: Callable[[dict[str, Any]], bool] = lambda state: True) -> Path | None:
    """The newest complete checkpoint in `output`; Trainer itself takes the newest, which a crash may have cut off.

    Args:
        output: A run's directory.
        usable: Told the content of its trainer_state.json, whether a checkpoint will do.
    """
    checkpoints = {path: path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")}
    numbered = {path: int(number) for path, number in checkpoints.items() if number.isdecimal()}
    for path in sorted(numbered, key=lambda path: -numbered[path]):
        try:  # Trainer writes this file last
            state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            logger.warning("%s is incomplete (the run ended while it was written) and passed over.", path)
            continue
        if usable(state):
            logger.info("Resuming from %s.", path)
            return path
    return None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """The old file or the new one is there, never half of one."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command."""
    with command("benchmarks.train"):
        plan, arguments = prepare(sys.argv[1:] if argv is None else argv)
        trainer = make_trainer(plan, arguments, Path(str(plan.training.output_dir)))
        return run(plan, arguments, trainer)


if __name__ == "__main__":
    main()
