"""A run without GradES is counted like one with it, and both compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import grades_hf.record.meter
from benchmarks.flops import FlopCounterCallback, compute
from grades_hf import GradESCallback
from tests import small
from tests.small import llama

STEPS = 12


class Freeze(TrainerCallback):
    """Freezes the first block's down_proj at one step, as GradES does, and may end training at another."""

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


def trained(
    folder: Path, *callbacks: TrainerCallback, resume: str | None = None, **options: Any
) -> tuple[FlopCounterCallback, dict[str, float]]:
    counter = FlopCounterCallback()
    trainer = small.trainer(llama(), folder, [*callbacks, counter], **options)
    trainer.train(resume_from_checkpoint=resume)
    return counter, compute(counter.meter, STEPS)


def test_a_run_without_grades_is_full(tmp_path: Path) -> None:
    callback = GradESCallback(tau=1e-30)
    small.trainer(llama(), tmp_path / "grades", [callback]).train()
    _, plain = trained(tmp_path / "plain")
    assert callback.engine is not None
    assert plain == compute(callback.engine.meter, STEPS)
    assert plain["used"] == plain["full"] > 0
    assert plain["saved"] == 0
    assert compute(None, STEPS) == {}


def test_freezing_and_ending_early_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grades_hf.record.meter, "COUNT_EVERY", 1)
    _, plain = trained(tmp_path / "plain")
    _, frozen = trained(tmp_path / "frozen", Freeze(at=3))
    _, ended = trained(tmp_path / "ended", Freeze(at=3, end=4))
    gradient = 2 * 4 * 12 * 16 * 24  # of the matrix, at each step
    assert plain["used"] - frozen["used"] == pytest.approx(9 * gradient, rel=1e-4)
    assert frozen["full"] == pytest.approx(plain["full"], rel=1e-4)
    assert ended["full"] == pytest.approx(plain["full"], rel=1e-4)
    assert ended["saved"] > 8 / 12


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "whole")
    options = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "parts", Freeze(at=99, end=8), **options)
    _, resumed = trained(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-8"), **options)
    assert resumed == whole


def test_a_second_run_starts_clean(tmp_path: Path) -> None:
    counter = FlopCounterCallback()
    trainer = small.trainer(llama(), tmp_path, [counter])
    trainer.train()
    first = compute(counter.meter, STEPS)
    trainer.train()
    assert compute(counter.meter, STEPS) == first
