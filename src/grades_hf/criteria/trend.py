"""no_significant_fall, significant_rise: the trend of the statistic against its own noise, at a significance level."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod

from .base import Relative

BLOCKS = 10


class Trend(Relative):
    r"""The Mann-Kendall test on the means of the last ten blocks of values.

    A window of w values is cut into K = 10 blocks of $\lceil w/K \rceil$ values each, whose means $M_1, ..., M_K$ are
    nearly independent where neighbouring values are not (Eq. 1 has a gradient in common with the value before). With

    $$ S = \sum_{i<j} \operatorname{sign}(M_j - M_i) $$

    an absence of trend means that every order of the means is equally likely, whatever their distribution: S then has
    the distribution of $K(K-1)/2 - 2I$ with I the number of inversions of a random permutation, which is known exactly.
    No variance is estimated, no scale enters, and one wild value counts no more than another that is as high in rank.
    The test is made each time a block is complete, on the last ten; so the level is that of one test, not of all tests
    of a run together.

    Sources: Mann, Nonparametric tests against trend, Econometrica 13 (1945); Kendall, Rank correlation methods (1948).

    Args:
        window: w, 1 or more; of fewer than ten values the window is ten.
        significance: The level a of the one-sided test, greater than 0 and at most 0.5.
    """

    sizes = range(2, 2 + BLOCKS + 1)  # the sum and the number of values in the open block, the means of closed ones

    def __init__(self, window: int, significance: float) -> None:
        super().__init__()
        self.block = math.ceil(window / BLOCKS)
        self.critical = critical_value(BLOCKS, significance)

    def observe(self, name: str, value: float) -> bool:
        total, number, *means = self.memory.get(name, (0.0, 0))
        total, number = total + value, number + 1
        if number < self.block:
            self.memory[name] = [total, number, *means]
            return False
        means = [*means[-BLOCKS + 1 :], total / number]
        self.memory[name] = [0.0, 0, *means]
        return len(means) == BLOCKS and self.converged(kendall(means))

    @abstractmethod
    def converged(self, s: int) -> bool:
        """The verdict on S of ten blocks."""


class NoSignificantFall(Trend):
    r"""It no longer falls: the trend is not downwards at level a, $P(S \le s) > a$ without a trend. See `Trend`."""

    name = "no_significant_fall"

    def converged(self, s: int) -> bool:
        return s > -self.critical


class SignificantRise(Trend):
    r"""It has begun to rise: the trend is upwards at level a, $P(S \ge s) \le a$ without a trend. See `Trend`."""

    name = "significant_rise"

    def converged(self, s: int) -> bool:
        return s >= self.critical


def kendall(values: list[float]) -> int:
    """S of a series: pairs that ascend less pairs that descend."""
    return sum((b > a) - (b < a) for a, b in itertools.combinations(values, 2))


def critical_value(number: int, significance: float) -> int:
    r"""The smallest s with $P(S \ge s) \le$ `significance` for a series of `number` values without a trend."""
    orders = [1]  # with 0, 1, ... inversions
    for length in range(2, number + 1):
        longer = [0] * (len(orders) + length - 1)
        for inversions, count in enumerate(orders):
            for more in range(length):
                longer[inversions + more] += count
        orders = longer
    enough = next(i for i, below in enumerate(itertools.accumulate(orders)) if below > significance * sum(orders))
    return number * (number - 1) // 2 - 2 * (enough - 1)
