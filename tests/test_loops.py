"""The engine in loops that people write themselves: several optimizers, optimizers with habits, Lightning."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from grades_hf import GradES, GradESConfig
from tests import runs, small
from tests.runs import LEARNING_RATE, WEIGHT_DECAY, Setting
from tests.small import llama

ROWS = torch.tensor(small.tokens(48)["input_ids"]).view(12, 4, -1)
SETS = {"q": 1e9, "down": 1e9, "attention": 1e-30, "mlp": 1e-30}


def train(model: nn.Module, optimizers: Any, *, set_to_none: bool = True, alpha: float = 0.3) -> tuple[GradES, list]:
    """A plain loop of 12 steps; the engine, and all weights before each step and at the end."""
    several = optimizers if isinstance(optimizers, list) else [optimizers]
    engine = GradES(model, GradESConfig(tau=SETS, alpha=alpha), total_steps=12, optimizer=optimizers)
    weights = []
    for rows in ROWS:
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        model(input_ids=rows, labels=rows).loss.backward()
        engine.step()
        for optimizer in several:
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return engine, weights


def check(model: nn.Module, engine: GradES, weights: list, optimizers: list, first: int = 5) -> None:
    """q and down rest from step `first` on, and are in no optimizer's state; everything else moves at every step."""
    frozen = {n for n, _ in model.named_parameters() if "q_proj" in n or "down_proj" in n}
    assert set(engine.frozen.values()) == {first}
    assert len(engine.frozen) == len(frozen) == 4
    for name, parameter in model.named_parameters():
        moved = [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(weights)]
        assert moved == [name not in frozen or step < first for step in range(1, 13)], name
        assert any(parameter in optimizer.state for optimizer in optimizers) is (name not in frozen)
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


@pytest.mark.compatibility("Custom loops", "plain PyTorch, several optimizers", "works")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_several_optimizers_equal_one_by_algorithm_1(set_to_none: bool) -> None:
    """Matrices and the rest in optimizers of their own, as for Muon; AdamW does the same either way."""
    setting = Setting(max_grad_norm=0.0)
    options = {"alpha": 0.3, "monitor": "gradient_change"}
    tau, outcome = runs.pick_tau(
        lambda tau: setting.reference(tau=tau, **options), setting.reference(tau=0.0, **options).values, first=5
    )
    model = runs.load("full")
    parts = [[p for n, p in model.named_parameters() if ("norm" in n) is norm] for norm in (False, True)]
    optimizers = [
        torch.optim.AdamW(part, lr=LEARNING_RATE, weight_decay=decay, fused=True)
        for part, decay in zip(parts, (WEIGHT_DECAY, 0.0), strict=True)
    ]
    engine = GradES(model, GradESConfig(tau=tau, **options), total_steps=runs.STEPS, optimizer=optimizers)
    for step, (batch,) in enumerate(setting.batches(), start=1):
        model(**batch, num_items_in_batch=batch["labels"][..., 1:].numel()).loss.backward()
        engine.step()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = runs.cosine(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    assert engine.frozen == outcome.frozen
    assert runs.differing(model, outcome) == []


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    hidden = {p for n, p in model.named_parameters() if "proj" in n}
    return list(hidden), [p for p in model.parameters() if p not in hidden]


@pytest.mark.compatibility("Optimizers", "Muon (torch.optim.Muon) for the matrices, AdamW for the rest", "works")
@pytest.mark.parametrize("set_to_none", [True, False])
def test_muon(set_to_none: bool) -> None:
    model = llama()
    hidden, rest = matrices_and_rest(model)
    optimizers = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.5),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.5),
    ]
    engine, weights = train(model, optimizers, set_to_none=set_to_none)
    check(model, engine, weights, optimizers)


class DecaysEverything(torch.optim.Optimizer):
    """Takes a missing gradient for zeros, as Muon's reference implementation does: momentum and decay go on."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 0.05)
                parameter.mul_(1 - group["lr"] * 0.5).add_(state["momentum"], alpha=-group["lr"])


@pytest.mark.compatibility("Optimizers", "optimizers that decay parameters without a gradient", "works")
def test_an_optimizer_that_moves_parameters_without_a_gradient() -> None:
    model = llama()
    optimizer = DecaysEverything(model.parameters(), lr=1e-2)
    engine, weights = train(model, optimizer)
    check(model, engine, weights, [optimizer])
    engine.close()
    model(input_ids=ROWS[0], labels=ROWS[0]).loss.backward()
    optimizer.step()  # the run is over: everything is trained again
    assert all(not torch.equal(p, weights[-1][n]) for n, p in model.named_parameters())


class Fails(torch.optim.SGD):
    fail = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if self.fail:
            raise RuntimeError("out of luck")
        super().step(closure)


def test_a_step_that_fails_leaves_the_parameter_groups_whole() -> None:
    model = llama()
    optimizer = Fails(model.parameters(), lr=1e-2)
    engine, _ = train(model, optimizer)
    optimizer.fail = True
    model(input_ids=ROWS[0], labels=ROWS[0]).loss.backward()
    engine.step()
    with pytest.raises(RuntimeError, match="out of luck"):
        optimizer.step()
    engine.close()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


@pytest.mark.compatibility("Custom loops", "DataParallel", "refused")
def test_data_parallel_is_refused_by_the_engine() -> None:
    model = nn.DataParallel(llama())
    with pytest.raises(RuntimeError, match=r"DataParallel.*torchrun"):
        GradES(model, GradESConfig(tau=1.0), total_steps=1)
