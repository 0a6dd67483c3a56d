"""The smallest models and runs that tests of engine and callback need: a random Llama, random tokens, a Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

MATRICES_PER_LAYER = 7


def llama(layers: int = 2, seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    """A random Llama of width 16; the same weights for the same seed."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=tied,
        )
    )


def lora(model: nn.Module | None = None, adapter: str = "default", **options: Any) -> PeftModel:
    """A LoRA of rank 2 on all linear layers."""
    base = llama() if model is None else model
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", **options), adapter_name=adapter)


def tokens(rows: int = 48, length: int = 12, seed: int = 3) -> Dataset:
    """Random token blocks."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(output_dir: Path | str, **options: Any) -> TrainingArguments:
    """12 optimizer steps, one log a step, no checkpoint, no reporter."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "weight_decay": 0.1,
    }
    return TrainingArguments(str(output_dir), **{**defaults, **options})


def trainer(
    model: nn.Module,
    output_dir: Path | str,
    callbacks: list[TrainerCallback],
    cls: Callable[..., Trainer] = Trainer,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer on `tokens()`; `options` are training arguments, `extra` arguments of the trainer itself."""
    return cls(
        model=model,
        args=arguments(output_dir, **options),
        train_dataset=tokens(),
        callbacks=callbacks,
        **(extra or {}),
    )


def enable_checkpointing(model: Any, reentrant: bool) -> None:
    """Gradient checkpointing as Trainer switches it on, with the hook that reentrant checkpointing needs."""
    new = hasattr(model, "activation_checkpointing_enable")  # transformers before 5.23 has the older name
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def checkpointing_arguments(reentrant: bool) -> dict[str, Any]:
    """The training arguments that switch gradient checkpointing on, by this version's names."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}


class Spy(TrainerCallback):
    """Copies of all weights before each optimizer step, by step (1-based), and what else a test asks for."""

    def __init__(self, look: Callable[[nn.Module, Any], Any] | None = None) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.seen: list[Any] = []
        self.look = look

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step + 1] = {n: p.detach().clone() for n, p in model.named_parameters()}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.look is not None:
            self.seen.append(self.look(model, optimizer))


def between(values: dict[str, Any], part: float = 0.5) -> float:
    """A threshold that `part` of the components' last values lie below, half way between two of them."""
    last = sorted(series[-1] for series in values.values() if len(series))
    index = min(max(1, round(part * len(last))), len(last) - 1)
    return (last[index - 1] + last[index]) / 2
