"""The recipe without Trainer: a plain training loop on accelerate, with the GradES engine in it. Made to be copied.

    accelerate launch recipes/no_trainer.py --config recipes/configs/quickstart.yaml [--argument value ...]

Arguments and result are those of `finetune.py`: the same weights, the same matrices frozen at the same steps. Training
arguments that this loop does not know are refused. What a run leaves in `output_dir`: the adapter or model with its
tokenizer, `grades_history.json` and `results.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: in recipes/, evaluate.py would hide the library of the same name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: CPU threads that wait do not keep a core busy

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, TrainingArguments, get_scheduler, set_seed

from grades_hf import GradES
from grades_hf.report import summarize
from recipes import finetune
from recipes.console import configure_logging, use_all_cores
from recipes.evaluate import evaluate
from recipes.examples import IGNORE, encode
from recipes.models import load_model, load_tokenizer

logger = logging.getLogger("recipes.no_trainer")

KNOWN = (
    "output_dir", "seed", "data_seed", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16",
    "fp16", "use_cpu", "logging_steps", "save_strategy", "save_steps", "resume_from_checkpoint", "report_to",
    "disable_tqdm", "dataloader_pin_memory",
)  # fmt: skip


def prepare(argv: list[str]) -> finetune.Plan:
    """The checked arguments and data of a run.

    Raises:
        ValueError: what `finetune.prepare` refuses, or a training argument that this loop does not know.
    """
    plan = finetune.prepare(argv, checkpoint_file="model.safetensors")
    args: Any = plan.training
    default = TrainingArguments(args.output_dir, use_cpu=args.use_cpu)  # the device decides how processes find together
    for option in dataclasses.fields(TrainingArguments):
        value = getattr(args, option.name)
        if option.init and option.name not in KNOWN and value != getattr(default, option.name):
            raise ValueError(f"{option.name}={value!r}: no_trainer.py does not know that argument; use finetune.py.")
    if plan.grades is None:
        raise ValueError("grades=False: this loop has the engine built in; use finetune.py to train without it.")
    unknown = {
        "dry_run": plan.arms.dry_run, "load_in_4bit": plan.model.load_in_4bit,
        "objective": plan.data.objective != "answer", "measure": plan.evaluation.measure != "accuracy",
        "task": len(plan.tests) > 1,
    }  # fmt: skip
    for name in (name for name, used in unknown.items() if used):
        raise ValueError(f"{name}: no_trainer.py does not know that value of it; use finetune.py.")
    if args.save_strategy not in ("no", "steps") or args.resume_from_checkpoint is True:
        raise ValueError(
            f"save_strategy={args.save_strategy.value!r}, resume_from_checkpoint={args.resume_from_checkpoint!r}: "
            'no_trainer.py saves with save_strategy="no" or "steps", and resumes from the checkpoint that is named.'
        )
    return plan


def train(
    plan: finetune.Plan, model: Any, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> tuple[Any, GradES]:
    """Train, and return the model with its engine."""
    args: Any = plan.training
    accumulation = args.gradient_accumulation_steps
    set_seed(args.seed)
    loader: Any = accelerator.prepare(
        DataLoader(
            encode(plan.task, plan.train, tokenizer, plan.data.max_length),  # type: ignore[arg-type]
            batch_size=args.per_device_train_batch_size,
            shuffle=True,
            collate_fn=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        )
    )
    steps_per_epoch = math.ceil(len(loader) / accumulation)
    total_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},  # norms and biases
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    # GradES: after everything else is set up. It counts the steps, and is saved and loaded with the rest.
    assert plan.grades is not None
    engine = GradES(model, plan.grades, total_steps=total_steps, optimizer=optimizer)
    accelerator.register_for_checkpointing(scheduler, engine)
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)

    model.train()
    while engine.t < total_steps and not engine.done:
        epoch, steps_done = divmod(engine.t, steps_per_epoch)
        loader.set_epoch(epoch)
        rest = iter(accelerator.skip_first_batches(loader, steps_done * accumulation))
        for batches in chunks(rest, accumulation, resumed=steps_done > 0):
            # The mean over all tokens of the step, on all processes, that have a label.
            tokens = accelerator.reduce(sum(batch["labels"][:, 1:].ne(IGNORE).sum() for batch in batches))
            mean_loss = torch.zeros((), device=accelerator.device)
            for last, batch in enumerate(batches, start=1 - len(batches)):
                with contextlib.nullcontext() if last == 0 else accelerator.no_sync(model):
                    loss = model(**batch, num_items_in_batch=tokens).loss * accelerator.num_processes
                    accelerator.backward(loss)
                mean_loss += loss.detach()
            if args.max_grad_norm > 0:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)

            engine.step()  # GradES: between the gradient that the optimizer is to see and the optimizer's step

            optimizer.step()
            if not accelerator.optimizer_step_was_skipped:  # float16: a gradient has overflowed
                scheduler.step()
            optimizer.zero_grad()
            if engine.t % every(args.logging_steps, total_steps) == 0:
                engine.log(accelerator.reduce(mean_loss, "mean").item())  # GradES: a row of history.logs
                logger.info("step %(step)d: loss %(loss).4f, %(frozen)d frozen", engine.history.logs[-1])
            if args.save_strategy == "steps" and engine.t % every(args.save_steps, total_steps) == 0:
                accelerator.save_state(str(plan.output / f"checkpoint-{engine.t}"))
            if engine.done or engine.t == total_steps:
                break
    engine.close()
    return accelerator.unwrap_model(model), engine


def chunks(batches: Iterator[Any], size: int, *, resumed: bool) -> Iterator[list[Any]]:
    """`size` batches at a time, the last time what is left.

    A loader draws a random number when it starts. In a `resumed` epoch that was done before the checkpoint.
    """
    with torch.random.fork_rng(devices=[], enabled=resumed):
        first = next(batches)
    batches = itertools.chain([first], batches)
    while chunk := list(itertools.islice(batches, size)):
        yield chunk


def every(steps: float, total_steps: int) -> int:
    """An interval in steps, which may be given as a part of all steps."""
    return int(steps) if steps >= 1 else math.ceil(steps * total_steps)


def run(plan: finetune.Plan) -> dict[str, Any]:
    """Evaluate, train, evaluate, save; returns what `results.json` holds."""
    args = plan.training
    accelerator = Accelerator(
        cpu=args.use_cpu,
        mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.data_seed),
    )
    tokenizer = load_tokenizer(plan.location)
    model: Any = load_model(plan.location, plan.model.dtype)
    set_seed(args.seed)
    if plan.model.method == "lora":
        model = get_peft_model(model, plan.model.lora_config())
    model.to(accelerator.device)
    scores: dict[str, Any] = {"task": plan.task.name, "rows": len(plan.test)}

    def measure(when: str) -> None:
        if accelerator.is_main_process:
            scores[when] = evaluate(model, tokenizer, plan.task.name, plan.test, args.per_device_eval_batch_size)
            logger.info("Accuracy %s training: %s", when, scores[when])
        accelerator.wait_for_everyone()

    if plan.evaluation.evaluate_before:
        measure("before")
    model, engine = train(plan, model, tokenizer, accelerator)
    if plan.evaluation.evaluate_after:
        measure("after")
    results = summarize(engine.history, steps_run=engine.t, evaluation=scores)
    if accelerator.is_main_process:
        model.save_pretrained(plan.output)
        tokenizer.save_pretrained(plan.output)
        engine.history.save(plan.output / "grades_history.json")
        (plan.output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    accelerator.end_training()
    return results


def main(argv: list[str] | None = None) -> None:
    """The command: bad input ends it with one line and exit status 1."""
    configure_logging()
    use_all_cores()
    try:
        run(prepare(sys.argv[1:] if argv is None else argv))
    except ValueError as error:
        sys.exit(f"no_trainer.py: error: {error}")


if __name__ == "__main__":
    main()
