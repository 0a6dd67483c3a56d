"""gradient_change: how much the gradient differs from that of the step before (Eq. 1, the paper's for full weights)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

from torch import Tensor

from .base import Monitor
from .norms import l1_distance

logger = logging.getLogger(__name__)


class GradientChange(Monitor):
    r"""$G_W(t) = \sum_{ij} |(\nabla W_t)_{ij} - (\nabla W_{t-1})_{ij}|$.

    Memory: one gradient per watched weight. Where the training loop drops its gradients after each step
    (`zero_grad(set_to_none=True)`, the default everywhere), the gradient's own buffer is kept and nothing is copied.
    Where a buffer lives on (`set_to_none=False`, a view of a communication bucket) it is copied. The first step is
    copied in any case, and what happens to its buffer tells which loop this is; should a loop later write to a buffer
    that was kept, the buffer's version shows it: that one comparison is left out and copying begins.
    """

    name = "gradient_change"

    def __init__(self) -> None:
        super().__init__()
        self._witness: weakref.ref[Tensor] | None = None  # a gradient of the first step: does it outlive its step?
        self._may_keep: bool | None = None  # None until the first step's gradient has been seen to die
        self._versions: dict[Tensor, int] = {}  # of kept buffers

    def measure(self, parameter: Tensor) -> Tensor | None:
        previous = self.previous.get(parameter)
        if previous is None or parameter.grad is None:
            return None
        if self._versions.get(parameter, previous._version) != previous._version:
            if self._may_keep:
                logger.warning(
                    "GradES: something wrote to a gradient after the optimizer step that used it; the comparison of "
                    "this step is left out for the affected matrices, and gradients are copied from now on."
                )
            self._may_keep = False
            return None
        return l1_distance(parameter.grad, previous)

    def remember(self, parameters: Iterable[Tensor]) -> None:
        if self._may_keep is None and self._witness is not None:
            self._may_keep = self._witness() is None
            self._witness = None
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                self.forget([parameter])
            elif self._may_keep and _owns_its_memory(gradient):
                self.previous[parameter] = gradient
                self._versions[parameter] = gradient._version
            else:
                if self._may_keep is None and self._witness is None:
                    self._witness = weakref.ref(gradient)
                kept = self._versions.pop(parameter, None) is not None
                if kept or parameter not in self.previous:
                    self.previous[parameter] = gradient.clone()
                else:
                    self.previous[parameter].copy_(gradient)

    def forget(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self.previous.pop(parameter, None)
            self._versions.pop(parameter, None)


def _owns_its_memory(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
