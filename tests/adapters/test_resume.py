"""A run that is killed and resumed ends like one that is not: same frozen steps, same values, bit-identical weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import signal
from functools import lru_cache
from itertools import accumulate, cycle, pairwise
from pathlib import Path

import pytest
import torch

from grades_hf import History
from tests import resumable
from tests.resumable import GRACE, SAVE_STEPS, STEPS, Job

# Where a process is killed, and at which step; freezing is possible from step 6 on.
KILLS = [
    ("between two micro-batches", 2),  # before the first checkpoint: the run starts again
    ("after a checkpoint", 3),  # in the grace period
    ("between two micro-batches", 5),  # the last step of the grace period
    ("checkpoint: only the model is written", 6),
    ("after freezing, before the update", 8),
    ("checkpoint: trainer_state.json is missing", 9),
    ("checkpoint: trainer_state.json is cut off", 9),
    ("after a checkpoint", 9),
    ("after the update", 10),
    ("while the history is written", 12),  # just before the checkpoint
    ("between two micro-batches", 12),
    ("after a checkpoint", 12),
    ("after the step", 13),
]


@pytest.fixture(scope="session")
def processes():
    """A server that has imported everything and forks a child for each job, so that none inherits a trainer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resumable"])
    return context


def run_in_child(processes, job: Job) -> None:
    process = processes.Process(target=resumable.run, args=(job,))
    process.start()
    process.join()
    assert process.exitcode == (0 if job.kill is None else -signal.SIGKILL), f"{job.kill}: {process.exitcode}"


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint whose trainer_state.json, which Trainer writes last, can be read."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        return str(path)
    return None


@lru_cache
def uninterrupted(kind: str, monitor: str, folder: Path) -> tuple[dict[str, float], dict]:
    """Thresholds at which many matrices freeze at different steps and some do not, and what a run with them gives."""

    def run(tau: float | dict[str, float]) -> dict:
        trainer, callback = resumable.build(Job(str(folder), kind, monitor, tau), save_strategy="no")
        trainer.train()
        return resumable.result(trainer, callback)

    taus = {}
    for i, (name, series) in enumerate(run(1e-12)["history"]["values"].items()):
        # With patience 2 a matrix freezes where the larger of two values in a row falls below its threshold.
        pairs = [max(pair) for pair in pairwise(series[GRACE:])]
        minima = [
            value for value, before in zip(pairs, accumulate([math.inf, *pairs], min), strict=False) if value < before
        ]
        taus[name] = 1e-12 if i % 5 == 4 else 1.01 * minima[-1 - i % 5 % len(minima)]
    return taus, run(taus)


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return lambda kind, monitor: uninterrupted(kind, monitor, folder)


def assert_same(folder: Path, expected: dict) -> None:
    result = torch.load(folder / resumable.RESULT)
    assert result["frozen"] == expected["frozen"]
    assert list(result["frozen"]) == list(expected["frozen"])
    assert result["last step"] == expected["last step"]
    assert result["weights"].keys() == expected["weights"].keys()
    differing = [k for k, tensor in expected["weights"].items() if not torch.equal(result["weights"][k], tensor)]
    assert differing == []
    history = History.load(folder)
    assert resumable.record(history) == expected["history"] == result["history"]
    seconds = [row["seconds"] for row in history.logs]
    assert seconds == sorted(seconds)
    assert [e for e in result["logs"] if "loss" in e] == [e for e in expected["logs"] if "loss" in e]


@pytest.mark.compatibility("Trainer", "resume_from_checkpoint", "works")
@pytest.mark.compatibility("Faults", "kill -9 at any moment of a step or a checkpoint, then resume", "works")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kill", "kind"),
    list(zip(KILLS, cycle(["full", "lora"]), strict=False)),
    ids=lambda value: value if isinstance(value, str) else f"{value[1]} {value[0]}",
)
def test_killed_once(kind, kill, processes, whole_runs, tmp_path):
    tau, expected = whole_runs(kind, "gradient_change")
    steps = expected["frozen"].values()
    assert 0 < len(steps) < 14
    assert min(steps) < 9 <= max(steps), "else no kill and resume comes between two freezings"
    job = Job(str(tmp_path), kind, "gradient_change", tau, restore=kind == "lora", kill=kill)
    run_in_child(processes, job)
    resume = last_complete_checkpoint(tmp_path)
    assert resume is None or int(resume.rsplit("-", 1)[1]) <= kill[1]
    assert (resume is None) == (kill[1] < SAVE_STEPS)
    run_in_child(processes, dataclasses.replace(job, kill=None, resume=resume))
    assert_same(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "restore", "monitor"),
    [
        ("full", True, "gradient_change"),
        ("lora", False, "gradient_change"),
        ("lora", True, "gradient_norm"),
        ("full", False, "weight_change"),
    ],
)
def test_killed_again_and_again(kind, restore, monitor, processes, whole_runs, tmp_path):
    tau, expected = whole_runs(kind, monitor)
    job = Job(str(tmp_path), kind, monitor, tau, restore=restore)
    others = [KILLS[1], KILLS[4], KILLS[11]]
    kills = KILLS[kind == "lora" :: 2] if monitor == "gradient_change" else others
    for kill in kills:
        resume = last_complete_checkpoint(tmp_path)
        run_in_child(processes, dataclasses.replace(job, kill=kill, resume=resume))
    run_in_child(processes, dataclasses.replace(job, resume=last_complete_checkpoint(tmp_path)))
    assert_same(tmp_path, expected)


def strip_previous_gradients(checkpoint: Path) -> None:
    optimizer = torch.load(checkpoint / "optimizer.pt")
    held = [state.pop("grades_previous", None) for state in optimizer["state"].values()]
    assert any(tensor is not None for tensor in held)
    torch.save(optimizer, checkpoint / "optimizer.pt")


@pytest.mark.compatibility("Trainer", "save_only_model", "works")
@pytest.mark.parametrize(("kind", "monitor"), [("full", "gradient_change"), ("lora", "weight_change")])
@pytest.mark.parametrize("lack", ["save_only_model", "optimizer.pt without them"])
def test_a_checkpoint_without_the_previous_step(lack, monitor, kind, tmp_path, caplog):
    """The first check after the resume has no value, freezes nothing, and one warning says so."""
    job = Job(str(tmp_path), kind, monitor, tau=1e9, patience=3)
    only_model = {"save_only_model": True} if lack == "save_only_model" else {}
    trainer, _ = resumable.build(job, **only_model)
    trainer.add_callback(StopAfter(6))
    trainer.train()
    checkpoint = tmp_path / "checkpoint-6"
    if not only_model:
        strip_previous_gradients(checkpoint)

    trainer, callback = resumable.build(job, **only_model)
    with caplog.at_level(logging.WARNING, logger="grades_hf"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("grades_hf")]
    about = [message for message in warnings if "step 7" in message]
    assert len(about) == 1
    assert "no value" in about[0]
    said = ("step 7", "below tau", "the run ends at step 10")
    assert [message for message in warnings if not any(words in message for words in said)] == []
    # Without the gap the count, which stood at 1 after step 6, would have reached 3 at step 8.
    assert set(callback.engine.frozen.values()) == {10}
    history = callback.engine.history
    assert history.steps == list(range(1, 11))
    for series in history.values.values():
        assert [step for step, value in zip(history.steps, series, strict=True) if math.isnan(value)] == [1, 7]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_statistic_of_one_step_needs_no_memory(kind, tmp_path, caplog):
    """With gradient_norm the checkpoint holds no tensors of ours, and nothing is missed after the resume."""
    job = Job(str(tmp_path), kind, "gradient_norm", tau=1e9, patience=3)
    trainer, _ = resumable.build(job)
    trainer.add_callback(StopAfter(6))
    trainer.train()
    optimizer = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt")
    assert not any("grades_previous" in state for state in optimizer["state"].values())
    trainer, callback = resumable.build(job)
    with caplog.at_level(logging.WARNING, logger="grades_hf"):
        trainer.train(resume_from_checkpoint=True)
    assert not [record for record in caplog.records if "no value" in record.getMessage()]
    assert set(callback.engine.frozen.values()) == {8}


@pytest.mark.compatibility("Trainer", "resuming a finished run", "works")
@pytest.mark.parametrize("restore", [False, True])
def test_resuming_a_finished_run_changes_nothing(restore, tmp_path):
    job = Job(str(tmp_path), "full", "gradient_norm", tau=1e9, patience=1, restore=restore)
    trainer, callback = resumable.build(job)
    trainer.train()
    first = resumable.result(trainer, callback)
    assert first["last step"] == GRACE + 1
    trainer, callback = resumable.build(job)
    trainer.train(resume_from_checkpoint=True)
    again = resumable.result(trainer, callback)
    assert again["last step"] == first["last step"]
    assert again["frozen"] == first["frozen"]
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in first["weights"].items())
    assert resumable.record(History.load(tmp_path)) == first["history"]


def test_the_checkpoint_holds_one_gradient_per_live_matrix(tmp_path):
    job = Job(str(tmp_path), "full", "gradient_change", tau=1e-9)
    trainer, callback = resumable.build(job, max_steps=3)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt")["state"]
    held = [state["grades_previous"] for state in saved.values() if "grades_previous" in state]
    assert sum(tensor.numel() for tensor in held) == sum(c.numel for c in callback.engine.components)
    assert not any("grades_previous" in state for state in trainer.optimizer.state.values()), "only in the checkpoint"
    assert STEPS > 3


class StopAfter(resumable.TrainerCallback):
    """Ends the run after a step, as a user would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


def test_the_clock_goes_on_from_the_checkpoint(tmp_path):
    job = Job(str(tmp_path), "full", "gradient_norm", tau=1e-9)
    trainer, _ = resumable.build(job)
    trainer.add_callback(StopAfter(8))
    trainer.train()
    before = History.load(tmp_path).logs
    trainer, _ = resumable.build(job)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    after = History.load(tmp_path).logs
    assert after[:6] == before[:6]
    assert [row["step"] for row in after] == list(range(1, STEPS + 1))
    seconds = [row["seconds"] for row in after]
    assert seconds == sorted(seconds)
