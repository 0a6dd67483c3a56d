"""gradient_norm: how large the gradient is (Eq. 3 of the paper, its choice for LoRA)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .base import Statistic


class GradientNorm(Statistic):
    r"""$G_W(t) = \sum_{ij} |(\nabla W_t)_{ij}|$; of an adapter: $\|\nabla A\|_1 + \|\nabla B\|_1$."""

    name = "gradient_norm"
    two_steps = False

    def sources(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [parameter.grad for parameter in parameters]
