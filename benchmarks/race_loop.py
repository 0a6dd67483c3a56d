"""A training run of the race: its job, its loop, and the held-out rows that are looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.race_tasks import SETTINGS, Places, Rows, Setting, losses, make, number_of, take
from grades_hf import ending
from grades_hf.parallel.ranks import Ranks

FORWARD = 1 / 3  # what a forward pass costs of a training step with as many rows
CALIBRATION = 9  # the seed of the runs that thresholds are chosen on

Weights = list[Tensor]


@dataclass(frozen=True)
class Job:
    """One training run and what is read off it, or the runs of the arms with a threshold.

    Attributes:
        taus: For the arms with a threshold: those of `thresholds`. Empty for all others.
    """

    places: Places
    setting: str
    seed: int
    taus: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        kind = "thresholds" if self.seed == CALIBRATION else "threshold" if self.taus else "run"
        return {"setting": self.setting, "seed": self.seed, "kind": kind}


class HeldRows(ending.Rows):
    """The held-out rows of the library's looks, many in a forward pass; it counts how many pass through the model."""

    def __init__(self, rows: Rows) -> None:
        super().__init__([range(number_of(rows))], number_of(rows))
        self.rows, self.passed = rows, 0
        self.put_together(True)

    def losses(self, model: nn.Module, ranks: Ranks, part: ending.Part) -> list[float]:
        chosen = torch.cat([batch for _, batch in part.alone])
        self.passed += len(chosen)
        found: list[float] = losses(model, take(self.rows, chosen))[0].tolist()
        return found

    def cost(self, batch: int) -> float:
        """Of all passes so far, in training steps."""
        return self.passed * FORWARD / batch


class Loop:
    """A training loop: AdamW, gradients clipped to a norm of 1."""

    def __init__(self, job: Job, part: float = 1.0) -> None:
        self.setting: Setting = SETTINGS[job.setting]
        self.task = make(self.setting, job.seed, job.places)
        self.model = self.task.model
        self.steps = round(self.setting.steps * part)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.setting.rate, weight_decay=0.0)
        self.batches = self.task.batches(self.setting.batch)

    def backward(self, step: int) -> Tensor:
        """The gradients of a step (1-based), not clipped yet; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate_at(step, self.steps)
        loss: Tensor = self.model(**next(self.batches)).loss
        loss.backward()
        return loss.detach()

    def clip(self) -> None:
        clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, step: int) -> float:
        """How often each row has been seen before a step."""
        return (step - 1) * self.setting.batch / self.setting.rows

    def weights(self) -> Weights:
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def install(self, weights: Weights) -> None:
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)
