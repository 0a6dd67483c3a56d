"""A refused engine leaves nothing behind: no hook, no patched function, no frozen parameter; and refusals are data."""

from __future__ import annotations

import functools
import gc
import importlib
import itertools
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad

import grades_hf
from grades_hf import GradES, GradESConfig
from grades_hf.assembly import refuse_conflicts
from grades_hf.contracts import Extension, Trait
from tests import toy

HELD_OUT = torch.ones(2)


def held_out(model: nn.Module) -> torch.Tensor:
    return HELD_OUT


def traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that an engine may register anywhere, as it is now."""
    return {
        "functions": (torch.autograd.backward, clip_grad._clip_grads_with_norm_, nn.utils.clip_grads_with_norm_),
        "recompilations": torch._dynamo.config.recompile_limit,
        "hooks": [
            (name, attribute, list(hooks.values()))
            for name, module in model.named_modules()
            for attribute, hooks in vars(module).items()
            if attribute.endswith("_hooks") and hooks
        ],
        "own attributes": [sorted(vars(module)) for module in model.modules()],
        "classes": [type(module) for module in model.modules()],
        "parameters": [
            (p.requires_grad, p.grad is None, len(p._post_accumulate_grad_hooks or ()), len(p._backward_hooks or ()))
            for p in model.parameters()
        ],
        "optimizer": sorted(vars(optimizer)),
        "optimizer's hooks": [
            (attribute, list(hooks.values()))
            for attribute, hooks in vars(optimizer).items()
            if attribute.endswith("_hooks") and hooks
        ],
        "log": [logging.getLogger("grades_hf").level],
    }


@pytest.fixture(autouse=True)
def untouched():
    """What engines of earlier tests have left is gone."""
    gc.collect()
    GradES(toy.build("full"), GradESConfig(), total_steps=9, held_out=held_out).close()


def assert_refused(
    model: nn.Module, match: str, options: dict[str, Any], error: type[Exception] = ValueError, **how: Any
) -> None:
    optimizer = toy.optimize("sgd", model)
    gc.collect()  # engines of earlier tests
    before = traces(model, optimizer)
    with pytest.raises(error, match=match):
        GradES(model, GradESConfig(**options), total_steps=9, **{"optimizer": optimizer, **how})
    assert traces(model, optimizer) == before


# --- refusals while attaching -----------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any], dict[str, Any]]] = {
    "merging full weights": (
        lambda: toy.build("full"),
        "can merge none",
        {"tau": 1.0, "merge_frozen_adapters": True, "freeze_prefix": True},
        {},
    ),
    "merging full weights, scaled": (
        lambda: toy.build("full"),
        "can merge none",
        {"tau": 1.0, "merge_frozen_adapters": True},
        {"scaler": torch.amp.GradScaler("cpu")},
    ),
    "a prefix without blocks": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        "freeze_prefix",
        {"tau": 1.0, "freeze_prefix": True, "target_modules": ["0"]},
        {},
    ),
    "no held-out rows": (lambda: toy.build("full"), "held_out=", {}, {}),
    "held-out rows beside a tau": (lambda: toy.build("full"), "held_out", {"tau": 1.0}, {"held_out": held_out}),
    "held-out rows of none": (lambda: toy.build("lora"), "no rows", {}, {"held_out": []}),
    "a key that matches nothing": (
        lambda: toy.build("full"),
        "matches no component",
        {"tau": {"z": 1.0, ".*": 1.0}},
        {},
    ),
    "a module that is none": (lambda: toy.build("full"), "nothing", {"tau": 1.0, "target_modules": ["nothing"]}, {}),
    "an optimizer that is none": (lambda: toy.build("full"), "optimizer", {"tau": 1.0}, {"optimizer": object()}),
    "no steps": (lambda: toy.build("full"), "total_steps", {"tau": 1.0}, {"total_steps": 0}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_engine_leaves_nothing(case):
    make, match, options, how = REFUSED[case]
    model = make()
    optimizer = toy.optimize("sgd", model)
    before = traces(model, optimizer)
    with pytest.raises(ValueError, match=match):
        GradES(model, GradESConfig(**options), **{"total_steps": 9, "optimizer": optimizer, **how})
    assert traces(model, optimizer) == before


SETUPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "with a tau": ("lora", {"tau": 1.0, "freeze_prefix": True, "merge_frozen_adapters": True}, {}),
    "without": ("full", {}, {"held_out": held_out}),
    "without, scaled": ("full", {}, {"held_out": held_out, "scaler": torch.amp.GradScaler("cpu")}),
}


def names(setup: str) -> list[str]:
    kind, options, how = SETUPS[setup]
    engine = GradES(toy.build(kind), GradESConfig(**options), total_steps=9, **how)
    engine.close()
    return [extension.name for extension in engine.extensions]


@pytest.mark.parametrize("setup", SETUPS)
def test_whichever_extension_refuses_what_was_attached_before_is_undone(setup, monkeypatch):
    """Each in turn does all of its work and then refuses; a run thereafter is as any other."""
    kind, options, how = SETUPS[setup]
    whole = toy.train(kind, GradESConfig(**options), toy.batches(0), held_out=how.get("held_out"))
    whole.engine.close()
    model = toy.build(kind)
    for name in names(setup):
        cls = next(cls for cls in EXTENSIONS if cls.name == name)
        with monkeypatch.context() as patch:
            attach = cls.attach

            def refusing(self, run, undo, attach=attach):
                attach(self, run, undo)
                raise RuntimeError("refused")

            patch.setattr(cls, "attach", refusing)
            assert_refused(model, "refused", options, RuntimeError, **how)
    for a, b in zip(toy.build(kind).parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("setup", SETUPS)
def test_a_closed_engine_leaves_nothing(setup):
    kind, options, how = SETUPS[setup]
    model = toy.build(kind)
    optimizer = toy.optimize("sgd", model)
    before = traces(model, optimizer)
    with_tau = "tau" in options
    config = GradESConfig(**{**options, **({"tau": {"q": 1e9, ".*": 1e-30}, "alpha": 0.0} if with_tau else {})})
    engine = GradES(model, config, total_steps=9, optimizer=optimizer, **how)
    for micro in toy.batches(0)[:4]:
        loss, scaler = model(**micro[0]).loss, how.get("scaler")
        (loss if scaler is None else scaler.scale(loss)).backward()
        engine.step()
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    assert bool(engine.frozen) is with_tau
    engine.close()
    after = traces(model, optimizer)
    assert {key: value for key, value in after.items() if value != before[key]} == {}


def test_a_refusal_ends_the_engine_before_it_and_no_other():
    """A new engine for a model replaces the old one; that it is refused does not bring the old one back."""
    model, other = toy.build("full"), toy.build("full")
    old, elsewhere = (GradES(m, GradESConfig(tau=1.0), total_steps=9) for m in (model, other))
    with pytest.raises(ValueError, match="can merge none"):
        GradES(model, GradESConfig(tau=1.0, merge_frozen_adapters=True), total_steps=9)
    with pytest.raises(RuntimeError, match="closed"):
        old.step()
    other(**toy.batches(0)[0][0]).loss.backward()
    elsewhere.step()
    elsewhere.close()


# --- all pairs --------------------------------------------------------------------------------------------------------


def every_extension() -> list[type[Extension]]:
    for room in ("ending", "freezing", "inputs", "parallel", "record"):
        for module in pkgutil.iter_modules([f"{grades_hf.__path__[0]}/{room}"], f"grades_hf.{room}."):
            importlib.import_module(module.name)
    found, known = [], [Extension]
    while known:
        below = [cls for cls in known.pop().__subclasses__() if cls.__module__.startswith("grades_hf.")]
        found += below
        known += below
    return sorted(found, key=lambda cls: cls.name)


EXTENSIONS = every_extension()


def named(cls: type[Extension]) -> Extension:
    return cls.__new__(cls)


def test_names_are_keys_of_checkpoints_and_no_two_are_alike():
    names = [cls.name for cls in EXTENSIONS]
    assert len(names) == len(set(names)) > 10


def test_an_extension_is_refused_under_a_trait_that_it_names_and_no_other():
    for cls, trait in itertools.product(EXTENSIONS, Trait):
        refuse = functools.partial(refuse_conflicts, [named(cls)], frozenset({trait}))
        check(refuse, cls.refuses.get(trait), cls.error)


def check(refuse: Callable[[], None], reason: str | None, error: type[Exception]) -> None:
    """Raises `reason`, a whole sentence with a remedy, or nothing."""
    if reason is None:
        refuse()
        return
    with pytest.raises(error) as raised:
        refuse()
    assert str(raised.value) == reason
    assert reason.endswith(".")
    assert reason.count(". ") >= 1, "what is wrong, and what to do about it"
