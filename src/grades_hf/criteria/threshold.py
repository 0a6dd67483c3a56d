"""threshold: the paper's criterion (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contracts import Criterion


class Threshold(Criterion):
    r"""Algorithm 1's test: $t > t_{grace}$ and $G_W(t) < \tau_W$, for `patience` checks in a row.

    A check without a value, or with one that is not finite, is not below any threshold and starts the count anew.

    Args:
        tau: The threshold of each component.
        patience: Checks in a row, 1 or more, counted after the grace period.
        grace: $t_{grace}$.
    """

    name = "threshold"
    width = 1  # checks below tau, in a row

    def __init__(self, tau: Sequence[float], patience: int = 1, grace: int = 0) -> None:
        super().__init__(len(tau))
        self.tau = torch.tensor(tau, dtype=torch.float64)
        self.patience = patience
        self.grace = grace

    def update(self, places: Tensor, step: int, values: Tensor) -> Tensor:
        if step <= self.grace:
            return torch.zeros(len(places), dtype=torch.bool)
        below = values.isfinite() & (values < self.tau[places])
        count = torch.where(below, self.memory[places, 0] + 1, 0.0)
        self.memory[places, 0] = count
        return count >= self.patience
