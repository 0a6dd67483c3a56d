"""What every criterion offers: from the values of one statistic, one after another, to a verdict for each component."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fractions import Fraction
from numbers import Real
from typing import Any, ClassVar


class Criterion(ABC):
    """When has a component converged? A pure function of the values of its statistic so far.

    Attributes:
        name: Its name in `GradESConfig.criterion`.
        sizes: How many numbers it may keep of a component.
        memory: Component name -> the numbers that are kept, all that a resumed run needs.
    """

    name: str
    sizes: ClassVar[range]

    def __init__(self) -> None:
        self.memory: dict[str, list[float]] = {}

    @property
    def parts(self) -> list[Criterion]:
        """The criteria that this one is made of: itself, or those of a combination."""
        return [self]

    @property
    def relative(self) -> list[Criterion]:
        """Those of `parts` that compare a statistic with its own past."""
        return [part for part in self.parts if isinstance(part, Relative)]

    @abstractmethod
    def update(self, name: str, step: int, value: float) -> bool:
        """Whether a component has converged, given its value at one more check.

        Args:
            name: The component.
            step: The optimizer step (1-based) of the check; steps ascend.
            value: The statistic; NaN where there is none.
        """

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Free what is kept of these components; default: of all, so that observation begins anew."""
        for name in list(self.memory) if names is None else names:
            self.memory.pop(name, None)

    def state_dict(self) -> dict[str, Any]:
        """`memory`, as JSON types."""
        return {name: list(numbers) for name, numbers in self.memory.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            AttributeError, TypeError, ValueError: `state` is none of this criterion; nothing has been changed then.
        """
        self.memory = self.checked(state)

    def checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What `load_state_dict` takes over; raises as it does."""
        memory = {str(name): list(numbers) for name, numbers in state.items()}
        for name, numbers in memory.items():
            if len(numbers) not in self.sizes or not all(_is_number(number) for number in numbers):
                raise ValueError(f"{numbers!r} is no state of criterion={self.name!r} (component {name})")
        return memory


class Relative(Criterion):
    """A criterion that compares a statistic with its own past, so that its scale does not matter.

    A check whose value is not finite, or 0 (there was nothing to learn), says nothing: it is left out, as if it had not
    been made. The engine lets observation begin anew at every step at which the learning rate is higher than ever
    before. What a statistic does in warm-up, when the weights hardly move yet, is therefore no part of its past.
    """

    def update(self, name: str, step: int, value: float) -> bool:
        return math.isfinite(value) and value > 0 and self.observe(name, value)

    @abstractmethod
    def observe(self, name: str, value: float) -> bool:
        """`update` for a value that is finite and greater than 0."""


def grace_steps(alpha: float, total_steps: int) -> int:
    r"""$t_{grace} = \lceil \alpha T \rceil$, in decimal arithmetic: 0.55 of 100 steps are 55, not 56."""
    return math.ceil(Fraction(str(alpha)) * total_steps)


def checks(window: float, total_steps: int, check_every: int) -> int:
    """Checks in a window: `window` is a number of optimizer steps, or if below 1 a part of the run; 1 or more."""
    steps = grace_steps(window, total_steps) if window < 1 else int(window)
    return max(1, math.ceil(steps / check_every))


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
