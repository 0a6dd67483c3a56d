"""The benchmark of growing runs on a thousandth of them: it runs, and its JSON says what it must."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling


@pytest.mark.slow
def test_history(tmp_path):
    (tmp_path / "scaling.json").write_text(json.dumps({"results": {"other": 1}}))
    path = scaling.main(["--parts", "history", "--divide", "1000", "--output", str(tmp_path)])
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["command"] == "python -m benchmarks.scaling --parts history --divide 1000 --threads 1"
    results = document["results"]
    assert results["other"] == 1  # a part that was not run keeps its figures
    rows = results["history"]["figures"]
    assert [(row["checks"], row["components"]) for row in rows] == [(100, 448), (20, 10_000)]
    for row in rows:
        assert 4 * row["checks"] * row["components"] < 1e6 * row["disk_mb"] < row["json"]["disk_mb"] * 1e6
        assert row["save_seconds"]["n"] >= 2


def test_steps(tmp_path):
    path = scaling.main(["--parts", "steps", "--divide", "1000", "--output", str(tmp_path)])
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]["steps"]["figures"]
    assert {(row["criterion"], row["statistic"]) for row in rows} == {
        ("threshold", "gradient_norm"),
        ("threshold", "gradient_change"),
        ("rise", "gradient_per_loss"),
    }
    assert {row["gradients"] for row in rows} == {"changing", "0 in three steps of four", "always 0"}
    assert {(row["components"], row["step"]) for row in rows} == {(20, 100)}
    for row in rows:
        assert row["step_ms"] > 0 < row["without_ms"]
        assert row["beyond_ms"] == row["step_ms"] - row["without_ms"]
