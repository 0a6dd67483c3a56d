"""rise: the smoothed statistic has risen by a part over its minimum."""

from __future__ import annotations

from .smoothing import Smoothed


class Rise(Smoothed):
    r"""$\bar G_n \ge (1 + r) \min_{i \le n} \bar G_i$.

    Args:
        rise: r, greater than 0.
        beta: See `Smoothed`.
    """

    name = "rise"

    def __init__(self, rise: float, beta: float) -> None:
        super().__init__(beta)
        self.rise = rise

    def converged(self, average: float, minimum: float, since: int) -> bool:
        return average >= (1 + self.rise) * minimum
