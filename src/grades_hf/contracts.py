"""What the parts of the engine promise each other: Step, Check, Criterion, Extension.

A fine-tune flows one way: find what can be frozen, measure, decide, freeze, record. The engine runs these five steps.
A `Statistic` measures (`statistics/base.py`), a `Criterion` decides. Whatever else a way of training asks for (a loss,
clipping, a gradient scaler) or makes freezing pay (a prefix cut, merging, FLOP counts) is an `Extension`: one class
that owns its hooks, its state, its refusals and its closing.
"""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .engine import GradES
    from .find.components import Component

Run: TypeAlias = "GradES"  # an extension may use all that is public in the engine


IDLE = -math.inf  # in the place of a value: the step's batch has not involved this component


@dataclass
class Step:
    """One optimizer step, as far as extensions have found out about it before the check.

    Attributes:
        t: Its number, from 1 on.
        loss: The loss that is trained on, a 0-d tensor, averaged over ranks; None where nothing asks for it.
        epoch: How many times each row has been seen before this step, 1.0 after the first pass; None if not known.
        skipped: Whether a gradient scaler has found an overflow and will leave the update out.
    """

    t: int
    loss: Tensor | None = None
    epoch: float | None = None
    skipped: bool = False


class Check:
    """The values of one check, on their way from the device to the host.

    On a GPU the stream does not wait for them before `values` is asked for.

    Args:
        step: The optimizer step (1-based) at which they were measured.
        names: The components, in order.
        values: (len(names),) in float64, on any device; NaN where there is none, `IDLE` where there was no gradient.
    """

    def __init__(self, step: int, names: list[str], values: Tensor) -> None:
        self.step = step
        self.names = names
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def values(self) -> Tensor:
        """The value of each component, (len(names),) on the host; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def state_dict(self) -> dict[str, Any]:
        """JSON types: `step`, `values` by name with None for what is not finite, and `idle`, the names of `IDLE`."""
        values = dict(zip(self.names, self.values().tolist(), strict=True))
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return {"step": self.step, "values": finite, "idle": [name for name, v in values.items() if v == IDLE]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Check:
        """The inverse of `state_dict`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: `state` is no such state.
        """
        values = {str(name): math.nan if value is None else float(value) for name, value in state["values"].items()}
        values |= {str(name): IDLE for name in state.get("idle", ()) if str(name) in values}
        return cls(int(state["step"]), list(values), torch.tensor(list(values.values()), dtype=torch.float64))


class Criterion(ABC):
    """A verdict on each component from the values of its statistic, one check after another.

    It sees places, steps and values only. A component's place is its index in the engine's list.

    Args:
        number: The number of components.

    Attributes:
        name: What it is called in histories.
        width: How many numbers it keeps of a component.
        memory: (number, width) in float64, all that a resumed run needs. A row of zeros is a component that has had no
            value yet.
    """

    name: ClassVar[str]
    width: ClassVar[int]

    def __init__(self, number: int) -> None:
        self.memory = torch.zeros(number, self.width, dtype=torch.float64)

    @abstractmethod
    def update(self, places: Tensor, step: int, values: Tensor) -> Tensor:
        """Which components have converged, given one more check.

        Args:
            places: (n,) int64, the components that were measured.
            step: The optimizer step (1-based) of the check; steps ascend.
            values: (n,) float64, their statistic; NaN where there is none.

        Returns:
            (n,) bool.
        """

    def forget(self, places: Tensor | None = None) -> None:
        """Free what is kept of these components; default: of all, so that observation begins anew."""
        if places is None:
            self.memory.zero_()
        else:
            self.memory[places] = 0.0

    def grow(self, more: int) -> None:
        """Make room for `more` components at the end."""
        self.memory = torch.cat([self.memory, self.memory.new_zeros(more, self.width)])


class Trait(enum.Enum):
    """A way of training that some extensions cannot work with; the value says it in words."""

    SHARDED = "sharded parameters (FSDP2)"
    COMPILED = "a compiled model (torch.compile)"
    PARALLEL = "several processes"


class Extension:
    """A part of the engine that does its work at some moments of a step; every hook has an empty default.

    Attributes:
        name: Its key in checkpoints.
        refuses: Ways of training that it cannot work with -> what is wrong and the remedy, a whole sentence.
        error: The type of what a refusal raises: a ValueError where an option asked for the extension.
    """

    name: ClassVar[str]
    refuses: ClassVar[Mapping[Trait, str]] = {}
    error: ClassVar[type[Exception]] = ValueError

    def attach(self, run: Run, undo: ExitStack) -> None:
        """Begin. May refuse with a ValueError or RuntimeError. All that it registers goes on `undo`."""

    def reassert(self) -> None:
        """Something else may have touched the model since: between two steps, and at the start of each."""

    def before_check(self, step: Step) -> None:
        """The gradients of a step are complete; fill in what is known of it."""

    def correct(self, values: Tensor, components: Sequence[Component], step: Step) -> Tensor:
        """The statistic as it should be, from the statistic as it was measured: (len(components),) on the device."""
        return values

    def on_values(self, step: int, components: Sequence[Component], values: Tensor) -> None:
        """The values of the check at `step` are on the host, before they are judged: (len(components),) float64."""

    def on_freeze(self, components: Sequence[Component], values: Tensor) -> None:
        """These components have frozen, at these values of their statistic: (len(components),) float64."""

    def on_join(self, components: Sequence[Component], parameters: Sequence[Tensor]) -> None:
        """More is trained than before: these components are tracked from now on, and all these tensors are new."""

    def on_grad_pattern(self) -> None:
        """`requires_grad` has changed, from the next forward pass on."""

    def on_step_end(self, step: Step) -> None:
        """The engine has done its part of a step; the optimizer's update comes next."""

    def tensors(self) -> dict[Tensor, Tensor]:
        """Parameter -> the tensor of its size that a checkpoint has to hold; saved beside the optimizer's state."""
        return {}

    def load_tensors(self, tensors: Mapping[Tensor, Tensor]) -> None:
        """Take back what `tensors` gave; each has its parameter's shape."""

    def state_dict(self) -> dict[str, Any]:
        """All else that a checkpoint has to hold, as JSON types; empty where there is nothing."""
        return {}

    def check(self, state: Mapping[str, Any]) -> Any:
        """What `load` takes, from what `state_dict` gave. May refuse with a ValueError; changes nothing."""
        return state

    def load(self, checked: Any) -> None:
        """Go on from there; cannot refuse."""
