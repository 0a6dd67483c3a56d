"""The recipe without Trainer: a plain training loop on accelerate, with the GradES engine in it. Made to be copied.

    accelerate launch --quiet recipes/no_trainer.py --data my.jsonl --model NAME --tau 0.5 --output_dir runs/mine

Arguments are those of `finetune.py`; training arguments that this loop does not know are refused. It freezes matrices
by a threshold, as the paper does. A run leaves the model or adapter with its tokenizer and `grades_history.arrow`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import operator
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, get_scheduler, set_seed
from trl import SFTConfig, get_peft_config

from grades_hf import GradES
from recipes import finetune
from recipes.arguments import command, parse

logger = logging.getLogger("recipes.no_trainer")

KNOWN = (
    "output_dir", "seed", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "per_device_eval_batch_size", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "max_length", "lr_scheduler_type", "warmup_steps", "bf16", "use_cpu", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit", "report_to", "disable_tqdm", "resume_from_checkpoint",
    "logging_strategy", "eval_strategy",
)  # fmt: skip


def prepare(argv: list[str]) -> finetune.Plan:
    """The checked arguments and rows of a run.

    Raises:
        ValueError: what `finetune.prepare` refuses, or a training argument that this loop does not know.
    """
    plan = finetune.prepare(argv)
    args: Any = plan.training
    default = parse((SFTConfig,), ["--output_dir", args.output_dir], "")[0]
    for item in dataclasses.fields(SFTConfig):
        value = getattr(args, item.name)
        if item.init and item.name not in KNOWN and value != getattr(default, item.name):
            raise ValueError(f"{item.name}={value!r}: no_trainer.py does not know that argument; use finetune.py.")
    if plan.grades is None or plan.grades.tau is None:
        raise ValueError("tau is missing: no_trainer.py freezes by a threshold. Pass --tau NUMBER, or use finetune.py.")
    return plan


def encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """A row as token ids, with labels on the answer (-100 elsewhere), or on everything where there is only a text."""
    chat = isinstance(row.get("prompt"), list)
    if chat:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    else:
        prompt = row.get("prompt", "")
        text = prompt + row["completion" if "prompt" in row else "text"] + tokenizer.eos_token
    ids, before = (tokenizer(part, add_special_tokens=not chat)["input_ids"] for part in (text, prompt))
    start = sum(1 for _ in itertools.takewhile(bool, map(operator.eq, ids, before))) if prompt else 0
    return {"input_ids": ids[:max_length], "labels": ([-100] * start + ids[start:])[:max_length]}


def train(plan: finetune.Plan, model: Any, tokenizer: Any, accelerator: Accelerator) -> tuple[Any, GradES]:
    """Train, and return the model with its engine."""
    args: Any = plan.training
    accumulation = args.gradient_accumulation_steps
    encoded = [encode(row, tokenizer, args.max_length) for row in plan.train]
    collate = DataCollatorForSeq2Seq(tokenizer)
    set_seed(args.seed)
    loader: Any = accelerator.prepare(
        DataLoader(encoded, args.per_device_train_batch_size, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
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
    warmup = args.get_warmup_steps(total_steps)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)

    # GradES: after everything else is set up. It counts the steps, and is saved and loaded with the rest.
    assert plan.grades is not None
    engine = GradES(model, plan.grades, total_steps=total_steps, optimizer=optimizer)
    accelerator.register_for_checkpointing(scheduler, engine)
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)

    model.train()
    while engine.t < total_steps and not engine.done:
        epoch, done = divmod(engine.t, steps_per_epoch)
        loader.set_epoch(epoch)
        rest = iter(accelerator.skip_first_batches(loader, done * accumulation))
        with torch.random.fork_rng(devices=[], enabled=done > 0):  # a loader draws a number, as before the checkpoint
            rest = itertools.chain([next(rest)], rest)
        while batches := list(itertools.islice(rest, accumulation)):
            # The mean over all tokens of the step, on all processes, that have a label.
            tokens = accelerator.reduce(sum(batch["labels"][:, 1:].ne(-100).sum() for batch in batches))
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
            scheduler.step()
            optimizer.zero_grad()
            if engine.t % every(args.logging_steps, total_steps) == 0:
                engine.log(accelerator.reduce(mean_loss, "mean").item())  # GradES: a row of history.logs
                logger.info("step %(step)d: loss %(loss).4f, %(frozen)d frozen", engine.history.logs[-1])
            if args.save_strategy == "steps" and engine.t % every(args.save_steps, total_steps) == 0:
                accelerator.save_state(str(Path(args.output_dir) / f"checkpoint-{engine.t}"))
            if engine.done or engine.t == total_steps:
                break
    engine.close()
    return accelerator.unwrap_model(model), engine


def every(steps: float, total_steps: int) -> int:
    """An interval in steps, which may be given as a part of all steps."""
    return int(steps) if steps >= 1 else math.ceil(steps * total_steps)


def main(argv: list[str] | None = None) -> GradES:
    """The command."""
    with command("no_trainer.py"):
        plan = prepare(sys.argv[1:] if argv is None else argv)
        args: Any = plan.training
        accelerator = Accelerator(
            cpu=args.use_cpu,
            mixed_precision="bf16" if args.bf16 else None,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(plan.location)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        set_seed(args.seed)
        model: Any = AutoModelForCausalLM.from_pretrained(plan.location, dtype=plan.model.dtype)
        adapters = get_peft_config(plan.model)
        model = model if adapters is None else get_peft_model(model, adapters)
        model.config.use_cache = False
        model, engine = train(plan, model.to(accelerator.device), tokenizer, accelerator)
    if accelerator.is_main_process:
        model.save_pretrained(args.output_dir)
        tokenizer.save_pretrained(args.output_dir)
        engine.history.save(Path(args.output_dir) / "grades_history.arrow")
    logger.info("%s", engine.conclude())
    accelerator.end_training()
    return engine


if __name__ == "__main__":
    main()
