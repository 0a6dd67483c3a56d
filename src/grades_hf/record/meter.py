"""What a run computes: FLOPs of real steps, counted, and what freezing has saved of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..contracts import Extension, Run, Step, Trait
from ..find.components import Component
from ..hooks import hook
from .counter import FlopCounter, count_backward, enter, leave
from .savings import Savings

COUNT_EVERY = 25  # steps for each counted one, on average at least
RECOUNT_AFTER = 100  # steps after which one is counted though nothing has changed


@dataclass
class _Tally:
    """All that a resumed run needs; JSON types only.

    Attributes:
        steps: Optimizer steps seen.
        counted: Of them counted ones.
        trainable: Trainable tensors when nothing was frozen; 0 before the first step.
        used: FLOPs of all steps.
        before: FLOPs of the steps with nothing frozen.
        forward: FLOPs that the forward passes of the other steps would have cost with nothing merged.
        merged: FLOPs that merging saved in these forward passes.
        weights: FLOPs of the weight gradients that were saved.
        unfrozen: FLOPs and forward FLOPs of the counted steps with nothing frozen.
        base: Input elements of the first counted step.
        components: Name -> forward FLOPs in the first counted step.
        last: FLOPs, forward FLOPs and input elements of the last counted step.
        last_set: The state of the model in it: trainable tensors, and FLOPs (of `components`) frozen and merged.
        last_step: Its number.
    """

    steps: int = 0
    counted: int = 0
    trainable: int = 0
    used: float = 0.0
    before: float = 0.0
    forward: float = 0.0
    merged: float = 0.0
    weights: float = 0.0
    unfrozen: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    base: int = 0
    components: dict[str, int] = dataclasses.field(default_factory=dict)
    last: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    last_set: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    last_step: int = 0


class Meter(Extension):
    """Counts what some steps of a run compute, and derives the others from them.

    A step is counted first of all, and when what is trained has changed, but on average at most one in 25; besides,
    one after 100 steps without. Counting changes no bit. A step between costs, for each input element (batch times
    padded length), what the last counted one cost, less the weight gradients of what has frozen since, as they are counted.

    The FLOPs are counted by a dispatch mode. It is active in the model's forward pass, and from then on only while a
    node of that pass's autograd graph runs: never between them, so that no error leaves it behind.

    What a step would have cost with nothing frozen: forward work does not depend on what is frozen, so it is the
    step's forward FLOPs (with what merging saved of them) times r, with r = (all FLOPs) / (forward FLOPs) of the
    counted steps with nothing frozen.

    Attributes:
        reason: Why nothing can be told, or None.
    """

    name = "meter"

    def __init__(self) -> None:
        self.reason: str | None = None
        self._tally = _Tally()
        self._taken = 0

    def attach(self, run: Run, undo: ExitStack) -> None:
        model, merging = run.model, run.extension("merging")
        self._merged: Callable[[], Collection[str]] = (lambda: merging.merged) if merging is not None else tuple  # type: ignore[attr-defined]
        self._parameters = list(model.parameters())
        self._components = run.components
        self._begun = False  # whether this step's first forward pass has begun
        self._set = [-1, 0, 0]  # of this step, see `_Tally.last_set`
        self._passes = 0  # input elements of this step
        self._pass: int | None = None  # of the forward pass that is running
        self._counter: FlopCounter | None = None  # of this step, if it is counted
        self._start = self._forward = 0  # FLOPs
        self._owners = _owners(model, run.components)
        self._inner: list[RemovableHandle] = []
        undo.callback(self._close)
        if Trait.COMPILED in run.traits:
            self.reason = "the model is compiled (torch.compile), and what compiled code computes is not seen"
            return
        undo.callback(hook(model, "forward_pre", self._before_forward, with_kwargs=True))
        undo.callback(hook(model, "forward", self._after_forward, always_call=True))

    @property
    def measured(self) -> bool:
        """Whether `savings` can tell something."""
        return self.reason is None and self._tally.unfrozen[1] > 0

    def on_step_end(self, step: Step) -> None:
        tally = self._tally
        tally.steps += 1
        if self._begun and self.reason is None:
            flops, forward = self._cost()
            tally.used += flops
            frozen, merged = (part * self._passes / tally.base if part else 0.0 for part in self._set[1:])
            if self._set[0] == tally.trainable and not merged:
                tally.before += flops
                if self._counter is not None:
                    tally.unfrozen = [tally.unfrozen[0] + self._counter.total, tally.unfrozen[1] + self._forward]
            else:
                tally.forward += forward + merged
                tally.merged += merged
                tally.weights += frozen
            if self._counter is not None:
                self._end_counted(self._counter)
        elif self.reason is None:
            self.reason = (
                f"no forward pass of the model was seen at step {tally.steps}: it is compiled, or not called as "
                "model(...) in training mode"
            )
        self._begun, self._passes = False, 0

    def savings(self, total_steps: int) -> Savings:
        """What is saved so far; `total_steps` are planned.

        Raises:
            RuntimeError: nothing can be told; the message says why.
        """
        tally = self._tally
        if not self.measured:
            raise RuntimeError(f"savings are not measured: {self.reason or 'no optimizer step has been counted yet'}.")
        full = tally.before + tally.forward * tally.unfrozen[0] / tally.unfrozen[1]
        rest = full - tally.used - tally.weights - 2 * tally.merged
        return Savings(
            steps=tally.steps,
            full=full,
            used=tally.used,
            weight_gradient=tally.weights,
            input_gradient=rest,
            adapter=2 * tally.merged,
            planned=full * total_steps / tally.steps,
        )

    def take(self) -> int | None:
        """The model's FLOPs since the last call, the running step included; None where they are not counted."""
        if self.reason is not None or not (self._tally.counted or self._begun):
            return None
        now = int(self._tally.used + (self._cost()[0] if self._begun else 0.0))
        taken, self._taken = now - self._taken, now
        return taken

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON types only."""
        return {**dataclasses.asdict(self._tally), "reason": self.reason}

    def check(self, state: Mapping[str, Any]) -> tuple[_Tally, str | None]:
        tally = _Tally(**{name: _like(default, state[name]) for name, default in vars(_Tally()).items()})
        reason = state["reason"]
        return tally, None if reason is None else str(reason)

    def load(self, checked: tuple[_Tally, str | None]) -> None:
        self._tally, reason = checked
        self.reason = self.reason or reason
        self._taken = int(self._tally.used)

    def _close(self) -> None:
        """End the run; what was counted stays readable."""
        if self._counter is not None:
            leave(self._counter)
        for handle in self._inner:
            handle.remove()
        self._parameters, self._owners, self._components = [], [], []
        self._merged = tuple

    # --- one step ------------------------------------------------------------------------------------------------

    def _state(self) -> list[int]:
        """The state of the model now, see `_Tally.last_set`."""
        flops, live = self._tally.components, sum(parameter.requires_grad for parameter in self._parameters)
        frozen = (c for c in self._components if not any(p.requires_grad for p in c.parameters))
        return [
            live,
            sum(flops.get(c.name, 0) for c in frozen) if live != self._tally.trainable else 0,
            sum(flops.get(name, 0) for name in self._merged()),
        ]

    def _begin(self) -> None:
        """The first forward pass of a step: what is trained, and is it counted?"""
        tally = self._tally
        self._begun = True
        if not tally.trainable:
            tally.trainable = sum(parameter.requires_grad for parameter in self._parameters)
        self._set = self._state()
        changed = self._set != tally.last_set and tally.counted * COUNT_EVERY <= tally.steps
        self._counter, self._forward = None, 0
        due = not tally.counted or changed or tally.steps + 1 - tally.last_step >= RECOUNT_AFTER
        if self.reason is None and due:
            self._counter = FlopCounter()
            if not tally.counted:
                self._hook_components(self._counter)

    def _cost(self) -> tuple[float, float]:
        """FLOPs and forward FLOPs of this step so far."""
        if self._counter is not None:
            return float(self._counter.total), float(self._forward)
        tally = self._tally
        if not tally.counted:
            return 0.0, 0.0
        (total, forward, elements), (_, frozen, merged) = tally.last, tally.last_set
        newly_frozen, newly_merged = self._set[1] - frozen, self._set[2] - merged
        flops, forward_flops = total * self._passes / elements, forward * self._passes / elements
        if newly_frozen or newly_merged:
            flops -= (newly_frozen + 2 * newly_merged) * self._passes / tally.base  # forward and input gradients
            forward_flops -= newly_merged * self._passes / tally.base
        return flops, forward_flops

    def _end_counted(self, counter: FlopCounter) -> None:
        tally = self._tally
        leave(counter)
        self._counter = None
        for handle in self._inner:
            handle.remove()
        self._inner.clear()
        if not self._passes or counter.total == self._forward:
            self.reason = "no backward pass of the model's outputs was seen"
            return
        tally.counted += 1
        tally.base = tally.base or self._passes
        tally.last = [counter.total, self._forward, self._passes]
        tally.last_set, tally.last_step = self._set, tally.steps

    # --- the model's passes ----------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if not model.training or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # the last: a recomputation, in a backward pass
        if self._counter is not None:
            leave(self._counter)  # an interrupt has left it
        if not self._begun:
            self._begin()
        self._pass = _elements(args, kwargs)
        if self._counter is not None:
            self._start = self._counter.total
            enter(self._counter)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or self._pass is None or torch._C._current_graph_task_id() != -1:
            return
        if output is not None:  # else it has failed
            self._passes += self._pass
        self._pass = None
        if self._counter is not None:
            leave(self._counter)
            self._forward += self._counter.total - self._start
            count_backward(output, self._counter)

    def _hook_components(self, counter: FlopCounter) -> None:
        """For this step: what each component's modules compute in the forward pass."""
        flops = self._tally.components = dict.fromkeys((component.name for component in self._components), 0)
        started: dict[nn.Module, int] = {}

        def before(module: nn.Module, args: Any) -> None:
            started[module] = counter.total

        def after(shares: dict[str, int], module: nn.Module, args: Any, output: Any) -> None:
            if self._pass is None:
                return  # a recomputation
            spent, numel = counter.total - started[module], sum(shares.values())
            for name, share in shares.items():  # fused experts: two components of one module
                flops[name] += spent * share // numel

        for module, shares in self._owners:
            self._inner.append(module.register_forward_pre_hook(before))
            self._inner.append(module.register_forward_hook(functools.partial(after, shares)))


def _owners(model: nn.Module, components: Sequence[Component]) -> list[tuple[nn.Module, dict[str, int]]]:
    """The modules that hold measured tensors: component name -> elements."""
    names = {parameter: component.name for component in components for parameter in component.measured}
    owners = []
    for module in model.modules():
        shares: dict[str, int] = {}
        for parameter in module.parameters(recurse=False):
            if parameter in names:
                shares[names[parameter]] = shares.get(names[parameter], 0) + parameter.numel()
        if shares:
            owners.append((module, shares))
    return owners


def _elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Elements of the inputs: of `input_ids`, or else of the first tensor; 1 where there is none."""
    inputs = kwargs.get("input_ids")
    if not isinstance(inputs, Tensor):
        tensors = (leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.numel())
        inputs = next(tensors, None)
    return 1 if inputs is None else inputs.numel()


def _like(default: Any, value: Any) -> Any:
    """`value` as a number, a list of as many whole numbers, or a dict of them, as `default` is."""
    if isinstance(default, list):
        numbers = [int(number) for number in value]
        if len(numbers) != len(default):
            raise ValueError(f"the FLOP counts of the checkpoint have {len(numbers)} numbers instead of {len(default)}.")
        return numbers
    if isinstance(default, dict):
        return {str(name): int(number) for name, number in value.items()}
    return type(default)(int(value) if isinstance(default, int) else float(value))
