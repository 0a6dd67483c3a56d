"""Which criterion to trust? Ways of spending less on a small model that overfits, saturates, or still learns.

    python -m benchmarks.race --model DIR --data-dir DIR

DIR of --model holds stories260k (a Llama of 260,032 parameters), that of --data-dir the benchmarks as
`<task>/train.jsonl.gz` and `validation.jsonl.gz`. Every run is one of Transformers' Trainer on packed text: 200 steps
of 8 sequences of 64 tokens, AdamW, cosine, gradients clipped to a norm of 1, all weights or LoRA. Quality is the mean
loss of 128 sequences of the validation splits, which nothing was chosen on. Writes `race.json`; the runs that have
ended stand in `race.jsonl` beside it, and the next call does what is left. The tables and figures of it are made by
`python -m benchmarks.page`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import logging
import multiprocessing
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments, set_seed

from benchmarks.arms import peer_callback
from benchmarks.common import RESULTS, say, write
from benchmarks.costs import costs
from benchmarks.flops import FlopCounterCallback, compute
from benchmarks.internals import Costs, FlopCounter, suggest
from grades_hf import GradES, GradESCallback, GradESConfig
from recipes.tasks.formats import TASKS
from recipes.tasks.rows import splits

STEPS, BATCH, LENGTH = 200, 8, 64
BASE_RATE = 1e-3  # with LoRA five times that
VALIDATION, TEST = 64, 128  # sequences
EVERY = STEPS // 20  # early stopping validates every 5 % of the steps, as in the paper
STOPS = (0.3, 0.5, 0.7)  # parts of the run after which the arms `stop` end
TARGET, ALPHA = 0.7, 0.5  # compute that the thresholds are chosen for, and their grace ratio

# What constants were settled on is no part of the race: other texts, 16 x 128 tokens a step, seeds 100 and 101.
TEXTS = ("arc_easy", "arc_challenge", "openbookqa", "winogrande")


@dataclass(frozen=True)
class Regime:
    """How many sequences there are to train on, and the learning rate of all weights."""

    sequences: int
    learning_rate: float


REGIMES = {
    "overfits": Regime(75, 1e-3),
    "saturates": Regime(200, 3e-4),
    "first epoch": Regime(STEPS * BATCH, 1e-3),
}

VOTE = {"quorum": 0.5, "max_frozen_fraction": 0.5}
# Name -> options of GradESCallback; the tau of `threshold` comes from a run of its own (see `thresholds`).
CANDIDATES: dict[str, dict[str, Any]] = {
    "default": {},
    "threshold": {"alpha": ALPHA},
    "budget": {"budget": 0.6},
    "one by one": {"criterion": "rise", "quorum": 0.0, "max_frozen_fraction": 1.0},
    "one by one, thaw": {"criterion": "rise", "quorum": 0.0, "max_frozen_fraction": 1.0, "thaw": 0.1},
    "gradient_norm": {"monitor": "gradient_norm", "rise": 0.25},
    "no_new_minimum": {"criterion": "no_new_minimum", "window": 0.2, **VOTE},
    "no_significant_fall": {"criterion": "no_significant_fall", "window": 0.3, **VOTE},
    "significant_rise": {"criterion": "significant_rise", "window": 0.3, **VOTE},
    "rise+significant_rise": {"criterion": "rise+significant_rise", "window": 0.3, "rise": 0.25, **VOTE},
    "relative_change": {"criterion": "rise", "monitor": "relative_change", "rise": 0.25, **VOTE},
    "signal_to_noise": {"criterion": "no_new_minimum", "monitor": "signal_to_noise", "window": 0.2, **VOTE},
    "evidence": {"criterion": "threshold", "monitor": "evidence", "tau": 1.0, "alpha": 0.1, **VOTE},
    "pflug": {"criterion": "pflug", **VOTE},
}
ARMS = ("none", "short", "peer", *CANDIDATES)
# With LoRA these take eight of 35 minutes.
OTHERS = tuple(CANDIDATES)[list(CANDIDATES).index("no_significant_fall") :]


@dataclass(frozen=True)
class Confounder:
    """Something other than overfitting that could move the statistic, in a first epoch."""

    batch: int = BATCH
    accumulation: int = 1
    length: int = LENGTH
    warmup: float = 0.0
    schedule: str = "cosine"
    clip: float = 1.0
    dropout: float = 0.0
    sequences: int | None = None
    factor: float = 1.0  # of the learning rate
    lora: bool = False
    clipped: bool = False  # the statistic after clipping, which the library undoes
    whole: bool = False  # that of A and B of a LoRA pair, where the library takes B alone


CONFOUNDERS = {
    "none of them": Confounder(),
    "warm-up over 20 % of the steps": Confounder(warmup=0.2),
    "constant learning rate": Confounder(schedule="constant"),
    "3 x the learning rate": Confounder(factor=3),
    "no clipping": Confounder(clip=0.0),
    "clipping to 0.3": Confounder(clip=0.3),
    "clipping to 0.3, not undone": Confounder(clip=0.3, clipped=True),
    "batch of 2": Confounder(batch=2),
    "batch of 32": Confounder(batch=32),
    "4 micro-batches of 2": Confounder(batch=2, accumulation=4),
    "16 tokens a sequence": Confounder(length=16),
    "attention dropout of 0.1": Confounder(dropout=0.1),
    "2 epochs of 800 sequences": Confounder(sequences=STEPS * BATCH // 2),
    "LoRA": Confounder(lora=True),
    "LoRA, with the gradient of A": Confounder(lora=True, whole=True),
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        regime: Of REGIMES; for the arm `confounder` one of CONFOUNDERS.
        arm: One of ARMS, `thresholds` or `confounder`.
        thresholds: For the arms that have a tau: the row of the run that it comes from.
    """

    model: str
    data: str
    regime: str
    lora: bool
    seed: int
    arm: str
    thresholds: dict[str, Any] | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {"regime": self.regime, "method": "lora" if self.lora else "full", "seed": self.seed, "arm": self.arm}


def main() -> None:
    options = _options()
    pack(options.model, options.data_dir, "train", LENGTH)  # bad arguments end it here
    options.output.mkdir(parents=True, exist_ok=True)
    log = options.output / "race.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    started = time.monotonic()
    place = {"model": options.model, "data": options.data_dir}
    kinds = [(regime, lora) for regime in REGIMES for lora in (False, True)]
    with multiprocessing.get_context("spawn").Pool(options.processes, _quiet) as pool, log.open("a") as file:

        def do(jobs: list[Job]) -> None:
            done = [{name: row[name] for name in ("regime", "method", "seed", "arm")} for row in rows]
            left = [job for job in jobs if job.key not in done]
            for number, row in enumerate(pool.imap_unordered(run, left), start=1):
                file.write(json.dumps(row) + "\n")
                file.flush()
                rows.append(row)
                what = ", ".join(str(row[name]) for name in ("regime", "method", "seed", "arm"))
                say(f"[{number}/{len(left)}, {time.monotonic() - started:.0f} s] {what}")

        # With a seed that the race does not have: its thresholds have not seen its runs.
        do([Job(**place, regime=regime, lora=lora, seed=0, arm="thresholds") for regime, lora in kinds])
        taus = {(row["regime"], row["method"]): row for row in rows if row["arm"] == "thresholds"}
        do(
            [
                Job(**place, regime=regime, lora=lora, seed=seed, arm=arm, thresholds=taus[regime, method])
                for seed in options.seeds
                for regime, lora in kinds
                for arm in ARMS
                if options.every_arm or not (lora and arm in OTHERS)
                for method in ("lora" if lora else "full",)
            ]
        )
        do([Job(**place, regime=name, lora=c.lora, seed=0, arm="confounder") for name, c in CONFOUNDERS.items()])
    options.model = options.data_dir = "DIR"  # no path of this machine
    path = write("race", rows, options, *(["grades"] if any(row["arm"] == "peer" for row in rows) else []))
    log.unlink()
    say(f"{path}; python -m benchmarks.page makes the tables and figures of it.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--processes", type=int, default=2, help="at a time, of one thread each")
    parser.add_argument("--every-arm", action="store_true", help=f"with LoRA also {', '.join(OTHERS)}")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device, options.shape = "cpu", "smollm2-135m"  # what `write` asks for
    return options


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()


def run(job: Job) -> dict[str, Any]:
    """One run, as a row of the results."""
    if job.arm == "confounder":
        return confound(job)
    regime = REGIMES[job.regime]
    setting = Confounder(sequences=regime.sequences, factor=regime.learning_rate / BASE_RATE, lora=job.lora)
    training, validation, test = sequences(job, setting)
    model = build(job, setting)
    if job.arm == "thresholds":
        return thresholds(job, setting, model, training)
    steps = round(STEPS * ALPHA) if job.arm == "short" else STEPS
    with tempfile.TemporaryDirectory() as folder:
        callbacks, grades, trace = _callbacks(job, model, validation, test, folder)
        started = time.perf_counter()
        trainer = make_trainer(job, setting, model, training, steps, callbacks, folder)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        seconds = time.perf_counter() - started
    row = {**job.key, "loss": loss(model, test), "steps": trainer.state.global_step, "seconds": round(seconds, 2)}
    if trace is not None:
        trace.finish()
        return {**row, "compute": 1.0, **trace.row}
    if grades is None:
        counted = compute(callbacks[0].meter, STEPS)  # type: ignore[attr-defined]
        return {**row, "compute": counted["used"] / counted["full"]}
    engine = grades.engine
    assert engine is not None
    frozen = sorted(engine.frozen.values())
    row |= {"compute": 1 - engine.savings().fraction_of_planned, "components": len(engine.components)}
    return {
        **row,
        "frozen": len(frozen),
        "first": frozen[0] if frozen else None,
        "last": frozen[-1] if frozen else None,
    }


def _callbacks(
    job: Job, model: nn.Module, validation: Tensor, test: Tensor, folder: str
) -> tuple[list[TrainerCallback], GradESCallback | None, Trace | None]:
    """Those of an arm, and which of them are GradES and the trace."""
    if job.arm == "none":
        watch = GradESCallback(quorum=1.0, alpha=0.9999)  # freezes nothing, sees what the default sees
        trace = Trace(model, validation, test, watch)
        return [watch, trace], None, trace
    if job.arm == "short":
        return [FlopCounterCallback()], None, None
    assert job.thresholds is not None
    if job.arm == "peer":
        peer = peer_callback(job.thresholds["peer_tau"], GradESConfig(tau=1, alpha=ALPHA), folder)
        return [FlopCounterCallback(), peer], None, None
    options = CANDIDATES[job.arm]
    grades = GradESCallback(**options, **({"tau": job.thresholds["tau"]} if job.arm == "threshold" else {}))
    return [grades], grades, None


class Trace(TrainerCallback):
    """What any stopping rule would have seen and got in a run with nothing frozen, and what the default watches.

    Attributes:
        row: `trace`: [step, validation loss, test loss] every 5 % of the steps. `validation`: the cost of one
            validation, in steps. `statistic`: for every step the mean over components of the smoothed statistic by its
            minimum so far, and the part of them that `rise` finds converged, None before there is a minimum.
    """

    def __init__(self, model: nn.Module, validation: Tensor, test: Tensor, watch: GradESCallback) -> None:
        self.model, self.validation, self.test, self.watch = model, validation, test, watch
        self.row: dict[str, Any] = {"trace": [], "statistic": []}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.watch.engine is not None
        self.row["statistic"].append(standing(self.watch.engine))
        if state.global_step % EVERY == 0:
            losses = [loss(self.model, rows) for rows in (self.validation, self.test)]
            self.row["trace"].append([state.global_step, *losses])

    def finish(self) -> None:
        """After training."""
        assert self.watch.engine is not None
        with FlopCounter() as counter:
            loss(self.model, self.validation)
        self.row["validation"] = counter.total / (self.watch.engine.savings().planned / STEPS)


def standing(engine: GradES) -> list[float] | None:
    """Mean of the smoothed statistic by its minimum, and the part of the components that have risen enough."""
    numbers = engine.criterion.memory.values()
    ratios = [total / weight / minimum for total, weight, minimum, _ in numbers if minimum > 0]
    if len(ratios) < len(engine.components):
        return None
    return [sum(ratios) / len(ratios), sum(r >= 1 + engine.config.rise for r in ratios) / len(ratios)]


def thresholds(job: Job, setting: Confounder, model: nn.Module, training: Tensor) -> dict[str, Any]:
    """tau for this package and for `grades`, as `grades-hf suggest` finds them in runs that freeze nothing."""
    found: dict[str, Any] = {}
    for name, by, monitor in (("tau", "projection", "auto"), ("peer_tau", "all", "weight_change")):
        grades = GradESCallback(tau=sys.float_info.min, alpha=ALPHA, monitor=monitor)
        model = build(job, setting)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            make_trainer(job, setting, model, training, STEPS, [grades], folder).train()
        engine = grades.engine
        assert engine is not None
        assert engine.meter is not None
        shares = costs(engine.meter, model)
        taus = suggest(engine.history, TARGET, costs=Costs(shares["weight_gradient"]), by=by).tau
        found[name] = taus[".*"] if by == "all" else taus
    return {**job.key, **found}


def confound(job: Job) -> dict[str, Any]:
    """How far the statistic rises in a run that learns to its end, and how many components then say so."""
    setting = CONFOUNDERS[job.regime]
    training, _, test = sequences(job, setting)
    model = build(job, setting)
    watch = GradESCallback(quorum=1.0, alpha=0.9999)
    peak = Peak(watch, setting)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        make_trainer(job, setting, model, training, STEPS, [watch, peak], folder).train()
    return {**job.key, "loss": loss(model, test), "rise": peak.ratio - 1, "votes": peak.votes}


class Peak(TrainerCallback):
    """The highest `standing` of a run, with what the library corrects left uncorrected where the setting says so."""

    def __init__(self, watch: GradESCallback, setting: Confounder) -> None:
        self.watch, self.setting = watch, setting
        self.ratio = self.votes = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        engine = self.watch.engine
        assert engine is not None
        assert engine.clipping is not None
        if self.setting.clipped:
            engine.clipping.close()
            engine.clipping = None
        if self.setting.whole:
            for component in engine.components:
                component.measured = component.parameters

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.watch.engine is not None
        now = standing(self.watch.engine)
        if now is not None:
            self.ratio, self.votes = max(self.ratio, now[0]), max(self.votes, now[1])


def make_trainer(
    job: Job, setting: Confounder, model: nn.Module, training: Tensor, steps: int, callbacks: Any, folder: str
) -> Trainer:
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=setting.batch, seed=job.seed, use_cpu=True,
        gradient_accumulation_steps=setting.accumulation,
        learning_rate=BASE_RATE * setting.factor * (5 if setting.lora else 1),
        lr_scheduler_type=setting.schedule, warmup_steps=setting.warmup, weight_decay=0.0, max_grad_norm=setting.clip,
        disable_tqdm=True, report_to="none", save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in training]
    return Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)  # type: ignore[arg-type]


def build(job: Job, setting: Confounder) -> nn.Module:
    """The pretrained model, with an adapter if that is what is trained."""
    set_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(job.model, attention_dropout=setting.dropout)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")) if setting.lora else model


def sequences(job: Job, setting: Confounder) -> tuple[Tensor, Tensor, Tensor]:
    """Those to train on, which the seed chooses, to validate and to test on: (n, length) tokens each."""
    training = pack(job.model, job.data, "train", setting.length)
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(job.seed))
    number = setting.sequences or STEPS * setting.batch * setting.accumulation
    if len(training) < number + VALIDATION:
        raise ValueError(f"data-dir={job.data!r} gives {len(training)} sequences of {setting.length} tokens, too few.")
    test = pack(job.model, job.data, "validation", LENGTH)[:TEST]
    return training[chosen[:number]], training[chosen[-VALIDATION:]], test


@functools.cache
def pack(model: str, data: str, split: str, length: int) -> Tensor:
    """The rows of the benchmarks, one after another, in sequences that are in random order."""
    tokenizer, parts = AutoTokenizer.from_pretrained(model), []
    for name in TEXTS:
        task, ids = TASKS[name], []
        for row in splits(task, data)[split]:
            question = task.format(row)
            text = f"{question['prompt']} {question['choices'][question['answer']]}"
            ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        parts.append(torch.tensor(ids[: len(ids) // length * length]).view(-1, length))
    found = torch.cat(parts)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    """Mean over tokens, in nats."""
    training = model.training
    model.eval()
    total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(64))
    model.train(training)
    return total / len(rows)


if __name__ == "__main__":
    main()
