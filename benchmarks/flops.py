"""What a run computed, in FLOPs: counted by GradES, and in the same way in runs without it, so that runs compare."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from benchmarks.internals import Meter
from grades_hf.contracts import Step, Trait


def compute(meter: Meter | None, planned_steps: int) -> dict[str, float]:
    """`used` and `full`: FLOPs of the run as it was, and of all planned steps with nothing frozen; `saved`: the part of
    `full` that was not used. Empty where nothing was counted (a compiled model)."""
    if meter is None or not meter.measured:
        return {}
    savings = meter.savings(planned_steps)
    return {"used": savings.used, "full": savings.planned, "saved": savings.fraction_of_planned}


class FlopCounterCallback(TrainerCallback, ExportableState):
    """Counts what a run without GradES computes; `grades_hf.record.savings.Savings` says what that is.

    Attributes:
        meter: What counts; None before training.
    """

    def __init__(self) -> None:
        self.meter: Meter | None = None
        self._undo = ExitStack()

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, so that a resumed run goes on counting."""
        return {"args": {}, "attributes": {"counts": None if self.meter is None else self.meter.state_dict()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._undo.close()
        self.meter = Meter()
        self.meter.attach(_Bare(kwargs["model"], args.torch_compile), self._undo)  # type: ignore[arg-type]
        callbacks: Any = state.stateful_callbacks  # a dict at this point, whatever its annotation says
        counts = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("counts")
        if state.global_step and counts is not None:
            self.meter.load(self.meter.check(counts))
        callbacks[type(self).__name__] = self.state()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.meter is not None:
            self.meter.on_step_end(Step(state.global_step + 1))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._undo.close()


class _Bare:
    """A run without GradES, as far as the meter asks."""

    def __init__(self, model: nn.Module, compiled: bool) -> None:
        self.model = model
        self.components: list[Any] = []
        self.traits = frozenset({Trait.COMPILED} if compiled else ())

    def extension(self, name: str) -> None:
        """There is none."""
