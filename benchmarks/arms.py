"""The ways of training that are compared, one flag: `--arm`. Each has the same rows, model and seed.

* `grades`: GradES with any of its options. `--observe true` freezes nothing and records.
* `none`: all T steps, nothing frozen.
* `es`: early stopping as in the paper: validation every 5 % of the steps on the held-out rows, ended by the third one
  in a row that does not lower the best loss by more than 0.0005. At the end it takes the weights of the lowest
  validation loss (the paper does not say; `--restore_best false`: the last ones).
* `stop`: the schedule of T steps, ended after ceil(alpha T) of them: what GradES is if all freezes at once.
* `short`: a schedule of ceil(alpha T) steps.
* `peer`: the PyPI package `grades`, with `peer_tau`, `alpha`, `check_every` and `max_frozen_fraction`. A resume loses
  what it has frozen, so it cannot be resumed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTTrainer

from benchmarks.flops import FlopCounterCallback
from benchmarks.internals import ALPHA, MAX_FROZEN_FRACTION, FlopCounter, grace_steps
from recipes.arguments import option
from recipes.finetune import GradESSFTTrainer, Plan, build

logger = logging.getLogger(__name__)

# Early stopping in the paper.
VALIDATE_EVERY, MIN_DELTA, PATIENCE = 0.05, 0.0005, 3


ARMS = ("grades", "none", "es", "stop", "short", "peer")


@dataclass
class ArmArguments:
    """Which of the ways of training, and how its quality is measured."""

    arm: str = option("grades", f"The way of training: {', '.join(ARMS)}.")
    restore_best: bool = option(True, "Arm es: end with the weights of the lowest validation loss.")
    peer_tau: float | None = option(None, "Arm peer: its threshold, on the L1 norm of a matrix's weight change.")
    measure: Literal["accuracy", "loss", "both"] = option(
        "accuracy", "Quality on the validation rows: accuracy by lm-evaluation-harness, the mean loss, or both."
    )

    def check(self, observe: bool) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: the arm is unknown, or lacks or contradicts another argument.
        """
        if self.arm not in ARMS:
            raise ValueError(f"arm={self.arm!r} is unknown; use one of {', '.join(ARMS)}.")
        if self.arm == "peer" and self.peer_tau is None:
            raise ValueError(
                "peer_tau is missing: pass --peer_tau NUMBER. Its scale is that of --monitor weight_change, so "
                "--observe true --monitor weight_change shows which values occur."
            )
        if observe and self.arm != "grades":
            raise ValueError(f"observe=True records the statistic of GradES; arm={self.arm!r} has none.")


def set_up(
    arm: str, arguments: ArmArguments, training: TrainingArguments, *, alpha: float | None, held_out: bool
) -> None:
    """Change the training arguments to what an arm needs.

    Raises:
        ValueError: the arm cannot work with these arguments, or on this machine.
    """
    if arm == "es":
        if not held_out:
            raise ValueError("arm='es' needs rows to validate on: set held_out_rows, the number to set aside.")
        training.eval_strategy, training.eval_steps = IntervalStrategy.STEPS, VALIDATE_EVERY
        training.metric_for_best_model, training.greater_is_better = "eval_loss", False
        training.restore_callback_states_from_checkpoint = True  # the number of validations without progress
        if arguments.restore_best:
            training.load_best_model_at_end = True
            training.save_strategy, training.save_steps = SaveStrategy.STEPS, VALIDATE_EVERY
            training.save_total_limit = training.save_total_limit or 1  # besides the best one
    if arm in ("stop", "short") and not 0 < _part(alpha) <= 1:
        raise ValueError(f"alpha={alpha} must be a number in (0, 1]: the part of the steps that arm={arm!r} makes.")
    if arm == "peer":
        if importlib.util.find_spec("grades") is None:
            raise ValueError("arm='peer' needs the package grades: pip install 'grades-hf[benchmarks]'.")
        if training.resume_from_checkpoint:
            raise ValueError(
                f"resume_from_checkpoint={training.resume_from_checkpoint!r}: arm='peer' cannot be resumed. The "
                "package loses what it has frozen, and freezes everything at the next step. Start from the beginning."
            )
        training.save_strategy = SaveStrategy.NO


def _part(alpha: float | None) -> float:
    """The part of the steps that `stop` and `short` make; without `alpha` the grace ratio of a threshold."""
    return ALPHA if alpha is None else alpha


class Clock(TrainerCallback, ExportableState):
    """Where the time of `train()` goes, and what validation computes; a resumed run goes on counting.

    Attributes:
        seconds: In `validation`, in `saving` checkpoints, and in `all`.
        validations: How many there were.
        flops: Of one of them, counted in the first: they are on the same rows. None: not counted so far.
    """

    def __init__(self) -> None:
        self.seconds = {"all": 0.0, "validation": 0.0, "saving": 0.0}
        self.validations = 0
        self.flops: int | None = None
        self._mark = self._since = 0.0

    def state(self) -> dict[str, Any]:
        """For trainer_state.json."""
        self._pass_time()
        counts = {"seconds": dict(self.seconds), "validations": self.validations, "flops": self.flops}
        return {"args": {}, "attributes": {"counts": counts}}

    def split(self) -> dict[str, float]:
        """Seconds of training, and of validation and saving where there was any."""
        parts = {name: self.seconds[name] for name in ("validation", "saving") if self.seconds[name]}
        return {"training": self.seconds["all"] - sum(parts.values()), **parts}

    @contextlib.contextmanager
    def validation(self, count: bool) -> Iterator[None]:
        """Around one validation; `count`: whether its FLOPs can be counted."""
        started = time.perf_counter()
        with FlopCounter() if count and self.flops is None else contextlib.nullcontext() as counter:
            yield
        if counter is not None:
            self.flops = counter.total
        self.validations += 1
        self._mark = time.perf_counter()
        self.seconds["validation"] += self._mark - started

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: Any = state.stateful_callbacks  # a dict at this point, whatever its annotation says
        counts = callbacks.get(type(self).__name__, {}).get("attributes", {}).get("counts")
        self.__init__()  # type: ignore[misc]
        if state.global_step and counts is not None:
            self.seconds, self.validations = dict(counts["seconds"]), counts["validations"]
            self.flops = counts["flops"]
        self._mark = self._since = time.perf_counter()
        callbacks[type(self).__name__] = self.state()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._mark = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds["saving"] += time.perf_counter() - self._mark

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pass_time()

    def _pass_time(self) -> None:
        now = time.perf_counter()
        if self._since:
            self.seconds["all"] += now - self._since
            self._since = now


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ArmMixin(_Base):
    """What all arms have in common.

    Attributes:
        planned_steps: T, the steps of the whole run; set by `make_trainer`.
        whole_schedule: Whether the learning rate follows the schedule of T steps, however many are made.
    """

    planned_steps: int
    whole_schedule = False

    @property
    def clock(self) -> Clock:
        """The clock at work (Trainer replaces callbacks that it restores from a checkpoint)."""
        return next(callback for callback in self.callback_handler.callbacks if isinstance(callback, Clock))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.validation(count=not self.args.torch_compile):
            return super().evaluate(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        steps = self.planned_steps if self.whole_schedule else num_training_steps
        return super().create_scheduler(steps, *args, **kwargs)


class ArmTrainer(ArmMixin, SFTTrainer):
    """Every arm but `grades`."""


class GradESArmTrainer(ArmMixin, GradESSFTTrainer):
    """The arm `grades`."""


def make_trainer(plan: Plan, arguments: ArmArguments, output: Path) -> Any:
    """The trainer of an arm.

    Raises:
        ValueError: an option does not fit.
    """
    trainer: Any
    if plan.grades is not None:
        trainer = build(plan, plan.grades, output, GradESArmTrainer, callbacks=[Clock()])
    else:
        callbacks: list[TrainerCallback] = [FlopCounterCallback(), Clock()]
        if arguments.arm == "es":
            callbacks.append(EarlyStoppingCallback(PATIENCE, MIN_DELTA))
        if arguments.arm == "peer":
            callbacks.append(peer_callback(arguments.peer_tau, plan.arguments, str(output)))
        trainer = build(plan, None, output, ArmTrainer, callbacks=callbacks)
    *_, trainer.planned_steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    if arguments.arm in ("stop", "short"):
        trainer.args.max_steps = grace_steps(_part(plan.arguments.alpha), trainer.planned_steps)
        trainer.whole_schedule = arguments.arm == "stop"
    return trainer


def peer_callback(tau: float | None, freezing: Any, output_dir: str) -> TrainerCallback:
    """The callback of the package `grades`, with as many of our options as it has."""
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    return GradEarlyStoppingCallback(  # type: ignore[no-any-return]
        GradEarlyStoppingConfig(
            tau=tau,
            alpha=_part(freezing.alpha),
            max_frozen_ratio=freezing.max_frozen_fraction or MAX_FROZEN_FRACTION,
            compute_interval=freezing.check_every,
            save_freezing_history=True,
            output_dir=output_dir,
        )
    )


def unfinished(checkpoint: Mapping[str, Any], steps: int) -> bool:
    """Whether a run of `steps` steps has steps left after a checkpoint, by its trainer_state.json.

    Trainer itself takes one more step when it resumes from the end of a run.
    """
    saved = checkpoint.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    stopped = saved is not None and saved["attributes"]["early_stopping_patience_counter"] >= PATIENCE
    return int(checkpoint["global_step"]) < steps and not stopped


def peer_summary(output: Path) -> dict[str, Any]:
    """What the package `grades` says that it froze, from the file that it leaves in the run's directory."""
    found = json.loads((output / "dynamic_freezing_history.json").read_text(encoding="utf-8"))
    return {
        "components": found["summary"]["total_components"],
        "frozen": found["summary"]["final_frozen_count"],
        "parameters": found["performance_metrics"]["total_parameters"],
        "frozen_parameters": found["performance_metrics"]["frozen_parameters"],
    }
