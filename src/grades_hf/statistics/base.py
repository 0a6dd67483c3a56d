"""What the statistics have in common: values for many tensors at once, and a memory of the step before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from ..contracts import Statistic
from ..parallel.sharded import placed_like
from .norms import l1_distances, l1_norms
from .sampling import Sampler


class L1Statistic(Statistic):
    """The L1 norm of a source, or of its change over one step.

    A statistic that compares two steps keeps the source of the step before in `previous`, and frees it in `forget`.

    Args:
        sampler: Which elements to look at; None (default) for all of them.
    """

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.previous: dict[Tensor, Tensor] = {}
        self.sampler = sampler
        self._samples: dict[Tensor, Tensor] = {}  # of this step's check, which `remember` may keep

    @abstractmethod
    def source(self, parameter: Tensor) -> Tensor | None:
        """What the statistic looks at; None where this step's batch did not involve `parameter` (an idle expert)."""

    def takes_part(self, parameter: Tensor) -> bool:
        return self.source(parameter) is not None

    def measure(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        sources = self._sources(p for p in parameters if not self.two_steps or self._comparable(p))
        if self.sampler is not None:
            sources = self._samples = {p: self.sampler.take(p, source) for p, source in sources.items()}
        now = list(sources.values())
        norms = l1_distances(now, [self.previous[p] for p in sources]) if self.two_steps else l1_norms(now)
        if self.sampler is not None and norms:
            torch._foreach_mul_(norms, [self.sampler.factor(parameter) for parameter in sources])
        return dict(zip(sources, norms, strict=True))

    def remember(self, parameters: Iterable[Tensor]) -> None:
        if self.two_steps:
            self.previous = self._kept(self._sources(parameters))
        self._samples = {}

    def forget(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self.previous.pop(parameter, None)
            self._samples.pop(parameter, None)
            if self.sampler is not None:
                self.sampler.forget(parameter)

    def fitting(self, parameter: Tensor, saved: Tensor) -> Tensor:
        return placed_like(saved, parameter) if self.sampler is None else self.sampler.fitting(parameter, saved)

    def _sources(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        found = ((parameter, self.source(parameter)) for parameter in parameters)
        return {parameter: source for parameter, source in found if source is not None}

    def _comparable(self, parameter: Tensor) -> bool:
        return self._is_here(parameter)

    def _is_here(self, parameter: Tensor) -> bool:
        """Whether something is kept for `parameter`, and on its device: the model may have moved since."""
        previous = self.previous.get(parameter)
        return previous is not None and previous.device == parameter.device

    def _kept(self, sources: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What to keep of each: copies, in the memory of those of the step before."""
        kept: dict[Tensor, Tensor] = {}
        for parameter, source in sources.items():
            if self.sampler is not None:
                sample = self._samples.get(parameter)
                kept[parameter] = self.sampler.take(parameter, source) if sample is None else sample
            elif self._is_here(parameter):
                kept[parameter] = self.previous[parameter].copy_(source)
            else:
                kept[parameter] = source.clone()
        return kept
