"""What a look says, against the rule written down once more: over lists, one row after the other."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import torch
from torch import nn

from grades_hf import GradES, GradESConfig
from grades_hf.ending import Part, Rows
from grades_hf.parallel.ranks import Ranks
from tests.ending import loops

ROWS = 72
QUARTER = [*range(0, ROWS, 4)]


class Told(Rows):
    """Rows whose losses a test dictates: of the average, and of the weights as they are."""

    def __init__(self) -> None:
        super().__init__([range(ROWS)], ROWS)
        self.put_together(True)
        self.average: list[float] = []
        self.present: list[float] = []

    def parts(self, model: nn.Module, ranks: Ranks) -> list[Part]:
        self.asked: list[int] = []
        return super().parts(model, ranks)

    def losses(self, model: nn.Module, ranks: Ranks, part: Part) -> list[float]:
        told = self.present if id(part) in self.asked else self.average  # each part has the average first
        self.asked.append(id(part))
        return [told[int(row)] for _, batch in part.alone for row in batch]


class Twin:
    """The rule of docs/criteria.md."""

    def __init__(self) -> None:
        self.before: dict[int, float] = {}

    def look(self, average: list[float], present: list[float]) -> tuple[int, bool, bool]:
        """How many rows were taken, whether the loss of the weights as they are counts, and whether the run ends."""
        before = self.before
        self.before = {row: average[row] for row in QUARTER}
        if self.known(QUARTER, average) < 16:
            return self.all(average, present, before)
        if self.compared(average, before, QUARTER) is None or self.learns(average, before, QUARTER, 2.0):
            return self.known(QUARTER, average), False, False
        if not self.worse(average, present, before, QUARTER, 0.0):
            return self.known(QUARTER, average), True, False
        return self.all(average, present, before)

    def all(self, average: list[float], present: list[float], before: dict[int, float]) -> tuple[int, bool, bool]:
        everything = QUARTER + [row for row in range(ROWS) if row not in QUARTER]
        self.before = {row: average[row] for row in everything}
        if self.compared(average, before, everything) is None or self.learns(average, before, everything, 3.0):
            return self.known(everything, average), False, False
        return self.known(everything, average), True, self.worse(average, present, before, everything, 3.0)

    def known(self, rows: list[int], losses: list[float]) -> int:
        return sum(math.isfinite(losses[row]) for row in rows)

    def compared(self, one: Any, other: Any, rows: list[int]) -> tuple[float, float] | None:
        """The mean difference over the rows that both have, and its standard error."""
        both = [one[row] - other[row] for row in rows if row in other or isinstance(other, list)]
        found = [difference for difference in both if math.isfinite(difference)]
        return (statistics.fmean(found), statistics.stdev(found) / len(found) ** 0.5) if len(found) > 1 else None

    def learns(self, average: Any, before: Any, rows: list[int], margin: float) -> bool:
        mean, error = self.compared(average, before, rows) or (0.0, 0.0)
        return mean + margin * error < 0

    def worse(self, average: Any, present: Any, before: Any, rows: list[int], margin: float) -> bool:
        """Than the average, and than the average of the last look."""
        mean, error = self.compared(average, present, rows) or (0.0, 0.0)
        since = {row: present[row] for row in rows if row in before}
        return mean + margin * error < 0 < (self.compared(since, before, list(since)) or (0.0, 0.0))[0]


def test_a_look_says_what_the_rule_says():
    told, twin, draw = Told(), Twin(), random.Random(0)
    model = loops.make("full")
    engine = GradES(model, GradESConfig(), total_steps=90, held_out=told)
    for step in range(3):
        model(**loops.batch(step)).loss.backward()
        engine.step()
        model.zero_grad()
    ending, average = engine.ending, engine.extension("average")
    seen = set()
    torch.manual_seed(0)
    level = torch.linspace(1, 3, ROWS)
    for _ in range(2000):
        noise = draw.choice([0.0, 0.01, 0.1])
        level = level + draw.gauss(0, 0.03) + noise * torch.randn(ROWS)
        present = level + draw.gauss(0, 0.03) + draw.choice([0.0, 0.01, 0.1]) * torch.randn(ROWS)
        told.average, told.present = level.tolist(), present.tolist()
        for row in draw.sample(range(ROWS), draw.choice([0, 0, 1, 3])):
            told.average[row] = math.nan
        if draw.random() < 0.02:
            told.average = [math.nan] * ROWS
        if draw.random() < 0.02:
            ending._before, twin.before = [], {}  # as at the first look
        look = ending._look(average)
        found = look["rows"], look["loss"] is not None, look["ended"]
        assert found == twin.look(told.average, told.present)
        seen.add(found[1:] + (found[0] > len(QUARTER),))
    assert len(seen) == 5  # all ways in which a look can go
    engine.close()
