"""What every client run is held to: frozen when it should be, bit for bit unmoved from then on, the rest trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from grades_hf import GradES, GradESCallback, GradESConfig, GradESTrainerMixin
from tests.small import Spy

STEPS = 6
FIRST = 4  # the first step that freezes: half of the steps are grace
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
}


def config(*groups: str) -> GradESConfig:
    """Everything in these groups freezes at step `FIRST`, nothing else ever."""
    return GradESConfig(tau={**dict.fromkeys(groups, 1e9), ".*": 1e-30}, alpha=0.5)


def train(
    trainer_class: type[Trainer],
    grades: GradESConfig,
    *,
    mixin: bool,
    more: list[TrainerCallback] | None = None,
    resume: str | None = None,
    **arguments: Any,
) -> tuple[Trainer, GradES, Spy]:
    """Train with the callback, or with the mixin before the trainer's class."""
    spy = Spy()
    callbacks: list[TrainerCallback] = [spy, *(more or [])]
    if mixin:
        combined: Callable[..., Any] = type("Combined", (GradESTrainerMixin, trainer_class), {})
        trainer = combined(callbacks=callbacks, grades=grades, **arguments)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, trainer.grades_callback.engine, spy
    callback = GradESCallback(grades)
    trainer = trainer_class(callbacks=[callback, *callbacks], **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.engine, spy


def check(trainer: Trainer, engine: GradES, spy: Spy, groups: tuple[str, ...], steps: int = STEPS) -> None:
    """The components of `groups` froze before the update of step `FIRST`; all others were updated at every step.

    A matrix may also rest where its gradient is exactly 0 (a LoRA's A at its first step, under weight decay too).
    """
    assert trainer.state.global_step == steps
    wanted = {c.name for c in engine.components if {c.group, c.projection} & set(groups)}
    assert 0 < len(wanted) < len(engine.components)
    assert engine.frozen == dict.fromkeys(sorted(wanted), FIRST)
    names = {p: n for n, p in trainer.model.named_parameters()}
    weights = {**spy.weights, steps + 1: {n: p.detach().clone() for n, p in trainer.model.named_parameters()}}
    assert sorted(weights) == list(range(1, steps + 2))
    for component in engine.components:
        for name in (names[p] for p in component.parameters):
            moved = [
                not torch.equal(a[name], b[name]) for (_, a), (_, b) in itertools.pairwise(sorted(weights.items()))
            ]
            if component.name in wanted:
                assert not any(moved[FIRST - 1 :]), name
                assert any(moved[: FIRST - 1]), name
            else:
                assert all(moved[FIRST - 1 :]), name


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models hold bit for bit the same tensors."""
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
