"""The statistics G_W(t) that decide when a matrix has converged; one file each, behind one small protocol."""

from __future__ import annotations

from .base import Monitor
from .gradient_change import GradientChange
from .gradient_norm import GradientNorm
from .sampling import Sampler
from .weight_change import WeightChange

__all__ = ["GradientChange", "GradientNorm", "Monitor", "Sampler", "WeightChange", "make_monitor"]

_CLASSES: dict[str, type[Monitor]] = {cls.name: cls for cls in (GradientChange, GradientNorm, WeightChange)}


def make_monitor(name: str, sampler: Sampler | None = None) -> Monitor:
    """A fresh monitor by its name: `"gradient_change"`, `"gradient_norm"` or `"weight_change"`."""
    return _CLASSES[name](sampler)
