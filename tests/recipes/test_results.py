"""What is said of a run."""

from __future__ import annotations

from typing import Any

from recipes.results import side_by_side, tell

RUN: dict[str, Any] = {
    "steps_run": 6, "steps_planned": 8, "seconds": {"training": 61.4}, "frozen": {"a": 4, "b": 6}, "components": 3,
    "compute": {"saved": 0.25}, "tau": 0.5, "looks": 3,
    "evaluation": {"task": "siqa", "before": {"loss": 4.0}, "after": {"loss": 3.0, "acc": 0.5}},
}  # fmt: skip


def test_a_run_in_sentences() -> None:
    assert tell(RUN) == [
        "Training made 6 of 8 planned steps in 61 s.",
        "GradES froze 2 of 3 matrices, the first at step 4 and the last at step 6.",
        "It ended the run 2 steps early.",
        "The run used 75.0% of the compute of all planned steps.",
        "The loss on the held-out rows is 4.000 before and 3.000 after training.",
        "acc on siqa is 50.0% after training.",
    ]
    looked = {**RUN, "frozen": {}, "tau": None}
    assert tell(looked)[1] == "GradES ended the run 2 steps early."
    whole = {**looked, "steps_run": 8, "compute": {"saved": -0.05}}
    assert tell(whole)[1:3] == [
        "GradES saw no reason in 3 looks to end the run early, so all planned steps were made.",
        "The run used 105.0% of the compute of all planned steps, looks included.",
    ]
    assert tell({**whole, "looks": 1})[1].startswith("GradES saw no reason in one look to end")
    assert tell({**whole, "looks": 0})[1] == "GradES made no look, so all planned steps were made."
    assert not [line for line in tell(whole) if "froze" in line]
    assert tell({**RUN, "steps_run": 8, "frozen": {}})[1] == "GradES froze 0 of 3 matrices."
    plain = {name: value for name, value in whole.items() if name not in ("frozen", "compute", "tau")}
    assert not [line for line in tell(plain) if "GradES" in line or "compute" in line]


def test_two_runs_side_by_side() -> None:
    plain = {**RUN, "steps_run": 8, "evaluation": {"task": "siqa", "after": {"loss": 3.5, "acc": 0.25}}}
    assert [line.split() for line in side_by_side(RUN, plain)] == [
        ["with", "GradES", "without"],
        ["steps", "6", "8"],
        ["compute", "0.75", "1.00"],
        ["training", "time", "61", "s", "61", "s"],
        ["held-out", "loss", "3.000", "3.500"],
        ["acc", "50.0%", "25.0%"],
    ]
