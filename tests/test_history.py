"""History on disk: JSON and parquet bring everything back, a failed write leaves the old file, damage is named."""

from __future__ import annotations

import json
import math
import sys
from array import array

import pytest
import torch

import grades_hf
from grades_hf import GradES, GradESConfig, History
from tests.small import llama


@pytest.fixture
def history():
    engine = GradES(llama(), GradESConfig(tau=1.0), total_steps=10)
    made = engine.history
    for step in range(1, 6):
        live = [c for c in engine.components if c.frozen_at is None]
        made.record(step, {c.name: math.nan if step == 1 else 10.0 / step + i for i, c in enumerate(live)})
        if step == 3:
            engine.components[2].frozen_at = 3
            made.record_freeze(3, engine.components[2], 0.5)
        loss = math.nan if step == 1 else 1.25 / step
        made.record_log({"step": step, "seconds": step / 4, "frozen": len(made.events), "loss": loss})
    made.savings, made.ended = {"steps": 5, "full": 10.0, "used": 9.0}, "stopped"
    return made


@pytest.mark.parametrize("name", ["grades_history.json", "values.parquet"])
def test_what_is_saved_comes_back(history, name, tmp_path):
    history.save(tmp_path / name)
    loaded = History.load(tmp_path / name)
    assert loaded.to_dict() == history.to_dict()
    assert loaded.logs[1:] == history.logs[1:]
    assert math.isnan(loaded.logs[0]["loss"])
    assert isinstance(loaded.values["model.layers.0.mlp.up_proj"], array)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_directory_stands_for_its_history(history, tmp_path):
    history.save(tmp_path / "grades_history.json")
    assert History.load(tmp_path).frozen == {"model.layers.0.self_attn.v_proj": 3}


def test_the_file_is_plain_json(history, tmp_path):
    history.save(tmp_path / "h.json")
    data = json.loads((tmp_path / "h.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["values"]["model.layers.0.self_attn.q_proj"][0] is None
    assert len(data["values"]["model.layers.0.self_attn.v_proj"]) == 3


def test_truncate_forgets_what_came_after(history):
    history.truncate(2)
    assert history.steps == [1, 2]
    assert history.frozen == {}
    assert {len(series) for series in history.values.values()} == {2}
    assert [row["step"] for row in history.logs] == [1, 2]
    assert (history.savings, history.ended) == (None, None)


def test_a_file_without_logs_is_read(history, tmp_path):
    old = {
        key: value for key, value in history.to_dict().items() if key not in ("logs", "savings", "ended", "versions")
    }
    (tmp_path / "h.json").write_text(json.dumps(old))
    loaded = History.load(tmp_path / "h.json")
    assert (loaded.logs, loaded.savings, loaded.ended, loaded.versions) == ([], None, None, {})
    assert loaded.values.keys() == history.values.keys()


@pytest.mark.parametrize("row", [{"step": 1}, {"step": None, "frozen": 0}, "step", {"step": 1, "frozen": "x"}])
def test_logs_that_are_none_are_damage(row, history, tmp_path):
    (tmp_path / "h.json").write_text(json.dumps(history.to_dict() | {"logs": [row]}))
    with pytest.raises(ValueError, match=r"h\.json"):
        History.load(tmp_path / "h.json")


def test_versions_are_those_of_the_run(history):
    assert history.versions["torch"] == torch.__version__
    assert history.versions["grades_hf"] == grades_hf.__version__
    assert set(history.versions) <= set(sys.modules) | {"python"}


def test_a_step_has_one_log(history):
    history.record_log({"step": 5, "seconds": 9.0, "frozen": 1, "compute_saved": 0.5})
    assert len(history.logs) == 5
    assert history.logs[-1] == {"step": 5, "seconds": 1.25, "frozen": 1, "loss": 0.25, "compute_saved": 0.5}


def test_latest_holds_the_live_finite_values_of_the_last_check(history):
    assert len(history.latest()) == 13
    assert "model.layers.0.self_attn.v_proj" not in history.latest()
    history.record(6, dict.fromkeys(history.latest(), math.inf))
    assert history.latest() == {}


def test_a_failed_write_leaves_the_old_file(history, tmp_path, monkeypatch):
    history.save(tmp_path / "h.json")
    old = (tmp_path / "h.json").read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    history.events.clear()
    with pytest.raises(OSError, match="No space"):
        history.save(tmp_path / "h.json")
    assert (tmp_path / "h.json").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["h.json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format": 1, "config": 3, "total_steps": "x"}', "\xff"]
)
def test_damage_is_named(text, tmp_path):
    (tmp_path / "h.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"h\.json"):
        History.load(tmp_path / "h.json")


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "h.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"h\.parquet"):
        History.load(tmp_path / "h.parquet")
