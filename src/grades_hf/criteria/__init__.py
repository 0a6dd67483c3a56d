"""What the values of a statistic say: a component has converged (`threshold`), or a look is proposed (`rise`)."""

from __future__ import annotations

from ..config import grace_steps
from .rise import Rise
from .tau import assign_thresholds
from .threshold import Threshold

__all__ = ["Rise", "Threshold", "assign_thresholds", "deciding_checks", "grace_steps", "smoothing"]


def deciding_checks(total_steps: int, grace: int, every: int, *, first: bool, late: bool) -> int:
    """How many checks of a run can freeze something.

    Args:
        total_steps, grace: Optimizer steps of the run, and of its grace period.
        every: Steps from one check to the next.
        first: Whether a check at step 1 yields values; not where two steps are compared.
        late: Whether a check decides one step later.
    """
    begin = grace if first else max(grace, 1)
    return max(0, (total_steps - int(late)) // every - begin // every)


def smoothing(total_steps: int, check_every: int = 1) -> float:
    """`Rise`'s beta: an average over a tenth of the run, but not less than 10 optimizer steps or more than 100."""
    return float((1 - 1 / min(100.0, max(10.0, total_steps / 10))) ** check_every)
