"""FLOPs of real steps equal closed-form numbers and torch's own counter, and counting changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from recipes.flops import FlopCounter, FlopCounterCallback

WIDTH, FEED, LAYERS, HEADS, KV_HEADS, VOCABULARY, BATCH, LENGTH = 16, 40, 2, 4, 2, 64, 2, 10
HEAD = WIDTH // HEADS
TOKENS = BATCH * LENGTH
LINEAR = 2 * WIDTH * WIDTH + 2 * WIDTH * KV_HEADS * HEAD + 3 * WIDTH * FEED  # weights of a block's matrices
FORWARD_LINEAR = 2 * TOKENS * (LAYERS * LINEAR + WIDTH * VOCABULARY)
FORWARD_ATTENTION = LAYERS * 2 * (2 * BATCH * HEADS * LENGTH * LENGTH * HEAD)  # scores and weighted values
FORWARD = FORWARD_LINEAR + FORWARD_ATTENTION
FULL = 3 * FORWARD  # backward: input gradients and weight gradients
DOWN_GRADIENT = 2 * TOKENS * FEED * WIDTH  # of one down_proj's weight


def model(attention: str = "eager") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FEED,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
    )


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


class Freeze(TrainerCallback):
    """Freezes layer 0's down_proj at one step, as GradES does, and may end training at another."""

    def __init__(self, at: int, end: int | None = None) -> None:
        self.at, self.end = at, end

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            weight = kwargs["model"].model.layers[0].mlp.down_proj.weight
            weight.requires_grad_(False)
            weight.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= state.global_step == self.end
        return control


def trained(folder: Path, counter: FlopCounterCallback, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    ids = torch.randint(VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    arguments: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": BATCH, "save_strategy": "no"}
    arguments |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    trainer = Trainer(
        model(),
        TrainingArguments(str(folder), **arguments | options),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        callbacks=[counter, *callbacks],
    )
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


def test_counts_equal_closed_forms() -> None:
    with FlopCounter() as counter:
        loss = model()(**batch()).loss
        assert counter.total == FORWARD
        loss.backward()
    assert counter.total == FULL


def test_counts_equal_those_of_torch() -> None:
    with FlopCounterMode(display=False) as expected:
        model()(**batch()).loss.backward()
    assert expected.get_total_flops() == FULL


def test_the_attention_kernel_of_the_cpu_is_counted() -> None:
    with FlopCounter() as counter:
        loss = model("sdpa")(**batch()).loss
        assert counter.total == FORWARD
        loss.backward()
    assert counter.total == FULL + FORWARD_ATTENTION // 2  # the kernel computes the scores again in backward


def test_counting_changes_no_bit() -> None:
    gradients = []
    for counted in (False, True):
        net = model("sdpa").bfloat16()
        if counted:
            with FlopCounter():
                net(**batch()).loss.backward()
        else:
            net(**batch()).loss.backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(plain, counted) for plain, counted in zip(*gradients, strict=True))


@pytest.mark.parametrize("every", [1, 10])
def test_a_run_with_nothing_frozen_saves_nothing(tmp_path: Path, every: int) -> None:
    counter = FlopCounterCallback(every)
    trained(tmp_path, counter, gradient_accumulation_steps=2)
    assert counter.steps == 6
    assert counter.total == pytest.approx(6 * 2 * FULL)
    assert counter.forward == pytest.approx(6 * 2 * FORWARD)
    assert counter.summary() == pytest.approx({"used": 12 * FULL, "full": 12 * FULL, "saved": 0})


@pytest.mark.parametrize("every", [1, 10])
def test_a_freeze_saves_its_weight_gradient_from_the_next_step_on(tmp_path: Path, every: int) -> None:
    counter = FlopCounterCallback(every)
    trained(tmp_path, counter, Freeze(at=3))
    assert counter.total == pytest.approx(6 * FULL - 3 * DOWN_GRADIENT)
    assert counter.summary()["full"] == pytest.approx(6 * FULL)
    assert counter.summary()["saved"] == pytest.approx(3 * DOWN_GRADIENT / (6 * FULL))


def test_steps_that_were_not_run_are_saved(tmp_path: Path) -> None:
    counter = FlopCounterCallback()
    trained(tmp_path, counter, Freeze(at=3, end=4))
    assert counter.summary()["full"] == pytest.approx(6 * FULL)
    assert counter.summary()["used"] == pytest.approx(4 * FULL - DOWN_GRADIENT)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    whole = FlopCounterCallback()
    trained(tmp_path / "whole", whole, Freeze(at=5))
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "parts", FlopCounterCallback(), Freeze(at=9, end=4), **options)
    resumed = FlopCounterCallback()
    trained(
        tmp_path / "parts",
        resumed,
        Freeze(at=5),
        resume_from_checkpoint=str(tmp_path / "parts/checkpoint-4"),
        **options,
    )
    assert resumed.summary() == pytest.approx(whole.summary())


def test_a_second_run_starts_clean(tmp_path: Path) -> None:
    counter = FlopCounterCallback()
    trainer = trained(tmp_path, counter)
    first = counter.summary()
    trainer.train()
    assert counter.summary() == first
