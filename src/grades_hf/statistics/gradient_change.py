"""gradient_change: how much the gradient differs from that of the step before (Eq. 1, the paper's for full weights)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..parallel.sharded import locals_of
from .base import Statistic
from .sampling import Sampler

logger = logging.getLogger(__name__)


class GradientChange(Statistic):
    r"""$G_W(t) = \sum_{ij} |(\nabla W_t)_{ij} - (\nabla W_{t-1})_{ij}|$.

    Memory: one gradient per watched weight, or a sample of it. Where the training loop drops its gradients after each
    step (`zero_grad(set_to_none=True)`, the default everywhere), the gradient's own buffer is kept and nothing is
    copied. Where a buffer lives on (`set_to_none=False`, a view of a communication bucket) it is copied. The first step
    is copied in any case, and what happens to its buffer tells which loop this is; should a loop later write to a
    buffer that was kept, the buffer's version shows it: that one comparison is left out and copying begins.

    A change of exactly 0 is a value where the gradient stays the same, and none where it is 0 in both steps, unless it
    always was (see `engine.GradES`). With `delay_transfer`, a sample or shards the first is not told from the second.
    """

    name = "gradient_change"

    def __init__(self, sampler: Sampler | None = None) -> None:
        super().__init__(sampler)
        # A parameter and its gradient of the first step: does that outlive its step?
        self._witness: tuple[Tensor, weakref.ref[Tensor]] | None = None
        self._may_keep: bool | None = None  # None until the first step's gradient has been seen to die
        self._versions: dict[Tensor, int] = {}  # of kept buffers

    def sources(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [parameter.grad for parameter in parameters]

    def forget(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        super().forget(parameters)
        for parameter in parameters:
            self._versions.pop(parameter, None)
        if self._witness is not None and any(parameter is self._witness[0] for parameter in parameters):
            self._witness = None

    def _comparable(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        kept = super()._comparable(parameters)
        if not self._versions:
            return kept
        versions = map(self._versions.get, parameters)
        triples = enumerate(zip(kept, versions, strict=True))
        written = [i for i, (tensor, v) in triples if tensor is not None and v is not None and tensor._version != v]
        for i in written:
            kept[i] = None
        if written and self._may_keep:
            logger.warning(
                "GradES: something wrote to a gradient after the optimizer step that used it; the comparison of "
                "this step is left out for the affected matrices, and gradients are copied from now on."
            )
        if written:
            self._may_keep = False
        return kept

    def _kept(self, sources: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        if self.sampler is not None:
            return super()._kept(sources)
        if self._may_keep is None and self._witness is not None:
            self._may_keep = self._witness[1]() is None
            self._witness = None
        own = _with_own_memory(sources) if self._may_keep else {}
        others = {p: gradient for p, gradient in sources.items() if p not in own} if len(own) < len(sources) else {}
        for parameter in self._versions if others else ():  # a gradient's own buffer is no memory to copy into
            self.previous.pop(parameter, None)
        self._versions = {parameter: gradient._version for parameter, gradient in own.items()}
        if self._may_keep is None and sources:
            parameter, gradient = next(iter(sources.items()))
            self._witness = parameter, weakref.ref(gradient)
        return {**own, **super()._kept(others)} if others else own


def _with_own_memory(gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
    """Those that are all of their storage: the others are views of something that lives on."""
    pairs = zip(gradients.items(), locals_of(list(gradients.values())), strict=True)
    return {p: gradient for (p, gradient), own in pairs if own.untyped_storage().nbytes() == own.nbytes}
