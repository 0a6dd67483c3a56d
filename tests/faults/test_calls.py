"""Loops that call the engine at the wrong moment, options under which nothing can happen, values out of range."""

from __future__ import annotations

import logging
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from grades_hf import GradES, GradESConfig
from tests import toy

STEPS = 10
WATCH: dict[str, Any] = {"tau": 1e-30, "alpha": 0.2}


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("grades_hf") and r.levelno >= logging.WARNING]


def start(total: int = STEPS, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, GradES]:
    model = toy.build("full")
    optimizer = toy.optimize("adamw", model)
    return model, optimizer, GradES(model, {**WATCH, **options}, total_steps=total, optimizer=optimizer)


def backward(model: nn.Module) -> None:
    model(**toy.batches(0)[0][0]).loss.backward()


def each_micro_batch(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for number in range(2 * STEPS):
        backward(model)
        engine.step()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()


def twice(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        backward(model)
        engine.step()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()


def after_the_update(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        backward(model)
        optimizer.step()
        engine.step()
        optimizer.zero_grad()


def after_zero_grad(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        engine.step()


def before_backward(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        engine.step()
        backward(model)
        optimizer.step()


def gradients_of_zeros(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        engine.step()
        backward(model)
        optimizer.step()


def too_often(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS + 3):
        backward(model)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()


def another_optimizer(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for _ in range(STEPS):
        optimizer = toy.optimize("sgd", model)
        backward(model)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()


def right(model: nn.Module, optimizer: Any, engine: GradES) -> None:
    for number in range(2 * STEPS):
        backward(model)
        if number % 2:
            engine.step()
            optimizer.step()
            optimizer.zero_grad()


LOOPS = {
    each_micro_batch: "called at steps 1 and 2 without an update",
    twice: "called at steps 1 and 2 without an update",
    after_the_update: "an update before the first engine.step()",
    after_zero_grad: "an update before the first engine.step()",
    before_backward: "no parameter has a gradient at step 1",
    too_often: "more often than the 10 times that were planned",
    another_optimizer: "pass the optimizer that the loop uses",
    right: None,
}


@pytest.mark.compatibility("Custom loops", "engine.step() at a wrong moment of the loop: one line says so", "works")
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_calls_that_do_not_match_are_told_once(loop, caplog):
    model, optimizer, engine = start()
    loop(model, optimizer, engine)
    expected = LOOPS[loop]
    lines = [line for line in messages(caplog) if "the run ends" not in line]
    assert len(lines) == (expected is not None)
    assert expected is None or expected in lines[0]
    engine.close()


@pytest.mark.parametrize("loop", [after_zero_grad, gradients_of_zeros])
def test_an_engine_without_an_optimizer_notices_that_it_sees_nothing(loop, caplog):
    model = toy.build("full")
    engine = GradES(model, {**WATCH, "monitor": "gradient_norm"}, total_steps=STEPS)
    loop(model, toy.optimize("sgd", model), engine)
    (line,) = messages(caplog)
    assert "Call engine.step() after backward() and before zero_grad()" in line


@pytest.mark.compatibility("Custom loops", "engine.step() at each micro-batch of accelerate's accumulate()", "refused")
@pytest.mark.parametrize("wrapped", [True, False])
def test_micro_batches_of_accelerate(wrapped, caplog):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        model = toy.build("full")
        model, optimizer = accelerator.prepare(model, toy.optimize("adamw", model))
        engine = GradES(model, WATCH, total_steps=STEPS, optimizer=optimizer if wrapped else optimizer.optimizer)
        with accelerator.accumulate(model):
            backward(model)
            if wrapped:
                with pytest.raises(RuntimeError, match=r"if accelerator\.sync_gradients: engine\.step\(\)"):
                    engine.step()
            else:
                engine.step()
        assert bool(messages(caplog)) is not wrapped
        engine.close()
    finally:
        accelerator.gradient_state._set_sync_gradients(True)


NOTHING: list[dict[str, Any]] = [
    {"alpha": 0.99},
    {"check_every": 11},
    {"patience": 9},
    {"alpha": 0.5, "patience": 6},
    {"alpha": 0.9, "delay_transfer": True},
    {"alpha": 0.55, "check_every": 5, "patience": 2},
]
SOMETHING: list[dict[str, Any]] = [
    {"alpha": 0.9},
    {"check_every": 10},
    {"patience": 8},
    {"alpha": 0.8, "delay_transfer": True},
    {"alpha": 0.0, "patience": 9},
    {"alpha": 0.0, "patience": 10, "monitor": "gradient_norm"},
]


@pytest.mark.parametrize("options", NOTHING, ids=str)
def test_options_under_which_nothing_can_freeze(options, caplog):
    start(**options)[2].close()
    (line,) = messages(caplog)
    assert "nothing can freeze in this run" in line


@pytest.mark.parametrize("options", SOMETHING, ids=str)
def test_options_under_which_something_freezes_at_last(options, caplog):
    model, optimizer, engine = start(**{**options, "tau": 1e9})
    assert messages(caplog) == []
    for _ in range(STEPS):
        backward(model)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.done
    assert engine.t == STEPS


def test_no_look_can_be_proposed(caplog):
    model = toy.build("full")
    GradES(model, GradESConfig(alpha=0.99), total_steps=12, held_out=lambda model: torch.ones(2)).close()
    (line,) = messages(caplog)
    assert "no look can be made" in line
    assert "check_every=1). Lower these, or train for more steps." in line


# --- values out of range -----------------------------------------------------------------------------------------

HUGE = 10**400
WRONG: dict[str, list[Any]] = {
    "tau": [HUGE, -HUGE, 0, -1, math.inf, math.nan, "x", True, {"q": HUGE}, {"q": None}, {"q": math.nan}, {}, []],
    "alpha": [HUGE, 1, -0.1, math.nan, Fraction(HUGE), "x", False, 1j],
    "patience": [HUGE, 2**53 + 1, 0, -1, 1.5, math.nan, True, "x"],
    "check_every": [HUGE, 0, 2.0, True],
    "max_frozen_fraction": [HUGE, 0, 1.01, math.nan, -HUGE],
    "rise": [HUGE, 0, math.inf, -1],
    "look_rows": [HUGE, 0, 1.5],
    "sample_size": [HUGE, 0, True],
    "max_recompilations": [HUGE, 0, -1],
    "reduction": [HUGE, 1],
    "monitor": [HUGE, ["gradient_norm"]],
    "skip_validation": [HUGE, 2, "yes"],
    "keep_frozen": [HUGE, 2, "yes"],
    "freeze_prefix": [HUGE, "no"],
    "delay_transfer": [HUGE, "no"],
    "merge_frozen_adapters": [HUGE, "no"],
    "average_device": [HUGE, "cuda"],
    "return_weights": [HUGE, "best"],
    "target_modules": [HUGE, "", [], [1], "("],
    "exclude_modules": [HUGE, "", [], [1], "("],
}


@pytest.mark.parametrize(("name", "value"), [(name, v) for name, some in WRONG.items() for v in some])
def test_options_out_of_range(name, value):
    mode = {} if name in ("tau", "rise", "look_rows", "average_device", "return_weights") else {"tau": 1.0}
    with pytest.raises(ValueError, match=name):
        GradESConfig(**{**mode, name: value})


@pytest.mark.parametrize("value", [HUGE, 0, -1, 2.5, 12.0, True, None, "12", math.nan, Decimal(12), torch.tensor(12)])
def test_total_steps_out_of_range(value):
    with pytest.raises(ValueError, match="total_steps"):
        GradES(toy.build("full"), GradESConfig(tau=1.0), total_steps=value)


@pytest.mark.parametrize("value", [np.int64(12), np.int32(12), 12])
def test_total_steps_of_numpy(value):
    engine = GradES(toy.build("full"), GradESConfig(tau=1.0), total_steps=value)
    assert engine.total_steps == 12
    assert type(engine.total_steps) is int


@pytest.mark.parametrize("name", ["loss", "epoch"])
@pytest.mark.parametrize(
    "value", [HUGE, "1", True, 1j, [1.0], torch.ones(2), torch.tensor(1j), object()], ids=lambda v: str(v)[:12]
)
def test_a_step_with_a_value_that_is_no_number(value, name):
    model, _, engine = start()
    backward(model)
    with pytest.raises(ValueError, match=f"{name}="):
        engine.step(**{name: value})
    assert engine.t == 0


LOSSES = [0.5, 1, np.float32(0.5), Fraction(1, 2), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(1)]


@pytest.mark.parametrize("loss", [*LOSSES, math.nan, math.inf, -1.0, 0.0, torch.tensor(math.nan), np.int64(0)], ids=str)
def test_a_step_with_any_number_for_a_loss(loss):
    model, optimizer, engine = start(monitor="gradient_per_loss")
    for _ in range(3):
        backward(model)
        engine.step(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    counts = any(loss is known for known in LOSSES)
    series = engine.history.values["model.layers.0.mlp.up_proj"]
    assert all(math.isfinite(value) for value in series) == counts


class Body:
    """As SetFit's model: no module, but it holds one."""

    def __init__(self) -> None:
        self.model_body = toy.build("full")


@pytest.mark.compatibility(
    "Client trainers",
    "GradES() with an object that is no nn.Module, such as the one that SetFit's callbacks get",
    "refused",
)
@pytest.mark.parametrize("model", [None, 3, "gpt2", Body(), {"a": 1}, [nn.Linear(2, 2)], nn.Linear])
def test_what_is_no_module_is_refused_in_a_sentence(model):
    with pytest.raises(ValueError, match=r"is no torch\.nn\.Module\. Pass the module that is trained") as error:
        GradES(model, GradESConfig(tau=1.0), total_steps=3)
    assert ("model.model_body" in str(error.value)) == isinstance(model, Body)


@pytest.mark.parametrize("config", [3, "tau", [1.0], {"tua": 1.0}])
def test_what_is_no_config_is_refused_in_a_sentence(config):
    with pytest.raises(ValueError, match="GradESConfig|no option"):
        GradES(toy.build("full"), config, total_steps=3)
