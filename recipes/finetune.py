"""Fine-tune a language model on your own rows or on benchmarks; GradES freezes weight matrices or ends the run early.

    accelerate launch --quiet recipes/finetune.py --data my.jsonl --model NAME --output_dir runs/mine [--use_peft true]
    accelerate launch --quiet recipes/finetune.py --config recipes/configs/quickstart.yaml [--argument value ...]

A row has `prompt` and `completion`, or `messages`, or `text`. All arguments of TRL's SFTConfig and ModelConfig work,
too. `--dry_run` shows in less than a minute whether everything fits together. A run leaves in `output_dir` the
model or adapter with its tokenizer, `grades_history.arrow` and `results.json`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: CPU threads that wait do not keep a core busy

from datasets import Dataset
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from grades_hf import GradESConfig, GradESTrainerMixin
from recipes import dry_run, pypi
from recipes.arguments import GradESArguments, check, command, grades_config, make_directory, option, parse, thresholds
from recipes.results import of_run, side_by_side, tell
from recipes.tasks import accuracy, rows


@dataclass
class RecipeArguments(rows.DataArguments):
    """What is fine-tuned, and how the result is measured."""

    model: str = option("HuggingFaceTB/SmolLM2-135M-Instruct", "Directory or hub id of a causal language model.")
    evaluate_before: bool = option(True, "Measure loss and accuracy before training, too.")
    compare: bool = option(False, "Train a second time without GradES, and print both runs side by side.")
    dry_run: bool = option(
        False, "Train a few steps of a small random model of the same architecture, without any download."
    )


@dataclass
class Plan:
    """A run whose arguments and rows have been checked. Nothing is loaded into memory so far.

    Attributes:
        location: What `from_pretrained` takes: a directory, or a hub id.
        tests: For each benchmark the rows that its accuracy is measured on.
        arguments: The options of GradES as they were given.
        more: The arguments of the types that a caller of `prepare` has added.
    """

    recipe: RecipeArguments
    model: ModelConfig
    training: SFTConfig
    grades: GradESConfig | None
    train: Dataset
    held_out: Dataset | None
    tests: dict[str, Dataset]
    location: str = ""
    arguments: Any = None
    more: tuple[Any, ...] = ()


def prepare(argv: list[str], *more: Any) -> Plan:
    """Parse the arguments, read the rows, find the model.

    Raises:
        ValueError: something cannot work; the message names the argument, its value and the remedy.
    """
    types = (RecipeArguments, ModelConfig, SFTConfig, GradESArguments, *more)
    recipe, model, training, arguments, *added = parse(types, argv, (__doc__ or "").split("\n")[0])
    grades = grades_config(arguments)
    if recipe.dry_run:
        pypi.go_offline()
    train, held_out, tests = rows.load(recipe, training, offline=recipe.dry_run)
    if len(held_out or ()) < 2 and grades is not None and grades.tau is None:
        raise ValueError(
            f"held_out_rows={len(held_out or ())}, but without a tau GradES looks at the loss on held-out rows, at "
            "least two. Raise held_out_rows, pass eval_data, or pass a tau."
        )
    if held_out is None and str(training.eval_strategy.value) != "no":
        raise ValueError(f"eval_strategy={training.eval_strategy.value!r} needs rows: pass eval_data or held_out_rows.")
    check(model, training, recipe.dry_run)
    plan = Plan(recipe, model, training, grades, train, held_out, tests, arguments=arguments, more=tuple(added))
    if recipe.dry_run:
        dry_run.shrink(plan)
    else:
        plan.location = pypi.locate_model(recipe.model)
    return plan


class GradESSFTTrainer(GradESTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with GradES."""


def build(plan: Plan, grades: GradESConfig | None, output: Path, kind: Any = None, **options: Any) -> SFTTrainer:
    """Load the model and make its trainer.

    Args:
        plan: The run.
        grades: The options of GradES; None: without it.
        output: The directory of the run.
        kind: Another class than GradESSFTTrainer or SFTTrainer.
        options: More arguments of it.

    Raises:
        ValueError: an option does not fit the model, or no row fits.
    """
    training: Any = copy.copy(plan.training)
    training.output_dir = str(output)
    make_directory(output)
    training.model_init_kwargs = {
        **(training.model_init_kwargs or {}),
        "revision": plan.model.model_revision,
        "attn_implementation": plan.model.attn_implementation,
        "dtype": plan.model.dtype,
    }
    tokenizer = AutoTokenizer.from_pretrained(plan.location, revision=plan.model.model_revision)
    chat = isinstance(plan.train[0].get("prompt"), list) or "messages" in plan.train.column_names
    if chat and tokenizer.chat_template is None and training.chat_template_path is None:
        raise ValueError(
            f"model={plan.recipe.model!r} has no chat template, which rows with messages need. Pass "
            "chat_template_path, an instruction-tuned model, or rows with prompt and completion."
        )
    if grades is not None:
        options = {"grades": grades, **options}
    trainer: Any = (kind or (SFTTrainer if grades is None else GradESSFTTrainer))(
        model=plan.location,
        args=training,
        train_dataset=plan.train,
        eval_dataset=plan.held_out,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(plan.model),
        peft_config=get_peft_config(plan.model),
        **options,
    )
    for name, kept in (("train", trainer.train_dataset), ("held-out", trainer.eval_dataset)):
        if kept is not None and len(kept) == 0:
            raise ValueError(
                f"max_length={training.max_length} leaves no answer in any of the {name} rows: all prompts are at "
                "least as long. Raise max_length, or shorten the prompts."
            )
    if grades is not None and grades.tau is not None:  # better refused now than after the first evaluation
        thresholds(trainer.model, grades)
    return trainer  # type: ignore[no-any-return]


def measure(plan: Plan, trainer: Any) -> dict[str, Any]:
    """The loss on the held-out rows, and the accuracy on the benchmarks; on the main process alone the latter."""
    scores: dict[str, Any] = {}
    if plan.held_out is not None:
        scores["loss"] = trainer.evaluate()["eval_loss"]
    if plan.tests and trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        batch_size = plan.training.per_device_eval_batch_size
        scores |= accuracy.mean(
            {
                name: accuracy.measure(model, trainer.processing_class, name, test, batch_size)
                for name, test in plan.tests.items()
            }
        )
    trainer.accelerator.wait_for_everyone()
    return scores


def run(plan: Plan, trainer: SFTTrainer) -> dict[str, Any]:
    """Measure, train, measure, save; returns what `results.json` holds.

    Raises:
        ValueError: an option does not fit, seen before the first step.
    """
    clock = {"evaluation": 0.0}
    evaluation: dict[str, Any] = {"task": "+".join(plan.tests) or "held-out rows"}
    evaluation["rows"] = sum(map(len, plan.tests.values())) or len(plan.held_out or ())

    def measured(when: str) -> None:
        started = time.perf_counter()
        evaluation[when] = measure(plan, trainer)
        clock["evaluation"] += time.perf_counter() - started

    if plan.recipe.evaluate_before:
        measured("before")
    started = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    except ValueError as error:
        if trainer.state.global_step == 0:
            raise
        raise RuntimeError(f"training failed after step {trainer.state.global_step}") from error
    clock["training"] = time.perf_counter() - started
    measured("after")
    trainer.save_model()
    results = {"evaluation": evaluation, "seconds": clock, "seed": plan.training.seed, **of_run(trainer)}
    results |= {"method": "lora" if plan.model.use_peft else "full"}
    results["sources"] = {"model": plan.recipe.model, "rows": plan.recipe.data or plan.recipe.task}
    if trainer.is_world_process_zero():
        Path(str(trainer.args.output_dir), "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    return results


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command."""
    with command("finetune.py"):
        plan = prepare(sys.argv[1:] if argv is None else argv)
        output = Path(str(plan.training.output_dir))
        shown = plan.recipe.dry_run and not plan.arguments.observe
        if shown and plan.grades is not None and plan.grades.tau is not None:
            plan.grades = dry_run.fitting(plan.grades, build(plan, plan.grades, output))
        trainer = build(plan, plan.grades, output)
        with dry_run.quiet() if plan.recipe.dry_run else contextlib.nullcontext():
            results = run(plan, trainer)
            lines = tell(results)
            if plan.recipe.compare and plan.grades is not None:
                lines += ["", *side_by_side(results, run(plan, build(plan, None, output / "without")))]
    if trainer.is_world_process_zero():
        sys.stdout.write("\n".join(["", *lines, f"The model and its records are in {output}.", ""]))
    return results


if __name__ == "__main__":
    main()
