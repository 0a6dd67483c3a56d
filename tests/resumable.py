"""A fine-tune that kills its own process where it is told to; `test_resume` starts it in children."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

import grades_hf.record.stream
from grades_hf import GradESCallback, History
from tests.runs import Setting, load, tokens

STEPS = 14
SAVE_STEPS = 3
ALPHA = 0.3
GRACE = 5  # ceil(0.3 * 14)
RESULT = "result.pt"


@dataclass(frozen=True)
class Job:
    """One process of a run.

    Attributes:
        folder: Output directory, the same for all processes of a run.
        kind: "full" or "lora" (with dropout, so that random states matter).
        monitor, tau, patience: Options of GradES.
        restore: `restore_callback_states_from_checkpoint`.
        resume: The checkpoint to go on from, or None.
        kill: (where, step): see `arm`; None to run to the end.
    """

    folder: str
    kind: str
    monitor: str
    tau: float | dict[str, float]
    patience: int = 2
    restore: bool = False
    resume: str | None = None
    kill: tuple[str, int] | None = None


def build(job: Job, **options: Any) -> tuple[Trainer, GradESCallback]:
    """14 steps of two accumulated batches, eight steps an epoch, shuffled, a checkpoint every three steps."""
    rows = tokens()[:32]
    callback = GradESCallback(tau=job.tau, alpha=ALPHA, monitor=job.monitor, patience=job.patience)
    trainer = Setting(job.kind, accumulation=2, max_grad_norm=0.0).trainer(
        Path(job.folder),
        [callback],
        model=load(job.kind, dropout=0.1),
        dataset=[{"input_ids": row, "labels": row} for row in rows],
        **{
            "max_steps": STEPS,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "train_sampling_strategy": "random",
            "restore_callback_states_from_checkpoint": job.restore,
            **options,
        },
    )
    return trainer, callback


def result(trainer: Trainer, callback: GradESCallback) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    assert callback.engine is not None
    return {
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "frozen": callback.engine.frozen,
        "history": record(callback.engine.history),
        "last step": trainer.state.global_step,
        "logs": [
            {key: value for key, value in entry.items() if key in ("step", "loss") or key.startswith("grades/")}
            for entry in trainer.state.log_history
        ],
    }


def record(history: History) -> dict[str, Any]:
    """The history but for its times, and for the versions of what happened to be imported."""
    kept = history.to_dict()
    del kept["versions"]
    kept["logs"] = [{key: value for key, value in row.items() if key != "seconds"} for row in kept["logs"]]
    return kept


def run(job: Job) -> None:
    """Train, and if nothing kills the process, leave what came out in the folder."""
    torch.set_num_threads(1)
    trainer, callback = build(job)
    if job.kill is not None:
        arm(trainer, *job.kill)
    trainer.train(resume_from_checkpoint=job.resume)
    torch.save(result(trainer, callback), Path(job.folder) / RESULT)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(TrainerCallback):
    """Dies at one of Trainer's events; comes after GradES among the callbacks."""

    EVENTS = {
        "between two micro-batches": "on_substep_end",
        "after freezing, before the update": "on_pre_optimizer_step",
        "after the update": "on_optimizer_step",
        "after the step": "on_step_end",
        "after a checkpoint": "on_save",
    }

    def __init__(self, where: str, step: int) -> None:
        done_before = step if where in ("after the step", "after a checkpoint") else step - 1

        def at(args: Any, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
            if state.global_step == done_before:
                die()

        setattr(self, self.EVENTS[where], at)


def arm(trainer: Trainer, where: str, step: int) -> None:
    """Make the process kill itself in or right after optimizer step `step` (1-based)."""
    if where in Killer.EVENTS:
        trainer.add_callback(Killer(where, step))
    elif where == "checkpoint: only the model is written":
        trainer._save_optimizer_and_scheduler = instead(trainer._save_optimizer_and_scheduler, trainer, step)
    elif where == "checkpoint: trainer_state.json is missing":
        trainer._save_rng_state = before(trainer._save_rng_state, trainer, step)
    elif where == "checkpoint: trainer_state.json is cut off":

        def half(state: TrainerState, path: str, write: Callable[..., None] = TrainerState.save_to_json) -> None:
            write(state, path)
            if state.global_step == step:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        TrainerState.save_to_json = half
    elif where == "while the history is written":

        class Os:
            def __getattr__(self, name: str) -> Any:
                if name == "pwrite" and trainer.state.global_step == step:
                    return torn
                return getattr(os, name)

        def torn(descriptor: int, data: bytes, offset: int) -> None:
            os.pwrite(descriptor, bytes(data)[: len(data) // 2], offset)
            die()

        grades_hf.record.stream.os = Os()  # type: ignore[assignment]
    else:
        raise ValueError(f"where={where!r}")


def instead(function: Callable[..., None], trainer: Trainer, step: int) -> Callable[..., None]:
    def killing(*args: Any) -> None:
        if trainer.state.global_step == step:
            die()
        function(*args)

    return killing


def before(function: Callable[..., None], trainer: Trainer, step: int) -> Callable[..., None]:
    def killing(*args: Any) -> None:
        function(*args)
        if trainer.state.global_step == step:
            die()

    return killing
