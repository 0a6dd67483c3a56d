"""A run that overfits within 60 steps, so that a look ends it; and one in which looks are made and say to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from grades_hf import GradESCallback
from tests import small
from tests.small import tokens

STEPS = 60
ENDS: dict[str, Any] = {"rise": 0.05}
HELD_OUT = 24


def trainer(
    model: nn.Module | None,
    folder: Path,
    callbacks: list[TrainerCallback],
    cls: Any = Trainer,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """8 rows of random tokens, over and over."""
    data = {"train_dataset": tokens(8), "eval_dataset": tokens(HELD_OUT, seed=5)}
    arguments = {"max_steps": STEPS, "learning_rate": 3e-2, "logging_steps": 10, "lr_scheduler_type": "constant"}
    return cls(
        model=model,
        args=small.arguments(folder, **{**arguments, **options}),
        callbacks=callbacks,
        **{**data, **(extra or {})},
    )


def ending() -> GradESCallback:
    """A callback that ends such a run."""
    return GradESCallback(**ENDS)
