"""weight_change: how far the last update moved a weight (what the PyPI package `grades` thresholds)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Statistic


class WeightChange(Statistic):
    r"""$G_W(t) = \sum_{ij} |(W_{t-1})_{ij} - (W_{t-2})_{ij}|$ with $W_s$ the weight after $s$ updates.

    It is read just before the update of step `t`, so it is the size of the last completed update. It is always one
    update, also with `check_every` > 1: the copy to compare with is taken one step before the check. Memory: one copy
    of every watched weight (with `check_every` > 1 only for the one step between).

    A change of exactly 0 means that there was no update (the first step of a warm-up, a step that a gradient scaler
    skipped) and is no value: it says nothing about convergence.
    """

    name = "weight_change"
    zero_is_a_value = False

    def sources(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [parameter.detach() for parameter in parameters]
