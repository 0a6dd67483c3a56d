"""Clipping is undone in statistics that are compared with their own past, and nowhere else."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad, clip_grad_norm_

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.clipping import Clipping
from tests import resumable, small, toy

MONITORS = ("gradient_change", "gradient_norm", "relative_change")
# Nothing freezes: a matrix that no gradient flows to any more would change the norm of the others.
WATCH = {"criterion": "rise", "alpha": 0.99, "count_flops": False}


def values(clip, config: GradESConfig, kind: str = "full", growth: float = 2.0) -> dict[str, list[float]]:
    """The statistic in a loop that learns nothing (so that clipping changes no later gradient); the loss grows."""
    model = toy.build(kind)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    engine = GradES(model, config, total_steps=toy.STEPS, optimizer=optimizer)
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
    "foreach": lambda model: clip_grad_norm_(model.parameters(), 0.1, foreach=False),
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
    config = GradESConfig(**WATCH, monitor=monitor, **options)
    bare = values(lambda model: None, config)
    for name, series in values(CLIPS[clip], config).items():
        assert series == pytest.approx(bare[name], rel=1e-5, nan_ok=True)
    assert any(math.isfinite(value) for series in bare.values() for value in series)


@pytest.mark.parametrize("monitor", MONITORS)
def test_those_of_an_adapter(monitor):
    config = GradESConfig(**WATCH, monitor=monitor)
    bare = values(lambda model: None, config, "lora")
    for name, series in values(to_norm(0.01), config, "lora").items():
        assert series == pytest.approx(bare[name], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("monitor", MONITORS[:2])
def test_the_papers_criterion_sees_what_the_optimizer_sees(monitor):
    config = GradESConfig(tau=1e-30, alpha=0.99, monitor=monitor, count_flops=False)
    bare, clipped = values(lambda model: None, config), values(to_norm(0.01), config)
    for name, series in clipped.items():
        assert all(value < 0.1 * before for value, before in zip(series[1:], bare[name][1:], strict=True))


@pytest.mark.parametrize("monitor", MONITORS)
def test_one_factor_is_worked_with_once(monitor):
    """However many matrices there are: neither a kernel nor a copy to the device for each."""
    model = toy.build("full")
    engine = GradES(model, GradESConfig(**WATCH, monitor=monitor), total_steps=toy.STEPS)
    watching = engine.monitors[monitor]
    for micro in toy.batches(0)[:2]:
        model.zero_grad()
        model(**micro[0]).loss.backward()
        clip_grad_norm_(model.parameters(), 0.1)
        divisors, ratios = watching._unclip({p: p.grad for c in engine.components for p in c.measured})
        assert len({id(divisor) for divisor in divisors}) == 1 < len(divisors)
        assert ratios is None or len({id(ratio) for ratio in ratios}) == 1 < len(ratios)
        engine.step()
    engine.close()


def test_an_update_is_no_gradient():
    model = toy.build("full")
    optimizer = toy.optimize("sgd", model)
    config = GradESConfig(**WATCH, monitor="weight_change")
    engine = GradES(model, config, total_steps=toy.STEPS, optimizer=optimizer)
    weights, expected = [], []
    for micro in toy.batches(0):
        weights.append(engine.components[0].measured[0].detach().clone())
        model(**micro[0]).loss.backward()
        clip_grad_norm_(model.parameters(), 0.01)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    engine.close()
    expected = [float((b - a).abs().sum()) for a, b in pairwise(weights)]
    measured = [v for v in engine.history.values[engine.components[0].name] if math.isfinite(v)]
    assert measured == pytest.approx(expected[-len(measured) :], rel=1e-6)


def test_torch_is_as_it_was_when_the_last_run_has_ended():
    original = clip_grad._clip_grads_with_norm_
    weight = nn.Parameter(torch.ones(3))
    first, second = Clipping([weight]), Clipping([weight])
    assert clip_grad._clip_grads_with_norm_ is not original
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    clip_grad_norm_([weight], 1.0)
    assert first.factors[weight].item() == second.factors[weight].item() == pytest.approx(0.2)
    first.close()
    assert not first.factors
    assert clip_grad._clip_grads_with_norm_ is not original
    second.close()
    assert clip_grad._clip_grads_with_norm_ is original is torch.nn.utils.clip_grads_with_norm_


def test_a_threshold_leaves_torch_alone():
    original = clip_grad._clip_grads_with_norm_
    engine = GradES(toy.build("full"), GradESConfig(tau=1.0), total_steps=3)
    assert clip_grad._clip_grads_with_norm_ is original
    engine.close()


def test_another_way_of_clipping_is_refused(monkeypatch):
    monkeypatch.delattr(clip_grad, "_clip_grads_with_norm_")
    with pytest.raises(RuntimeError, match=r"clips gradients in another way.*criterion='threshold'"):
        GradES(toy.build("full"), GradESConfig(), total_steps=3)


@pytest.mark.parametrize("make", [small.llama, small.lora])
@pytest.mark.parametrize("monitor", MONITORS)
def test_a_resumed_run_goes_on_exactly(make, monitor, tmp_path):
    options = {"rise": 0.02, "smoothing": 0.0, "quorum": 0.0, "max_frozen_fraction": 1.0, "alpha": 0.45}
    saves = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "learning_rate": 3e-3, "max_grad_norm": 1e-4}

    def train(folder: Path, resume: str | None = None):
        callback = GradESCallback(**options, monitor=monitor)
        trainer = small.trainer(make(), folder, [callback], **saves)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict(), callback.engine

    weights, engine = train(tmp_path)
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    factors = state["stateful_callbacks"]["GradESCallback"]["attributes"]["checkpoint"].get("clipping", {})
    assert (len(factors) > 0) == (monitor != "gradient_norm")
    assert all(0 < factor < 1 for row in factors.values() for factor in row)
    resumed, again = train(tmp_path, str(tmp_path / "checkpoint-5"))
    assert again.frozen == engine.frozen != {}
    assert resumable.record(again.history) == resumable.record(engine.history)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_the_engines_own_state_has_the_factors():
    def run(resume_after: frozenset[int]):
        config = GradESConfig(criterion="rise", rise=0.01, smoothing=0.0, quorum=0.0, max_frozen_fraction=1.0,
                              monitor="gradient_change", count_flops=False)  # fmt: skip
        return toy.train("full", config, toy.batches(0), max_grad_norm=0.5, resume_after=resume_after)

    whole, parts = run(frozenset()), run(frozenset({1, 4, 6}))
    assert whole.engine.frozen == parts.engine.frozen != {}
    assert resumable.record(whole.engine.history) == resumable.record(parts.engine.history)
