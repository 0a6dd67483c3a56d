"""Copies of a model in mid-run are as without GradES, and a finished run keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grades_hf import GradES, GradESConfig
from grades_hf.hooks import Hook
from tests import toy

STEPS = 10
CONFIGS = {
    "freezing": GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.2, monitor="gradient_change"),
    "prefix": GradESConfig(tau={".*layers\\.0\\..*": 1e9, ".*": 1e-30}, alpha=0.2, freeze_prefix=True),
    "looks": GradESConfig(),
}


def start(kind: str, name: str) -> tuple[GradES, nn.Module, torch.optim.Optimizer]:
    model = toy.build(kind)
    optimizer = toy.optimize("adamw", model)
    rows = None if CONFIGS[name].tau is not None else lambda model: torch.ones(2)
    return GradES(model, CONFIGS[name], total_steps=STEPS, optimizer=optimizer, held_out=rows), model, optimizer


def train(engine: GradES, model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 5) -> None:
    for _ in range(number):
        model(**toy.batches(0)[0][0]).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()


def hooks(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and value:
                found += value.values()
    for parameter in model.parameters():
        found += (getattr(parameter, "_post_accumulate_grad_hooks", None) or {}).values()
    return found


def size(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.tell()


@pytest.mark.compatibility("Faults", "deepcopy, AveragedModel and pickling of the model in mid-run", "works")
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("moment", ["between steps", "after backward"])
def test_a_deep_copy_is_as_a_bare_one(moment, name, kind):
    bare = hooks(copy.deepcopy(toy.build(kind)))
    assert bare == []
    engine, model, optimizer = start(kind, name)
    for number in (1, 5):
        train(engine, model, optimizer, number)
        if moment != "between steps":
            model(**toy.batches(0)[0][0]).loss.backward()
        copied = copy.deepcopy(model)
        assert hooks(copied) == []
        assert hooks(model) != []
        part = copy.deepcopy(dict(model.named_modules())["base_model" if kind == "lora" else "model"])
        assert hooks(part) == []
        for (name_, ours), theirs in zip(model.named_parameters(), copied.parameters(), strict=True):
            assert torch.equal(ours, theirs), name_
            assert ours.requires_grad == theirs.requires_grad
        copied(**toy.batches(0)[0][0])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)
    assert hooks(averaged) == []
    engine.close()
    assert hooks(model) == []


LOAD = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
called = []
for module in model.modules():
    for _ in range(30):
        module.register_forward_pre_hook(lambda module, args: called.append(1))
        module.register_forward_hook(lambda module, args, output: called.append(1))
from tests import toy
model(**toy.batches(0)[0][0]).loss.backward()
assert called
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pickled_model_holds_the_model_only(name, kind, tmp_path):
    engine, model, optimizer = start(kind, name)
    plain = size(toy.build(kind))
    train(engine, model, optimizer)
    model(**toy.batches(0)[0][0])
    data = pickle.dumps(model)
    assert b"grades_hf" not in data
    assert size(model) < 1.2 * plain + 4000
    loaded = pickle.loads(data)
    loaded(**toy.batches(0)[0][0]).loss.backward()
    if (name, kind) == ("prefix", "full"):  # in a process of its own torch numbers hooks from 0 on again
        torch.save(model, tmp_path / "model.pt")
        done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "model.pt")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    # A second engine on the loaded model finds the places of the first one's hooks taken.
    for (key, ours), theirs in zip(toy.build(kind).named_parameters(), loaded.parameters(), strict=True):
        assert theirs.requires_grad_(ours.requires_grad).shape == ours.shape, key
    optimizer = toy.optimize("adamw", loaded)
    rows = None if CONFIGS[name].tau is not None else lambda model: torch.ones(2)
    again = GradES(loaded, CONFIGS[name], total_steps=STEPS, optimizer=optimizer, held_out=rows)
    loaded.zero_grad()
    train(again, loaded, optimizer)
    again.close()
    assert not any(isinstance(found, Hook) for found in hooks(loaded))


def test_the_optimizer_of_a_run_can_be_copied():
    engine, model, optimizer = start("full", "freezing")
    train(engine, model, optimizer)
    copied = copy.deepcopy(optimizer)
    assert "step" not in vars(copied)
    assert len(copied.state) == len(optimizer.state) < len(list(model.parameters()))
    pickle.loads(pickle.dumps(optimizer)).zero_grad()
    engine.close()


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"sample_size": 3}, {"delay_transfer": True}], ids=str)
def test_five_folds_keep_nothing_alive(options, name, kind):
    """What the user still holds (engine, history, components) keeps neither model nor optimizer alive."""
    held: list[Any] = []
    gone: list[weakref.ref[Any]] = []
    for _ in range(5):
        model = toy.build(kind)
        optimizer = toy.optimize("adamw", model)
        rows = None if CONFIGS[name].tau is not None else lambda model: torch.ones(2)
        config = GradESConfig(**{**CONFIGS[name].to_dict(), **options})
        engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer, held_out=rows)
        train(engine, model, optimizer)
        engine.close()
        weight = engine.components[0].parameters[0]
        assert weight.shape == next(p for p in model.parameters() if p is weight).shape
        gone += [weakref.ref(part) for part in (model, optimizer, next(iter(model.parameters())), weight)]
        held.append((engine, engine.history, engine.components))
        del model, optimizer, engine, weight
    gc.collect()
    assert [part() for part in gone if part() is not None] == []
    for engine, history, components in held:
        assert len(engine.frozen) == len(history.frozen)
        assert engine.conclude()
        assert engine.state_dict(tensors=False)["step"] == 5
        for component in components:
            assert component.numel > 0
            assert list(component.parameters) == []
            assert component.frozen_at == engine.frozen.get(component.name)
        pickle.dumps(components)


def test_an_engine_that_was_never_closed_dies_with_its_model():
    gc.collect()  # what earlier tests have left unclosed
    before = torch.autograd.backward, nn.utils.clip_grads_with_norm_
    engine, model, optimizer = start("full", "looks")
    train(engine, model, optimizer)
    parts = [weakref.ref(part) for part in (engine, model, optimizer)]
    del engine
    gc.collect()
    assert parts[0]() is not None  # the model could be given back to its user still
    del model, optimizer
    gc.collect()
    assert [part() for part in parts] == [None] * 3
    assert (torch.autograd.backward, nn.utils.clip_grads_with_norm_) == before


def test_an_engine_that_was_dropped_is_ended_by_the_next_one():
    engine, model, optimizer = start("full", "freezing")
    train(engine, model, optimizer)
    del engine
    gc.collect()
    assert not all(p.requires_grad for p in model.parameters())
    GradES.release(model)
    assert all(p.requires_grad for p in model.parameters())
    assert hooks(model) == []
    assert "step" not in vars(optimizer)
