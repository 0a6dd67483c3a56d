"""GradES: find, measure, decide, freeze, record; one call per optimizer step, in any training loop."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, proxy, ref

import torch
from torch import Tensor, nn

from . import joining, state, words
from .assembly import assemble
from .checks import checked_scalar, checked_total_steps
from .config import GradESConfig, make_config
from .contracts import Check, Step
from .ending import HeldOut
from .find.components import Component, kinds, release
from .hooks import hook
from .parallel.refusals import refuse_foreign
from .reading import Plan, measure, valid
from .record.savings import Savings
from .statistics import make_statistic

logger = logging.getLogger(__name__)

# The engine of each model that has one; a hook on the model keeps it alive as long as the model lives.
_active: WeakKeyDictionary[nn.Module, ref[GradES]] = WeakKeyDictionary()


class GradES:
    """Gradient-based early stopping (Algorithm 1 of arXiv 2509.01842).

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

    A statistic of exactly 0 is no value where there was another one before, or where all components have it: the batch
    had nothing to teach this matrix (no labels, an idle expert whose gradient is filled with zeros). A matrix whose
    gradient has always been 0 while others learn has the value 0, so that it freezes. So has one whose gradient stays
    the same, for a statistic of its change.

    Args:
        model: The model that is trained; what is trainable now, or becomes so later, can be frozen.
        config: The options, as a `GradESConfig` or a dict of its fields.
        total_steps: The planned number T of optimizer steps, 1 or more; the grace period is a part of it.
        optimizer: The optimizer (or accelerate's wrapper), whose state for frozen parameters is dropped; or a list of
            several.
        scaler: The `torch.amp.GradScaler` of a loop in float16, default None; accelerate's is found by itself. Call
            `step()` before `scaler.step(optimizer)`: it unscales the gradients if clipping has not done it. A step
            that the scaler skips yields no values.
        held_out: Held-out rows for the looks of a run without a tau: a Dataset or DataLoader whose rows the model takes
            as keyword arguments, or a function from the model to the losses of the rows, a tensor of shape (rows,).

    Attributes:
        components: All that is tracked, in the order of the model's modules.
        frozen: Component name -> the optimizer step (1-based) at which it froze, in the order of freezing.
        joined: Names of the components that have become trainable in the course of the run.
        took_part: Which components have ever had a gradient; only those count.
        history: Events and measured values.
        t: Optimizer steps seen.
        t_grace: ceil(alpha * T); components may freeze at steps after it.
        ended: Why training should end before T, in a sentence; None as long as it goes on.

    Raises:
        ValueError: an option that does not fit the model, nothing to track, or no held-out rows without a tau; before
            anything is changed.
        RuntimeError: a way of training in several processes that is not supported (`parallel/refusals.py`).
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradESConfig | Mapping[str, Any],
        *,
        total_steps: int,
        optimizer: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.total_steps = checked_total_steps(total_steps)
        refuse_foreign(model)
        GradES.release(model)
        self.model = model
        self.t = 0
        self.frozen: dict[str, int] = {}
        self.joined: list[str] = []
        self._absent: dict[str, Any] = {}  # what a checkpoint knows of components that have not joined yet
        self.ended: str | None = None
        parts = assemble(model, make_config(config).resolved(), self.total_steps, optimizer, scaler, held_out)
        self.config, self.t_grace, self.traits = parts.config, parts.t_grace, parts.traits
        self.components, self.statistics, self.criterion = parts.components, parts.statistics, parts.criterion
        self.optimizers, self.freezer, self.ranks, self.history = (
            parts.optimizers, parts.freezer, parts.ranks, parts.history,
        )  # fmt: skip
        self.extensions, self.ending, self.meter = parts.extensions, parts.ending, parts.meter
        self.learned = torch.zeros(len(self.components), dtype=torch.bool)  # who ever had a value other than 0
        self.took_part = torch.zeros(len(self.components), dtype=torch.bool)  # who ever had a gradient
        self._place = {component.name: place for place, component in enumerate(self.components)}
        self._live: list[Component] | None = None
        self._plan: Plan | None = None
        self._open: Check | None = None  # a check that is not decided upon yet
        self._resumed = False
        self._remembers = True  # whether tensors of the last step in a checkpoint are of this statistic
        self._told_idle = False
        with ExitStack() as undo:  # a refusal undoes what was attached before
            for extension in self.extensions:
                extension.attach(self, undo)
            undo.callback(hook(model, "state_dict_pre", self._nothing, keep=self))
            self._undo: ExitStack | None = undo.pop_all()
        _active[model] = ref(self)
        logger.info(words.describe(self))
        words.warn_if_nothing_can_happen(self)

    # --- Algorithm 1 -----------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None, *, epoch: float | None = None) -> None:
        """Check and freeze; call between `backward` (and clipping) and `optimizer.step()`, once per optimizer step.

        Args:
            loss: The trained loss of the step, a number or a 0-d tensor, where the statistic is divided by it. Default:
                what `backward` was called on since the last step, added up.
            epoch: How often each row has been seen before this step: 1.0 after the first pass over the data. Below 1
                no look is proposed. Default None: not known, and looks may be proposed from the start.

        Raises:
            RuntimeError: the engine is closed, by `close()` or by another one for the same model; or the statistic
                needs the loss, and there is none; or the model's parameters have been replaced; or it is a micro-batch
                at which accelerate's optimizer makes no update.
            ValueError: `loss` or `epoch` is no number, or the ranks have different options.
        """
        self._refuse_closed()
        loss, epoch = checked_scalar("loss", loss), checked_scalar("epoch", epoch)
        self.t += 1
        step = Step(self.t, None if loss is None else torch.as_tensor(loss), None if epoch is None else float(epoch))
        words.warn_after_resume(self)
        self.reassert()
        self._decide()  # upon a check that was left open (delay_transfer)
        for extension in self.extensions:
            extension.before_check(step)
        if self.t % self.config.check_every == 0:
            values = self.ranks.agree(measure(self, step))  # G_W(t) of all W not in F
            self._open = Check(self.t, self.plan.names, values)
            if not self.config.delay_transfer:
                self._decide()
        self._remember(step)
        words.tell_idle(self)
        for extension in self.extensions:
            extension.on_step_end(step)

    def _decide(self) -> None:
        if self._open is None or self.ended is not None:
            return
        check, self._open = self._open, None
        components, places, values = valid(self, check)
        verdicts = self.criterion.update(places, check.step, values)  # G_W(t) < tau_W
        if check.step <= self.t_grace:
            return
        if self.ending is not None:
            self.ending.consider(int(verdicts.sum()))
        elif verdicts.any():
            self._freeze([components[i] for i in verdicts.nonzero().flatten().tolist()], values[verdicts])

    def _freeze(self, converged: Sequence[Component], values: Tensor) -> None:
        self._mark(dict.fromkeys((component.name for component in converged), self.t))  # F <- F + {W}
        self.freezer.freeze(parameter for component in converged for parameter in component.parameters)
        for statistic in self.statistics.values():
            statistic.forget(p for c in converged if c.monitor == statistic.name for p in c.measured)
        self.criterion.forget(torch.tensor([self._place[component.name] for component in converged]))
        for extension in self.extensions:
            extension.on_freeze(converged, values)
        self._settle()
        if self.progress >= 1:
            self.end(f"the run ends at step {self.t} of {self.total_steps}: {self.conclude()}")
        logger.info(
            "GradES step %d: froze %d (%s); %d of %s are frozen.",
            self.t, len(converged), kinds(converged), len(self.frozen), words.counted(self),
        )  # fmt: skip
        earliest = self.t_grace + self.config.check_every + int(self.config.delay_transfer)
        if len(converged) == int(self.took_part.sum()) > 1 and self.t <= earliest:
            logger.warning(
                "GradES: every component was below tau at the first check that could freeze it (step %d), so this run "
                "ends like one that is simply stopped there. tau is probably too large for this model.",
                self.t,
            )

    # ---------------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> list[Component]:
        """The components that are not frozen."""
        if self._live is None:
            self._live = [component for component in self.components if component.name not in self.frozen]
        return self._live

    @property
    def plan(self) -> Plan:
        """What a check has to know of the components that are live now."""
        if self._plan is None or self._plan.components is not self.live:
            self._plan = Plan(self)
        return self._plan

    @property
    def frozen_fraction(self) -> float:
        """The part of the components that take part in training that is frozen, 0 to 1."""
        return len(self.frozen) / max(1, int(self.took_part.sum()))

    @property
    def progress(self) -> float:
        """How much of what has to freeze before training ends is frozen, 0 to 1."""
        return min(1.0, self.frozen_fraction / self.config.max_frozen_fraction)

    @property
    def done(self) -> bool:
        """Whether training should end after this step."""
        return self.ended is not None

    def join(self, parameters: Sequence[Tensor]) -> None:
        """Track what these tensors make up, which are trained from now on; see `grades_hf.joining`."""
        joining.join(self, parameters)

    def end(self, why: str) -> None:
        """Training should end after this step; one line says so."""
        self.ended = why
        if self.ranks.rank == 0:
            logger.warning("GradES: %s", why)

    def extension(self, name: str) -> Any:
        """The extension of that name (see `assembly.py`); None where this run has none."""
        return next((extension for extension in self.extensions if extension.name == name), None)

    def reassert(self) -> None:
        """Freeze again what something else (PEFT's `disable_adapter()`) has unfrozen since the last step."""
        for extension in self.extensions:
            extension.reassert()

    def log(self, loss: float | None = None) -> None:
        """Add a row to `history.logs` (time, components frozen, compute saved); call where the loop logs its loss."""
        row: dict[str, float] = {"step": self.t, "frozen": len(self.frozen)}
        if loss is not None:
            row["loss"] = float(loss)
        if self.ending is not None:
            row["votes"] = self.ending.share
        if self.meter.measured:
            row["compute_saved"] = self.savings().fraction
            self.history.shares = self.history.shares or self.meter.shares()
        self.extension("history").log(row)

    def flush(self) -> None:
        """Complete the history: nothing freezes any more. The check that `delay_transfer` has left open is added."""
        if self._open is not None:
            check, self._open = self._open, None
            valid(self, check)
        over = "converged" if self.ending is None else "look"
        self.history.ended = over if self.done else "completed" if self.t >= self.total_steps else "stopped"
        if self.meter.measured:
            self.history.savings = dataclasses.asdict(self.savings())

    def close(self) -> None:
        """End the run: `requires_grad` is as it was before (unless `keep_frozen`), everything kept is freed.

        The engine stays readable, and keeps neither model nor optimizer alive: `model` is a weak proxy, and the
        components' `parameters` are there as long as the model is.
        """
        if self._undo is None:
            return
        self.flush()
        words.tell_whole(self)
        undo, self._undo = self._undo, None
        for statistic in self.statistics.values():
            statistic.forget(list(statistic.previous))
        if self.frozen and not self.config.keep_frozen:
            self.ranks.on_grad_pattern()
        undo.close()
        if (active := _active.get(self.model)) is not None and active() is self:
            del _active[self.model]
        self._plan = None
        release(self.components, self.model)
        self.statistics = {name: make_statistic(name) for name in self.statistics}
        self.optimizers = []
        self.model = proxy(self.model)  # type: ignore[assignment]

    @staticmethod
    def release(model: nn.Module) -> None:
        """End whatever engine still holds `model` (its run was interrupted), so that it is trainable as before."""
        found = _active.get(model)
        engine = None if found is None else found()
        if engine is not None:
            engine.close()

    def savings(self) -> Savings:
        """What the steps so far have cost in FLOPs, and what freezing has saved of them; also after `close`.

        Raises:
            RuntimeError: it is not measured: no step so far, a compiled model (torch.compile), or a checkpoint without
                counts; the message says which.
        """
        return self.meter.savings(self.total_steps)

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """All that a resumed run needs to go on as if it had not been interrupted; see `grades_hf.state`.

        Args:
            tensors: Whether the tensors come along; without them the dict holds JSON types only.
        """
        return state.save(self, tensors=tensors)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`: freezes what was frozen; call after model and optimizer were restored.

        Where options or `total_steps` are others than those of the state, the new ones hold from here on and a warning
        names them: what is frozen stays frozen, patience starts to count anew, and with another statistic the record
        begins anew, too.

        Raises:
            ValueError: the state does not fit the model; nothing has been changed then.
        """
        state.load(self, saved)

    def conclude(self) -> str:
        """What came of it, in one line."""
        return words.conclude(self) if self.ending is None else self.ending.conclude()

    def tensors(self) -> dict[str, dict[Tensor, Tensor]]:
        """The tensors that a checkpoint has to hold: kind -> parameter -> a tensor of its size, or a sample of it."""
        found = {x.name: x.tensors() for x in self.extensions}
        found["previous"] = {p: tensor for s in self.statistics.values() for p, tensor in s.previous.items()}
        return {kind: tensors for kind, tensors in found.items() if tensors}

    def load_tensors(self, found: Mapping[str, Mapping[Tensor, Tensor]]) -> None:
        """Take back what `tensors` gave; call after `load_state_dict`."""
        for extension in self.extensions:
            extension.load_tensors(found.get(extension.name, {}))
        for component in self.live if self._remembers else ():
            statistic = self.statistics[component.monitor]
            if statistic.two_steps:
                own = found.get("previous", {})
                statistic.previous |= {p: own[p] for p in component.measured if p in own}

    def kept(self) -> dict[str, list[Tensor]]:
        """The parameters that `tensors` may hold something for, in an order that is the same on all ranks."""
        two_steps = [c for c in self.live if self.statistics[c.monitor].two_steps and self._remembers]
        averaged = [] if self.ending is None else self.extension("average").parameters
        return {"previous": [p for c in two_steps for p in c.measured], "average": averaged}

    def _remember(self, step: Step) -> None:
        due = (self.t + 1) % self.config.check_every == 0 and not self.done and not step.skipped
        for name, statistic in self.statistics.items():
            if step.skipped:
                statistic.forget(list(statistic.previous))
            else:
                statistic.remember(self.plan.parameters[name] if due else [])

    # --- parts -----------------------------------------------------------------------------------------------------

    def _mark(self, frozen: Mapping[str, int]) -> None:
        """Components are frozen from these steps on."""
        self.frozen |= frozen
        for name, step in frozen.items():
            self.components[self._place[name]].frozen_at = step
            self.took_part[self._place[name]] = True
        self._live = None

    def _settle(self) -> None:
        """Whatever is frozen requires no gradient from the next forward pass on, if now is a good moment."""
        if self.freezer.due is not None and not self.freezer.due(self.progress):
            return
        self.freezer.settle()
        for extension in self.extensions:
            extension.on_grad_pattern()

    def _nothing(self, *_: Any) -> None:
        """The hook that keeps this engine alive as long as its model."""

    def _refuse_closed(self) -> None:
        if self._undo is None:
            raise RuntimeError(
                "this engine is closed: another run has begun for its model, or with its callback. Two runs at a time "
                "need a model and a GradESCallback each."
            )
