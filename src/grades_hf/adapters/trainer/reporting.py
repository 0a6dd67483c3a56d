"""What a run of Trainer shows: logs, trackers, the progress bar and the history's file."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from ...engine import GradES

logger = logging.getLogger(__name__)


@dataclass
class Reports:
    """One run's reports.

    Args:
        skip: Whether scheduled evaluations are left out.
        over: Whether the run has been resumed from its own end, so that there is nothing to train.
        path: Where the history goes; None on other ranks than the first.
        hook: What takes the hook off that saves tensors with the optimizer.
    """

    skip: bool = False
    over: bool = False
    path: Path | None = None
    hook: Callable[[], None] | None = None
    _engine: GradES | None = None
    _written: float = 0.0
    _seconds: float = 0.0
    _evaluate_first: bool = field(default=False)

    def begin(self, engine: GradES, args: TrainingArguments) -> None:
        """The run begins. A directory that cannot be written is known before the first step."""
        self._engine = engine
        if self.skip and args.eval_on_start:
            args.eval_on_start, self._evaluate_first = False, True
        if self.path is not None:
            engine.history.save(self.path)

    def restore(self, args: TrainingArguments) -> None:
        """The moment for a first evaluation is over: the user's arguments are as they were."""
        if self._evaluate_first:
            args.eval_on_start, self._evaluate_first = True, False

    def log(self, logs: dict[str, Any], entry: dict[str, Any], found: Mapping[str, float]) -> None:
        """Trainer logs: `entry` is what it keeps of `logs`."""
        if self.over and "train_loss" in logs:  # Trainer divides the loss of that one void step by no steps
            del logs["train_loss"], entry["train_loss"]
        logs.update(found)  # for the callbacks after this one: the progress bar prints them
        entry.update(found)
        if found and self._engine is not None and not self.over:
            self._engine.log(logs.get("loss"))

    def write(self, *, always: bool) -> None:
        """Write the history; unless `always`, so seldom that it takes at most 1 % of the time.

        A disk that is full by then costs the record, not the run: nothing that a resume needs is in that file.
        """
        if self.path is None or self._engine is None:
            return
        now = time.monotonic()
        if not always and now - self._written < 100 * self._seconds:
            return
        try:
            self._engine.history.save(self.path)
        except OSError as error:
            logger.warning("GradES: %s could not be written, training goes on: %s", self.path, error)
        self._written = time.monotonic()
        self._seconds = self._written - now

    def end(self, engine: GradES) -> None:
        """The run is over, in whatever way."""
        if self.hook is None:
            return
        self.hook()
        self.hook = None
        engine.flush()
        if not engine.history.logs or engine.history.logs[-1]["step"] < engine.t:
            engine.log()
        self.write(always=True)
        logger.info("GradES: %s", engine.conclude())
        engine.close()
        self.over, self._engine = False, None


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


def report_through(trainer: Trainer, at_work: Callable[[], Any]) -> None:
    """Give the trackers of `trainer` (`report_to`) the options, under `grades`, and the scalars of every log.

    Trainer runs its trackers before the callbacks of its user, so what those add to a log comes too late for them.

    Args:
        trainer: The trainer.
        at_work: Gives the `GradESCallback` that is at work (Trainer may replace the user's), or None.
    """
    handler = trainer.callback_handler
    begin, log = handler.on_train_begin, handler.on_log

    def on_train_begin(args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        callback = at_work()
        to_dict, ours = args.to_dict, {} if callback is None else {"grades": callback.config.resolved().to_dict()}
        # Every tracker's integration asks for the options of a run in this way, when it begins.
        args.__dict__["to_dict"] = lambda: {**to_dict(), **ours}
        try:
            return begin(args, *rest, **kwargs)
        finally:
            args.__dict__.pop("to_dict", None)

    def on_log(
        args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> Any:
        if (callback := at_work()) is not None:
            logs.update(callback.metrics(logs))
        return log(args, state, control, logs, **kwargs)

    handler.__dict__.update(on_train_begin=on_train_begin, on_log=on_log)


def show_progress(engine: GradES, state: TrainerState) -> None:
    """Write "frozen k/n" behind Trainer's progress bar, which a callback can only find among all open bars."""
    if not state.is_world_process_zero or engine.ending is not None:
        return
    for bar in list(getattr(tqdm, "_instances", ())):
        if bar.total == state.max_steps and not bar.disable and bar.desc == "":
            bar.set_postfix_str(f"frozen {len(engine.frozen)}/{len(engine.components)}", refresh=False)
