"""Rules that end a run of the race without changing it: the library's own, early stopping, and that of version 0.1."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race_loop import FORWARD, HeldRows, Weights
from grades_hf import GradES, GradESConfig
from grades_hf.criteria import Rise, smoothing
from grades_hf.ending import Average, Ending
from grades_hf.parallel.ranks import Ranks

MIN_DELTA, PATIENCE = 0.0005, 3  # early stopping, as in the paper
OLD_RISE = 1.5  # at which half of the components ended a run in grades-hf 0.1


class Snapshot:
    """Weights, gradients and the optimizer's state, to be put back after an engine has ended a run."""

    def __init__(self, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._trained, self._optimizer = trained, optimizer
        self.weights = [p.detach().clone() for p in trained]
        self._gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        self._states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in trained]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weight, gradient, state in zip(
            self._trained, self.weights, self._gradients, self._states, strict=True
        ):
            parameter.copy_(weight)
            parameter.grad = gradient
            self._optimizer.state[parameter] = state


class ScheduleAlone:
    """The library's own looks and average where the gradients never propose; it has what those ask of an engine."""

    def __init__(self, engine: GradES, held: HeldRows) -> None:
        self.model, self.total_steps, self.t = engine.model, engine.total_steps, 0
        self.config = GradESConfig(return_weights="last")  # so that the end changes no weights
        self.ranks, self.history = Ranks(engine.model), SimpleNamespace(looks=[])
        self.criterion, self.learned = SimpleNamespace(level=math.inf), torch.ones(1)
        self.freezer = SimpleNamespace(freeze=lambda parameters: None, settle=lambda: None)
        self.held, self.ended, self.meter = held, False, SimpleNamespace(look=contextlib.nullcontext)
        self.average, self.ending = Average(engine.extension("average").horizon), Ending(held)
        self._undo = ExitStack()
        for extension in (self.average, self.ending):
            extension.attach(self, self._undo)  # type: ignore[arg-type]

    def extension(self, name: str) -> Any:
        return self.average if name == "average" else self.meter

    def step(self, step: int, epoch: float) -> None:
        self.t = step
        at = SimpleNamespace(t=step, epoch=epoch)
        self.average.before_check(at)  # type: ignore[arg-type]
        self.ending.before_check(at)  # type: ignore[arg-type]
        if not self.ended:
            self.ending.consider(0)

    def end(self, why: str) -> None:
        self.ended = True

    def returned(self, weights: Callable[[], Weights]) -> Weights:
        """The average, in copies that `weights` makes."""
        with self.average.installed():
            return weights()


class OldVote:
    """The rule of grades-hf 0.1: half of the components have risen to 1.5 times their minimum."""

    def __init__(self, engine: GradES) -> None:
        self._measured = [component.measured for component in engine.components]
        self.criterion = Rise(len(self._measured), OLD_RISE, smoothing(engine.total_steps, 1))
        self._rate: float | None = None

    @torch.no_grad()
    def step(self, loss: Tensor, rate: float) -> bool:
        """Whether the vote is there, from the gradients as they are before clipping."""
        if self._rate is not None and rate > self._rate:
            self.criterion.forget()
        self._rate = rate if self._rate is None else max(rate, self._rate)
        norms = [[p.grad.abs().sum() for p in several if p.grad is not None] for several in self._measured]
        values = torch.stack([torch.stack(each).sum() if each else torch.tensor(math.nan) for each in norms])
        places = torch.arange(len(norms))
        votes = self.criterion.update(places, 0, values.double() / loss if loss > 0 else values.double() * math.nan)
        return int(votes.sum()) >= len(norms) / 2


class EarlyStopping:
    """Validation every 5 % of the steps; the third in a row without progress of 0.0005 ends it; best weights.

    Args:
        rows: Of how many held-out rows, the first ones.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.best = rows, Weights()
        self._lowest, self._waiting, self._validations = math.inf, 0, 0

    def validate(self, held: Tensor, weights: Callable[[], Weights]) -> bool:
        """Whether the run ends, at these losses of at least as many held-out rows."""
        loss = float(held[: self.rows].mean())
        self._validations += 1
        self._waiting = 0 if loss < self._lowest - MIN_DELTA else self._waiting + 1
        if loss < self._lowest or not self.best:
            self._lowest, self.best = loss, weights()
        return self._waiting >= PATIENCE

    def cost(self, batch: int) -> float:
        """Of all validations so far, in training steps."""
        return self._validations * self.rows * FORWARD / batch
