"""The arms of the race with a threshold: the paper's method and the PyPI package `grades`, on runs of their own."""

from __future__ import annotations

import math
import statistics
import tempfile
from types import SimpleNamespace
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from benchmarks.race_loop import Job, Loop
from benchmarks.race_tasks import losses
from grades_hf import GradES, GradESConfig

TARGET, ALPHA, NO_TAU = 0.7, 0.5, 1e-30  # the compute that thresholds are chosen for, and their grace ratio


def thresholds(job: Job) -> dict[str, Any]:
    """tau for this package and for `grades`, chosen on runs that freeze nothing."""
    found: dict[str, Any] = {}
    for name, monitor in (("tau", "auto"), ("peer", "weight_change")):
        loop = Loop(job)
        config = GradESConfig(tau=NO_TAU, alpha=ALPHA, monitor=monitor)
        engine = GradES(loop.model, config, total_steps=loop.steps, optimizer=loop.optimizer)
        for step in range(1, loop.steps + 1):
            loop.backward(step)
            loop.clip()
            engine.step()
            loop.update()
        values = {c.name: [float(v) for v in engine.history.values[c.name]] for c in engine.components}
        late = {c: [v for v in own[engine.t_grace :] if math.isfinite(v)] for c, own in values.items()}
        # One level for each projection (q, k, up, ...); `grades` has a single one.
        groups = {c: "all" if name == "peer" else c.rsplit(".", 1)[-1] for c in late}
        levels = {g: statistics.median(v for c in late if groups[c] == g for v in late[c]) for g in groups.values()}
        scale = choose({c: [v / levels[groups[c]] for v in late[c]] for c in late}, engine.total_steps)
        engine.close()
        taus = {c: scale * levels[groups[c]] for c in late}
        found[name] = next(iter(taus.values())) if name == "peer" else taus
    return found


def choose(late: dict[str, list[float]], steps: int) -> float:
    """The smallest threshold with which a run would have used at most TARGET of its compute.

    Args:
        late: The values of each component after the grace period.
        steps: Of the whole run. A third of a step is the weight gradients, each component's as large as another's.
    """
    for tau in sorted({v for values in late.values() for v in values}):
        ends = [next((i for i, v in enumerate(own, 1) if v <= tau), len(own)) for own in late.values()]
        end, grace = max(ends), steps - len(next(iter(late.values())))
        saved = sum(end - each for each in ends) / len(ends) / 3
        if (grace + end - saved) / steps <= TARGET:
            return tau * (1 + 1e-9)
    raise ValueError(f"no threshold gives {TARGET} of the compute")


def with_threshold(job: Job) -> dict[str, Any]:
    """The paper's method."""
    loop = Loop(job)
    config = GradESConfig(tau=job.taus["tau"], alpha=ALPHA)
    engine = GradES(loop.model, config, total_steps=loop.steps, optimizer=loop.optimizer)
    counted = Counted(loop)
    for step in range(1, loop.steps + 1):
        counted.backward(step)
        loop.clip()
        engine.step()
        loop.update()
        if engine.done:
            break
    engine.close()
    return counted.row("threshold", step)


def with_peer(job: Job) -> dict[str, Any]:
    """The PyPI package `grades`, whose callback is called as Trainer would call it."""
    from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

    loop = Loop(job)
    control = SimpleNamespace(should_training_stop=False)
    with tempfile.TemporaryDirectory() as folder:
        config = GradEarlyStoppingConfig(tau=job.taus["peer"], alpha=ALPHA, output_dir=folder)
        callback, state = GradEarlyStoppingCallback(config), SimpleNamespace(global_step=0, max_steps=loop.steps)
        callback.on_train_begin(SimpleNamespace(output_dir=folder), state, control, model=loop.model)
        counted = Counted(loop)
        for step in range(1, loop.steps + 1):
            counted.backward(step)
            loop.clip()
            loop.update()
            state.global_step = step
            callback.on_step_end(None, state, control, model=loop.model)
            if control.should_training_stop:
                break
    return counted.row("peer", step)


class Counted:
    """Steps of a loop whose FLOPs are counted anew whenever another set of parameters is trained."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.total, self.full = loop, 0.0, 0.0
        self._known: dict[int, float] = {}

    def backward(self, step: int) -> None:
        trained = sum(p.numel() for p in self.loop.trained if p.requires_grad)
        if trained not in self._known:
            with FlopCounterMode(display=False) as counter:
                self.loop.backward(step)
            self._known[trained] = float(counter.get_total_flops())
        else:
            self.loop.backward(step)
        self.full = self.full or self._known[trained]
        self.total += self._known[trained]

    def row(self, arm: str, step: int) -> dict[str, Any]:
        each, _ = losses(self.loop.model, self.loop.task.test)
        compute = self.total / (self.full * self.loop.steps)
        return {"arm": arm, "loss": float(each.mean()), "end": step / self.loop.steps, "compute": compute, "looks": 0}
