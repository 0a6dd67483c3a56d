"""Warm-up: what a statistic does while the learning rate still rises is no part of its past."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ..contracts import Extension, Run, Step


class WarmUp(Extension):
    """Lets a criterion that compares with the past begin anew where the learning rate is higher than ever before.

    Attributes:
        rate: The highest learning rate so far; None where no optimizer tells one (Adafactor's own schedule).
        rising: Whether it is higher at this step than ever before.
    """

    name = "warm_up"

    def __init__(self) -> None:
        self.rate: float | None = None
        self.rising = False

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._run = run

    def before_check(self, step: Step) -> None:
        groups = [group for optimizer in self._run.optimizers for group in optimizer.param_groups]
        rates = [float(group["lr"]) for group in groups if group.get("lr") is not None]
        if not rates:
            return
        rate, before = max(rates), self.rate
        self.rising = before is not None and rate > before
        if self.rising:
            self._run.criterion.forget()
        self.rate = rate if before is None else max(rate, before)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.rate is None else {"rate": self.rate}

    def check(self, state: Mapping[str, Any]) -> float | None:
        return None if state.get("rate") is None else float(state["rate"])

    def load(self, checked: float | None) -> None:
        self.rate = checked
