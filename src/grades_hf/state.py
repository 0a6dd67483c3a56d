"""What a checkpoint holds of an engine, and how a resumed run goes on from it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .compilation import Batches
from .components import Component
from .config import GradESConfig
from .criteria import Criterion
from .flops import ComputeMeter
from .freezer import Freezer
from .history import History, check_events
from .monitors import Monitor
from .prefix import Prefix
from .transfer import Reading

logger = logging.getLogger(__name__)

# The options that decide what is measured, and those that decide what freezes and when.
SCALE = ("monitor", "reduction", "sample_size")
RULE = (
    "tau", "alpha", "criterion", "patience", "window", "smoothing", "rise", "significance", "quorum",
    "check_every", "target_modules", "exclude_modules", "max_frozen_fraction", "freeze_prefix", "delay_transfer",
)  # fmt: skip


class Resumable:
    """The part of `GradES` that saves and restores it."""

    config: GradESConfig
    total_steps: int
    t: int
    t_grace: int
    components: list[Component]
    history: History
    criterion: Criterion
    monitors: dict[str, Monitor]
    freezer: Freezer
    batches: Batches
    prefix: Prefix | None
    meter: ComputeMeter | None
    remembers: bool
    _began: float
    _resumed: bool
    _reading: Reading | None
    _learning_rate: float | None

    if TYPE_CHECKING:

        @property
        def frozen(self) -> dict[str, int]: ...
        @property
        def _progress(self) -> float: ...
        def _live(self) -> list[Component]: ...
        def _new_criterion(self) -> Criterion: ...
        def _settle(self) -> None: ...

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had not been interrupted.

        Args:
            tensors: With the tensors of the last step that the statistic compares with; without them the dict holds
                JSON types only.

        Returns:
            `step`, `seconds` (of training), `events` (what froze when), `criterion`
            (what it keeps of each component), `learning_rate` (the highest so far, where the criterion asks for it),
            `config` and `total_steps` (what they were made with), `checksum` (of the history), `reading` (the check
            that `delay_transfer` has left open, if any);
            and with `tensors` also `history` and `previous` (component name -> one tensor or None for each measured
            tensor).
        """
        state: dict[str, Any] = {
            "step": self.t,
            "seconds": time.monotonic() - self._began,
            "events": list(self.history.events),
            "criterion": self.criterion.state_dict(),
            "config": self.config.state_dict(),
            "total_steps": self.total_steps,
            "checksum": self.history.checksum(),
        }
        if self._learning_rate is not None:
            state["learning_rate"] = self._learning_rate
        factors = {p: factor for monitor in self.monitors.values() for p, factor in monitor.previous_factors.items()}
        if factors:
            numbers = {factor: factor.item() for factor in set(factors.values())}  # mostly one for all
            state["clipping"] = {
                component.name: [numbers[factors[p]] if p in factors else 1.0 for p in component.measured]
                for component in self.components
                if not factors.keys().isdisjoint(component.measured)
            }
        if self.prefix is not None:
            state["prefix"] = self.prefix.state_dict()
        if self._reading is not None:
            state["reading"] = self._reading.state_dict()
        if self.meter is not None:
            state["flops"] = self.meter.state_dict()
        if tensors:
            state["history"] = self.history.to_dict()
            state["previous"] = {
                component.name: [self.monitors[component.monitor].previous.get(p) for p in component.measured]
                for component in self._live()
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`: freezes what was frozen; call after model and optimizer were restored.

        Where options or `total_steps` are others than those of the state, the new ones hold from here on and a warning
        names them: what is frozen stays frozen, patience starts to count anew, and with another statistic the record
        begins anew, too.

        Raises:
            ValueError: the state does not fit the model; nothing has been changed then.
        """
        try:
            step, criterion, made = int(state["step"]), self._new_criterion(), dict(state.get("config") or {})
            if made.get("criterion", self.config.criterion) == self.config.criterion:
                criterion.load_state_dict(state["criterion"])
            learning_rate = float(state["learning_rate"]) if "learning_rate" in state else None
            seconds = float(state.get("seconds", 0.0))
            events = check_events(state["events"])
            previous = {name: list(tensors) for name, tensors in state.get("previous", {}).items()}
            clipping = {name: [float(f) for f in factors] for name, factors in state.get("clipping", {}).items()}
            reading = Reading.from_state(state["reading"]) if "reading" in state else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is no state of GradES: {error!r} is missing or malformed.") from error
        by_name = {component.name: component for component in self.components}
        names = [event["name"] for event in events]
        open_names = () if reading is None else reading.names
        observed = {name for part in criterion.parts for name in part.memory}
        unknown = sorted({*names, *observed, *previous, *clipping, *open_names} - by_name.keys())
        if unknown:
            raise ValueError(
                f"the checkpoint knows components that the model does not have ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}): resume with the same model, adapter and "
                "target_modules that the checkpoint was made with."
            )
        if any(not 1 <= event["step"] <= step for event in events):
            raise ValueError(f"the state of GradES contradicts itself: of step {step}, it has freezings of later ones.")
        for name, tensors in previous.items():
            if len(tensors) != len(by_name[name].measured):
                raise ValueError(
                    f"the checkpoint measured {len(tensors)} tensors of {name}, the model has "
                    f"{len(by_name[name].measured)}: resume with the same adapter that it was made with."
                )
        history = History.from_dict(state["history"]) if "history" in state else None
        if self.meter is not None and "flops" in state:
            self.meter.load_state_dict(state["flops"])
        elif self.meter is not None and events:
            self.meter.reason = "the checkpoint holds no counts (count_flops=False, or an older version of grades-hf)"
        changed = self._changed_options(state)
        if self.prefix is not None and "prefix" in state:
            self.prefix.load_state_dict(state["prefix"])
        self.t = step
        self._began = time.monotonic() - seconds
        self._resumed = True
        self.criterion = self._new_criterion() if changed else criterion
        self._learning_rate = learning_rate
        self._reading = None if changed.intersection(SCALE) else reading
        self.history.events = events
        for event in events:
            component = by_name[event["name"]]
            component.frozen_at = event["step"]
            self.freezer.freeze(component.parameters)
        if events:
            self.batches.due(self._progress)
            self._settle()
        if history is not None:
            try:
                self.adopt_history(history)
            except ValueError as error:
                if not changed:
                    raise
                logger.warning("GradES: earlier values are lost from the history: %s", error)
        # One criterion undoes clipping, another does not.
        self.remembers = not changed.intersection((*SCALE, "criterion"))
        for name, factors in clipping.items() if self.remembers else ():
            known = self.monitors[by_name[name].monitor].previous_factors
            known |= {p: torch.tensor(f, device=p.device) for p, f in zip(by_name[name].measured, factors, strict=True)}
        for name, tensors in previous.items() if self.remembers else ():
            component = by_name[name]
            for parameter, tensor in zip(component.measured, tensors, strict=True):
                if tensor is not None:
                    self.monitors[component.monitor].restore(parameter, tensor)

    def _changed_options(self, state: Mapping[str, Any]) -> set[str]:
        """The options of `state` that are others now; one warning names them."""
        own, earlier = self.config.state_dict(), dict(state.get("config") or {})
        names = [name for name in (*RULE, *SCALE) if name in earlier and earlier[name] != own[name]]
        changed: dict[str, tuple[Any, Any]] = {name: (earlier[name], own[name]) for name in names}
        if state.get("total_steps", self.total_steps) != self.total_steps:
            changed["total_steps"] = (state["total_steps"], self.total_steps)
        if changed:
            logger.warning(
                "GradES: the checkpoint was made with other options (%s). The new ones hold from here on: what is "
                "frozen stays frozen, other components may freeze from step %d on, and patience starts to count anew.",
                "; ".join(f"{name}: {before!r} -> {now!r}" for name, (before, now) in changed.items()),
                max(self.t_grace, int(state["step"])) + 1,
            )
        return set(changed)

    def adopt_history(self, history: History, checksum: int | None = None) -> None:
        """Continue an earlier record of this run, as far as it goes up to the current step.

        Args:
            history: The record.
            checksum: What `state_dict()` said of it, None if that is not known.

        Raises:
            ValueError: the record is of another run; nothing has been changed then.
        """
        history.truncate(self.t, None if self._reading is None else self._reading.step - 1)
        checks = len(history.steps)
        fits = history.values.keys() == self.history.values.keys() and history.frozen == self.frozen
        fits = fits and (checksum is None or checksum == history.checksum())
        if not fits or any(len(history.values[c.name]) != checks for c in self.components if c.frozen_at is None):
            raise ValueError("the history is of another run: its components, its frozen set or its values differ.")
        if _scale(history) != _scale(self.history):
            raise ValueError("the history is of another statistic (monitor, reduction or sample_size).")
        self.history.steps = history.steps
        self.history.values = history.values
        self.history.logs = history.logs

    def previous_tensors(self) -> dict[Tensor, Tensor]:
        """What the monitors remember of the last step, by parameter; empty where they need no memory."""
        return {p: tensor for monitor in self.monitors.values() for p, tensor in monitor.previous.items()}

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


def _scale(history: History) -> tuple[dict[str, str], Any, Any]:
    """What its values measure."""
    monitors = {component["name"]: component["monitor"] for component in history.components}
    return monitors, history.config.get("reduction"), history.config.get("sample_size")
