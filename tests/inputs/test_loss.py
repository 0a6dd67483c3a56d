"""The loss of a step, which the default criterion takes gradients in proportion to."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.inputs.loss import Loss
from tests import small, toy

WATCH = {"monitor": "gradient_per_loss", "criterion": "rise", "alpha": 0.99, "count_flops": False}


class Says(nn.Module):
    """A model that returns what it is told, made of its weight so that it requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, make):
        return make(self.weight)


OUTPUTS = {
    "dict": lambda w: {"loss": 3 * w},
    "attribute": lambda w: SimpleNamespace(loss=3 * w, logits=w),
    "tuple": lambda w: (3 * w, w),
}
NONE = {
    "no loss": lambda w: {"logits": w},
    "None": lambda w: SimpleNamespace(loss=None),
    "several values": lambda w: (3 * w).expand(2, 2)[None],
    "an empty tuple": lambda w: (),
    "detached": lambda w: {"loss": 3 * w.detach()},
    "a tensor": lambda w: 3 * w,
}


@pytest.mark.parametrize("make", OUTPUTS.values(), ids=OUTPUTS)
def test_what_a_model_returns_is_added_up(make):
    model = Says()
    loss = Loss(model)
    model(make)
    model(make)
    assert loss.take().item() == 6
    assert loss.take() is None
    loss.close()
    model(make)
    assert loss.take() is None


@pytest.mark.parametrize("make", NONE.values(), ids=NONE)
def test_what_is_no_loss(make):
    model = Says()
    loss = Loss(model)
    model(make)
    assert loss.take() is None


def test_evaluations_do_not_count():
    model = Says()
    loss = Loss(model)
    with torch.no_grad():
        model(OUTPUTS["dict"])
    model.eval()(OUTPUTS["dict"])
    assert loss.take() is None


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_values_are_norms_by_the_loss(kind, accumulation, given):
    model = toy.build(kind)
    optimizer = toy.optimize("adamw", model)
    engine = GradES(model, GradESConfig(**WATCH), total_steps=toy.STEPS, optimizer=optimizer)
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
    engine = GradES(model, GradESConfig(**WATCH), total_steps=3)
    for value in (1.0, 0.0, -2.0):
        model(**toy.batches(0)[0][0]).loss.backward()
        engine.step(loss=value)
    engine.close()
    for series in engine.history.values.values():
        assert [math.isfinite(v) for v in series] == [True, False, False]


def test_a_missing_loss_is_said_at_the_first_step():
    model = toy.build("full")
    engine = GradES(model, GradESConfig(), total_steps=3)
    model.eval()
    model(**toy.batches(0)[0][0]).loss.backward()
    with pytest.raises(RuntimeError, match=r"needs the loss.*engine\.step\(loss=loss\)"):
        engine.step()
    assert engine.t == 0


def test_other_criteria_need_none():
    for options in ({"tau": 0.5}, {"monitor": "gradient_norm"}, {"budget": 0.6}, {"criterion": "no_new_minimum"}):
        engine = GradES(toy.build("full"), GradESConfig(**options), total_steps=30)
        assert engine.loss is None
        assert "gradient_per_loss" not in engine.statistics
        engine.close()


@pytest.mark.compatibility("Trainer", "label_smoothing_factor without a tau", "refused")
def test_label_smoothing_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0\.1.*monitor='gradient_norm'"):
        small.trainer(small.llama(), tmp_path, [GradESCallback()], label_smoothing_factor=0.1)
    for options in ({"tau": 1e-9}, {"monitor": "gradient_norm"}):
        trainer = small.trainer(
            small.llama(), tmp_path, [GradESCallback(**options)], label_smoothing_factor=0.1, max_steps=1
        )
        trainer.train()


@pytest.mark.compatibility("Trainer", "GradESCallback() without options", "works")
@pytest.mark.parametrize("make", [small.llama, small.lora])
def test_a_run_that_overfits_ends(make, tmp_path):
    """Two rows again and again: the loss vanishes, and the gradient by the loss does not."""
    callback = GradESCallback()
    trainer = small.trainer(make(), tmp_path, [callback], max_steps=120, learning_rate=2e-2)
    trainer.train_dataset = [trainer.train_dataset[0], trainer.train_dataset[1]]
    trainer.train()
    engine = callback.engine
    assert engine.history.ended == "converged"
    assert len(engine.components) / 2 <= len(engine.frozen) < trainer.state.max_steps
    assert set(engine.frozen.values()) == {trainer.state.global_step}
