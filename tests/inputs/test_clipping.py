"""Without a tau clipping is undone in what is measured; the paper's criterion sees what the optimizer sees."""

from __future__ import annotations

import gc
import math
from typing import Any
from weakref import WeakSet

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import small, toy

MONITORS = ("gradient_norm", "gradient_per_loss")
UNENDING: dict[str, Any] = {"held_out": lambda model: torch.ones(2)}  # every look says to go on


def values(clip, config: GradESConfig, kind: str = "full", growth: float = 2.0) -> dict[str, list[float]]:
    """The statistic in a loop that learns nothing (so that clipping changes no later gradient); the loss grows."""
    model = toy.build(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    rows = UNENDING if config.tau is None else {}
    engine = GradES(model, config, total_steps=toy.STEPS, optimizer=optimizer, **rows)
    for t, micro in enumerate(toy.batches(0)):
        for batch in micro:
            (growth**t * model(**batch).loss).backward()
        clip(model)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    engine.close()
    return {name: list(series) for name, series in engine.history.values.items()}


def to_norm(maximum: float):
    return lambda model: clip_grad_norm_(model.parameters(), maximum)


def by_group(model: nn.Module) -> None:
    """As some loops do: one norm for attention, one for the rest, and the rest twice."""
    attention = [p for name, p in model.named_parameters() if "self_attn" in name]
    rest = [p for name, p in model.named_parameters() if "self_attn" not in name]
    clip_grad_norm_(attention, 0.1)
    clip_grad_norm_(iter(rest), 1.0)
    clip_grad_norm_(rest, 0.01)


CLIPS = {
    "always": to_norm(0.01),
    "sometimes": to_norm(100.0),
    "never": to_norm(1e9),
    "not foreach": lambda model: clip_grad_norm_(model.parameters(), 0.1, foreach=False),
    "infinity norm": lambda model: clip_grad_norm_(model.parameters(), 0.1, norm_type=math.inf),
    "by group": by_group,
    "accelerate": lambda model: Accelerator(cpu=True).clip_grad_norm_(model.parameters(), 0.1),
    "the norm is known": lambda model: torch.nn.utils.clip_grads_with_norm_(
        model.parameters(), 0.1, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    ),
}


@pytest.mark.parametrize("options", [{}, {"check_every": 3}, {"sample_size": 7}, {"reduction": "mean"}], ids=str)
@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("clip", CLIPS)
def test_values_are_those_before_clipping(clip, monitor, options):
    config = GradESConfig(monitor=monitor, **options)
    bare = values(lambda model: None, config)
    for name, series in values(CLIPS[clip], config).items():
        assert series == pytest.approx(bare[name], rel=1e-5, nan_ok=True)
    assert any(math.isfinite(value) for series in bare.values() for value in series)


def test_those_of_an_adapter():
    config = GradESConfig()
    bare = values(lambda model: None, config, "lora")
    for name, series in values(to_norm(0.01), config, "lora").items():
        assert series == pytest.approx(bare[name], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm"])
def test_the_papers_criterion_sees_what_the_optimizer_sees(monitor):
    config = GradESConfig(tau=1e-30, alpha=0.99, monitor=monitor)
    bare, clipped = values(lambda model: None, config), values(to_norm(0.01), config)
    for name, series in clipped.items():
        assert all(value < 0.1 * before for value, before in zip(series[1:], bare[name][1:], strict=True))


def test_one_factor_is_worked_with_once(monkeypatch):
    """However many matrices there are: neither a kernel nor a copy to the device for each."""
    model = toy.build("full")
    engine = GradES(model, GradESConfig(monitor="gradient_norm"), total_steps=toy.STEPS, **UNENDING)
    correct, divided = engine.extension("clipping").correct, []

    def correcting(values, components, step):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "stack", lambda *_: pytest.fail("a factor for each matrix"))
            divided.append(len(components))
            return correct(values, components, step)

    monkeypatch.setattr(engine.extension("clipping"), "correct", correcting)
    for micro in toy.batches(0)[:2]:
        model.zero_grad()
        model(**micro[0]).loss.backward()
        clip_grad_norm_(model.parameters(), 0.1)
        engine.step()
    assert divided == [len(engine.components)] * 2
    engine.close()


@pytest.fixture
def untouched():
    """No engine of an earlier test is at work."""
    gc.collect()
    GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING).close()
    for function in (clip_grad._clip_grads_with_norm_, torch.autograd.backward):
        assert "grades_hf" not in function.__code__.co_filename


@pytest.mark.usefixtures("untouched")
def test_torch_is_as_it_was_when_the_last_run_has_ended():
    original = clip_grad._clip_grads_with_norm_
    engines = [GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING) for _ in range(2)]
    assert clip_grad._clip_grads_with_norm_ is not original
    for engine in engines:
        for p in engine.model.parameters():
            p.grad = torch.ones_like(p)
        norm = clip_grad_norm_(engine.model.parameters(), 1.0)
    for engine in engines:  # the second one's clipping is nothing to the first, and the other way round
        factors = engine.extension("clipping")._factors
        assert set(factors) == {p for component in engine.components for p in component.measured}
        assert all(factor.item() == pytest.approx(1 / norm.item()) for factor in factors.values())
    engines[0].close()
    assert clip_grad._clip_grads_with_norm_ is not original
    engines[1].close()
    assert clip_grad._clip_grads_with_norm_ is original is torch.nn.utils.clip_grads_with_norm_


@pytest.mark.usefixtures("untouched")
def test_an_engine_that_nobody_holds_leaves_no_trace():
    """It is not closed, only gone: once it is collected, torch is as it was."""
    original = clip_grad._clip_grads_with_norm_
    backward = torch.autograd.backward
    GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING)
    gc.collect()  # an engine refers to itself
    GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING).close()
    assert clip_grad._clip_grads_with_norm_ is original
    assert torch.autograd.backward is backward


@pytest.mark.usefixtures("untouched")
def test_an_engine_that_dies_while_another_begins(monkeypatch):
    original, backward = clip_grad._clip_grads_with_norm_, torch.autograd.backward
    held = [GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING)]
    add = WeakSet.add

    def collecting(self, item):
        held.clear()
        gc.collect()
        add(self, item)

    monkeypatch.setattr(WeakSet, "add", collecting)
    engine = GradES(toy.build("full"), GradESConfig(), total_steps=9, **UNENDING)
    monkeypatch.undo()
    assert clip_grad._clip_grads_with_norm_.__wrapped__ is original
    assert torch.autograd.backward.__wrapped__ is backward
    engine.close()
    assert clip_grad._clip_grads_with_norm_ is original
    assert torch.autograd.backward is backward


@pytest.mark.usefixtures("untouched")
def test_a_threshold_leaves_torch_alone():
    original, backward = clip_grad._clip_grads_with_norm_, torch.autograd.backward
    engine = GradES(toy.build("full"), GradESConfig(tau=1.0), total_steps=3)
    assert clip_grad._clip_grads_with_norm_ is original
    assert torch.autograd.backward is backward
    engine.close()


@pytest.mark.usefixtures("untouched")
def test_another_way_of_clipping_is_refused(monkeypatch):
    backward = torch.autograd.backward
    monkeypatch.delattr(clip_grad, "_clip_grads_with_norm_")
    with pytest.raises(RuntimeError, match=r"clips gradients in another way.*Pass a tau"):
        GradES(toy.build("full"), GradESConfig(), total_steps=3, **UNENDING)
    assert torch.autograd.backward is backward


@pytest.mark.parametrize("make", [small.llama, small.lora])
def test_trainer_clips_and_the_values_are_those_before(make, tmp_path):
    """Learning nothing, so that clipping changes no later gradient."""

    def train(max_grad_norm: float):
        callback = GradESCallback(held_out=small.tokens(2))
        options = {"max_grad_norm": max_grad_norm, "learning_rate": 0.0, "max_steps": 4}
        small.trainer(make(), tmp_path, [callback], **options).train()
        return callback.engine.history.values

    bare = train(0.0)
    for name, series in train(1e-4).items():
        assert list(series) == pytest.approx(list(bare[name]), rel=1e-4, nan_ok=True)
