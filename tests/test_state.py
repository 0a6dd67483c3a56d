"""Checkpoints of an engine: a refused one changes nothing and is never a KeyError; zeros need no history."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grades_hf import GradES, GradESConfig
from tests import toy

SETTINGS = settings(max_examples=250, deadline=None, derandomize=True, database=None)

SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "with a tau": (
        "lora",
        {
            "tau": {r"model\.layers\.0\..*": 1e9, "down": 1e9, ".*": 1e-30}, "alpha": 0.2, "freeze_prefix": True,
            "merge_frozen_adapters": True, "delay_transfer": True, "monitor": "gradient_change",
        },
    ),
    "a sample": ("full", {"tau": {"q": 1e9, ".*": 1e-30}, "alpha": 0.0, "sample_size": 5}),
    "without": ("full", {"rise": 1e-9}),
}  # fmt: skip


def engine_of(setup: str) -> tuple[GradES, nn.Module, torch.optim.Optimizer]:
    kind, options = SETUPS[setup]
    model = toy.build(kind)
    optimizer = toy.optimize("adamw", model)
    rows = {"held_out": lambda model: torch.ones(2)} if "tau" not in options else {}
    return GradES(model, GradESConfig(**options), total_steps=12, optimizer=optimizer, **rows), model, optimizer


def steps(engine: GradES, model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    for micro in toy.batches(0)[engine.t : engine.t + number]:
        model(**micro[0]).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()


@functools.cache
def state_of(setup: str) -> dict[str, Any]:
    engine, model, optimizer = engine_of(setup)
    steps(engine, model, optimizer, 6)
    state = copy.deepcopy(engine.state_dict())
    engine.close()
    return state


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a state, containers and leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


GONE = object()
DAMAGE = [
    GONE, None, "x", -1, 0, 10**400, 1.5, math.nan, math.inf, True, [], ["x"], [[1.0]], {}, {"x": 1}, [None],
    {"x": None}, torch.zeros(3, 2), torch.zeros(()),
]  # fmt: skip


def damaged(state: dict[str, Any], path: tuple[Any, ...], damage: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    if damage is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = damage
    return state


def seen(engine: GradES, model: nn.Module) -> list[Any]:
    """All that loading may change, to be compared; tensors by their values."""
    found = [engine.state_dict(), engine.frozen, engine.done, [p.requires_grad for p in model.parameters()]]
    found += [[c.frozen_at for c in engine.components], [type(module) for module in model.modules()]]
    found += [engine.history.to_dict(), {x.name: x.tensors() for x in engine.extensions}]
    return flat(found)


def flat(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), repr(value.tolist())]  # of NaN, too
    if isinstance(value, dict):
        items = [(id(key) if isinstance(key, Tensor) else key, flat(inner)) for key, inner in value.items()]
        return sorted(items, key=lambda item: str(item[0]))
    return [flat(inner) for inner in value] if isinstance(value, (list, tuple)) else repr(value)


@SETTINGS
@given(data=st.data())
def test_a_damaged_state_is_taken_over_or_refused_with_a_sentence_and_changes_nothing_then(data):
    """Every place in the state, each extension's too, with every kind of damage."""
    setup = data.draw(st.sampled_from(sorted(SETUPS)))
    state = state_of(setup)
    part = data.draw(st.sampled_from(sorted(state)))
    extension = data.draw(st.sampled_from(sorted(state["extensions"]))) if part == "extensions" else None
    start = (part,) if extension is None else (part, extension)
    inner = state[part] if extension is None else state[part][extension]
    path = data.draw(st.sampled_from([start, *places(inner, start)]))
    bad = damaged(state, path, data.draw(st.sampled_from(DAMAGE)))
    engine, model, _ = engine_of(setup)
    try:
        before = seen(engine, model)
        refusal = None
        try:
            engine.load_state_dict(bad)
        except ValueError as error:
            refusal = error
        if refusal is not None:
            assert type(refusal) is ValueError
            assert "GradES" in str(refusal) or "the checkpoint" in str(refusal)
            assert seen(engine, model) == before
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("setup", "way"),
    [
        ("with a tau", ("previous", "model.layers.1.mlp.up_proj", 0)),
        ("a sample", ("previous", "model.layers.1.mlp.up_proj", 0)),
        ("without", ("tensors", "average", "model.layers.1.mlp.up_proj.weight")),
    ],
)
@pytest.mark.parametrize("damage", [torch.zeros(3, 2), "x", [1.0]], ids=["shape", "text", "list"])
def test_a_tensor_that_does_not_fit_is_found_before_anything_changes(setup, way, damage):
    engine, model, _ = engine_of(setup)
    before = seen(engine, model)
    with pytest.raises(ValueError, match="in this state of GradES does not fit"):
        engine.load_state_dict(damaged(state_of(setup), way, damage))
    assert seen(engine, model) == before
    engine.close()


@pytest.mark.parametrize("state", [None, 3, [], "x", {}, {"epoch": 3}, {"format": 99}, {"format": 2}, {"format": "x"}])
def test_what_is_no_state_is_refused(state):
    engine, model, _ = engine_of("with a tau")
    before = seen(engine, model)
    with pytest.raises(ValueError, match="state of GradES"):
        engine.load_state_dict(state)
    assert seen(engine, model) == before
    engine.close()


@pytest.mark.parametrize("setup", SETUPS)
def test_an_undamaged_state_is_taken_over_whole(setup):
    """Otherwise the test above would show nothing."""
    engine, _, _ = engine_of(setup)
    engine.load_state_dict(copy.deepcopy(state_of(setup)))
    assert flat(engine.state_dict()) == flat(state_of(setup))
    assert state_of(setup)["extensions"].keys() >= {
        "with a tau": {"prefix", "meter"}, "a sample": {"meter"}, "without": {"ending", "average", "warm_up", "meter"},
    }[setup]  # fmt: skip
    engine.close()


def test_a_state_of_a_later_version_is_refused():
    engine, _, _ = engine_of("without")
    with pytest.raises(ValueError, match=r"has format 3, and this version reads up to 2\. Resume with"):
        engine.load_state_dict({**state_of("without"), "format": 3})
    engine.close()


# --- zeros ------------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Two blocks, of which a batch may use the first one only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 8)}) for _ in range(3))

    def forward(self, x: Tensor, use: int) -> Tensor:
        for layer in self.layers[:use]:
            x = x + layer["fc1"](layer["norm"](x))
        return x.square().mean()


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize("resume_after", range(8))
def test_zeros_are_judged_alike_with_and_without_the_history(resume_after, history):
    """The second matrix has learned and gets no gradient any more, which is no value; the third one never does."""

    def run(resume_after: int) -> dict[str, int]:
        model = Parts()
        how = {"total_steps": 8}
        config = GradESConfig(tau=1e-12, alpha=0.5, monitor="gradient_norm")
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        engine = GradES(model, config, **how)
        generator = torch.Generator().manual_seed(1)
        for t, use in enumerate([2, 2, 1, 1, 1, 1, 1, 1], start=1):
            model(torch.randn(4, 8, generator=generator), use).backward()
            engine.step()
            model.zero_grad(set_to_none=False)
            if t == resume_after:
                state = json.loads(json.dumps(engine.state_dict(tensors=False)))
                if history:
                    state["history"] = engine.history.to_dict()
                engine.close()
                engine = GradES(model, config, **how)
                engine.load_state_dict(state)
                for parameter in model.parameters():
                    if parameter.grad is None and parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
        engine.close()
        return engine.frozen

    assert run(resume_after) == run(0) == {"layers.2.fc1": 5}
