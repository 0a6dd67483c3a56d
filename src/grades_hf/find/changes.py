"""What is trained may change in the course of a run: blocks are opened, adapters are added, parameters are replaced."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..contracts import Extension, Run, Step, Trait
from ..hooks import hook
from .components import Component

LOOK_EVERY = 100  # steps from one look through the whole model to the next, where nothing tells that it has changed


class Changes(Extension):
    """Finds what has become trainable, and refuses to go on where tracked parameters are not the model's any more.

    Layers are opened after some epochs (Lightning's BaseFinetuning), layer by layer, or in turn (LISA), and adapters
    are added. What is trainable for the first time is tracked from then on. What a schedule closes again just has no
    gradient meanwhile.

    In each step this costs a look at each parameter that has not been trained so far, and at the place of each that is
    tracked; the model is searched only where something has changed, and now and then.
    """

    name = "changes"

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._run: Any = run
        everything = list(run.model.parameters())
        self._seen = {parameter for parameter in everything if parameter.requires_grad}
        self._closed = [parameter for parameter in everything if not parameter.requires_grad]
        self._grouped = self._in_groups()
        self._told = False
        self._homes: list[tuple[dict[str, Any], str, Tensor]] = []
        self._find_homes()
        undo.callback(self._close)
        if Trait.PARALLEL in run.traits:
            undo.callback(hook(run.model, "forward_pre", self._before_forward))

    def before_check(self, step: Step) -> None:
        if not all(parameters.get(key) is tensor for parameters, key, tensor in self._homes):
            self._refuse_replaced()
        opened = any(parameter.requires_grad for parameter in self._closed)
        if opened or self._grouped != (grouped := self._in_groups()) or step.t % LOOK_EVERY == 0:
            self._grouped = self._in_groups() if opened else grouped
            self.look()

    def look(self) -> None:
        """Search the model for what is trainable and has not been so far."""
        everything = list(self._run.model.parameters())
        if not self._run.ranks.sharded:
            self._refuse_lost(self._run.live, set(everything))
        new = [parameter for parameter in everything if parameter.requires_grad and parameter not in self._seen]
        self._seen.update(new)
        self._closed = [parameter for parameter in everything if parameter not in self._seen]
        self._told = False
        if new:
            self._run.join(new)
            self._find_homes()

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        """DDP reduces the gradients of what its reducer knows."""
        if not self._told and any(parameter.requires_grad for parameter in self._closed):
            self._told = True
            self._run.ranks.on_grad_pattern()

    def _in_groups(self) -> int:
        return sum(len(group["params"]) for optimizer in self._run.optimizers for group in optimizer.param_groups)

    def _find_homes(self) -> None:
        """Where the model keeps each tracked parameter. Sharding puts others there in turn, so nothing is watched."""
        self._homes = []
        if self._run.ranks.sharded:
            return
        tracked = {parameter for component in self._run.components for parameter in component.parameters}
        for module in self._run.model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and parameter in tracked:
                    tracked.discard(parameter)
                    self._homes.append((module._parameters, key, parameter))

    def _refuse_replaced(self) -> None:
        self._refuse_lost(self._run.components, set(self._run.model.parameters()))
        self._find_homes()  # they have only moved: a parametrization holds them now

    @staticmethod
    def _refuse_lost(components: Iterable[Component], there: set[Tensor]) -> None:
        lost = [component.name for component in components if not there.issuperset(component.parameters)]
        if not lost:
            return
        raise RuntimeError(
            f"the parameters of {len(lost)} tracked matrices ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}) "
            "are not the model's any more: they were replaced by new ones (fully_shard, a conversion, resizing) or "
            "taken out. Do so before GradES begins, and build the optimizer after it."
        )

    def _close(self) -> None:
        self._run = None
        self._seen, self._closed, self._homes = set(), [], []
