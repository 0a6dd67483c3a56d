"""The statistics G_W(t) that decide when a matrix has converged; one file each, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Monitor
from .gradient_change import GradientChange
from .gradient_norm import GradientNorm
from .relative_change import RelativeChange
from .sampling import Sampler
from .signal_to_noise import SignalToNoise
from .weight_change import WeightChange

__all__ = [
    "GradientChange", "GradientNorm", "Monitor", "RelativeChange", "Sampler", "SignalToNoise", "WeightChange",
    "make_monitor",
]  # fmt: skip

_CLASSES: dict[str, type[Monitor]] = {
    cls.name: cls for cls in (GradientChange, GradientNorm, WeightChange, RelativeChange)
}


def make_monitor(
    name: str, sampler: Sampler | None = None, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> Monitor:
    """A fresh monitor by its name in `GradESConfig.monitor`; `optimizers` are those whose moments it may read.

    Raises:
        ValueError: it needs moments, and no optimizer has any.
    """
    return SignalToNoise(optimizers, sampler) if name == SignalToNoise.name else _CLASSES[name](sampler)
