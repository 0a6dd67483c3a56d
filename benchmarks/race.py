"""May GradES without a tau be trusted? It and other ways of spending less, judged on the same training runs.

    python -m benchmarks.race --model DIR --data-dir DIR
    python -m benchmarks.race --model DIR --data-dir DIR --only SmolLM2 --seeds 10 11

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
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.common import RESULTS, command, commit, say, write
from benchmarks.race_loop import CALIBRATION, HeldRows, Job, Loop, Weights
from benchmarks.race_rules import EarlyStopping, OldVote, ScheduleAlone, Snapshot
from benchmarks.race_tasks import REAL, SETTINGS, SMOLLM2, Places, first, losses, number_of
from benchmarks.race_thresholds import thresholds, with_peer, with_threshold
from grades_hf import GradES, GradESConfig
from recipes.pypi import locate_model

STOPS = (0.3, 0.5, 0.7)  # parts of the run after which the arms `stop` end
SHORT = 0.5  # the part of the steps that the shorter schedule has
VALIDATIONS = 20  # of early stopping, as in the paper


def main(arguments: list[str] | None = None) -> Path:
    options = _options(arguments)
    places = Places(options.model, options.data_dir)
    chosen = _chosen(options.only)
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "race.jsonl"
    done = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    options.model = options.data_dir = "DIR"  # no path of this machine
    started, made = time.monotonic(), {"commit": commit(), "command": command("race", options)}
    with multiprocessing.get_context("spawn").Pool(options.processes, _quiet) as pool, log.open("a") as file:

        def do(jobs: list[Job]) -> None:
            left = [job for job in jobs if job.key not in [entry["key"] for entry in done]]
            for number, entry in enumerate(pool.imap_unordered(run, left), start=1):
                entry |= made
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
    runs = [{name: entry.get(name) for name in ("key", "seconds", "commit", "command", "looks")} for entry in entries]
    order = list(SETTINGS)
    results.sort(key=lambda row: (order.index(row["setting"]), row["seed"], row["kind"]))
    runs.sort(key=lambda entry: (order.index(entry["key"]["setting"]), entry["key"]["seed"], entry["key"]["kind"]))
    return write("race", {"arms": results, "runs": runs}, options, "grades")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="the folder of stories260k")
    parser.add_argument("--data-dir", required=True, help="the folder of the benchmarks and the digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[15, 16, 17, 18, 19])
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


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    say(f"{main()}; python -m benchmarks.page makes the tables and figures of it.")
