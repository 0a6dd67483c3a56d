"""A tiny grid, really run: what is finished stays, what was killed goes on, and the table says what the runs say."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import compare
from tests.recipes.rows import all_tasks_dir

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "completion_only_loss": False, "measure": "loss", "use_peft": False, "train_rows": 24, "held_out_rows": 6,
    "max_length": 32, "test_rows": 4, "per_device_train_batch_size": 2, "num_train_epochs": 1,
    "learning_rate": 1e-3, "alpha": 0.5, "tau": 1e9, "monitor": "gradient_norm", "logging_steps": 4,
    "save_strategy": "steps", "save_steps": 3,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    folders = {"model": str(tiny_model_dir), "data_dir": str(all_tasks_dir(tmp_path / "data", train=40, validation=6))}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **folders}), encoding="utf-8")
    return ["--config", str(file), "--output", str(tmp_path / "grid")]


def command(argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.compare", *argv]


@pytest.mark.slow
def test_a_grid_from_end_to_end(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*base, "--arms", "none", "all=grades --alpha 0.25", "--tasks", "siqa", "--seeds", "1", "2"]
    argv += ["--num_train_epochs", "4"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    grid = tmp_path / "grid"
    # The first call is killed, child and all, as soon as its first cell has a checkpoint.
    process = subprocess.Popen(command(argv), env=environment, start_new_session=True)
    first = grid / "siqa" / "none" / "seed-1"
    deadline = time.monotonic() + 300
    while not list(first.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (first / "results.json").exists()

    again = subprocess.run(command(argv), env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    log = (first / "log.txt").read_text(encoding="utf-8")
    starts = [line for line in log.splitlines() if line.startswith("# ")]
    assert len(starts) == 2
    assert "--resume_from_checkpoint" in starts[1]
    assert "[4/4]" in again.stderr

    results = {}
    for arm in ("none", "all"):
        for seed in (1, 2):
            folder = grid / "siqa" / arm / f"seed-{seed}"
            results[arm, seed] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            audit = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))
            assert audit["config"] == (tmp_path / "run.yaml").read_text(encoding="utf-8")
            assert audit["versions"].keys() >= {"python", "torch", "transformers"}
            assert results[arm, seed]["seed"] == seed
    assert [results["none", seed]["steps_run"] for seed in (1, 2)] == [48, 48]
    assert [results["all", seed]["steps_run"] for seed in (1, 2)] == [13, 13]

    rows = {row["arm"]: row for row in csv.DictReader((grid / "comparison.csv").read_text().splitlines())}
    for arm in ("none", "all"):
        losses = [results[arm, seed]["evaluation"]["after"]["loss"] for seed in (1, 2)]
        assert float(rows[arm]["siqa loss"]) == pytest.approx(sum(losses) / 2)
        assert float(rows[arm]["siqa loss standard error"]) == pytest.approx(abs(losses[0] - losses[1]) / 2)
        used = [results[arm, seed]["compute"]["used"] for seed in (1, 2)]
        assert float(rows[arm]["training FLOPs"]) == pytest.approx(sum(used) / 2)
    assert rows["all"]["steps planned"] == "48.0"
    assert (grid / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "13 of 48" in (grid / "comparison.md").read_text(encoding="utf-8")
    assert "13 of 48" in again.stdout

    # A third call runs nothing.
    stamps = {file: file.stat().st_mtime_ns for file in grid.glob("siqa/*/*/*") if file.is_file()}
    compare.main(argv)
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    # With other arguments nothing is mixed.
    with pytest.raises(SystemExit, match="2"):
        compare.main([*argv, "--num_train_epochs", "41"])
    assert re.search(r"seed-1 holds a run with other arguments.*pass another --output", capsys.readouterr().err)


def test_a_failing_cell_is_named_and_the_others_are_run(
    base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The grid's own work, without child processes: one cell fails at first."""
    calls: list[str] = []

    def run(cell: compare.Cell, config: str) -> bool:
        calls.append(f"{cell.arm.name} {cell.seed}")
        if calls.count("es 1") == 1 and calls[-1] == "es 1":
            return False
        cell.folder.mkdir(parents=True)
        results = {"steps_run": 1, "steps_planned": 2, "compute": {"used": 1.0}, "seconds": {"training": 1.0}}
        results["evaluation"] = {"task": cell.task, "after": {"loss": 2.0}}
        (cell.folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
        audit = {"arguments": cell.arguments, "config": config, "commit": "abc", "versions": {"torch": "1.2"}}
        cell.audit.write_text(json.dumps(audit), encoding="utf-8")
        return True

    monkeypatch.setattr(compare, "run_cell", run)
    argv = [*base, "--arms", "none", "es", "--tasks", "siqa", "--seeds", "1", "2"]
    with pytest.raises(SystemExit, match="1 of 4 cells failed; the next call runs them again"):
        compare.main(argv)
    assert calls == ["none 1", "es 1", "none 2", "es 2"]
    compare.main(argv)
    assert calls[4:] == ["es 1"]
    page = (tmp_path / "grid" / "comparison.md").read_text(encoding="utf-8")
    assert "4 of 4 runs" in page
    assert "Run at commit abc with torch 1.2." in page


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "none", "none", "--tasks", "siqa"], "arms=none none must differ"),
        (["--arms", "a/b=none", "--tasks", "siqa"], "arms: 'a/b=none' must be an arm"),
        (["--arms", "x=--tau 1", "--tasks", "siqa"], "must be an arm, or a name and an arm"),
        (["--arms", "all", "--tasks", "siqa"], "arm='all' is unknown"),
        (["--arms", "none", "--tasks", "squad"], "task='squad' must name benchmarks, each once. Use some of"),
        (["--arms", "none", "--tasks", "siqa", "--tao", "1"], "'--tao' is unknown. Did you mean --tau"),
        (["--arms", "peer", "--tasks", "siqa"], "peer_tau is missing"),
        (["--arms", "none", "--tasks", "siqa", "--report_only"], "no cell has ended"),
        (["--arms", "none", "--tasks", "siqa", "--seeds", "1", "1"], "seeds=1 1 must differ"),
    ],
)
def test_bad_input_is_refused_before_anything_is_run(
    argv: list[str], message: str, base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main([*base, *argv])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "grid").exists()


def test_a_cell_that_runs_already_is_left_alone(base: list[str], tmp_path: Path) -> None:
    arm = compare.Arm.parse("none")
    cell = compare.Cell(arm, "siqa", 1, tmp_path / "cell", ("--config", base[1]))
    cell.folder.mkdir()
    with open(cell.folder / ".lock", "w") as lock:
        compare.fcntl.flock(lock, compare.fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is running"):
            compare.run_cell(cell, "")
