"""TRL's trainers: supervised fine-tuning, preferences and rewards, with TRL's default gradient checkpointing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.clients.checks import OPTIONS, check, config, same_weights, train
from tests.resumable import record

# TRL sets an argument by the name that it has in older versions of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")

GROUPS = ("q", "down")
CASES = [
    pytest.param(peft, mixin, id=f"{'lora' if peft else 'full'}-{'mixin' if mixin else 'callback'}")
    for peft in (False, True)
    for mixin in (False, True)
]


@pytest.fixture
def folder(tiny_model_dir: Path, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A saved model of two layers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def common(folder: Path, peft: bool) -> dict[str, Any]:
    """The arguments that all of TRL's trainers take."""
    adapters = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    return {"model": AutoModelForCausalLM.from_pretrained(folder), "peft_config": adapters}


def saves_what_it_trained(trainer: Trainer, base: Path, peft: bool) -> None:
    trainer.save_model(str(base.parent / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(base if peft else base.parent / "saved")
    if peft:
        loaded = PeftModel.from_pretrained(loaded, base.parent / "saved")
    assert same_weights(trainer.model, loaded)


def texts() -> Dataset:
    return Dataset.from_dict({"text": [f"{n} times there was a cat who liked fish." for n in range(24)]})


def preferences() -> Dataset:
    columns = {
        "prompt": [f"Once upon a time number {n}" for n in range(24)],
        "chosen": [" there was a little cat."] * 24,
        "rejected": [" cat the the milk upon."] * 24,
    }
    return Dataset.from_dict(columns)


def sft(folder: Path, tokenizer: PreTrainedTokenizerBase, peft: bool, output: str, **options: Any) -> dict[str, Any]:
    arguments = SFTConfig(str(folder.parent / output), max_length=32, **{**OPTIONS, **options})
    assert arguments.gradient_checkpointing
    return {**common(folder, peft), "args": arguments, "train_dataset": texts(), "processing_class": tokenizer}


@pytest.mark.compatibility("Client trainers", "TRL SFTTrainer, full and LoRA, callback and mixin", "works")
@pytest.mark.parametrize(("peft", "mixin"), CASES)
def test_sft(peft: bool, mixin: bool, folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    run = train(SFTTrainer, config(*GROUPS), mixin=mixin, **sft(folder, tiny_tokenizer, peft, "sft"))
    check(*run, GROUPS)
    saves_what_it_trained(run[0], folder, peft)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_sft_resumed_equals_uninterrupted(peft: bool, folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    runs = []
    for resume in (None, str(folder.parent / "first" / "checkpoint-4")):
        arguments = sft(folder, tiny_tokenizer, peft, "first", **options)
        runs.append(train(SFTTrainer, config(*GROUPS), mixin=False, resume=resume, **arguments))
    (whole, engine, spy), (resumed, resumed_engine, _) = runs
    check(whole, engine, spy, GROUPS)
    assert resumed_engine.frozen == engine.frozen
    assert record(resumed_engine.history) == record(engine.history)
    assert same_weights(whole.model, resumed.model)


@pytest.mark.compatibility("Client trainers", "TRL DPOTrainer, full and LoRA, callback and mixin", "works")
@pytest.mark.parametrize(("peft", "mixin"), CASES)
def test_dpo(peft: bool, mixin: bool, folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """With LoRA the reference is the model itself under `disable_adapter`, which unfreezes what it finds."""
    arguments = DPOConfig(str(folder.parent / "dpo"), max_length=32, **OPTIONS)
    assert arguments.gradient_checkpointing
    more = {"args": arguments, "train_dataset": preferences(), "processing_class": tiny_tokenizer}
    run = train(DPOTrainer, config(*GROUPS), mixin=mixin, **common(folder, peft), **more)
    assert (run[0].ref_model is None) is peft
    check(*run, GROUPS)
    saves_what_it_trained(run[0], folder, peft)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.mark.compatibility("Client trainers", "TRL GRPOTrainer, full and LoRA", "works")
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_grpo(peft: bool, folder: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    options = {"max_completion_length": 8, "num_generations": 2, "beta": 0.1, "temperature": 1.5}
    arguments = GRPOConfig(str(folder.parent / "grpo"), **{**OPTIONS, **options})
    more = {"args": arguments, "train_dataset": preferences().select_columns("prompt"), "reward_funcs": reward}
    run = train(
        GRPOTrainer, config(*GROUPS), mixin=peft, **common(folder, peft), **more, processing_class=tiny_tokenizer
    )
    check(*run, GROUPS)
    assert all(torch.isfinite(p).all() for p in run[0].model.parameters())
