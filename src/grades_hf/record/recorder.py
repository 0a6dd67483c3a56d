"""The recorder: what the engine does goes into the history."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from ..contracts import Extension, Run
from ..find.components import Component


class Recorder(Extension):
    """Writes checks, freezings and logs into the run's history. It decides nothing."""

    name = "history"

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._run = run
        self._began = time.monotonic()
        self._components: list[Component] = []
        self._names: list[str] = []

    def on_values(self, step: int, components: Sequence[Component], values: Tensor) -> None:
        if components != self._components:  # they are compared by identity
            self._components, self._names = list(components), [component.name for component in components]
        self._run.history.record(step, self._names, values)

    def on_freeze(self, components: Sequence[Component], values: Tensor) -> None:
        for component, value in zip(components, values.tolist(), strict=True):
            self._run.history.record_freeze(self._run.t, component, value)

    def log(self, row: dict[str, float]) -> None:
        """Add a row to the history's logs, with the seconds of training so far."""
        self._run.history.record_log({**row, "seconds": self.seconds})

    @property
    def seconds(self) -> float:
        """Wall time of training so far; that of the sessions before a resume is in the history's logs."""
        return self._run.history.earlier_seconds + time.monotonic() - self._began
