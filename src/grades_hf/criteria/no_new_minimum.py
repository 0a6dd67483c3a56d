"""no_new_minimum: the smoothed statistic has stopped falling."""

from __future__ import annotations

from .smoothing import Smoothed


class NoNewMinimum(Smoothed):
    r"""The smoothed statistic has had no new minimum for the last w checks.

    $$ \min_{n-w < i \le n} \bar G_i \ge \min_{i \le n-w} \bar G_i $$

    Args:
        window: w, 1 or more.
        beta: See `Smoothed`.
    """

    name = "no_new_minimum"

    def __init__(self, window: int, beta: float) -> None:
        super().__init__(beta)
        self.window = window

    def converged(self, average: float, minimum: float, since: int) -> bool:
        return since >= self.window
