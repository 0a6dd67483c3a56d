"""An error or Ctrl-C at any point of a step: after `close()` model, optimizer and torch are as without GradES."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from grades_hf import GradES, GradESConfig
from grades_hf.contracts import Extension
from tests import toy
from tests.faults.test_copies import hooks

STEPS = 10
MODES: dict[str, dict[str, Any]] = {
    "freezing": {"tau": {"q": 1e9, ".*": 1e-30}, "alpha": 0.2},
    "prefix": {"tau": {".*layers\\.0\\..*": 1e9, ".*": 1e-30}, "alpha": 0.2, "freeze_prefix": True},
    "looks": {},
}


class Fail(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: type[BaseException] | None) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.error is not None:
            raise ctx.error("out of luck")
        return gradient, None


class Loop:
    """A plain loop with clipping, in which something fails at one point of one step."""

    def __init__(self, kind: str, mode: str, cls: type[torch.optim.Optimizer] = torch.optim.AdamW) -> None:
        self.model = toy.build(kind)
        self.trainable = {name: p.requires_grad for name, p in self.model.named_parameters()}
        self.optimizer = cls([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.groups = [[id(p) for p in group["params"]] for group in self.optimizer.param_groups]
        rows = None if "tau" in MODES[mode] else lambda model: torch.ones(2)
        self.engine = GradES(
            self.model, GradESConfig(**MODES[mode]), total_steps=STEPS, optimizer=self.optimizer, held_out=rows
        )
        self.layer = self.model.get_submodule(("base_model.model." if kind == "lora" else "") + "model.layers.1")
        self.error: type[BaseException] | None = None

    def step(self, where: str = "") -> None:
        def fail(*_: Any) -> Any:
            raise self.error("out of luck")

        handles = []
        if where == "forward":
            handles.append(self.layer.register_forward_pre_hook(fail))
        if where == "backward":
            handles.append(self.layer.register_forward_hook(lambda m, args, output: Fail.apply(output, self.error)))
        try:
            loss = self.model(**toy.batches(0)[0][0]).loss
            if where == "before backward":
                fail()
            loss.backward()
            if where == "clipping":
                next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
                self.error = RuntimeError
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, error_if_nonfinite=True)
            if where == "engine":
                self.engine.extensions.append(failing(fail))
            self.engine.step()
            if where == "before the update":
                fail()
            if where == "update":
                self.tear(fail)
            self.optimizer.step()
            self.optimizer.zero_grad()
        finally:
            for handle in handles:
                handle.remove()

    def tear(self, fail: Callable[..., Any]) -> None:
        """The update fails in the middle: at the second parameter that it comes to."""
        calls = []

        class Group(dict):  # type: ignore[type-arg]
            def __getitem__(self, key: Any) -> Any:
                calls.append(key)
                if key == "lr":
                    fail()
                return super().__getitem__(key)

        self.optimizer.param_groups[0] = Group(self.optimizer.param_groups[0])


def failing(fail: Callable[..., Any]) -> Extension:
    class Failing(Extension):
        name = "failing"

        def on_step_end(self, step: Any) -> None:
            fail()

    return Failing()


WHERE = ("forward", "before backward", "backward", "clipping", "engine", "before the update", "update")


@pytest.mark.compatibility("Faults", "an error or Ctrl-C at any point of a step of one's own loop", "works")
@pytest.mark.parametrize(("step", "error"), [(1, RuntimeError), (5, KeyboardInterrupt)])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(("kind", "mode"), [("full", "freezing"), ("lora", "prefix"), ("full", "looks")])
def test_everything_is_as_before(kind, mode, where, step, error):
    gc.collect()  # engines that other tests have left open
    functions = torch.autograd.backward, nn.utils.clip_grads_with_norm_, clip_grad._clip_grads_with_norm_
    loop = Loop(kind, mode)
    for _ in range(1, step):
        loop.step()
    loop.error = error
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="out of luck|non-finite"):
        loop.step(where)
    assert [[id(p) for p in group["params"]] for group in loop.optimizer.param_groups] == loop.groups
    fresh = torch.optim.AdamW([p for name, p in loop.model.named_parameters() if loop.trainable[name]], lr=1e-2)
    fresh.load_state_dict(loop.optimizer.state_dict())  # an emergency save, before anything is closed
    loop.engine.close()
    assert (torch.autograd.backward, nn.utils.clip_grads_with_norm_, clip_grad._clip_grads_with_norm_) == functions
    assert _get_current_dispatch_mode_stack() == []
    assert "step" not in vars(loop.optimizer)
    assert hooks(loop.model) == []
    assert {name: p.requires_grad for name, p in loop.model.named_parameters()} == loop.trainable
    # A plain loop on the same model trains everything.
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    if where != "clipping":
        loop.model.zero_grad()
        loop.model(**toy.batches(0)[0][0]).loss.backward()
        fresh.step()
        moved = {name: not torch.equal(p, before[name]) for name, p in loop.model.named_parameters()}
        assert moved == loop.trainable
    # And the next engine begins as if nothing had happened.
    again = GradES(loop.model, GradESConfig(tau=1e-30), total_steps=STEPS, optimizer=fresh)
    loop.model.zero_grad()
    loop.model(**toy.batches(0)[0][0]).loss.backward()
    again.step()
    again.close()


def test_a_step_that_fails_can_be_taken_again():
    """The loop catches the error and goes on: what is frozen stays frozen."""
    loop, plain = Loop("full", "freezing"), Loop("full", "freezing")
    for _ in range(3):
        loop.step()
        plain.step()
    loop.error = RuntimeError
    for where in ("forward", "before backward", "backward"):
        with pytest.raises(RuntimeError, match="out of luck"):
            loop.step(where)
        loop.optimizer.zero_grad()
    for _ in range(4):
        loop.step()
        plain.step()
    assert loop.engine.frozen == plain.engine.frozen
    assert len(loop.engine.frozen) == 2
    for p, q in zip(loop.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(p, q)
    loop.engine.close()
    plain.engine.close()
