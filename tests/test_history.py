"""History on disk: JSON and parquet bring everything back, a failed write leaves the old file, damage is named."""

from __future__ import annotations

import json
import math
from array import array

import pytest

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
    return made


@pytest.mark.parametrize("name", ["grades_history.json", "values.parquet"])
def test_what_is_saved_comes_back(history, name, tmp_path):
    history.save(tmp_path / name)
    loaded = History.load(tmp_path / name)
    assert loaded.to_dict() == history.to_dict()
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
