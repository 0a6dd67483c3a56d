"""The trained loss of a step: what backward is called on, whoever computes it."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import small, toy

UNENDING: dict[str, Any] = {"held_out": lambda model: torch.ones(2)}  # every look says to go on
ROWS = torch.tensor(small.tokens(16)["input_ids"]).view(4, 4, -1)


def watch(model: nn.Module, **how: Any) -> tuple[GradES, list[float]]:
    """An engine, and what it takes for the loss of each step."""
    engine, seen = GradES(model, GradESConfig(), total_steps=9, **UNENDING, **how), []
    correct = engine.extension("loss").correct

    def noting(values, components, step):
        seen.append(step.loss.item())
        return correct(values, components, step)

    engine.extension("loss").correct = noting
    return engine, seen


def step(model: nn.Module, number: int = 0) -> torch.Tensor:
    return model(**toy.batches(0)[number][0]).loss


# --- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_are_norms_divided_by_the_loss(kind, accumulation, given):
    """The losses of a step's micro-batches are added up; a loop that knows better hands its own over."""
    model = toy.build(kind)
    optimizer = toy.optimize("adamw", model)
    engine = GradES(model, GradESConfig(), total_steps=toy.STEPS, optimizer=optimizer, **UNENDING)
    expected = {component.name: [] for component in engine.components}
    for micro in toy.batches(0, accumulation):
        total = 0.0
        for batch in micro:
            loss = model(**batch).loss
            loss.backward()
            total += loss.item()
        for component in engine.components:
            norm = sum(float(abs(x)) for p in component.measured for x in p.grad.flatten())
            expected[component.name].append(norm / (2 * total if given else total))
        engine.step(loss=torch.tensor(2 * total) if given else None)
        optimizer.step()
        optimizer.zero_grad()
    engine.close()
    for name, series in engine.history.values.items():
        assert list(series) == pytest.approx(expected[name], rel=1e-6)


def test_a_loss_that_is_not_greater_than_0_gives_no_value():
    model = toy.build("full")
    engine = GradES(model, GradESConfig(), total_steps=3, **UNENDING)
    for value in (1.0, 0.0, -2.0):
        step(model).backward()
        engine.step(loss=value)
    engine.close()
    for series in engine.history.values.values():
        assert [math.isfinite(v) for v in series] == [True, False, False]


def test_a_missing_loss_is_said_at_the_first_step():
    """In evaluation mode, or in a backward pass of another model."""
    for model, other in ((toy.build("full").eval(), None), (toy.build("full"), toy.build("full"))):
        engine = GradES(model, GradESConfig(), total_steps=3, **UNENDING)
        step(other or model).backward()
        with pytest.raises(RuntimeError, match=r"has seen none.*model\.train\(\).*engine\.step\(loss=loss\)"):
            engine.step()
        engine.close()


def test_only_one_statistic_needs_it():
    for options in ({"tau": 0.5}, {"monitor": "gradient_norm"}):
        rows = {} if "tau" in options else UNENDING
        engine = GradES(toy.build("full"), GradESConfig(**options), total_steps=30, **rows)
        assert engine.extension("loss") is None
        assert "gradient_per_loss" not in engine.statistics
        engine.close()
    engine = GradES(toy.build("full"), GradESConfig(tau=1.0, monitor="gradient_per_loss"), total_steps=30)
    assert engine.extension("loss") is not None
    engine.close()


def test_evaluations_between_steps_do_not_count():
    model = toy.build("full")
    engine, seen = watch(model)
    loss = step(model)
    loss.backward()
    with torch.no_grad():
        step(model)
    engine.step()
    assert seen == [pytest.approx(loss.item())]
    engine.close()


def test_two_models_that_take_turns_have_their_own_losses():
    """As a generator and a discriminator do; a pass through both counts for both."""
    models = [toy.build("full"), toy.build("full", order=toy.MATRICES[::-1])]
    (one, of_one), (two, of_two) = (watch(model) for model in models)
    expected: tuple[list[float], list[float]] = [], []
    for number in range(3):
        for model, engine, losses in zip(models, (one, two), expected, strict=True):
            loss = (number + 1) * step(model, number)
            loss.backward()
            losses.append(loss.item())
            engine.step()
            model.zero_grad()
    assert of_one == pytest.approx(expected[0])
    assert of_two == pytest.approx(expected[1])
    loss = step(models[0]) + step(models[1])
    loss.backward()
    one.step()
    two.step()
    assert of_one[-1] == of_two[-1] == pytest.approx(loss.item())
    one.close()
    two.close()


class Twice(torch.autograd.Function):
    """Runs a part of the model a second time in backward, with a backward pass of its own, as GradCache does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, part: Any) -> torch.Tensor:
        ctx.part = part
        ctx.save_for_backward(x)
        return part(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            (ctx.part(x) * gradient).sum().backward()
        return x.grad, None


def test_a_backward_pass_inside_of_another_is_no_loss():
    model = toy.build("full")
    engine, seen = watch(model)
    batch = toy.batches(0)[0][0]

    def whole(x: torch.Tensor) -> torch.Tensor:
        return model(x, batch["labels"]).loss.reshape(1)

    loss = 3 * Twice.apply(batch["x"].clone().requires_grad_(True), whole).sum()
    loss.backward()
    engine.step()
    assert seen == [pytest.approx(loss.item())]
    engine.close()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_a_loss_once(reentrant):
    model = small.llama()
    small.enable_checkpointing(model, reentrant)
    engine, seen = watch(model.train())
    losses = []
    for rows in ROWS[:2]:
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        losses.append(loss.item())
        engine.step()
        model.zero_grad()
    assert seen == pytest.approx(losses)
    engine.close()


def test_what_a_scaler_has_multiplied_the_loss_with_is_no_part_of_it():
    model, scaler = toy.build("full"), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = toy.optimize("sgd", model)
    engine, seen = watch(model, optimizer=optimizer, scaler=scaler)
    loss = step(model)
    scaler.scale(loss).backward()
    engine.step()
    assert seen == [pytest.approx(loss.item())]
    engine.close()


def test_backward_is_torchs_own_again_when_the_last_run_has_ended():
    gc.collect()
    watch(toy.build("full"))[0].close()  # what engines of earlier tests have left is gone
    original = torch.autograd.backward
    assert not hasattr(original, "__wrapped__")
    engines = [watch(toy.build("full"))[0] for _ in range(2)]
    assert torch.autograd.backward is not original
    engines[0].close()
    assert torch.autograd.backward is not original
    engines[1].close()
    assert torch.autograd.backward is original


def test_a_backward_pass_that_fails_counts_for_nothing():
    model = toy.build("full")
    engine, seen = watch(model)
    loss = step(model)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    engine.step()
    assert seen == [pytest.approx(loss.item())]
    engine.close()


# --- Trainer ----------------------------------------------------------------------------------------------------------


def squared(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.square().mean()


class Noting(Trainer):
    """Keeps the loss of each micro-batch as it is trained on."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.noted = [*getattr(self, "noted", []), loss.item()]
        return loss


@pytest.mark.compatibility("Trainer", "without a tau: label_smoothing_factor, compute_loss_func, accumulation", "works")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("options", "extra"),
    [({}, {}), ({"label_smoothing_factor": 0.3}, {}), ({}, {"compute_loss_func": squared})],
    ids=["the model's", "label smoothing", "compute_loss_func"],
)
def test_the_trained_loss_is_what_trainer_trains_on(options, extra, accumulation, tmp_path):
    callback = GradESCallback(held_out=small.tokens(2))
    trainer = small.trainer(
        small.llama(), tmp_path, [callback], cls=Noting, extra=extra, max_steps=3, max_grad_norm=0.0,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=2, **options,
    )  # fmt: skip
    norms = []
    trainer.add_callback(Norms(norms))
    trainer.train()
    losses = torch.tensor(trainer.noted).view(3, accumulation).sum(1).tolist()
    name = callback.engine.components[0].name
    expected = [norm / loss for norm, loss in zip(norms, losses, strict=True)]
    assert list(callback.engine.history.values[name]) == pytest.approx(expected, rel=1e-4)


class Norms(small.TrainerCallback):
    """The L1 norm of the first matrix's gradient at each step."""

    def __init__(self, norms: list[float]) -> None:
        self.norms = norms

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.norms.append(model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum().item())
