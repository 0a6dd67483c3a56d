"""TensorBoard, W&B and trackio: what each has written is read back, with GradESTrainer and with the callback."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from grades_hf import GradESCallback, GradESTrainer, History
from tests import small, tracked
from tests.small import llama

ROOT = Path(__file__).parents[2]
GROUPS = ("attention", "mlp")


@dataclass(frozen=True)
class Run:
    """What a run has left: its history, and for each tracker the config under `grades` and the scalars by step."""

    folder: Path
    history: History
    configs: dict[str, Any]
    scalars: dict[str, dict[int, dict[str, float]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp(request.param)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_ERROR_REPORTING": "false",
        "TRACKIO_DIR": str(folder / "trackio"),
        "https_proxy": "http://127.0.0.1:9",  # whatever asks for the network gets nothing
        "http_proxy": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "tests.tracked", request.param, str(folder)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {"tensorboard": tensorboard(folder), "wandb": wandb(folder), "trackio": trackio(folder)}
    configs = {name: config for name, (config, _) in found.items()}
    return Run(folder, History.load(folder), configs, {name: scalars for name, (_, scalars) in found.items()})


def tensorboard(folder: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    (text,) = events.Tensors("args/text_summary")
    scalars: dict[int, dict[str, float]] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            scalars.setdefault(event.step, {})[tag.removeprefix("train/")] = event.value
    return json.loads(text.tensor_proto.string_val[0]).get("grades"), scalars


def wandb(folder: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    config, scalars = None, {}
    for data in leveldb_log(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        for item in (*record.config.update, *record.run.config.update):
            if item.key == "grades":
                config = json.loads(item.value_json)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "train/loss" in row:
            scalars[row["train/global_step"]] = {key.removeprefix("train/"): value for key, value in row.items()}
    return config, scalars


def leveldb_log(raw: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB; after 7 bytes that say what it is."""
    position, parts = 7, []
    while position + 7 <= len(raw):
        left = 32768 - position % 32768
        if left < 7:  # no header fits into the rest of a block
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, position)
        parts.append(raw[position + 7 : position + 7 + size])
        position += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield b"".join(parts)
            parts = []


def trackio(folder: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    with sqlite3.connect(folder / "trackio" / "grades.db") as database:
        (config,) = database.execute("SELECT config FROM configs").fetchone()
        rows = [json.loads(row) for (row,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    database.close()
    scalars = {
        row["train/global_step"]: {key.removeprefix("train/"): value for key, value in row.items()}
        for row in rows
        if "train/loss" in row
    }
    return json.loads(config).get("grades"), scalars


@pytest.mark.compatibility("Trainer", "report_to tensorboard, wandb, trackio (GradESTrainer; callback)", "works")
@pytest.mark.slow
@pytest.mark.parametrize("run", ["trainer", "callback"], indirect=True)
def test_each_tracker_has_the_options_and_the_scalars(run):
    assert len(run.history.logs) == 12
    for tracker in tracked.TRACKERS:
        config, scalars = run.configs[tracker], run.scalars[tracker]
        assert config == run.history.config == tracked.CONFIG.resolved().to_dict(), tracker
        assert list(config["tau"]) == ["q", "down", ".*"], "their order counts"
        for row in run.history.logs:
            written = scalars[row["step"]]
            assert written["loss"] == pytest.approx(row["loss"], rel=1e-6), tracker
            assert written["grades/frozen_fraction"] == pytest.approx(row["frozen"] / 14), tracker
            assert written["grades/compute_saved"] == pytest.approx(row["compute_saved"], rel=1e-6), tracker
            quartiles = {f"grades/{group}/statistic_q{part}" for group in GROUPS for part in (25, 50, 75)}
            assert quartiles.isdisjoint(written) if row["step"] == 1 else quartiles <= written.keys(), tracker
    assert run.scalars["trackio"][9]["grades/mlp/statistic_q50"] == pytest.approx(median(run.history, "mlp", 9))
    assert run.history.logs[-1]["frozen"] == 4


def median(history: History, group: str, step: int) -> float:
    names = [component["name"] for component in history.components if component["group"] == group]
    live = sorted(history.values[name][step - 1] for name in names if len(history.values[name]) >= step)
    return (live[(len(live) - 1) // 2] + live[len(live) // 2]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("run", ["trainer", "callback"], indirect=True)
def test_the_training_arguments_stay_as_they_were(run):
    """They are pickled into every checkpoint."""
    import torch

    arguments = torch.load(run.folder / "checkpoint-12" / "training_args.bin", weights_only=False)
    assert "to_dict" not in vars(arguments)
    assert "grades" not in arguments.to_dict()


def test_a_failing_tracker_leaves_the_arguments_as_they_were(tmp_path):
    class Broken(small.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert "grades" in args.to_dict()
            raise RuntimeError("no connection")

    callback = GradESCallback(tau=1.0)
    trainer = small.trainer(llama(), tmp_path, [Broken(), callback])
    with pytest.raises(RuntimeError, match="no connection"):
        trainer.train()
    assert "grades" not in trainer.args.to_dict()


class Tracker(small.TrainerCallback):
    """Stands where trackers stand: before GradESCallback."""

    def __init__(self) -> None:
        self.config, self.steps = None, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.config = args.to_dict().get("grades")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grades/frozen_fraction" in logs:
            self.steps.append(state.global_step)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("kind", ["trainer", "callback"])
def test_after_a_resume(kind, restore, tmp_path):
    """With `restore_callback_states_from_checkpoint` Trainer replaces the callback by a copy."""
    options = {"save_strategy": "steps", "save_steps": 6, "restore_callback_states_from_checkpoint": restore}
    for resume in (None, str(tmp_path / "checkpoint-6")):
        tracker, callback = Tracker(), GradESCallback(tracked.CONFIG)
        if kind == "trainer":
            extra = {"grades": tracked.CONFIG}
            trainer = small.trainer(llama(), tmp_path, [tracker], cls=GradESTrainer, extra=extra, **options)
        else:
            trainer = small.trainer(llama(), tmp_path, [tracker, callback], **options)
        trainer.train(resume_from_checkpoint=resume)
        assert tracker.config == tracked.CONFIG.resolved().to_dict()
        assert tracker.steps == list(range(1 if resume is None else 7, 13))
