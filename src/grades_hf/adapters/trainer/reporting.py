"""What a run of Trainer shows: logs, trackers, the progress bar and the history's file."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

from transformers import ProgressCallback, Trainer, TrainingArguments

from ...config import GradESConfig
from ...engine import GradES


def _nothing() -> None:
    return None


@dataclass
class Reports:
    """One run's reports.

    Args:
        engine: The run's engine; None before a run, and after it.
        config: The run's options: the user's, or those of a checkpoint from which Trainer has restored callbacks.
        args: The training arguments.
        skip: Whether scheduled evaluations are left out.
        over: Whether the run has been resumed from its own end, so that there is nothing to train.
        path: The directory that the history goes to; None on other ranks than the first.
        bar: Gives Trainer's progress bar, or None.
        hook: What takes the hook off that saves tensors with the optimizer.
    """

    engine: GradES | None = None
    config: GradESConfig | None = None
    args: TrainingArguments | None = None
    skip: bool = False
    over: bool = False
    path: Path | None = None
    bar: Callable[[], Any] = _nothing
    hook: Callable[[], Any] = _nothing

    def begin(self) -> None:
        """The run begins. A directory that cannot be written is known before the first step."""
        if self.path is not None and self.engine is not None:
            self.engine.history.open(self.path)

    def log(self, logs: dict[str, Any], entry: dict[str, Any], found: Mapping[str, float]) -> None:
        """Trainer logs: `entry` is what it keeps of `logs`."""
        logs.update(found)  # for the callbacks after this one: the progress bar prints them
        entry.update(found)
        if found and self.engine is not None:
            self.engine.log(logs.get("loss"))

    def write(self, *, urgent: bool) -> None:
        """Append to the history's file what has come since; where it is not urgent, only now and then."""
        if self.engine is not None:
            self.engine.history.flush(urgent=urgent)

    def end(self) -> None:
        """The run is over, in whatever way."""
        engine = self.engine
        if engine is None:
            return
        try:
            self.hook()
            engine.flush()
            if not engine.history.logs or engine.history.logs[-1]["step"] < engine.t:
                engine.log()
            self.write(urgent=True)
        finally:
            engine.close()
            self.engine, self.over, self.skip = None, False, False
            self.bar = self.hook = _nothing


def metrics(engine: GradES, logs: Mapping[str, Any]) -> dict[str, float]:
    """The scalars that belong to a training log.

    `grades/frozen_fraction`, `grades/compute_saved` (the part of the FLOPs so far, where they are counted), without a
    tau `grades/votes` (the part of the components that vote for a look), and the quartiles of each group's statistic
    at the last check, over what was not frozen before it: `grades/attention/statistic_q25`, `_q50` and `_q75`
    (`grades/vision/attention/...` in a model with towers), left out where no value was measured. Empty for the logs of
    an evaluation and for the summary at the end.
    """
    if "loss" not in logs or "train_runtime" in logs:
        return {}
    found = {"grades/frozen_fraction": engine.frozen_fraction}
    if engine.ending is not None:
        found = {"grades/votes": engine.ending.share}
    if engine.meter.measured:
        found["grades/compute_saved"] = engine.savings().fraction
    latest, groups = engine.history.latest(), defaultdict[str, list[float]](list)
    for component in engine.components:
        if component.name in latest:
            label = f"{component.tower}/{component.group}" if component.tower else component.group
            groups[label].append(latest[component.name])
    for label, values in groups.items():
        cuts = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        found |= {f"grades/{label}/statistic_q{part}": cut for part, cut in zip((25, 50, 75), cuts, strict=True)}
    return found


def progress_bar(trainer: Trainer | None) -> Callable[[], Any]:
    """Gives Trainer's progress bar, or None where there is none; keeps nothing alive."""
    reference = None if trainer is None else weakref.ref(trainer.callback_handler)

    def bar() -> Any:
        handler = None if reference is None else reference()
        callbacks = () if handler is None else handler.callbacks
        return next((c.training_bar for c in callbacks if isinstance(c, ProgressCallback)), None)

    return bar


def show_progress(engine: GradES, bar: Callable[[], Any]) -> None:
    """Write "frozen k/n" behind Trainer's progress bar."""
    if engine.ending is None and (shown := bar()) is not None:
        shown.set_postfix_str(f"frozen {len(engine.frozen)}/{len(engine.components)}", refresh=False)
