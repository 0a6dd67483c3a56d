"""When has a component converged? One file for each kind of criterion, behind one small protocol."""

from __future__ import annotations

from collections.abc import Callable

from ..config import GradESConfig
from .base import Criterion, Relative, checks, grace_steps
from .combination import Combination
from .no_new_minimum import NoNewMinimum
from .pflug import Pflug
from .rise import Rise
from .thresholds import Threshold, assign_thresholds
from .trend import NoSignificantFall, SignificantRise

__all__ = [
    "Combination", "Criterion", "NoNewMinimum", "NoSignificantFall", "Pflug", "Relative", "Rise",
    "SignificantRise", "Threshold", "assign_thresholds", "grace_steps", "make_criterion",
]  # fmt: skip


def make_criterion(config: GradESConfig, total_steps: int, tau: Callable[[str], float]) -> Criterion:
    """A fresh criterion.

    Args:
        config: Its name and options.
        total_steps: Planned number of optimizer steps T.
        tau: From a component's name to its threshold; asked by `"threshold"` only.
    """
    window = checks(config.window, total_steps, config.check_every)
    beta = (config.smoothing or 0.0) ** config.check_every
    makers: dict[str, Callable[[], Criterion]] = {
        Threshold.name: lambda: Threshold(tau, config.patience, grace_steps(config.alpha or 0, total_steps)),
        NoNewMinimum.name: lambda: NoNewMinimum(window, beta),
        Rise.name: lambda: Rise(config.rise, beta),
        NoSignificantFall.name: lambda: NoSignificantFall(window, config.significance),
        SignificantRise.name: lambda: SignificantRise(window, config.significance),
        Pflug.name: lambda: Pflug(window),
    }
    parts = [makers[name]() for name in config.criterion.split("+")]
    return parts[0] if len(parts) == 1 else Combination(parts)
