"""The statistics G_W(t) that are measured, one file each. A new one is a file here and a line in `STATISTICS`."""

from __future__ import annotations

from .base import Statistic
from .gradient_change import GradientChange
from .gradient_norm import GradientNorm
from .gradient_per_loss import GradientPerLoss
from .sampling import Sampler
from .weight_change import WeightChange

STATISTICS: dict[str, type[Statistic]] = {
    cls.name: cls for cls in (GradientChange, GradientNorm, WeightChange, GradientPerLoss)
}


def make_statistic(name: str, sampler: Sampler | None = None) -> Statistic:
    """A fresh statistic by its name in `GradESConfig.monitor`."""
    return STATISTICS[name](sampler)


__all__ = [
    "STATISTICS",
    "GradientChange",
    "GradientNorm",
    "GradientPerLoss",
    "Sampler",
    "Statistic",
    "WeightChange",
    "make_statistic",
]
