"""May GradES without a tau be trusted? It and other ways of spending less, judged on the same training runs.

    python -m benchmarks.race --model DIR --data-dir DIR
    python -m benchmarks.race --model DIR --data-dir DIR --only SmolLM2 --seeds 10

DIR of --model holds stories260k (a Llama of 260,032 parameters), that of --data-dir the benchmarks as
`<task>/train.jsonl.gz` and `validation.jsonl.gz`, and `digits/*.parquet`. One run of each setting of
`benchmarks/race_tasks.py` and each seed goes through all of its steps, with the library's engine at work. When the
engine ends it, the weights it returns are kept for the test, and the run goes on as if it had not ended: nothing was
frozen before. The other arms that only end a run are read off the same run; a shorter schedule, and on stories260k the
two arms with a threshold, have runs of their own. The settings of SmolLM2-135M take hours, so they only run where
--only names them. `race.jsonl` holds what has ended, and the next call does what is left; `race.json` is written anew
after each run. The page of it is made by `python -m benchmarks.page`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import RESULTS, commit, say, write
from benchmarks.race_tasks import REAL, SETTINGS, SMOLLM2, Places, Rows, Setting, first, losses, make, number_of
from grades_hf import GradES, GradESConfig
from grades_hf.criteria import Rise, smoothing
from grades_hf.ending import Average, Ending
from grades_hf.parallel.ranks import Ranks
from recipes.pypi import locate_model

STOPS = (0.3, 0.5, 0.7)  # parts of the run after which the arms `stop` end
SHORT = 0.5  # the part of the steps that the shorter schedule has
VALIDATIONS, MIN_DELTA, PATIENCE = 20, 0.0005, 3  # early stopping, as in the paper
OLD_RISE = 1.5  # at which half of the components ended a run in grades-hf 0.1
FORWARD = 1 / 3  # what a forward pass costs of a training step with as many rows
TARGET, ALPHA, NO_TAU = 0.7, 0.5, 1e-30  # the compute that thresholds are chosen for, and their grace ratio
CALIBRATION = 9  # the seed of the runs that thresholds are chosen on

Weights = list[Tensor]


@dataclass(frozen=True)
class Job:
    """One training run and what is read off it, or the runs of the arms with a threshold.

    Attributes:
        taus: For the arms with a threshold: those of `thresholds`. Empty for all others.
    """

    places: Places
    setting: str
    seed: int
    taus: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, Any]:
        kind = "thresholds" if self.seed == CALIBRATION else "threshold" if self.taus else "run"
        return {"setting": self.setting, "seed": self.seed, "kind": kind}


def main(arguments: list[str] | None = None) -> Path:
    options = _options(arguments)
    places = Places(options.model, options.data_dir)
    chosen = _chosen(options.only)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "race.jsonl"
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    options.model = options.data_dir = "DIR"  # no path of this machine
    started, now = time.monotonic(), commit()
    with multiprocessing.get_context("spawn").Pool(options.processes, _quiet) as pool, log.open("a") as file:

        def do(jobs: list[Job]) -> None:
            left = [job for job in jobs if job.key not in [entry["key"] for entry in done]]
            for number, entry in enumerate(pool.imap_unordered(run, left), start=1):
                entry["commit"] = now
                file.write(json.dumps(entry) + "\n")
                file.flush()
                done.append(entry)
                _write(done, options)
                what = ", ".join(map(str, entry["key"].values()))
                say(f"[{number}/{len(left)}, {time.monotonic() - started:.0f} s] {what}")

        do([Job(places, setting, seed) for seed in options.seeds for setting in chosen])
        with_taus = [setting for setting in chosen if SETTINGS[setting].tau]
        do([Job(places, setting, CALIBRATION) for setting in with_taus])
        taus = {entry["key"]["setting"]: entry for entry in done if entry["key"]["kind"] == "thresholds"}
        do([Job(places, name, seed, taus[name]["taus"]) for seed in options.seeds for name in with_taus])
    return _write(done, options)


def _chosen(only: list[str] | None) -> list[str]:
    """The settings that an option names, by default the small ones; without those whose model cannot be had."""
    large = [name for name, setting in SETTINGS.items() if setting.family == REAL]
    if only is None:
        return [name for name in SETTINGS if name not in large]
    chosen = [name for name in SETTINGS if any(part in name for part in only)]
    if set(chosen) & set(large):
        try:
            locate_model(SMOLLM2)
        except (ValueError, RuntimeError) as error:
            say(f"Without SmolLM2-135M, which is not to be had: {error}")
            chosen = [name for name in chosen if name not in large]
    return chosen


def _write(entries: list[dict[str, Any]], options: argparse.Namespace) -> Path:
    """race.json: one dict for each setting, seed and arm, and the runs that they come from."""
    results = [{**entry["key"], **row} for entry in entries for row in entry.get("arms", [])]
    runs = [{"key": e["key"], "seconds": e["seconds"], "commit": e["commit"], "looks": e.get("looks")} for e in entries]
    order = list(SETTINGS)
    results.sort(key=lambda row: (order.index(row["setting"]), row["seed"], row["kind"]))
    runs.sort(key=lambda entry: (order.index(entry["key"]["setting"]), entry["key"]["seed"], entry["key"]["kind"]))
    return write("race", {"arms": results, "runs": runs}, options, "grades")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="the folder of stories260k")
    parser.add_argument("--data-dir", required=True, help="the folder of the benchmarks and the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--only", nargs="+", help="parts of the names of settings; default: all but SmolLM2's")
    parser.add_argument("--processes", type=int, default=2, help="at a time, of one thread each")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if CALIBRATION in options.seeds:
        parser.error(f"--seeds: {CALIBRATION} is the seed that thresholds are chosen on")
    return options


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run(job: Job) -> dict[str, Any]:
    """What one job gives: rows of the results under `arms`, and its time."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        if job.seed == CALIBRATION:
            found: dict[str, Any] = {"taus": thresholds(job)}
        elif job.taus:
            found = {"arms": [with_threshold(job), with_peer(job)]}
        else:
            found = Race(job).run()
    return {"key": job.key, **found, "seconds": round(time.perf_counter() - started, 1)}


# --- the run that nearly all arms are read off -----------------------------------------------------------------------


class HeldRows:
    """The held-out rows as a function from the model to their losses; it counts how often they are asked for."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.passes = rows, 0

    def __call__(self, model: nn.Module) -> Tensor:
        self.passes += 1
        return losses(model, self.rows)[0]

    def cost(self, batch: int) -> float:
        """Of all passes so far, in training steps."""
        return self.passes * number_of(self.rows) * FORWARD / batch


class Loop:
    """A training loop: AdamW, gradients clipped to a norm of 1."""

    def __init__(self, job: Job, part: float = 1.0) -> None:
        self.setting: Setting = SETTINGS[job.setting]
        self.task = make(self.setting, job.seed, job.places)
        self.model = self.task.model
        self.steps = round(self.setting.steps * part)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=self.setting.rate, weight_decay=0.0)
        self.batches = self.task.batches(self.setting.batch)

    def backward(self, step: int) -> Tensor:
        """The gradients of a step (1-based), not clipped yet; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate_at(step, self.steps)
        loss: Tensor = self.model(**next(self.batches)).loss
        loss.backward()
        return loss.detach()

    def clip(self) -> None:
        clip_grad_norm_([p for p in self.trained if p.grad is not None], 1.0)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, step: int) -> float:
        """How often each row has been seen before a step."""
        return (step - 1) * self.setting.batch / self.setting.rows

    def weights(self) -> Weights:
        return [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def install(self, weights: Weights) -> None:
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)


class Race(Loop):
    """One run to its end, and what each arm would have returned of it."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.job = job
        self.looks = HeldRows(first(self.task.held, self.setting.looks))
        self.engine = GradES(
            self.model, GradESConfig(), total_steps=self.steps, optimizer=self.optimizer, held_out=self.looks
        )
        self.schedule = ScheduleAlone(self.engine, HeldRows(self.looks.rows))
        self.vote = OldVote(self.engine)
        self.early = {
            "es": EarlyStopping(number_of(self.task.held)),
            "es, rows of a look": EarlyStopping(number_of(self.looks.rows)),
        }
        self.kept: dict[str, tuple[Weights, dict[str, Any]]] = {}  # arm -> what it returns, and what that took

    def run(self) -> dict[str, Any]:
        for step in range(1, self.steps + 1):
            loss = self.backward(step)
            self._watch(step, loss)
            self.clip()
            if not self.engine.done:
                self._step_of_the_engine(step)
            self.update()
            self._after(step)
        return {"arms": self._test(), "looks": self.found}

    def keep(self, arm: str, weights: Weights, end: float, extra: float = 0.0, looks: int = 0) -> None:
        """An arm returns these weights after so many steps, and as much compute as `extra` steps besides."""
        took = {"end": end / self.setting.steps, "compute": (end + extra) / self.setting.steps, "looks": looks}
        self.kept.setdefault(arm, (weights, took))

    def _step_of_the_engine(self, step: int) -> None:
        before = Snapshot(self.trained, self.optimizer)
        self.engine.step(epoch=self.epoch(step))
        if self.engine.done or step == self.steps:
            self.found = self.engine.ending.looks  # type: ignore[union-attr]
            self.cost = self.looks.cost(self.setting.batch)
        if self.engine.done:
            self.keep("default", self.weights(), step, self.cost, len(self.found))
            self.keep("look, last weights", before.weights, step, self.cost, len(self.found))
            self.engine.close()
            before.restore()

    def _watch(self, step: int, loss: Tensor) -> None:
        """Rules that see the gradients of a step before its update."""
        self.schedule.step(step, self.epoch(step))
        if self.schedule.ended and "schedule alone" not in self.kept:
            average, cost = self.schedule.returned(self.weights), self.schedule.held.cost(self.setting.batch)
            self.keep("schedule alone", average, step, cost, len(self.schedule.ending.looks))
        if self.vote.step(loss, self.setting.rate_at(step, self.steps)) and "old default" not in self.kept:
            self.keep("old default", self.weights(), step)
            self.keep("average, no look", self.schedule.returned(self.weights), step)

    def _after(self, step: int) -> None:
        """Rules that see the weights of a step after its update."""
        for part in STOPS:
            if step >= part * self.steps:
                self.keep(f"stop at {part:g}", self.weights(), step)
        waiting = {arm: rule for arm, rule in self.early.items() if arm not in self.kept}
        if waiting and step % max(1, self.steps // VALIDATIONS) == 0:
            found = losses(self.model, first(self.task.held, max(rule.rows for rule in waiting.values())))[0]
            for arm, rule in waiting.items():
                if rule.validate(found, self.weights):
                    self.keep(arm, rule.best, step, rule.cost(self.setting.batch))

    def _test(self) -> list[dict[str, Any]]:
        final, steps, batch = self.weights(), self.steps, self.setting.batch
        if not self.engine.done:
            self.engine.close()
        for arm, rule in self.early.items():
            self.keep(arm, rule.best, steps, rule.cost(batch))
        for arm in ("default", "look, last weights"):
            self.keep(arm, final, steps, self.cost, len(self.found))
        self.keep("schedule alone", final, steps, self.schedule.held.cost(batch), len(self.schedule.ending.looks))
        for arm in ("full", "old default", "average, no look"):
            self.keep(arm, final, steps)
        short = Loop(self.job, SHORT)
        for step in range(1, short.steps + 1):
            short.backward(step)
            short.clip()
            short.update()
        self.keep("short", short.weights(), short.steps)
        full, _ = whole = self._losses(final)
        rows = []
        for arm, (weights, took) in self.kept.items():
            each, right = whole if weights is final else self._losses(weights)
            row = {"arm": arm, "loss": float(each.mean()), **took}
            row["error"] = float((each - full).std()) / math.sqrt(len(each))  # of the difference, over test rows
            rows.append(row if right is None else {**row, "accuracy": float(right.mean())})
        return rows

    def _losses(self, weights: Weights) -> tuple[Tensor, Tensor | None]:
        self.install(weights)
        return losses(self.model, self.task.test)


class Snapshot:
    """Weights, gradients and the optimizer's state, to be put back after an engine has ended a run."""

    def __init__(self, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._trained, self._optimizer = trained, optimizer
        self.weights = [p.detach().clone() for p in trained]
        self._gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        self._states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in trained]

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, weight, gradient, state in zip(
            self._trained, self.weights, self._gradients, self._states, strict=True
        ):
            parameter.copy_(weight)
            parameter.grad = gradient
            self._optimizer.state[parameter] = state


class ScheduleAlone:
    """The library's own looks and average where the gradients never propose; it has what those ask of an engine."""

    def __init__(self, engine: GradES, held: HeldRows) -> None:
        self.model, self.total_steps, self.t = engine.model, engine.total_steps, 0
        self.config = GradESConfig(return_weights="last")  # so that the end changes no weights
        self.ranks, self.history = Ranks(engine.model), SimpleNamespace(looks=[])
        self.criterion, self.learned = SimpleNamespace(level=math.inf), torch.ones(1)
        self.freezer = SimpleNamespace(freeze=lambda parameters: None, settle=lambda: None)
        self.held, self.ended = held, False
        self.average, self.ending = Average(engine.extension("average").horizon), Ending(held)
        self._undo = ExitStack()
        for extension in (self.average, self.ending):
            extension.attach(self, self._undo)  # type: ignore[arg-type]

    def extension(self, name: str) -> Any:
        return self.average

    def step(self, step: int, epoch: float) -> None:
        self.t = step
        at = SimpleNamespace(t=step, epoch=epoch)
        self.average.before_check(at)  # type: ignore[arg-type]
        self.ending.before_check(at)  # type: ignore[arg-type]
        if not self.ended:
            self.ending.consider(0)

    def end(self, why: str) -> None:
        self.ended = True

    def returned(self, weights: Callable[[], Weights]) -> Weights:
        """The average, in copies that `weights` makes."""
        with self.average.installed():
            return weights()


class OldVote:
    """The rule of grades-hf 0.1: half of the components have risen to 1.5 times their minimum."""

    def __init__(self, engine: GradES) -> None:
        self._measured = [component.measured for component in engine.components]
        self.criterion = Rise(len(self._measured), OLD_RISE, smoothing(engine.total_steps, 1))
        self._rate: float | None = None

    @torch.no_grad()
    def step(self, loss: Tensor, rate: float) -> bool:
        """Whether the vote is there, from the gradients as they are before clipping."""
        if self._rate is not None and rate > self._rate:
            self.criterion.forget()
        self._rate = rate if self._rate is None else max(rate, self._rate)
        norms = [[p.grad.abs().sum() for p in several if p.grad is not None] for several in self._measured]
        values = torch.stack([torch.stack(each).sum() if each else torch.tensor(math.nan) for each in norms])
        places = torch.arange(len(norms))
        votes = self.criterion.update(places, 0, values.double() / loss if loss > 0 else values.double() * math.nan)
        return int(votes.sum()) >= len(norms) / 2


class EarlyStopping:
    """Validation every 5 % of the steps; the third in a row without progress of 0.0005 ends it; best weights.

    Args:
        rows: Of how many held-out rows, the first ones.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.best = rows, Weights()
        self._lowest, self._waiting, self._validations = math.inf, 0, 0

    def validate(self, held: Tensor, weights: Callable[[], Weights]) -> bool:
        """Whether the run ends, at these losses of at least as many held-out rows."""
        loss = float(held[: self.rows].mean())
        self._validations += 1
        self._waiting = 0 if loss < self._lowest - MIN_DELTA else self._waiting + 1
        if loss < self._lowest or not self.best:
            self._lowest, self.best = loss, weights()
        return self._waiting >= PATIENCE

    def cost(self, batch: int) -> float:
        """Of all validations so far, in training steps."""
        return self._validations * self.rows * FORWARD / batch


# --- arms with a threshold -------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say(f"{main()}; python -m benchmarks.page makes the tables and figures of it.")
