"""What every monitor offers: a value for each tensor now, and a memory of the step before where it needs one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor


class Monitor(ABC):
    """One gradient statistic $G_W(t)$, read just before the update of optimizer step `t`.

    A monitor sees single tensors; the engine adds the values of a component's tensors up. Those that compare two
    steps keep the tensor of the step before in `previous` and free it in `forget`.

    Attributes:
        name: The statistic's name in `GradESConfig.monitor`.
        compares_steps: Whether it needs `previous`, so that its first check yields no value.
        zero_is_a_value: Whether exactly 0 says something about the matrix, or only that nothing was measured.
        previous: What was remembered, by parameter; always empty for a monitor that looks at one step only.
    """

    name: ClassVar[str]
    compares_steps: ClassVar[bool] = True
    zero_is_a_value: ClassVar[bool] = True

    def __init__(self) -> None:
        self.previous: dict[Tensor, Tensor] = {}

    def takes_part(self, parameter: Tensor) -> bool:
        """Whether this step's batch involved `parameter` (an expert or adapter that it did not has no gradient)."""
        return parameter.grad is not None

    @abstractmethod
    def measure(self, parameter: Tensor) -> Tensor | None:
        """The statistic of one parameter as a 0-d tensor on its device; None where there is nothing to compare with."""

    def remember(self, parameters: Iterable[Tensor]) -> None:  # noqa: B027 - most statistics need no memory
        """Keep what the check at the next step needs; called after this step's check."""

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Free what is kept for these parameters."""
        for parameter in parameters:
            self.previous.pop(parameter, None)
