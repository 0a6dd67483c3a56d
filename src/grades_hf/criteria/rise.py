"""rise: the smoothed statistic has risen over its own minimum. It proposes the end of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Criterion

OUTLIER = 2.0


class Rise(Criterion):
    r"""$\bar G_n \ge r \min_{i \le n} \bar G_i$, where $\bar G$ is an exponential moving average free of a start value:

    $$ \bar G(n) = \frac{\sum_{i=1}^{n} \beta^{n-i} G'_i}{\sum_{i=1}^{n} \beta^{n-i}}, \qquad
       G'_n = \min(\max(G_n, \bar G(n-1) / 2), 2 \bar G(n-1)) $$

    $G_i$ is the i-th value and $G'_i$ what counts of it: no single value counts more than twice as much as the average
    so far, or less than half (the last batch of an epoch can be a short one, whose gradient is mostly noise). $G'_1 =
    G_1$. Minima count from the first n on at which the denominator has half of its final size: before, the average is
    the mean of a few values, and a low one among them would be a minimum that nothing comes down to again.

    A check whose value is not finite, or not greater than 0, is as if it had not been made.

    Args:
        number: The number of components.
        level: r, greater than 1; it may be raised in the course of a run.
        beta: The decay for each check, 0 (no smoothing) or more and less than 1.
    """

    name = "rise"
    width = 3  # both sums of the average, its minimum (0: none yet)

    def __init__(self, number: int, level: float, beta: float) -> None:
        super().__init__(number)
        self.level = level
        self.beta = beta

    def update(self, places: Tensor, step: int, values: Tensor) -> Tensor:
        total, weight, minimum = self.memory[places].unbind(1)
        there = values.isfinite() & (values > 0)
        if self.beta:
            average = total / weight
            clamped = torch.minimum(torch.maximum(values, average / OUTLIER), average * OUTLIER)
            values = torch.where(weight > 0, clamped, values)
        values = torch.where(there, values, 0.0)
        total, weight = (
            torch.where(there, self.beta * total + values, total),
            torch.where(there, self.beta * weight + 1, weight),
        )
        average = total / weight  # NaN where there has been no value
        new = there & (weight * (1 - self.beta) >= 0.5) & ((minimum == 0) | (average < minimum))
        minimum = torch.where(new, average, minimum)
        self.memory[places] = torch.stack([total, weight, minimum], 1)
        return there & (minimum > 0) & (average >= self.level * minimum)

    def ratios(self) -> Tensor:
        """The smoothed statistic of each component divided by its minimum; NaN where there is no minimum yet."""
        total, weight, minimum = self.memory.unbind(1)
        return torch.where(minimum > 0, total / weight / minimum, torch.nan)
