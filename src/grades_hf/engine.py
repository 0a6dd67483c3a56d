"""GradES: find, measure, decide, freeze, record; one call per optimizer step, in any training loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .clipping import Clipping
from .compilation import Batches
from .components import Component, kinds, measure_last_factors, survey
from .config import GradESConfig, is_count
from .criteria import Criterion, assign_thresholds, grace_steps, make_criterion
from .distributed import Placeholders, Ranks, refuse
from .flops import ComputeMeter, Savings
from .freezer import Freezer, unwrap_optimizers
from .history import History
from .loss import Loss
from .merging import Merger
from .monitors import Monitor, Sampler, make_monitor
from .prefix import Prefix
from .scaling import GradientScale, find_scaler
from .state import Resumable
from .transfer import Reading

logger = logging.getLogger(__name__)

_active: WeakKeyDictionary[nn.Module, GradES] = WeakKeyDictionary()


class GradES(Resumable):
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
        optimizer: The optimizer (or accelerate's wrapper), whose state for frozen parameters is dropped; or a list of
            several.
        scaler: The `torch.amp.GradScaler` of a loop in float16, default None; accelerate's is found by itself. Call
            `step()` before `scaler.step(optimizer)`: it unscales the gradients if clipping has not done it. A step
            that the scaler skips yields no values.

    Attributes:
        components: All that is tracked, in the order of the model's modules.
        history: Events and measured values.
        t: Optimizer steps seen.
        t_grace: ceil(alpha * T); components may freeze at steps after it.
        merger: What merges frozen LoRA pairs, and `merger.merged` their names; None without `merge_frozen_adapters`.

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
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not is_count(total_steps):
            raise ValueError(f"total_steps={total_steps!r} must be the planned number of optimizer steps, 1 or more.")
        GradES.release(model)
        self.total_steps = int(total_steps)
        self.config = config = config.resolved(self.total_steps)
        self.t = 0
        self.t_grace = grace_steps(cast(float, config.alpha), self.total_steps)
        self.components, left_out = survey(model, config)
        assign_thresholds(self.components, config.tau)
        self.criterion = self._new_criterion()
        for component in self.components:
            paper = "gradient_norm" if component.adapter else "gradient_change"
            automatic = "gradient_per_loss" if config.needs_loss else "gradient_norm"
            automatic = automatic if self.criterion.relative else paper
            component.monitor = automatic if config.monitor == "auto" else config.monitor
        if self.criterion.relative and config.criterion != "pflug":  # whose products are those of all tensors
            measure_last_factors(model, self.components)
        sampler = None
        if config.sample_size is not None:
            names = {p: f"{c.name}/{place}" for c in self.components for place, p in enumerate(c.measured)}
            sampler = Sampler(config.sample_size, names)
        self._learning_rate: float | None = None  # the highest so far, where the criterion observes from there on
        self.batches = Batches(model, config.max_recompilations)
        scaler = find_scaler(optimizer) if scaler is None else scaler
        refuse(model, config, optimizer, compiled=self.batches.compiled, scaled=scaler is not None)
        optimizers = unwrap_optimizers(optimizer)
        self.monitors: dict[str, Monitor] = {
            name: make_monitor(name, sampler, optimizers)
            for name in dict.fromkeys(component.monitor for component in self.components)
        }
        self.scale = GradientScale(optimizers, scaler)
        self.clipping: Clipping | None = None  # undone where values are compared with those of earlier steps
        if self.criterion.relative:
            self.clipping = Clipping(p for component in self.components for p in component.measured)
            for monitor in self.monitors.values():
                monitor.factors = self.clipping.factors
        self.loss: Loss | None = None
        if config.needs_loss:
            self.loss = Loss(model)
        self.freezer = Freezer(optimizers, patient=self.batches.compiled)
        self.merger = Merger(model, self.components) if config.merge_frozen_adapters else None
        self.prefix: Prefix | None = None
        if config.freeze_prefix:
            self.prefix = Prefix(model, self.components, left_out, config.exclude_modules, self.freezer)
            self.batches.allow(2)  # the order in which modules run is recorded by hooks, which come and go
        self.history = History.start(
            self.components, config.to_dict(), total_steps=self.total_steps, t_grace=self.t_grace
        )
        self._began = time.monotonic()  # less what earlier sessions of a resumed run took
        self._resumed = False
        self._reading: Reading | None = None  # a check that is not decided upon yet
        self.remembers = True  # whether tensors of the last step in a checkpoint are of this statistic
        self._closed = False
        self.ranks = Ranks(model)
        if self.ranks.sharded:
            self.freezer.placeholders = Placeholders(optimizers)
        if any(component.adapter for component in self.components):
            self.freezer.guard(model)
        self.meter: ComputeMeter | None = None
        if config.count_flops:
            self.meter = ComputeMeter(
                model,
                self.components,
                optimizers,
                merged=lambda: self.merger.merged if self.merger is not None else (),
                frozen=self.freezer,
                compiled=self.batches.compiled,
            )
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
        return self._progress >= 1

    @property
    def _progress(self) -> float:
        return self.frozen_fraction / cast(float, self.config.max_frozen_fraction)

    def step(self, loss: Tensor | float | None = None) -> None:
        """Check and freeze; call between `backward` (and clipping) and `optimizer.step()`, once per optimizer step.

        Args:
            loss: That of the step, a number or a 0-d tensor, for a statistic that needs it (`gradient_per_loss`, which
                the default criterion looks at). Default: what the model has returned as `loss` in training mode since
                the last step, added up.

        Raises:
            RuntimeError: the engine is closed, by `close()` or by another one for the same model; or the statistic
                needs the loss, and there is none.
        """
        if self._closed:
            raise RuntimeError(
                "this engine is closed: another run has begun for its model, or with its callback. Two runs at a time "
                "need a model and a GradESCallback each."
            )
        loss = self._loss_of_step(loss)
        self.t += 1
        self.reassert()
        skipped = self.scale.remove()
        self._warn_after_resume()
        self._decide()  # upon a delayed check
        self._watch_warm_up()
        live = self._live()
        if self.t % self.config.check_every == 0:
            loss = None if loss is None else self.ranks.mean(loss)
            values = self.ranks.agree(self._measure(() if skipped else live, live, loss))
            self._reading = Reading(self.t, [component.name for component in live], values)
            if not self.config.delay_transfer:
                self._decide()
                live = self._live()
        if skipped:
            self._forget()
        else:
            due = (self.t + 1) % self.config.check_every == 0 and not self.done
            for name, monitor in self.monitors.items():
                monitor.remember(p for c in live if due and c.monitor == name for p in c.measured)
        if self.clipping is not None:
            self.clipping.factors.clear()
        if self.meter is not None:
            self.meter.step()

    def _loss_of_step(self, given: Tensor | float | None) -> Tensor | None:
        """As a 0-d tensor; None where no statistic asks for it."""
        if self.loss is None:
            return None
        seen = self.loss.take()
        if given is not None:
            return torch.as_tensor(given).detach().to(self.components[0].parameters[0].device)
        if seen is None:
            raise RuntimeError(
                "monitor='gradient_per_loss', which criterion='rise' looks at, needs the loss of each step, and the "
                "model has returned none (it is computed outside of it). Pass monitor='gradient_norm' and rise=0.25, a "
                "tau, or in a loop of your own engine.step(loss=loss)."
            )
        return seen

    def reassert(self) -> None:
        """Freeze again what something else (PEFT's `disable_adapter()`) has unfrozen since the last step."""
        self.freezer.reassert()
        if self.merger is not None:
            self.merger.refresh()

    def log(self, loss: float | None = None) -> None:
        """Add a row to `history.logs` (time, components frozen, compute saved); call where the loop logs its loss."""
        row = {"step": self.t, "seconds": time.monotonic() - self._began, "frozen": len(self.history.events)}
        if loss is not None:
            row["loss"] = float(loss)
        if self.meter is not None and self.meter.measured:
            savings = self.savings()
            row["compute_saved"] = savings.fraction
            self.history.savings = dataclasses.asdict(savings)
        self.history.record_log(row)

    def flush(self) -> None:
        """Complete the history: nothing freezes any more. The check that `delay_transfer` has left open is added."""
        if self._reading is not None:
            self._record(self._reading)
            self._reading = None
        if self.meter is not None and self.meter.measured:
            self.history.savings = dataclasses.asdict(self.savings())
        self.history.ended = "converged" if self.done else "completed" if self.t >= self.total_steps else "stopped"

    def close(self) -> None:
        """End the run: `requires_grad` is as it was before (unless `keep_frozen`), everything kept is freed."""
        self._closed = True
        self.flush()
        if self.meter is not None:
            self.meter.close()
        if self.merger is not None:
            self.merger.close()
        if self.prefix is not None:
            self.prefix.close()
        self.batches.close()
        if self.clipping is not None:
            self.clipping.close()
        if self.loss is not None:
            self.loss.close()
        if self.freezer.placeholders is not None:
            self.freezer.placeholders.close()
        self.freezer.release(keep_frozen=self.config.keep_frozen)
        if self.frozen and not self.config.keep_frozen:
            self.ranks.changed()
        self.ranks.close()
        self._forget()

    def savings(self) -> Savings:
        """What the steps so far have cost in FLOPs, and what freezing has saved of them; also after `close`.

        Raises:
            RuntimeError: it is not measured: `count_flops=False`, no step so far, a compiled model (torch.compile), or
                a checkpoint without counts; the message says which.
        """
        if self.meter is None:
            raise RuntimeError("savings are not measured: count_flops=False. Pass count_flops=True.")
        return self.meter.savings(self.total_steps)

    def describe(self) -> str:
        """What is tracked and how, in one line."""
        groups = Counter(
            f"{component.tower} {component.group}" if component.tower else component.group
            for component in self.components
        )
        taus = sorted({component.tau for component in self.components if component.tau is not None})
        rule = f"criterion {self.criterion.name}"
        if taus:
            many = f"{len(taus)} values of tau from {taus[0]:g} to {taus[-1]:g}"
            rule = f"{rule}, " if len(self.criterion.parts) > 1 else ""
            rule += f"tau {taus[0]:g}" if len(taus) == 1 else many
        if self.config.quorum:
            rule += f", quorum {self.config.quorum:g}"
        return (
            f"GradES tracks {len(self.components)} components ("
            + ", ".join(f"{number} {group}" for group, number in groups.items())
            + f") with {sum(component.numel for component in self.components):,} parameters; "
            + f"monitor {', '.join(self.monitors)} ({self.config.reduction}), {rule}; "
            + f"freezing from step {self.t_grace + 1} of {self.total_steps} on."
        )

    def conclude(self) -> str:
        """What came of it, in one line."""
        line = f"{len(self.history.events)} of {len(self.components)} components are frozen after step {self.t}"
        if self.history.events:
            steps = [event["step"] for event in self.history.events]
            line += f", between steps {min(steps)} and {max(steps)}"
        live = {c.name: c.tau for c in self.components if c.frozen_at is None and c.tau is not None}
        nearest = min(((value / live[n], n) for n, value in self.history.latest().items() if n in live), default=None)
        if nearest is not None:
            line += f"; nearest to its tau of those still trained: {nearest[1]} at {nearest[0]:.3g} x tau"
        return line + "."

    def _forget(self) -> None:
        for monitor in self.monitors.values():
            monitor.forget(list(monitor.previous))

    # --- one check -----------------------------------------------------------------------------------------------

    def _live(self) -> list[Component]:
        return [component for component in self.components if component.frozen_at is None]

    @torch.no_grad()
    def _measure(self, measured: Sequence[Component], live: Sequence[Component], loss: Tensor | None = None) -> Tensor:
        """The statistic of each component of `live`, NaN where there is none, or where it is not among `measured`.

        Returns:
            (len(live),) in float64 on the device of the first component. There is no transfer to the host.
        """
        device = self.components[0].parameters[0].device
        if not live:
            return torch.empty(0, dtype=torch.float64, device=device)
        number = next(iter(self.monitors.values())).sums  # the same for all: only those with one are combined
        shape = () if number == 1 else (number,)
        found: dict[Tensor, Tensor] = {}
        for name, monitor in self.monitors.items():
            found |= monitor.measure(p for c in measured if c.monitor == name for p in c.measured)
        if self.ranks.sharded:
            among = [parameter for component in measured for parameter in component.measured]
            single = [sums.flatten() for sums in found.values()]
            columns = [[sums[index] for sums in single] for index in range(number)]
            added = [self.ranks.add_shards(column, list(found), among) for column in columns]
            found = {p: torch.stack(sums).view(shape) for p, *sums in zip(found, *added, strict=True)}
        nan, zero = torch.full(shape, math.nan, device=device), torch.zeros(shape, device=device)
        width = max(len(component.measured) for component in live)
        norms: list[Tensor] = []  # for each component `width` of them
        elements: list[int] = []
        for component in live:
            parts = component.measured
            row = [found[p] for p in parts if p in found]
            if len(row) < len(parts):
                parts = tuple(p for p in parts if self.monitors[component.monitor].takes_part(p))
                if not row or len(row) < len(parts):
                    row = [nan]
            norms += row + [zero] * (width - len(row))
            if self.config.reduction == "mean":
                elements.append(sum(p.numel() for p in parts))
        values = _stack(norms, device).view(len(live), width, *shape).sum(1)
        if self.config.reduction == "mean":
            torch._foreach_div_(list(values.unbind()), [float(max(1, count)) for count in elements])
        values = next(iter(self.monitors.values())).combine(values)
        if loss is not None:
            loss = loss.to(values)
            values = torch.where(loss > 0, values / loss, math.nan)
        return values

    def _decide(self) -> None:
        """Record the check that is open, if any, and freeze what has converged."""
        if self._reading is None:
            return
        reading, self._reading = self._reading, None
        values = self._record(reading)
        live = [component for component in self._live() if component.name in values]
        # Every component's record goes on, also in the grace period, so no short circuit here.
        converged = [c for c in live if self.criterion.update(c.name, reading.step, values[c.name])]
        agreed = len(converged) + len(self.components) - len(self._live())
        if (
            converged
            and reading.step > self.t_grace
            and agreed >= cast(float, self.config.quorum) * len(self.components)
        ):
            self._freeze(converged, values)

    def _record(self, reading: Reading) -> dict[str, float]:
        values = reading.values()
        nothing = all(value == 0 or math.isnan(value) for value in values.values())
        for component in self.components:
            if values.get(component.name) == 0 and not self._zero_counts(component, reading.step, nothing):
                values[component.name] = math.nan
        self.history.record(reading.step, {c.name: values[c.name] for c in self._live() if c.name in values})
        return values

    def _zero_counts(self, component: Component, step: int, nothing: bool) -> bool:
        """Whether a statistic of exactly 0 is a value (see `Monitor`); `nothing`: no component has another one."""
        monitor = self.monitors[component.monitor]
        if not monitor.zero_is_a_value:
            return False
        if not nothing and not any(abs(value) > 0 for value in self.history.values[component.name]):
            return True  # it takes part, and never has had a gradient
        # A gradient that stays the same changes by 0. This asks the device, but hardly ever; where the gradient is not
        # whole or gone by now, the answer is no.
        known = monitor.sampler is None and not self.ranks.sharded and step == self.t
        return known and any(p.grad is not None and bool(p.grad.any()) for p in component.measured)

    def _new_criterion(self) -> Criterion:
        by_name = {component.name: component for component in self.components}
        return make_criterion(self.config, self.total_steps, lambda name: cast(float, by_name[name].tau))

    def _watch_warm_up(self) -> None:
        """Let a criterion that compares with the past begin anew where the learning rate is higher than ever before."""
        if not self.criterion.relative:
            return
        groups = [group for optimizer in self.freezer.optimizers for group in optimizer.param_groups]
        if not groups:
            return
        rate = max(float(group["lr"]) for group in groups)
        if self._learning_rate is not None and rate > self._learning_rate:
            for part in self.criterion.relative:
                part.forget()
        self._learning_rate = rate if self._learning_rate is None else max(rate, self._learning_rate)

    def _freeze(self, converged: Sequence[Component], values: Mapping[str, float]) -> None:
        for component in converged:
            component.frozen_at = self.t
            self.history.record_freeze(self.t, component, values[component.name])
            self.freezer.freeze(component.parameters)
            self.monitors[component.monitor].forget(component.measured)
        self.criterion.forget([component.name for component in converged])
        if self.prefix is not None:
            self.prefix.update(self.t)
        if self.batches.due(self._progress):
            self._settle()
        logger.info(
            "GradES step %d: froze %d (%s); %d of %d components are frozen.",
            self.t,
            len(converged),
            kinds(converged),
            len(self.history.events),
            len(self.components),
        )
        delay = int(self.config.delay_transfer)
        if len(converged) == len(self.components) > 1 and self.t <= self.t_grace + self.config.check_every + delay:
            has_tau = self.config.tau is not None
            logger.warning(
                "GradES: every component %s at the first check that could freeze it (step %d), so this run "
                "ends like one that is simply stopped there. %s",
                "was below tau" if has_tau else "froze",
                self.t,
                "tau is probably too large for this model." if has_tau else "Lower alpha to freeze each in its time.",
            )

    def _settle(self) -> None:
        """Whatever is frozen requires no gradient from the next forward pass on."""
        self.freezer.settle()
        if self.prefix is not None:
            self.prefix.cut()
        if self.merger is not None:
            self.merger.merge(component for component in self.components if component.frozen_at is not None)
        self.ranks.changed()


def _stack(norms: list[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape as one in float64 on `device`, in order; one copy from each other device."""
    for other in {norm.device for norm in norms} - {device}:
        indices = [index for index, norm in enumerate(norms) if norm.device == other]
        moved = torch.stack([norms[index] for index in indices]).to(device, non_blocking=True)
        for index, norm in zip(indices, moved.unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms).double()
