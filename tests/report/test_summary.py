"""The summary's numbers and their text."""

from __future__ import annotations

import json

from grades_hf import History
from grades_hf.report import summarize, table_rows, to_markdown

from .histories import history

SCORES = {"acc": 0.4, "acc_stderr": 0.0123, "acc_norm": 0.5, "acc_norm_stderr": 0.02}


def small() -> History:
    """Two layers of two matrices; layer 0 froze at steps 3 and 5."""
    run = history(layers=2, projections=("q", "up"), frozen=0.0, steps=6, planned=8)
    run.events = [
        {"step": step, "name": f"None.0.{kind}.0", "value": 0.5, "tau": 1.0} for kind, step in (("q", 3), ("up", 5))
    ]
    return run


def test_numbers() -> None:
    summary = summarize(small(), steps_run=7, seconds={"training": 3.0}, evaluation={}, compute=None)
    assert json.loads(json.dumps(summary)) == summary
    assert summary == {
        "steps_run": 7,
        "steps_planned": 8,
        "grace_steps": 4,
        "monitors": ["gradient_norm"],
        "tau": [1.0, 2.0],
        "components": 4,
        "frozen": 2,
        "parameters": 40,
        "frozen_parameters": 20,
        "groups": [
            {"group": "attention", "components": 2, "frozen": 1, "first": 3, "last": 3},
            {"group": "mlp", "components": 2, "frozen": 1, "first": 5, "last": 5},
        ],
        "seconds": {"training": 3.0},
    }
    assert summarize(small())["steps_run"] == 6


def test_towers_are_groups_of_their_own() -> None:
    summary = summarize(history(towers=("vision", "language"), projections=("q",)))
    assert [group["group"] for group in summary["groups"]] == ["vision attention", "language attention"]


def test_text() -> None:
    summary = summarize(
        small(),
        steps_run=7,
        evaluation={"task": "siqa", "before": SCORES, "after": {**SCORES, "acc": 0.451}},
        seconds={"training": 212.4, "evaluation": 59.0, "waiting": 7300.0},
        compute={"used": 9e12, "full": 1e13, "saved": 0.1},
    )
    assert table_rows(summary) == [
        ("steps", "7 of 8 planned"),
        ("frozen", "2 of 4 components, 50% of their parameters"),
        ("  attention", "1 of 2, first at step 3, last at step 3"),
        ("  mlp", "1 of 2, first at step 5, last at step 5"),
        ("siqa acc", "40.0% ± 1.2% before, 45.1% ± 1.2% after"),
        ("siqa acc_norm", "50.0% ± 2.0% before, 50.0% ± 2.0% after"),
        ("time", "training 3 min 32 s, evaluation 59 s, waiting 2 h 1 min"),
        ("compute saved", "10.0% (9e+12 of 1e+13 FLOPs)"),
    ]
    page = to_markdown(summary, "A run", notes={"model": "a | b"})
    assert page.startswith("# A run\n\n| | |\n|---|---|\n| model | a \\| b |\n| steps | 7 of 8 planned |\n")
    assert "| statistic | gradient_norm, tau 1 to 2, none frozen up to step 4 |" in page


def test_what_is_missing_is_left_out() -> None:
    assert table_rows({"steps_run": 1, "steps_planned": 2}) == [("steps", "1 of 2 planned")]
    nothing = summarize(history(frozen=0.0, projections=("q",)))
    assert ("  attention", "0 of 3") in table_rows(nothing)
    only_after = table_rows({"evaluation": {"after": SCORES}})
    assert only_after[0] == ("acc", "40.0% ± 1.2% after")
