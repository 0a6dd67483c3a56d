"""What a check says of matrices without a gradient, with one of 0 and with one that stays the same: a literal twin."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from grades_hf import GradES, GradESConfig

STEPS, MATRICES = 40, 12


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3, bias=False) for _ in range(MATRICES))


def gradients(seed: int) -> list[list[Tensor | None]]:
    """One for each step and matrix; some matrices have none, or 0, or the same one for long or for ever."""
    source = random.Random(seed)
    torch.manual_seed(seed)
    weights = [
        source.choice([(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 1, 1, 1), (1, 6, 1, 1)]) for _ in range(MATRICES)
    ]
    rows: list[list[Tensor | None]] = []
    for t in range(STEPS):
        row: list[Tensor | None] = []
        for place in range(MATRICES):
            before = rows[-1][place] if rows else None
            kind = source.choices(["new", "zero", "none", "same"], weights[place])[0]
            if t % 10 == 9:
                kind = "zero"  # a batch that teaches nothing
            row.append({"new": torch.randn(3, 3), "zero": torch.zeros(3, 3), "none": None, "same": before}[kind])
        rows.append(row)
    return rows


def expected(monitor: str, rows: list[list[Tensor | None]]) -> list[list[float]]:
    """The values by the words of `GradES`, one matrix and step after the other."""
    learned = [False] * MATRICES
    found = []
    for t, row in enumerate(rows):
        values: list[float] = []
        for place, now in enumerate(row):
            before = rows[t - 1][place] if t else None
            if monitor == "gradient_norm":
                values.append(math.nan if now is None else now.abs().sum().item())
            else:
                values.append(math.nan if now is None or before is None else (now - before).abs().sum().item())
        nothing = all(value == 0 or math.isnan(value) for value in values)
        for place, value in enumerate(values):
            stays = monitor == "gradient_change" and row[place] is not None and bool(row[place].any())
            if value == 0 and not stays and (nothing or learned[place]):
                values[place] = math.nan
        learned = [known or value > 0 for known, value in zip(learned, values, strict=True)]
        found.append(values)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("monitor", ["gradient_norm", "gradient_change"])
def test_values_are_those_of_the_literal_rule(monitor, seed):
    model, rows = Matrices(), gradients(seed)
    config = GradESConfig(tau=1e-30, alpha=0.99, monitor=monitor, target_modules=r"layers\.\d+")
    engine = GradES(model, config, total_steps=STEPS)
    for row in rows:
        for layer, gradient in zip(model.layers, row, strict=True):
            layer.weight.grad = None if gradient is None else gradient.clone()
        engine.step()
    measured = [list(engine.history.values[component.name]) for component in engine.components]
    took_part = [any(row[place] is not None for row in rows) for place in range(MATRICES)]
    assert engine.took_part.tolist() == took_part
    for place, series in enumerate(zip(*expected(monitor, rows), strict=True)):
        assert measured[place] == pytest.approx(list(series), rel=1e-6, nan_ok=True)
    engine.close()
