"""The smoothed statistic that criteria on a minimum look at."""

from __future__ import annotations

from abc import abstractmethod

from .base import Relative

OUTLIER = 2.0


class Smoothed(Relative):
    r"""An exponential moving average of the values, free of a start value, and its minimum.

    $$ \bar G(n) = \frac{\sum_{i=1}^{n} \beta^{n-i} G'_i}{\sum_{i=1}^{n} \beta^{n-i}}, \qquad
       G'_n = \min(\max(G_n, \bar G(n-1) / 2), 2 \bar G(n-1)) $$

    with $G_i$ the i-th value, of which $G'_i$ counts: no single one more than twice as much as the average so far, or
    less than half (the last batch of an epoch can be a short one, whose gradient is mostly noise). $G'_1 = G_1$, and
    without smoothing all values count as they are. $\beta = \text{smoothing}^{\text{check\_every}}$, so that it
    reaches as many optimizer steps back whatever the interval of checks is. Minima count from the first n on at which
    the denominator has half of its final size, $1 - \beta^n \ge 1/2$: before, it is the mean of a few values, and a low
    one among them would be a minimum that nothing comes down to again.

    Args:
        beta: As above, 0 (no smoothing) or more and less than 1.
    """

    sizes = range(4, 5)  # both sums of the average, its minimum (0: none yet), values since then

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def observe(self, name: str, value: float) -> bool:
        total, weight, minimum, since = self.memory.get(name, (0.0, 0.0, 0.0, 0))
        if weight and self.beta:
            value = min(max(value, total / weight / OUTLIER), total / weight * OUTLIER)
        total, weight = self.beta * total + value, self.beta * weight + 1
        average = total / weight
        since += 1
        if weight * (1 - self.beta) >= 0.5 and (minimum == 0 or average < minimum):
            minimum, since = average, 0
        self.memory[name] = [total, weight, minimum, since]
        return minimum > 0 and self.converged(average, minimum, int(since))

    @abstractmethod
    def converged(self, average: float, minimum: float, since: int) -> bool:
        """The verdict.

        Args:
            average: The smoothed statistic now.
            minimum: Its minimum so far, now included.
            since: Values since the minimum.
        """
