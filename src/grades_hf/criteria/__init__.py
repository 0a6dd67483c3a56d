"""What the values of a statistic say: a component has converged (`threshold`), or a run should be looked at (`rise`)."""

from __future__ import annotations

from ..config import grace_steps
from .rise import Rise
from .tau import assign_thresholds
from .threshold import Threshold

__all__ = ["Rise", "Threshold", "assign_thresholds", "grace_steps", "smoothing"]


def smoothing(total_steps: int, check_every: int = 1) -> float:
    """`Rise`'s beta: an average over a tenth of the run, but not less than 10 optimizer steps or more than 100."""
    return float((1 - 1 / min(100.0, max(10.0, total_steps / 10))) ** check_every)
