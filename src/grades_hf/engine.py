"""GradES: find, measure, decide, freeze, record; one call per optimizer step, in any training loop."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .components import Component, find_components
from .config import GradESConfig, is_count
from .criterion import Threshold, assign_thresholds, grace_steps
from .distributed import Ranks
from .freezer import Freezer, unwrap_optimizer
from .history import History
from .monitors import Monitor, make_monitor

logger = logging.getLogger(__name__)

_active: WeakKeyDictionary[nn.Module, GradES] = WeakKeyDictionary()


class GradES:
    """Gradient-based early stopping of single matrices (Algorithm 1 of arXiv 2509.01842).

    ```python
    engine = GradES(model, GradESConfig(tau=0.5), total_steps=T, optimizer=optimizer)
    for batch in loader:
        model(**batch).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            break
    engine.close()
    ```

    Args:
        model: The model that is trained; what is trainable now can be frozen.
        config: The options.
        total_steps: Planned number of optimizer steps T, 1 or more; the grace period is a part of it.
        optimizer: The optimizer (or accelerate's wrapper), whose state for frozen parameters is dropped.

    Attributes:
        components: All that is tracked, in the order of the model's modules.
        history: Events and measured values.
        t: Optimizer steps seen.
        t_grace: ceil(alpha * T); components may freeze at steps after it.

    Raises:
        ValueError: an option that does not fit the model, or nothing to track; before anything is changed.
        RuntimeError: a way of training in several processes that is not supported (see `distributed.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradESConfig,
        *,
        total_steps: int,
        optimizer: Any = None,
    ) -> None:
        if not is_count(total_steps):
            raise ValueError(f"total_steps={total_steps!r} must be the planned number of optimizer steps, 1 or more.")
        GradES.release(model)
        self.config = config
        self.total_steps = int(total_steps)
        self.t = 0
        self.t_grace = grace_steps(config.alpha, self.total_steps)
        self.components = find_components(model, config)
        assign_thresholds(self.components, config.tau)
        for component in self.components:
            automatic = "gradient_norm" if component.adapter else "gradient_change"
            component.monitor = automatic if config.monitor == "auto" else config.monitor
        self.monitors: dict[str, Monitor] = {
            name: make_monitor(name) for name in dict.fromkeys(component.monitor for component in self.components)
        }
        self.criterion = Threshold(config.patience)
        self.freezer = Freezer(unwrap_optimizer(optimizer))
        self.history = History.start(
            self.components, config.to_dict(), total_steps=self.total_steps, t_grace=self.t_grace
        )
        self._resumed = False
        self.ranks = Ranks(model)
        if any(component.adapter for component in self.components):
            self.freezer.guard(model)
        _active[model] = self
        logger.info(self.describe())

    @staticmethod
    def release(model: nn.Module) -> None:
        """End whatever engine still holds `model` (its run was interrupted), so that it is trainable as before."""
        engine = _active.pop(model, None)
        if engine is not None:
            engine.close()

    @property
    def frozen(self) -> dict[str, int]:
        """Component name -> optimizer step (1-based) that it froze at, in the order of freezing."""
        return self.history.frozen

    @property
    def frozen_fraction(self) -> float:
        """Part of the components that is frozen, 0 to 1."""
        return len(self.history.events) / len(self.components)

    @property
    def done(self) -> bool:
        """Whether `max_frozen_fraction` of the components is frozen: training should end after this step."""
        return self.frozen_fraction >= self.config.max_frozen_fraction

    def step(self) -> None:
        """Check and freeze; call between `backward` (and clipping) and `optimizer.step()`, once per optimizer step."""
        self.t += 1
        self.freezer.reassert()
        self._warn_after_resume()
        live = [component for component in self.components if component.frozen_at is None]
        if self.t % self.config.check_every == 0:
            values = self.ranks.agree(self._measure(live), self.components[0].parameters[0].device)
            self.history.record(self.t, values)
            if self.t > self.t_grace:
                self._freeze(live, values)
                live = [component for component in live if component.frozen_at is None]
        if (self.t + 1) % self.config.check_every == 0 and not self.done:
            for name, monitor in self.monitors.items():
                monitor.remember(
                    tensor for component in live if component.monitor == name for tensor in component.measured
                )

    def reassert(self) -> None:
        """Freeze again what something else (PEFT's `disable_adapter()`) has unfrozen since the last step."""
        self.freezer.reassert()

    def close(self) -> None:
        """End the run: `requires_grad` is as it was before (unless `keep_frozen`), everything kept is freed."""
        self.freezer.release(keep_frozen=self.config.keep_frozen)
        if self.frozen and not self.config.keep_frozen:
            self.ranks.changed()
        self.ranks.close()
        for monitor in self.monitors.values():
            monitor.forget(list(monitor.previous))

    def describe(self) -> str:
        """What is tracked and how, in one line."""
        groups = Counter(
            f"{component.tower} {component.group}" if component.tower else component.group
            for component in self.components
        )
        taus = sorted({component.tau for component in self.components})
        tau = f"tau {taus[0]:g}" if len(taus) == 1 else f"{len(taus)} values of tau from {taus[0]:g} to {taus[-1]:g}"
        return (
            f"GradES tracks {len(self.components)} components ("
            + ", ".join(f"{number} {group}" for group, number in groups.items())
            + f") with {sum(component.numel for component in self.components):,} parameters; "
            + f"monitor {', '.join(self.monitors)} ({self.config.reduction}), {tau}; "
            + f"freezing from step {self.t_grace + 1} of {self.total_steps} on."
        )

    def conclude(self) -> str:
        """What came of it, in one line."""
        line = f"{len(self.history.events)} of {len(self.components)} components are frozen after step {self.t}"
        if self.history.events:
            steps = [event["step"] for event in self.history.events]
            line += f", between steps {min(steps)} and {max(steps)}"
        live = {c.name: c.tau for c in self.components if c.frozen_at is None}
        nearest = min(((value / live[n], n) for n, value in self.history.latest().items() if n in live), default=None)
        if nearest is not None:
            line += f"; nearest to its tau of those still trained: {nearest[1]} at {nearest[0]:.3g} x tau"
        return line + "."

    # --- state -------------------------------------------------------------------------------------------------

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had not been interrupted.

        Args:
            tensors: With the tensors of the last step that the statistic compares with; without them the dict holds
                JSON types only.

        Returns:
            `step`, `events` (what froze when), `below` (patience counters); and with `tensors` also `history` and
            `previous` (component name -> one tensor or None for each measured tensor).
        """
        state: dict[str, Any] = {
            "step": self.t,
            "events": list(self.history.events),
            "below": dict(self.criterion.below),
        }
        if tensors:
            state["history"] = self.history.to_dict()
            state["previous"] = {
                component.name: [self.monitors[component.monitor].previous.get(p) for p in component.measured]
                for component in self.components
                if component.frozen_at is None
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`: freezes what was frozen; call after model and optimizer were restored.

        Raises:
            ValueError: the state does not fit the model; nothing has been changed then.
        """
        try:
            step, events, below = int(state["step"]), list(state["events"]), dict(state["below"])
            names = [event["name"] for event in events]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no state of GradES: {error!r} is missing or malformed.") from error
        by_name = {component.name: component for component in self.components}
        unknown = [name for name in [*names, *below] if name not in by_name]
        if unknown:
            raise ValueError(
                f"the checkpoint knows components that the model does not have ({', '.join(sorted(set(unknown))[:3])}"
                f"{', ...' if len(set(unknown)) > 3 else ''}): resume with the same model, adapter and "
                "target_modules that the checkpoint was made with."
            )
        self.t = step
        self._resumed = True
        self.criterion.below = below
        self.history.events = events
        for event in events:
            component = by_name[event["name"]]
            component.frozen_at = int(event["step"])
            self.freezer.freeze(component)
        if events:
            self.ranks.changed()
        if "history" in state:
            self.adopt_history(History.from_dict(state["history"]))
        for name, previous in state.get("previous", {}).items():
            component = by_name[name]
            for parameter, tensor in zip(component.measured, previous, strict=True):
                if tensor is not None:
                    kept = tensor.to(device=parameter.device, copy=True)
                    self.monitors[component.monitor].previous[parameter] = kept

    def adopt_history(self, history: History) -> None:
        """Continue an earlier record of this run, as far as it goes up to the current step.

        Raises:
            ValueError: the record is of another run; nothing has been changed then.
        """
        history.truncate(self.t)
        checks = len(history.steps)
        fits = history.values.keys() == self.history.values.keys() and history.frozen == self.frozen
        if not fits or any(len(history.values[c.name]) != checks for c in self.components if c.frozen_at is None):
            raise ValueError("the history is of another run: its components or its frozen set differ.")
        self.history.steps = history.steps
        self.history.values = history.values

    def previous_tensors(self) -> dict[Tensor, Tensor]:
        """What the monitors remember of the last step, by parameter; empty where they need no memory."""
        return {p: tensor for monitor in self.monitors.values() for p, tensor in monitor.previous.items()}

    # --- one check -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _measure(self, live: Sequence[Component]) -> dict[str, float]:
        """The statistic of each component, NaN where there is none; one transfer from each device."""
        owners: list[tuple[str, int]] = []
        norms: list[Tensor] = []
        without: set[str] = set()
        for component in live:
            monitor = self.monitors[component.monitor]
            for parameter in component.measured:
                if not monitor.takes_part(parameter):
                    continue
                norm = monitor.measure(parameter)
                if norm is None:
                    without.add(component.name)
                else:
                    owners.append((component.name, parameter.numel()))
                    norms.append(norm)
        totals: dict[str, float] = {}
        elements: dict[str, int] = {}
        for (name, numel), value in zip(owners, _to_host(norms), strict=True):
            totals[name] = totals.get(name, 0.0) + value
            elements[name] = elements.get(name, 0) + numel
        if self.config.reduction == "mean":
            totals = {name: total / elements[name] for name, total in totals.items()}
        for component in live:
            if totals.get(component.name) == 0 and not self.monitors[component.monitor].zero_is_a_value:
                without.add(component.name)
        return {c.name: math.nan if c.name in without else totals.get(c.name, math.nan) for c in live}

    def _freeze(self, live: Sequence[Component], values: Mapping[str, float]) -> None:
        # Every component's count goes on, so no short circuit here.
        converged = [c for c in live if self.criterion.converged(c.name, values[c.name], c.tau)]
        if not converged:
            return
        for component in converged:
            component.frozen_at = self.t
            self.history.record_freeze(self.t, component, values[component.name])
            self.freezer.freeze(component)
            self.monitors[component.monitor].forget(component.measured)
            self.criterion.below.pop(component.name, None)
        self.ranks.changed()
        kinds = Counter(f"{c.tower} {c.projection}" if c.tower else c.projection for c in converged)
        logger.info(
            "GradES step %d: froze %d (%s); %d of %d components are frozen.",
            self.t,
            len(converged),
            ", ".join(f"{number} {kind}" for kind, number in kinds.items()),
            len(self.history.events),
            len(self.components),
        )
        if len(converged) == len(self.components) > 1 and self.t <= self.t_grace + self.config.check_every:
            logger.warning(
                "GradES: every component was below tau at the first check that could freeze it (step %d), so this run "
                "ends like one that is simply stopped there. tau is probably too large for this model.",
                self.t,
            )

    def _warn_after_resume(self) -> None:
        """Say once that the first check after a resume has nothing to compare with, where that is so."""
        if not self._resumed:
            return
        self._resumed = False
        needs_memory = {name for name, monitor in self.monitors.items() if monitor.compares_steps}
        waiting = [c for c in self.components if c.frozen_at is None and c.monitor in needs_memory]
        if self.t % self.config.check_every == 0 and waiting and not self.previous_tensors():
            logger.warning(
                "GradES: the checkpoint does not hold the tensors of the step before (it was saved without the "
                "optimizer, or without GradES), so the check at step %d yields no value.",
                self.t,
            )


def _to_host(norms: Sequence[Tensor]) -> list[float]:
    """0-d tensors as floats, in order; one transfer from each device."""
    floats = [0.0] * len(norms)
    for device in dict.fromkeys(norm.device for norm in norms):
        indices = [index for index, norm in enumerate(norms) if norm.device == device]
        for index, value in zip(indices, torch.stack([norms[i].double() for i in indices]).tolist(), strict=True):
            floats[index] = value
    return floats
