"""Things that go wrong: each ends in a clear error or a right continuation, never in a wrong frozen set.

Processes that are killed: test_resume.py. Several processes: test_ddp.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from grades_hf import GradES, GradESCallback, GradESConfig, History
from tests import small
from tests.resumable import record
from tests.small import llama, lora, tokens

STEPS = 12
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
RESUME = "checkpoint-6"
OPTIONS: dict[str, Any] = {"alpha": 0.25, "monitor": "gradient_change"}


class Whole:
    """A run without faults: some matrices freeze before step 6, some after it, some never; a checkpoint every 3."""

    def __init__(self, folder: Path) -> None:
        watch = GradESCallback(tau=1e-30, **OPTIONS)
        small.trainer(llama(), folder / "watch", [watch]).train()
        values = {name: series[4:] for name, series in watch.engine.history.values.items()}
        taus = {}
        for i, (name, series) in enumerate(values.items()):
            taus[name] = (1e-30, 1e9, 1.001 * min(series))[i % 3]
        self.config = GradESConfig(tau=taus, **OPTIONS)
        self.folder = folder / "run"
        callback = GradESCallback(self.config)
        trainer = small.trainer(llama(), self.folder, [callback], **SAVES)
        trainer.train()
        self.frozen = callback.engine.frozen
        self.history = record(callback.engine.history)
        self.weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        steps = self.frozen.values()
        assert min(steps) <= 6 < max(steps)
        assert len(steps) < 14

    def copy(self, to: Path) -> Path:
        """Its output directory as it was left by a crash after step 7."""
        shutil.copytree(self.folder, to)
        for step in (9, 12):
            shutil.rmtree(to / f"checkpoint-{step}")
        return to

    def assert_same(self, trainer: Trainer, engine: GradES) -> None:
        assert engine.frozen == self.frozen
        assert trainer.state.global_step == STEPS
        differing = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, self.weights[n])]
        assert differing == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


def messages(caplog) -> list[str]:
    """What is warned of; what a whole run says at its end is not."""
    found = [r for r in caplog.records if r.name.startswith("grades_hf") and r.levelno >= logging.WARNING]
    return [r.getMessage() for r in found if " are frozen after step " not in r.getMessage()]


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(file.read_text())
    changed = change(data)
    file.write_text(json.dumps(data if changed is None else changed))


# --- the history -------------------------------------------------------------------------------------------------


def of_another_run(file: Path) -> None:
    """Same model, same frozen set, other values."""

    def change(data: dict) -> None:
        for series in data["values"].values():
            series[1:] = [value * 1.01 for value in series[1:]]

    edit(file, change)


HISTORIES: dict[str, Callable[[Path], Any]] = {
    "deleted": lambda file: file.unlink(),
    "empty": lambda file: file.write_text(""),
    "cut off": lambda file: os.truncate(file, file.stat().st_size // 2),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "older": lambda file: edit(file, lambda data: data.update(format=0)),
    "newer": lambda file: edit(file, lambda data: data.update(format=2)),
    "of another run": of_another_run,
    "events without names": lambda file: edit(file, lambda data: [e.pop("name") for e in data["events"]] and None),
    "frozen twice": lambda file: edit(file, lambda data: data["events"].append(data["events"][0])),
    "events of no kind": lambda file: edit(file, lambda data: data.update(events=["x"])),
    "values of other components": lambda file: edit(file, lambda data: data["components"].pop()),
    "a value too few": lambda file: edit(file, lambda data: [s.pop(0) for s in data["values"].values()] and None),
}


@pytest.mark.compatibility("Faults", "the history missing, cut off, of another version or run", "works")
@pytest.mark.parametrize("damage", HISTORIES)
def test_the_history_costs_the_record_but_not_the_run(damage, whole, tmp_path, caplog):
    folder = whole.copy(tmp_path / "run")
    History.load(folder).save(folder / "grades_history.json")  # the format of 0.1.0, which can be edited as text
    (folder / "grades_history.arrow").unlink()
    HISTORIES[damage](folder / "grades_history.json")
    callback = GradESCallback(whole.config)
    trainer = small.trainer(llama(), folder, [callback], **SAVES)
    trainer.train(resume_from_checkpoint=True)
    (message,) = messages(caplog)
    assert "earlier values are lost" in message
    whole.assert_same(trainer, callback.engine)
    history = History.load(folder)
    assert history.steps == list(range(7, STEPS + 1))
    assert history.frozen == whole.frozen


def test_the_history_of_the_same_run_is_continued(whole, tmp_path, caplog):
    callback = GradESCallback(whole.config)
    folder = whole.copy(tmp_path / "run")
    trainer = small.trainer(llama(), folder, [callback], **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert messages(caplog) == []
    whole.assert_same(trainer, callback.engine)
    assert record(History.load(folder)) == whole.history


def test_what_a_killed_save_left_is_cleaned_up(whole, tmp_path):
    logs = [row | {"seconds": 0.0} for row in whole.history["logs"]]
    history = History.from_dict(whole.history | {"logs": logs})
    history.save(tmp_path / "h.json")
    (stale,) = _names_seen(history, tmp_path / "h.json")
    (tmp_path / stale).write_text("half of a his")
    history.save(tmp_path / "h.json")
    assert [path.name for path in tmp_path.iterdir()] == ["h.json"]
    assert record(History.load(tmp_path / "h.json")) == whole.history


def _names_seen(history: History, file: Path) -> set[str]:
    """What is in the directory at the moment of the rename, besides the file itself."""
    seen: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.replace", lambda source, target: seen.update(p.name for p in file.parent.iterdir()))
        history.save(file)
    return seen - {file.name}


class Limit(TrainerCallback):
    """From a step on, files that grow beyond a size cannot be written, as on a full disk."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@contextlib.contextmanager
def limited(step: int, size: int) -> Iterator[Limit]:
    limit = Limit(step, size)
    try:
        yield limit
    finally:
        limit.lift()


@pytest.mark.compatibility("Faults", "disk full while a checkpoint is written, then resume", "works")
@pytest.mark.usefixtures("capsys")  # else the limit holds for the file that pytest captures into, too
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(whole, tmp_path, caplog):
    callback = GradESCallback(whole.config)
    with limited(5, 2000) as limit:
        trainer = small.trainer(llama(), tmp_path, [callback, limit], **SAVES, save_total_limit=1)
        with pytest.raises(Exception, match=r"(?i)file too large|os error 27|write"):
            trainer.train()
    assert trainer.state.global_step == 6
    assert any("could not be written, training goes on" in message for message in messages(caplog))
    assert History.load(tmp_path).steps[-1] < 6
    caplog.clear()

    callback = GradESCallback(whole.config)
    trainer = small.trainer(llama(), tmp_path, [callback], **SAVES)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    whole.assert_same(trainer, callback.engine)
    assert record(History.load(tmp_path)) == whole.history
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.usefixtures("capsys")
def test_a_history_that_does_not_fit_costs_the_record_but_not_the_run(whole, tmp_path, caplog):
    callback = GradESCallback(whole.config)
    with limited(5, 2000) as limit:
        trainer = small.trainer(llama(), tmp_path, [callback, limit])
        trainer.train()
    whole.assert_same(trainer, callback.engine)
    assert any("could not be written, training goes on" in message for message in messages(caplog))
    assert History.load(tmp_path).steps[-1] < 5  # the old file, whole
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_disk_that_is_really_full(whole, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a file system of 64 KB")
    try:

        class Fill(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    with contextlib.suppress(OSError), open(disk / "full", "wb", buffering=0) as file:
                        while True:
                            file.write(bytes(512))

        callback = GradESCallback(whole.config)
        trainer = small.trainer(llama(), disk, [callback, Fill()])
        trainer.train()
        whole.assert_same(trainer, callback.engine)
        assert any(os.strerror(errno.ENOSPC) in message for message in messages(caplog))
        assert History.load(disk).steps[-1] <= 5
        assert sorted(path.name for path in disk.iterdir()) == ["full", "grades_history.arrow"]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.compatibility("Faults", "disk full at a resume", "refused")
@pytest.mark.parametrize("last", [6, 12])
def test_a_full_disk_at_a_resume_stops_before_the_first_step(last, tmp_path, caplog, monkeypatch):
    stop = [] if last == STEPS else [StopAfter(last)]
    small.trainer(llama(), tmp_path, [GradESCallback(tau=1.0), *stop], **SAVES).train()
    before = (tmp_path / "grades_history.arrow").read_bytes()

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    caplog.clear()
    model = llama()
    trainer = small.trainer(model, tmp_path, [GradESCallback(tau=1.0)], **SAVES)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match=r"GradES cannot write its record, .*No space left.*grades_history\.arrow"):
            trainer.train(resume_from_checkpoint=str(tmp_path / RESUME))
    assert trainer.state.global_step == 6
    assert not any("training goes on" in message for message in messages(caplog))
    assert all(p.requires_grad for p in model.parameters())
    assert (tmp_path / "grades_history.arrow").read_bytes() == before
    trainer.train(resume_from_checkpoint=str(tmp_path / RESUME))
    assert History.load(tmp_path).steps[-1] == trainer.state.global_step > 6


READ_ONLY = """
import os, sys
from grades_hf import GradESCallback
from tests import small
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
trainer = small.trainer(small.llama(), sys.argv[1], [GradESCallback(tau=1.0)])
try:
    trainer.train()
except PermissionError as error:
    print("refused:", error, "after step", trainer.state.global_step)
"""


@pytest.mark.slow
@pytest.mark.compatibility("Faults", "output_dir is read-only", "refused")
def test_a_read_only_output_dir_stops_before_the_first_step():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", READ_ONLY, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert f"refused: [Errno 13] Permission denied: '{folder}/.grades_history" in done.stdout, done.stderr[-2000:]
        assert "after step 0" in done.stdout
        assert os.listdir(folder) == []


# --- the checkpoint ----------------------------------------------------------------------------------------------


def grades_state(data: dict) -> dict:
    return data["stateful_callbacks"]["GradESCallback"]["attributes"]["checkpoint"]


STATES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no step": (lambda data: grades_state(data).pop("step") and None, "contradicts itself"),
    "no events": (lambda data: grades_state(data).pop("frozen") and None, "'frozen'"),
    "no counters": (lambda data: (grades_state(data).pop("criterion"), None)[1], "'criterion'"),
    "no state": (
        lambda data: data["stateful_callbacks"]["GradESCallback"]["attributes"].update(checkpoint=None),
        "no usable state",
    ),
    "no attributes": (lambda data: data["stateful_callbacks"].update(GradESCallback={}), "no usable state"),
    "a list": (
        lambda data: data["stateful_callbacks"]["GradESCallback"]["attributes"].update(checkpoint=[1]),
        "no usable state",
    ),
    "of a later step": (lambda data: grades_state(data).update(step=7), "GradES saved its state at step '?7"),
    "events without steps": (lambda data: grades_state(data)["frozen"][0].pop("step") and None, "'step'"),
    "events without names": (lambda data: grades_state(data)["frozen"][0].pop("name") and None, "'name'"),
    "events of later steps": (lambda data: grades_state(data)["frozen"][0].update(step=7), "of later ones"),
    "frozen twice": (
        lambda data: grades_state(data)["frozen"].append(grades_state(data)["frozen"][0]),
        "frozen twice",
    ),
    "counters of no kind": (lambda data: grades_state(data).update(criterion=[1, 2]), "malformed"),
    "of another model": (lambda data: grades_state(data)["criterion"].update({"model.layers.7.x": [1]}), r"layers\.7"),
}


@pytest.mark.compatibility(
    "Faults", "trainer_state.json with an incomplete or contradicting state of GradES", "refused"
)
@pytest.mark.parametrize("case", STATES)
def test_a_state_that_cannot_be_trusted_is_refused(case, whole, tmp_path):
    folder = whole.copy(tmp_path / "run")
    change, match = STATES[case]
    edit(folder / RESUME / "trainer_state.json", change)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = llama()
    trainer = small.trainer(model, folder, [GradESCallback(whole.config)], **SAVES)
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=True)
    assert all(p.requires_grad for p in model.parameters())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


@pytest.mark.compatibility(
    "Faults", "trainer_state.json or optimizer.pt cut off, trainer_state.json missing", "refused"
)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trainer_state.json", "missing"),
        ("trainer_state.json", "cut off"),
        ("trainer_state.json", "overwritten"),
        ("optimizer.pt", "cut off"),
        ("optimizer.pt", "overwritten"),
    ],
)
def test_a_damaged_checkpoint_ends_in_an_error(name, damage, whole, tmp_path):
    folder = whole.copy(tmp_path / "run")
    file = folder / RESUME / name
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.write_text("nothing")
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    model = llama()
    trainer = small.trainer(model, folder, [GradESCallback(whole.config)], **SAVES)
    with pytest.raises((OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError)):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step in (0, 6)
    assert all(p.requires_grad for p in model.parameters())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files

    # The checkpoint before is whole.
    callback = GradESCallback(whole.config)
    trainer = small.trainer(llama(), folder, [callback], **SAVES)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    whole.assert_same(trainer, callback.engine)


@pytest.mark.compatibility("Faults", "a checkpoint of an older version of GradES", "works")
def test_a_state_without_the_fields_that_came_later(whole, tmp_path, caplog):
    folder = whole.copy(tmp_path / "run")

    def older(data: dict) -> None:
        state = grades_state(data)
        assert state.keys() >= {"step", "frozen", "criterion", "config", "total_steps", "checksum"}
        for name in ("config", "total_steps", "checksum"):
            del state[name]

    edit(folder / RESUME / "trainer_state.json", older)
    callback = GradESCallback(whole.config)
    trainer = small.trainer(llama(), folder, [callback], **SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert messages(caplog) == []
    whole.assert_same(trainer, callback.engine)


@pytest.mark.compatibility("Faults", "a checkpoint whose optimizer.pt is missing", "works")
def test_without_the_optimizer_the_frozen_set_is_right_all_the_same(whole, tmp_path, caplog):
    folder = whole.copy(tmp_path / "run")
    (folder / RESUME / "optimizer.pt").unlink()
    callback, spy = GradESCallback(whole.config), small.Spy()
    trainer = small.trainer(llama(), folder, [callback, spy], **SAVES)
    trainer.train(resume_from_checkpoint=True)
    (message,) = messages(caplog)
    assert "check at step 7 yields no value" in message
    early = {name: step for name, step in whole.frozen.items() if step <= 6}
    assert early.items() <= callback.engine.frozen.items()
    assert 7 not in callback.engine.frozen.values()
    final = dict(trainer.model.named_parameters())
    for name, step in callback.engine.frozen.items():
        first = spy.weights[max(step, 7)][f"{name}.weight"]
        assert torch.equal(first, final[f"{name}.weight"])
        assert step > 6 or torch.equal(first, whole.weights[f"{name}.weight"])


# --- other options at a resume -------------------------------------------------------------------------------------


def resume(folder: Path, config: GradESConfig, **options: Any) -> GradESCallback:
    callback = GradESCallback(config)
    trainer = small.trainer(llama(), folder, [callback], **{**SAVES, **options})
    trainer.train(resume_from_checkpoint=str(folder / RESUME))
    return callback


def started(folder: Path, **options: Any) -> None:
    """A run up to checkpoint-6."""
    small.trainer(llama(), folder, [GradESCallback(**options), StopAfter(6)], **SAVES).train()


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
        return control


MODULES = ["q_proj", "k_proj"]


@pytest.mark.compatibility("Trainer", "other options of GradES at a resume", "works")
def test_another_tau_holds_from_the_resume_on(tmp_path, caplog):
    started(tmp_path, tau={"q": 1e9, "k": 1e-30}, alpha=0.25, target_modules=MODULES)
    callback = resume(tmp_path, GradESConfig(tau={"q": 1e-30, "k": 1e9}, alpha=0.25, target_modules=MODULES))
    assert {n[-6:]: s for n, s in callback.engine.frozen.items()} == {"q_proj": 4, "k_proj": 7}  # frozen stays frozen
    (message,) = [m for m in messages(caplog) if "other options" in m]
    assert "tau: [['q', 1000000000.0], ['k', 1e-30]] -> [['q', 1e-30], ['k', 1000000000.0]]" in message
    assert History.load(tmp_path).steps == list(range(1, 8))  # the same statistic: the record goes on


def test_another_tau_starts_patience_anew(tmp_path):
    started(tmp_path, tau=2e9, alpha=0.25, patience=5)
    state = json.loads((tmp_path / RESUME / "trainer_state.json").read_text())
    assert {count for (count,) in grades_state(state)["criterion"].values()} == {3}
    assert set(resume(tmp_path, GradESConfig(tau=1e9, alpha=0.25, patience=5)).engine.frozen.values()) == {11}
    same = resume(tmp_path, GradESConfig(tau=2e9, alpha=0.25, patience=5))
    assert set(same.engine.frozen.values()) == {8}


@pytest.mark.parametrize(
    ("before", "after", "first"),
    [
        ("gradient_change", "weight_change", 8),
        ("weight_change", "gradient_change", 8),
        ("gradient_norm", "gradient_change", 8),
        ("gradient_change", "gradient_norm", 7),
    ],
)
def test_another_statistic_is_not_compared_with_what_the_first_one_kept(before, after, first, tmp_path, caplog):
    started(tmp_path, tau=1e-30, alpha=0.25, monitor=before)
    callback = resume(tmp_path, GradESConfig(tau=1e9, alpha=0.25, monitor=after))
    assert set(callback.engine.frozen.values()) == {first}
    assert History.load(tmp_path).steps == list(range(7, first + 1))  # values of two statistics do not mix
    assert sum("monitor: " in m for m in messages(caplog)) == 1
    assert sum("earlier values are lost" in m and "another statistic" in m for m in messages(caplog)) == 1


def test_another_max_steps_moves_the_grace_period(tmp_path, caplog):
    options = {"alpha": 0.5, "target_modules": MODULES}
    started(tmp_path, tau={"q": 1e9, "k": 1e-30}, **{**options, "alpha": 0.25})
    config = GradESConfig(tau={"q": 1e9, "k": 1e-30}, **{**options, "alpha": 0.25})
    callback = resume(tmp_path, config, max_steps=20)
    assert callback.engine.t_grace == 5
    assert callback.engine.t == 20
    assert set(callback.engine.frozen.values()) == {4}  # frozen stays frozen
    (message,) = [m for m in messages(caplog) if "other options" in m]
    assert "total_steps: 12 -> 20" in message
    assert "freeze from step 7 on" in message


def test_a_later_grace_period_waits(tmp_path):
    started(tmp_path, tau=1e9, alpha=0.4, patience=3)  # grace until step 5, one check counted
    callback = resume(tmp_path, GradESConfig(tau=1e9, alpha=0.4, patience=3), max_steps=20)
    assert callback.engine.t_grace == 8
    assert set(callback.engine.frozen.values()) == {11}


@pytest.mark.parametrize("after", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]])
def test_other_components(after, tmp_path, caplog):
    started(tmp_path, tau=1e9, alpha=0.4, patience=2, target_modules=["q_proj"], max_frozen_fraction=1.0)
    taus = dict.fromkeys(after, 1e9)
    callback = resume(tmp_path, GradESConfig(tau=taus, alpha=0.4, patience=2, target_modules=after))
    # A component that is new has nothing to compare with at step 7.
    frozen = {name: 8 if name.endswith("q_proj") else 9 for name in callback.engine.history.values}
    assert callback.engine.frozen == frozen
    assert len(frozen) == 2 * len(after)
    assert sum("target_modules: " in m for m in messages(caplog)) == 1


def test_options_that_decide_nothing_may_change(whole, tmp_path, caplog):
    folder = whole.copy(tmp_path / "run")
    options = whole.config.to_dict() | {"skip_validation": False, "keep_frozen": True}
    callback = resume(folder, GradESConfig(**options))
    assert messages(caplog) == []
    assert callback.engine.frozen == whole.frozen


def test_the_engine_alone_treats_other_options_alike(caplog):
    def run(engine: GradES, model: nn.Module, steps: int) -> None:
        ids = torch.tensor(tokens(4)["input_ids"])
        for _ in range(steps):
            model(input_ids=ids, labels=ids).loss.backward()
            engine.step()
            model.zero_grad()

    model = llama()
    first = GradES(model, GradESConfig(tau=1e-30, alpha=0.25), total_steps=12)
    run(first, model, 2)
    second = GradES(model, GradESConfig(tau=1e9, alpha=0.25, monitor="weight_change"), total_steps=16)
    second.load_state_dict(first.state_dict())
    assert second.tensors().get("previous", {}) == {}
    assert second.history.steps == []
    text = " ".join(messages(caplog))
    assert "monitor: 'auto' -> 'weight_change'; total_steps: 12 -> 16" in text
    run(second, model, 2)
    assert second.history.steps == [3, 4]
    assert second.frozen == {}  # the weights did not move: no value


@pytest.mark.parametrize("spoil", ["frozen", "previous", "unknown previous", "history"])
def test_a_state_that_does_not_fit_changes_nothing_in_the_engine(spoil):
    first = GradES(llama(), GradESConfig(tau=1.0), total_steps=4)
    state = first.state_dict()
    name = first.components[0].name
    if spoil == "frozen":
        state["frozen"] = [{"name": name, "step": 4, "value": 0.0}]
    elif spoil == "previous":
        state["previous"][name] = [None, None]
    elif spoil == "unknown previous":
        state["previous"]["lm_head"] = [None]
    else:
        state["history"]["format"] = 7
    model = llama()
    engine = GradES(model, GradESConfig(tau=1.0), total_steps=4)
    with pytest.raises(ValueError, match="GradES|checkpoint"):
        engine.load_state_dict({**state, "step": 3})
    assert engine.t == 0
    assert engine.frozen == {}
    assert all(p.requires_grad for p in model.parameters())


# --- numbers and batches -------------------------------------------------------------------------------------------


class Spoiled(Trainer):
    """Multiplies the loss of some steps by a number."""

    number = math.nan
    steps: range = range(1, STEPS + 1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * self.number if self.state.global_step + 1 in self.steps else loss


def assert_as_without_us(tmp_path: Path, config: GradESConfig, make: Callable[..., Trainer]) -> GradES:
    """Training is what it is without GradES, and nothing freezes."""
    callback = GradESCallback(config)
    with_us, without = make(tmp_path / "with", [callback]), make(tmp_path / "without", [])
    with_us.train()
    without.train()
    assert callback.engine.frozen == {}
    assert with_us.state.global_step == without.state.global_step == callback.engine.t
    for (name, ours), plain in zip(with_us.model.named_parameters(), without.model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True, msg=name)
    losses = [[log.get("loss") for log in trainer.state.log_history] for trainer in (with_us, without)]
    assert repr(losses[0]) == repr(losses[1])
    History.load(tmp_path / "with").save(tmp_path / "history.json")
    json.loads((tmp_path / "history.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    return callback.engine


@pytest.mark.compatibility("Faults", "NaN or infinite loss, in some steps or all", "works")
@pytest.mark.parametrize(
    ("monitor", "number", "first"),
    [
        ("gradient_change", math.nan, 4),
        ("gradient_change", math.inf, 1),
        ("gradient_norm", math.inf, 4),
        ("weight_change", math.nan, 1),
    ],
)
def test_a_loss_that_is_not_finite_freezes_nothing(first, number, monitor, tmp_path):
    def make(folder, callbacks):
        trainer = small.trainer(llama(), folder, callbacks, cls=Spoiled, logging_nan_inf_filter=False)
        trainer.number, trainer.steps = number, range(first, STEPS + 1)
        return trainer

    # After the first such update the weights are NaN, and so is all that follows; weight_change lags by one update.
    engine = assert_as_without_us(tmp_path, GradESConfig(tau=1e9, alpha=0.34, monitor=monitor), make)
    assert engine.t_grace == 5
    for series in engine.history.values.values():
        assert not any(math.isfinite(value) for value in series[5:])


def empty(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that returns no row in the last batch of an epoch."""
    ids = torch.tensor([feature["input_ids"] for feature in features])
    ids = ids[: 0 if len(features) == 1 else None]
    return {"input_ids": ids, "labels": ids}


def masked(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that leaves no label in the last batch of an epoch."""
    ids = torch.tensor([feature["input_ids"] for feature in features])
    return {"input_ids": ids, "labels": ids if len(features) > 1 else torch.full_like(ids, -100)}


@pytest.mark.compatibility("Faults", "a last batch that is smaller, empty or without labels", "works")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("collator", [None, masked, empty], ids=["smaller", "without labels", "empty"])
def test_the_last_batch(collator, accumulation, tmp_path):
    def make(folder, callbacks):
        options = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
        options["remove_unused_columns"] = False
        torch.manual_seed(0)
        return Trainer(
            model=Rows() if collator is empty else llama(),  # Llama cannot take a batch of no rows
            args=small.arguments(folder, **options),
            callbacks=callbacks,
            train_dataset=tokens(13),
            data_collator=collator,
        )

    engine = assert_as_without_us(tmp_path, GradESConfig(tau=1e-30, monitor="gradient_norm"), make)
    assert engine.t == (8 if accumulation == 1 else 4)
    for series in engine.history.values.values():
        finite = [math.isfinite(value) for value in series]
        # Gradients of exactly 0 are no values, least of all small ones.
        nothing = collator is not None and accumulation == 1
        assert finite == ([True, True, True, False] * 2 if nothing else [True] * len(finite))


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm"])
def test_gradients_of_0_are_no_convergence(monitor):
    model = llama()
    engine = GradES(model, GradESConfig(tau=1e-6, alpha=0, monitor=monitor), total_steps=5)
    ids = torch.tensor(tokens(4)["input_ids"])
    for _ in range(5):
        (model(input_ids=ids, labels=ids).loss * 0).backward()
        engine.step()
        model.zero_grad()
    assert engine.frozen == {}


class Rows(nn.Module):
    """A model that takes batches of no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.parts = Parts()
        self.out = nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.out(self.parts(self.embed(input_ids), 2))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Parts(nn.Module):
    """Two blocks and a head; `use` says whether the blocks take part."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 8)}) for _ in range(2))
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, use: int) -> torch.Tensor:
        for layer in self.layers[:use]:
            x = x + layer["fc1"](layer["norm"](x))
        return self.head(x)


@pytest.mark.compatibility("Faults", "steps in which some or all tracked matrices have no gradient", "works")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
def test_steps_without_a_gradient(monitor, set_to_none):
    model = Parts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = GradES(model, GradESConfig(tau=1e9, alpha=0, patience=4, monitor=monitor), total_steps=99)
    used = [0, 2, 2, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    for use in used:
        model(torch.randn(4, 8), use).square().mean().backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        if engine.done:
            break
    # Four values in a row: a change needs a gradient in the step before, too, or an update. From or to a gradient of
    # zeros it is a value, between two of them it is none.
    change = (9, 13) if set_to_none else (6, 12)
    expected = {"gradient_norm": (8, 12), "gradient_change": change, "weight_change": (9, 13)}
    assert (engine.frozen["layers.0.fc1"], engine.frozen["layers.1.fc1"]) == expected[monitor]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_stays_the_same_has_converged(set_to_none):
    """Eq. 1 is exactly 0 then, which is below any tau."""
    model = nn.Sequential(nn.Linear(8, 8))
    engine = GradES(model, GradESConfig(tau=1e-30, alpha=0.3, target_modules=["0"]), total_steps=9)
    for _ in range(9):
        model(torch.ones(2, 8)).sum().backward()
        engine.step()
        model.zero_grad(set_to_none=set_to_none)
        if engine.done:
            break
    assert engine.frozen == {"0": 4}
    assert list(engine.history.values["0"])[1:] == [0.0] * 3


# --- code that raises ----------------------------------------------------------------------------------------------


class Raise(TrainerCallback):
    """Raises at one of Trainer's events, once."""

    def __init__(self, event: str, step: int, error: type[BaseException]) -> None:
        self.armed = True

        def at(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step + (event not in ("on_step_end", "on_save")) == step:
                self.armed = False
                raise error("out of luck")

        setattr(self, event, at)


EVENTS = [
    ("on_step_begin", 8),
    ("on_substep_end", 8),
    ("on_pre_optimizer_step", 7),
    ("on_optimizer_step", 8),
    ("on_step_end", 8),
    ("on_save", 9),
]


@pytest.mark.compatibility("Faults", "an error or Ctrl-C in any callback, then train() again or resume", "works")
@pytest.mark.parametrize(
    ("event", "step", "error"),
    [(*at, (RuntimeError, KeyboardInterrupt)[i % 2]) for i, at in enumerate(EVENTS)],
)
def test_train_again_after_an_error(event, step, error, whole, tmp_path):
    accumulate = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    reference = GradESCallback(whole.config)
    plain = small.trainer(llama(), tmp_path / "plain", [reference], **accumulate)
    plain.train()

    callback = GradESCallback(whole.config)
    trainer = small.trainer(llama(), tmp_path / "run", [callback, Raise(event, step, error)], **SAVES, **accumulate)
    with pytest.raises(error, match="out of luck"):
        trainer.train()
    assert callback.engine.frozen
    # The same trainer goes on from its last checkpoint.
    trainer.train(resume_from_checkpoint=True)
    assert callback.engine.frozen == reference.engine.frozen
    final = dict(trainer.model.named_parameters())
    assert [n for n, p in plain.model.named_parameters() if not torch.equal(p, final[n])] == []
    assert record(History.load(tmp_path / "run")) == record(reference.engine.history)


@pytest.mark.parametrize("make_model", [llama, lora])
def test_train_from_the_start_after_an_error(make_model, tmp_path):
    config = GradESConfig(tau={"q": 1e9, "k": 1e-30}, alpha=0.25, target_modules=MODULES)
    callback = GradESCallback(config)
    model = make_model()
    trainer = small.trainer(model, tmp_path, [callback, Raise("on_optimizer_step", 8, RuntimeError)])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    first = callback.engine
    trainer.add_callback(spy := small.Spy())
    trainer.train()
    assert callback.engine is not first
    assert callback.engine.frozen == first.frozen
    assert set(callback.engine.frozen.values()) == {4}
    names = {p: n for n, p in model.named_parameters()}
    for component in callback.engine.components:
        for name in (names[p] for p in component.parameters):
            moved = [not torch.equal(spy.weights[t][name], spy.weights[t + 1][name]) for t in range(1, STEPS)]
            assert moved == [component.frozen_at is None or t < 4 for t in range(1, STEPS)]
    with pytest.raises(RuntimeError, match="this engine is closed"):
        first.step()


# --- several runs in one process -------------------------------------------------------------------------------------


class Nested(TrainerCallback):
    """Runs another training in the middle of this one."""

    def __init__(self, inner: Trainer) -> None:
        self.inner = inner

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            self.inner.train()


@pytest.mark.compatibility(
    "Trainer", "two trainers at a time in one process, each with its model and callback", "works"
)
def test_two_trainers_at_a_time(whole, tmp_path):
    callback, inner_callback = GradESCallback(whole.config), GradESCallback(whole.config)
    inner = small.trainer(llama(), tmp_path / "inner", [inner_callback])
    trainer = small.trainer(llama(), tmp_path / "outer", [callback, Nested(inner)])
    trainer.train()
    whole.assert_same(trainer, callback.engine)
    whole.assert_same(inner, inner_callback.engine)


@pytest.mark.compatibility("Trainer", "two trainers at a time that share a model or a callback", "refused")
@pytest.mark.parametrize("shared", ["model", "callback"])
def test_two_trainers_at_a_time_must_share_nothing(shared, whole, tmp_path):
    callback, model = GradESCallback(whole.config), llama()
    inner = small.trainer(
        model if shared == "model" else llama(),
        tmp_path / "inner",
        [callback if shared == "callback" else GradESCallback(whole.config)],
    )
    trainer = small.trainer(model, tmp_path / "outer", [callback, Nested(inner)])
    with pytest.raises(RuntimeError, match="another run has begun"):
        trainer.train()
    assert trainer.state.global_step == 5


@pytest.mark.parametrize("restore", [False, True])
def test_the_order_of_tau_survives_a_checkpoint(restore, tmp_path, caplog):
    """Trainer sorts the keys of trainer_state.json, and of two expressions the first one holds."""
    config = GradESConfig(tau={".*q_proj.*": 1e9, ".*proj.*": 1e-30}, alpha=0.25)
    assert sorted(config.tau) != list(config.tau)
    options = {**SAVES, "restore_callback_states_from_checkpoint": restore}
    small.trainer(llama(), tmp_path, [GradESCallback(config), StopAfter(3)], **options).train()
    callback = GradESCallback(config)
    trainer = small.trainer(llama(), tmp_path, [callback], **options)
    trainer.train(resume_from_checkpoint=True)
    assert messages(caplog) == []
    assert {name[-6:] for name in callback.engine.frozen} == {"q_proj"}
