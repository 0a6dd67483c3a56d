"""The moving average of the trained weights, which a run without a tau returns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..contracts import Extension, Run, Step
from ..parallel.sharded import local, placed_like

logger = logging.getLogger(__name__)

UPDATES = 20  # updates of the average within its horizon, at least


class Average(Extension):
    r"""An exponential moving average of the trained weights, without the untrained beginning.

    $$ \bar W_n = \bar W_{n-1} + a_n (W_t - \bar W_{n-1}), \qquad a_n = \max(1 / h, 2 / (n + 1)) $$

    with $W_t$ the weights after t updates and n = 1, 2, ... the updates of the average. The horizon h is a tenth of the
    run, but not less than 10 optimizer steps; as long as n is smaller, the average reaches over the last half of the
    steps so far. It begins anew as long as the learning rate rises (warm-up). On long runs it is updated at every k-th
    optimizer step only, k = h / 20, where it costs next to nothing.

    Memory: one copy of the trained weights, in float32 or better, sharded where they are.

    Args:
        horizon: h, in optimizer steps.
        device: Where it is kept; None for the device of each weight.

    Attributes:
        parameters: What is averaged: all that is trained.
    """

    name = "average"

    def __init__(self, horizon: float, device: str | None = None) -> None:
        self.horizon = horizon
        self.every = max(1, int(horizon / UPDATES))
        self.device = device
        self.number = 0  # n
        self._average: dict[Tensor, Tensor] = {}

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._warm_up: Any = run.extension("warm_up")
        self.parameters = [p for p in run.model.parameters() if p.requires_grad and p.is_floating_point()]
        undo.callback(self._close)

    @torch.no_grad()
    def on_step_end(self, step: Step) -> None:
        if self._warm_up.rising:
            self.number = 0
        if (step.t - 1) % self.every and self.number:
            return
        self.number += 1
        if not self._average:  # at the beginning, or after a resume from a checkpoint without it
            self.number = 1
        if self.number == 1:
            self._average = {p: self._copy(p) for p in self.parameters}
            return
        weight = max(self.every / self.horizon, 2 / (self.number + 1))
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, average in self._average.items():
            now = local(parameter.detach())
            averages, weights = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            weights.append(now.to(average.device, average.dtype))
        for averages, weights in groups.values():
            torch._foreach_lerp_(averages, weights, weight)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average into the model."""
        for parameter, average in self._average.items():
            local(parameter.detach()).copy_(average)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model holds the average meanwhile, and its own weights again afterwards, to the bit."""
        with torch.no_grad():
            present = {p: local(p.detach()).to(self.device or p.device, copy=True) for p in self._average}
        try:
            self.install()
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in present.items():
                    local(parameter.detach()).copy_(weight)

    def tensors(self) -> dict[Tensor, Tensor]:
        return dict(self._average)

    def load_tensors(self, tensors: Mapping[Tensor, Tensor]) -> None:
        if not self.number:
            return
        if tensors.keys() != set(self.parameters):
            self.number = 0  # it begins anew
            logger.warning("GradES: the checkpoint does not hold the average of the weights, so it begins anew.")
            return
        self._average = {
            p: local(placed_like(tensors[p], p)).to(self.device or p.device, self._dtype(p)) for p in self.parameters
        }

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def check(self, state: Mapping[str, Any]) -> int:
        number = int(state["number"])
        if number < 0 or not math.isfinite(number):
            raise ValueError(f"the average of a checkpoint cannot have had {number} updates.")
        return number

    def load(self, checked: int) -> None:
        self.number = checked

    def _copy(self, parameter: Tensor) -> Tensor:
        return local(parameter.detach()).to(self.device or parameter.device, self._dtype(parameter), copy=True)

    @staticmethod
    def _dtype(parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32)

    def _close(self) -> None:
        self._average, self.parameters = {}, []
