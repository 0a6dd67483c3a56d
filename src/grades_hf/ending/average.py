"""The moving average of the trained weights, which a run without a tau returns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..contracts import Extension, Run, Step
from ..find.components import Component
from ..parallel.sharded import local, placed_like, reshard

logger = logging.getLogger(__name__)

UPDATES = 20  # updates of the average within its horizon, at least


class Average(Extension):
    r"""An exponential moving average of the trained weights, without the untrained beginning.

    $$ \bar W \leftarrow \bar W + a (W_s - \bar W), \qquad a = 1 - (1 - 1/h_s)^k, \qquad
       h_s = \min(h, \max(1, (s - 1 + k) / 2)) $$

    with $W_s$ the weights after s updates, s = 1 first. The horizon h is a tenth of the run, but not less than 10
    optimizer steps; in the beginning the average reaches over the last half of the steps so far. It is updated at every
    k-th step, k = h / 20 or 1, so that it costs next to nothing on long runs.

    Memory: one copy of the trained weights, in float32 or better, sharded where they are.

    Args:
        horizon: h, in optimizer steps.
        device: Where it is kept; None for the device of each weight.

    Attributes:
        parameters: What is averaged: all that is trained.
        every: k.
    """

    name = "average"

    def __init__(self, horizon: float, device: str | None = None) -> None:
        self.horizon = horizon
        self.every = max(1, int(horizon / UPDATES))
        self.device = device
        self.parameters: list[Tensor] = []
        self._origin = 0  # the step that s counts from; 0 but for a run that has lost its average
        self._average: dict[Tensor, Tensor] = {}

    @property
    def ready(self) -> bool:
        """Whether there is an average already."""
        return bool(self._average)

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._run = run
        self.parameters = [p for p in run.model.parameters() if p.requires_grad and p.is_floating_point()]
        undo.callback(self._close)

    @torch.no_grad()
    def before_check(self, step: Step) -> None:
        updates = step.t - 1 - self._origin  # s
        if updates < 1 or (updates - 1) % self.every:
            return
        if not self._average:
            self._average = {p: self._copy(p) for p in self.parameters}
        horizon = min(self.horizon, max(1.0, (updates - 1 + self.every) / 2))
        weight = 1 - (1 - 1 / horizon) ** self.every
        groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for parameter, average in self._average.items():
            averages, weights = groups.setdefault((average.device, average.dtype), ([], []))
            averages.append(average)
            weights.append(local(parameter.detach()).to(average.device, average.dtype))
        for averages, weights in groups.values():
            torch._foreach_lerp_(averages, weights, weight)

    def on_join(self, components: Sequence[Component], parameters: Sequence[Tensor]) -> None:
        """Their average begins at their weights as they are."""
        known = set(self.parameters)
        more = [p for p in parameters if p.is_floating_point() and p not in known]
        self.parameters += more
        if self._average:
            self._average |= {p: self._copy(p) for p in more}

    def install(self) -> None:
        """Put the average into the model."""
        self._write(self._average)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model holds the average meanwhile, and its own weights again afterwards, to the bit."""
        with torch.no_grad():
            present = {p: local(p.detach()).to(self.device or p.device, copy=True) for p in self._average}
        try:
            self.install()
            yield
        finally:
            self._write(present)

    @torch.no_grad()
    def _write(self, weights: Mapping[Tensor, Tensor]) -> None:
        for parameter, weight in weights.items():
            local(parameter.detach()).copy_(weight)
        reshard(self._run.model)

    def tensors(self) -> dict[Tensor, Tensor]:
        return dict(self._average)

    def load_tensors(self, tensors: Mapping[Tensor, Tensor]) -> None:
        if tensors and tensors.keys() == set(self.parameters):
            self._average = {
                p: local(placed_like(tensors[p], p)).to(self.device or p.device, self._dtype(p))
                for p in self.parameters
            }
        elif self._run.t > 0:
            self._origin = max(0, self._run.t - 1)
            logger.warning(
                "GradES: the checkpoint does not hold the average of the weights (it was saved without the optimizer, "
                "or without GradES), so it begins anew."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self._origin}

    def check(self, state: Mapping[str, Any]) -> int:
        origin = int(state["origin"])
        if origin < 0:
            raise ValueError(f"the average of a checkpoint cannot have begun at step {origin}.")
        return origin

    def load(self, checked: int) -> None:
        self._origin = checked

    def _copy(self, parameter: Tensor) -> Tensor:
        return local(parameter.detach()).to(self.device or parameter.device, self._dtype(parameter), copy=True)

    @staticmethod
    def _dtype(parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32)

    def _close(self) -> None:
        self._average, self.parameters = {}, []
        del self._run
