"""The part "steps" of `python -m benchmarks.scaling`: what a step costs as components and steps grow.

A model of many matrices of 4 x 4 elements, so that the kernels are nearly nothing. Its gradients are made up and put in
place; a small head runs forward and backward, so that all hooks of a run are there. The record is kept in a file and
a log is written every ten steps, as a trainer does it.

What is told is CPU time: of forward, backward, `engine.step()` and the log; of the same without GradES together with
a bare loop over the same tensors, `[gradient.abs().sum() for gradient in gradients]` or that of the difference of two
gradients; and the difference of both. It is the median of the means of ten steps each, of the last `MEASURED` steps
before the step that the row names. Python's garbage collector is off meanwhile, as in `timeit`: it goes through all
that the process has imported, now in the one and now in the other. The steps before are not made but recorded, with
values of the kind that they would have had. Not in it are looks, and the update of the average of the weights (at every
250th step of a run this long), both of which `benchmarks.overhead` measures.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from grades_hf import GradES, GradESConfig

COMPONENTS = (100, 1_000, 10_000)
STEPS = (100, 5_000, 50_000)
MEASURED, SETTLING = 50, 5
LOG_EVERY = 10
BARE_EVERY = 5
NEVER = 1e-30  # a threshold that nothing falls below
SIZE = 4

# Criterion, statistic.
RULES = (("threshold", "gradient_norm"), ("threshold", "gradient_change"), ("rise", "gradient_per_loss"))
# What gradients are like -> of how many sets of them each matrix has one that is not 0, and of how many there are.
GRADIENTS = {"changing": (4, 4), "0 in three steps of four": (1, 4), "always 0": (0, 4)}


class Experts(nn.Module):
    """Ten blocks of matrices that do not run, and a head that does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(SIZE, SIZE, bias=False) for _ in range(number // 10)) for _ in range(10)
        )
        self.head = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).square().sum()


class Bench:
    """One engine whose steps are measured."""

    def __init__(self, number: int, rule: str, statistic: str, kind: str, total: int, folder: Path) -> None:
        torch.manual_seed(0)
        self.model, self.bare = Experts(number), Experts(number)
        config: dict[str, Any] = {"target_modules": r".*layers.*", "monitor": statistic}
        if rule == "threshold":
            config["tau"] = NEVER
        held_out = None if rule == "threshold" else lambda model: torch.zeros(4)
        self.engine = GradES(self.model, GradESConfig(**config), total_steps=total, held_out=held_out)
        self.engine.history.open(folder)
        self.parameters = list(self.model.layers.parameters())
        nonzero, of = GRADIENTS[kind]
        self.sets = [
            [
                torch.randn(SIZE, SIZE) if (place + turn) % of < nonzero else torch.zeros(SIZE, SIZE)
                for place in range(len(self.parameters))
            ]
            for turn in range(of)
        ]
        value = 1.0 if nonzero else torch.nan
        self.values = [value * torch.rand(len(self.parameters), dtype=torch.float64) for _ in range(16)]
        self.compares = statistic == "gradient_change"
        self.x = torch.randn(2, SIZE)

    def skip_to(self, step: int) -> None:
        """Record steps up to this one without making them."""
        engine, names = self.engine, [component.name for component in self.engine.components]
        while engine.t < step:
            engine.t += 1
            engine.history.record(engine.t, names, self.values[engine.t % 16])
            if engine.t % LOG_EVERY == 0:
                self._log()

    def step(self) -> float:
        """One step; its CPU time."""
        start = time.process_time()
        self.model(self.x).backward()
        taken = time.process_time() - start
        now = self.sets[self.engine.t % len(self.sets)]
        for parameter, gradient in zip(self.parameters, now, strict=True):
            parameter.grad = gradient.clone()
        start = time.process_time()
        self.engine.step(epoch=0.5)  # a first pass over the data, in which no look is made
        if self.engine.t % LOG_EVERY == 0:
            self._log()
        taken += time.process_time() - start
        for parameter in self.parameters:
            parameter.grad = None
        self.model.head.zero_grad()
        return taken

    def without(self) -> float:
        """The CPU time of the same without GradES, and of a bare loop over the gradients."""
        now, before = (self.sets[(self.engine.t + turn) % len(self.sets)] for turn in (0, -1))
        start = time.process_time()
        self.bare(self.x).backward()
        if self.compares:
            [(a - b).abs_().sum() for a, b in zip(now, before, strict=True)]
        else:
            [gradient.abs().sum() for gradient in now]
        return time.process_time() - start

    def _log(self) -> None:
        self.engine.log(loss=1.0)
        self.engine.history.flush(urgent=False)


def measure(number: int, rule: str, statistic: str, kind: str, steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows of one number of components, one for each of `steps`."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(number, rule, statistic, kind, max(steps), Path(folder))
        for last in steps:
            bench.skip_to(last - MEASURED - SETTLING)
            while bench.engine.t < last - MEASURED:
                bench.step()
            taken, without = [], []
            gc.disable()
            try:
                while bench.engine.t < last:
                    taken.append(bench.step())
                    if bench.engine.t % BARE_EVERY == 0:
                        without.append(bench.without())
            finally:
                gc.enable()
            tens = [sum(taken[i : i + LOG_EVERY]) / LOG_EVERY for i in range(0, MEASURED, LOG_EVERY)]
            step, bare = 1e3 * median(tens), 1e3 * median(without)
            yield {
                "criterion": rule, "statistic": statistic, "gradients": kind, "components": number, "step": last,
                "step_ms": step, "without_ms": bare, "beyond_ms": step - bare,
            }  # fmt: skip
        bench.engine.close()


def steps_part(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; prints them as they come."""
    logging.getLogger("grades_hf").setLevel(logging.ERROR)
    numbers = sorted({max(20, number // options.divide) for number in COMPONENTS})
    steps = sorted({max(2 * MEASURED, step // options.divide) for step in STEPS})
    rows = []
    for number in numbers:
        for rule, statistic in RULES:
            for kind in GRADIENTS:
                for row in measure(number, rule, statistic, kind, steps):
                    rows.append(row)
                    common.say(
                        f"{number:6,} components, step {row['step']:6,}, {rule} on {statistic}, gradients {kind}: "
                        f"{row['step_ms']:.2f} ms a step, {row['without_ms']:.2f} without, {row['beyond_ms']:+.2f}"
                    )
    return rows
