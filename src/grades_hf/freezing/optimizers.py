"""Optimizers: which ones can leave a frozen parameter alone, and how they are made to."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3  # how deep in an optimizer's own containers parameters are looked for


def refuse_optimizers(optimizers: Sequence[torch.optim.Optimizer], tracked: Iterable[Tensor]) -> None:
    """Raise for an optimizer that could move what is frozen, or fail where a gradient is missing.

    The rules are about what an optimizer holds and asks for, not about its name. A frozen parameter has no gradient and
    is not in the parameter groups while the optimizer steps, so an optimizer must take its parameters from there, one
    by one, and be content with a single gradient for each step.

    Args:
        optimizers: The optimizers of a run.
        tracked: The parameters that may freeze.

    Raises:
        ValueError: the message names the optimizer, the reason and the remedy.
    """
    remedy = "Use another optimizer (AdamW, SGD, Adafactor, Muon, and most others work)."
    for optimizer in optimizers:
        name, own = type(optimizer).__name__, {id(parameter) for parameter in _parameters(optimizer)}
        if _needs_closure(optimizer):
            raise ValueError(
                f"GradES cannot work with {name}: its step() needs a closure, so it computes gradients several times "
                f"in a step, of which GradES would see one. {remedy}"
            )
        if (key := _parallel(optimizer)) is not None:
            raise ValueError(
                f"GradES cannot work with {name}: its parameter groups hold {key!r}, a list that goes by the place of "
                f"each parameter, and what is frozen has no place there. {remedy}"
            )
        for attribute, value in vars(optimizer).items():
            if attribute not in ("param_groups", "state") and _holds(value, own, DEPTH):
                raise ValueError(
                    f"GradES cannot work with {name}: it holds parameters outside of its parameter groups "
                    f"({attribute}), and could move frozen ones. {remedy}"
                )
        if any(hasattr(parameter, "grad_sample") for parameter in _parameters(optimizer)):
            raise ValueError(
                f"GradES cannot work with {name}: its parameters hold a gradient for each row (grad_sample), from "
                "which the optimizer makes the gradient inside of its own step(), after GradES has looked. Train "
                "without per-sample gradients, or without GradES."
            )
    if optimizers:
        known = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
        if not any(id(parameter) in known for parameter in tracked):
            raise ValueError(
                f"optimizer={type(optimizers[0]).__name__} holds none of the matrices that GradES tracks: it was built "
                "for another model, before the parameters were replaced, or updates copies of them. Build it over the "
                "parameters of the model that is passed to GradES."
            )


def with_inner(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    """These and the optimizers inside of them (Lookahead, SAM), each once."""
    found = list(dict.fromkeys(optimizers))
    for optimizer in found:  # which grows meanwhile
        inner = (value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer))
        found += [other for other in inner if other not in found]
    return found


class LeaveOut:
    """Takes what is frozen out of an optimizer's parameter groups while it steps, and puts it back.

    Some optimizers also move parameters that have no gradient (Muon's reference implementation decays them).

    torch's hooks before and after a step do it. They belong to the optimizer's class, so that they are called whoever
    has replaced `optimizer.step` (accelerate does while its scaler steps). But the one after it is left out when the
    step fails. So the method is wrapped, too, and where that is replaced, `state_dict()` and the end of the run put
    everything back.

    Args:
        optimizer: The optimizer.
        frozen: What is frozen; held weakly.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Collection[object]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._frozen = weakref.ref(frozen)
        self._taken: list[tuple[dict[str, Any], list[Tensor]]] = []
        self._depth = 0  # steps that run inside of each other: a class that calls its base class's

    def attach(self, optimizer: torch.optim.Optimizer, undo: ExitStack) -> None:
        """Begin; `undo` ends it."""
        undo.callback(self.put_back)
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):
            undo.callback(optimizer.register_step_pre_hook(self.take_out).remove)
            undo.callback(optimizer.register_step_post_hook(self._after).remove)
            undo.callback(optimizer.register_state_dict_pre_hook(self.put_back).remove)
        undo.callback(self._wrap(optimizer))

    def take_out(self, *_: Any) -> None:
        """Parameter groups without what is frozen; also a hook before a step."""
        self._depth += 1
        self.refresh()

    def refresh(self) -> None:
        """More is frozen now; a step that runs meanwhile (Lightning's closure is a part of it) leaves that out, too."""
        frozen, optimizer = self._frozen(), self._optimizer()
        if self._depth == 0 or not frozen or optimizer is None:
            return
        for group in optimizer.param_groups:
            if not any(group is known for known, _ in self._taken):
                self._taken.append((group, group["params"]))
            group["params"] = [parameter for parameter in group["params"] if parameter not in frozen]

    def put_back(self, *_: Any) -> None:
        """Parameter groups as they were; also a hook before `state_dict()`."""
        self._depth = 0
        for group, parameters in self._taken:
            group["params"] = parameters
        self._taken.clear()

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.put_back()

    def _wrap(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        own, step = optimizer.__dict__.get("step"), optimizer.step

        @functools.wraps(step)
        def stepping(_: Any, *args: Any, **kwargs: Any) -> Any:
            self.take_out()
            try:
                return step(*args, **kwargs)
            finally:
                self.put_back()

        bound = types.MethodType(stepping, optimizer)  # a schedule that is built later takes its `__func__`
        optimizer.step = bound  # type: ignore[method-assign]

        def undo() -> None:
            there = self._optimizer()
            if there is None or there.__dict__.get("step") is not bound:
                return  # something has replaced it; ours finds nothing frozen any more
            if own is None:
                del there.__dict__["step"]
            else:
                there.step = own  # type: ignore[method-assign]

        return undo


def can_leave_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters may leave the groups for a step: bitsandbytes' options go by a parameter's place there.

    Its optimizers leave alone what has no gradient.
    """
    return not hasattr(optimizer, "get_config")


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` has an argument that must be given."""
    try:
        arguments = list(inspect.signature(type(optimizer).step).parameters.values())[1:]
    except (TypeError, ValueError):
        return False
    return any(a.default is a.empty and a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD) for a in arguments)


def _parallel(optimizer: torch.optim.Optimizer) -> str | None:
    """The key of a list in a parameter group that has an element for each parameter; None where there is none.

    torch's own `param_names`, which no step reads, is none. Nor are a few numbers (betas, schedules).
    """
    for group in optimizer.param_groups:
        number = len(group["params"])
        for key, value in group.items():
            if key in ("params", "param_names") or not isinstance(value, (list, tuple)) or len(value) != number:
                continue
            if number > 3 or not all(isinstance(item, (int, float, Tensor)) for item in value):
                return str(key)
    return None


def _holds(value: object, parameters: Container[int], depth: int) -> bool:
    """Whether `value` is, or holds, one of the parameters with these ids."""
    if isinstance(value, Tensor):
        return id(value) in parameters
    if isinstance(value, nn.Module):
        return any(id(parameter) in parameters for parameter in value.parameters())
    if depth == 0 or isinstance(value, (str, bytes, torch.optim.Optimizer)):
        return False
    if isinstance(value, Mapping):
        return any(_holds(item, parameters, depth - 1) for pair in value.items() for item in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_holds(item, parameters, depth - 1) for item in value)
    return False
