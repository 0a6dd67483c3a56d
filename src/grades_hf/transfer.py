"""The values of one check on their way from the device to the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Reading:
    """What was measured at one step; on a GPU the stream does not wait for it before `values` is asked for.

    Args:
        step: The optimizer step (1-based) that it was measured at.
        names: The components, in order.
        values: (len(names),) in float64, on any device.
    """

    def __init__(self, step: int, names: list[str], values: Tensor) -> None:
        self.step = step
        self.names = names
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty_like(values, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values

    def values(self) -> dict[str, float]:
        """The value of each component; waits until they have arrived."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self.names, self._host.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """As JSON types: `step`, and `values` with None for what is not finite."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values().items()}
        return {"step": self.step, "values": values}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reading:
        """The inverse of `state_dict`.

        Raises:
            KeyError, TypeError, ValueError: `state` is none.
        """
        values = {str(name): math.nan if value is None else float(value) for name, value in state["values"].items()}
        return cls(int(state["step"]), list(values), torch.tensor(list(values.values()), dtype=torch.float64))
