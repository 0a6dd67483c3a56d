"""What the statistics have in common: values for many tensors at once, and a memory of the step before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..parallel.sharded import placed_like
from .norms import l1_distances, l1_norms
from .sampling import Sampler


class Statistic(ABC):
    """One statistic $G_W(t)$ of single tensors, read just before the update of optimizer step `t`.

    It is the L1 norm of a source, or of its change over one step. The engine adds the values of a component's tensors
    up.

    Args:
        sampler: Which elements to look at; None (default) for all of them.

    Attributes:
        name: Its name in `GradESConfig.monitor`.
        two_steps: Whether it compares two steps, so that its first check yields no value.
        zero_is_a_value: Whether exactly 0 can be a value; not where 0 says that there was no update.
        needs_loss: Whether the engine divides it by the loss of the step.
        previous: The source of the step before, by parameter: tensors like it, or (n,) sampled elements of it. Always
            empty if the statistic looks at one step only.
    """

    name: ClassVar[str]
    two_steps: ClassVar[bool] = True
    zero_is_a_value: ClassVar[bool] = True
    needs_loss: ClassVar[bool] = False

    def __init__(self, sampler: Sampler | None = None) -> None:
        self.previous: dict[Tensor, Tensor] = {}
        self.sampler = sampler
        self._samples: dict[Tensor, Tensor] = {}  # of this step's check, which `remember` may keep

    @abstractmethod
    def sources(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """What the statistic looks at; None where this step's batch did not involve a parameter (an idle expert)."""

    def takes_part(self, parameter: Tensor) -> bool:
        """Whether this step's batch involved `parameter`."""
        return self.sources([parameter])[0] is not None

    def measure(self, parameters: Sequence[Tensor]) -> tuple[list[int], Tensor]:
        """The statistic of each parameter, on the device of the first; there is no transfer to the host.

        Left out are parameters that do not take part, and those that have nothing to compare with.

        Returns:
            The indices in `parameters` of those n that have a value, in order, and the values, (n,) float64.
        """
        sources = self.sources(parameters)
        earlier = self._comparable(parameters) if self.two_steps else sources
        pairs = enumerate(zip(sources, earlier, strict=True))
        found = [i for i, (source, before) in pairs if source is not None and before is not None]
        own, now, then = list(parameters), cast(list[Tensor], sources), cast(list[Tensor], earlier)
        if len(found) < len(own):
            own, now, then = [own[i] for i in found], [now[i] for i in found], [then[i] for i in found]
        if self.sampler is not None:
            now = [self.sampler.take(p, source) for p, source in zip(own, now, strict=True)]
            self._samples = dict(zip(own, now, strict=True))
        norms = l1_distances(now, then) if self.two_steps else l1_norms(now)
        if self.sampler is not None:
            factors = [self.sampler.factor(parameter) for parameter in own]
            norms *= torch.tensor(factors, dtype=torch.float64, device=norms.device)
        return found, norms

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Keep what the check at the next step needs of these parameters, and nothing of others."""
        if self.two_steps:
            sources = zip(parameters, self.sources(parameters), strict=True)
            self.previous = self._kept({p: source for p, source in sources if source is not None})
        self._samples = {}

    def forget(self, parameters: Iterable[Tensor]) -> None:
        """Free what is kept for these parameters."""
        for parameter in parameters:
            self.previous.pop(parameter, None)
            self._samples.pop(parameter, None)
            if self.sampler is not None:
                self.sampler.forget(parameter)

    def fitting(self, parameter: Tensor, saved: Tensor) -> Tensor:
        """What `previous` may hold for `parameter`, from what it held; a ValueError if the shape is another one."""
        return placed_like(saved, parameter) if self.sampler is None else self.sampler.fitting(parameter, saved)

    def _comparable(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """What this step of each is compared with, as `_here`."""
        return self._here(parameters)

    def _here(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """What is kept of each; None where that is nothing, or not on its device: the model may have moved since."""
        kept = list(map(self.previous.get, parameters))
        devices = {tensor.device for tensor in kept if tensor is not None}
        if devices and devices | {parameter.device for parameter in parameters} != {parameters[0].device}:
            return [
                None if tensor is None or tensor.device != parameter.device else tensor
                for parameter, tensor in zip(parameters, kept, strict=True)
            ]
        return kept

    def _kept(self, sources: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """What to keep of each: copies, in the memory of those of the step before."""
        kept: dict[Tensor, Tensor] = {}
        if self.sampler is not None:
            for parameter, source in sources.items():
                sample = self._samples.get(parameter)
                kept[parameter] = self.sampler.take(parameter, source) if sample is None else sample
            return kept
        earlier = self._here(list(sources))
        for (parameter, source), before in zip(sources.items(), earlier, strict=True):
            kept[parameter] = source.clone() if before is None else before.copy_(source)
        return kept
