"""The summary's numbers and their text."""

from __future__ import annotations

import json

import pytest

from grades_hf import History
from grades_hf.report import summarize, to_markdown
from grades_hf.report.summary import escape, facts, look_rows, rule, saved, sentence, visible

from .histories import history, looked


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


def test_a_run_without_a_tau() -> None:
    run = looked()
    assert sentence(run) == (
        "Ended by a look at step 20 of 40: 2 looks at held-out rows, the last one ended the run (loss 2.4 with "
        "averaged weights, 2.6 without), 50.0% of the planned compute saved, loss 2, 0.5 s a step."
    )
    assert summarize(run)["looks"] == {"number": 2, "ended": True}
    assert "tau" not in summarize(run)
    assert facts(run)[:3] == [("steps", "20 of 40 planned"), ("attention", "4 matrices"), ("mlp", "2 matrices")]
    assert look_rows(run)[1] == ("20", "6 of 6", "128", "2.4000", "-0.1200", "2.6000", "-0.2000 ± 0.0100", "end")
    assert sentence(looked("completed")).startswith("Ended after all 40 steps: no look was proposed, loss 2,")
    assert sentence(looked(None)) == (
        "Step 20 of 40: 100% of the components vote for a look, no look so far, loss 2, 0.5 s a step, "
        "at most 10 s left."
    )
    assert "20% over its own minimum" in rule(run)
    run.looks = run.looks[:1]
    assert "1 look at held-out rows, it said to go on" in sentence(run)


def test_markdown() -> None:
    page = to_markdown(summarize(small(), evaluation={"loss": "a | b"}), "A run")
    assert page.startswith("# A run\n\n|  |  |\n| --- | --- |\n| steps run | 6 |\n")
    assert "a \\| b" in page


@pytest.mark.parametrize(
    "text", ["<script>x</script>", "[a](javascript:b)", "`c`", "d\n| e |", "\x1b[31mred\x07", "&lt;"]
)
def test_no_text_becomes_markdown_html_or_a_command_of_a_terminal(text: str) -> None:
    found = escape(text)
    assert not set("<>`\n\x1b\x07") & set(found)
    assert "](" not in found.replace("\\]", "")
    assert visible(text).isprintable() or "\n" in text


@pytest.mark.parametrize("full", [0.0, -1.0])
def test_savings_of_nothing_are_no_figure(full: float) -> None:
    run = looked()
    run.savings = {**(run.savings or {}), "full": full, "used": 0.0, "planned": full}
    assert "saved" not in sentence(run)
    assert saved(run) is None
