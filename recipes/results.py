"""What a run did, in a few sentences, and two runs side by side."""

from __future__ import annotations

import logging
from typing import Any

from grades_hf import GradESTrainerMixin

logger = logging.getLogger(__name__)


def of_run(trainer: Any) -> dict[str, Any]:
    """The steps that a trainer has made, and what GradES did, if it was there."""
    found: dict[str, Any] = {
        "arm": "none",
        "steps_run": trainer.state.global_step,
        "steps_planned": trainer.state.max_steps,
    }
    if isinstance(trainer, GradESTrainerMixin):
        engine = trainer.grades_callback.engine
        assert engine is not None
        found |= {"arm": "grades", "tau": engine.config.tau, "looks": len(engine.history.looks)}
        found |= {"components": len(engine.components), "frozen": dict(engine.frozen)}
        try:
            savings = engine.savings()
            saved = savings.fraction_of_planned
            found["compute"] = {"used": savings.used, "full": savings.planned, "saved": saved}
        except RuntimeError as error:  # compiled models are not counted
            logger.info("%s", error)
    return found


def tell(results: dict[str, Any]) -> list[str]:
    """What a run did, in a few sentences."""
    ran, planned = results["steps_run"], results["steps_planned"]
    lines = [f"Training made {ran} of {planned} planned steps in {results['seconds']['training']:.0f} s."]
    early = f"ended the run {planned - ran} steps early." if ran < planned else ""
    if "frozen" in results and results["tau"] is None:
        looks = {0: "made no look", 1: "saw no reason in one look to end the run early"}
        looked = looks.get(results["looks"], f"saw no reason in {results['looks']} looks to end the run early")
        lines.append(f"GradES {early or f'{looked}, so all planned steps were made.'}")
    elif "frozen" in results:
        steps, number = sorted(results["frozen"].values()), results["components"]
        when = f", the first at step {steps[0]} and the last at step {steps[-1]}" if steps else ""
        lines.append(f"GradES froze {len(steps)} of {number} matrices{when}.")
        if early:
            lines.append(f"It {early}")
    if "compute" in results:
        included = ", looks included" if results["compute"]["saved"] < 0 else ""
        lines.append(
            f"The run used {1 - results['compute']['saved']:.1%} of the compute of all planned steps{included}."
        )
    for name, form in (("loss", ".3f"), ("acc", ".1%"), ("acc_norm", ".1%")):
        parts = [
            f"{results['evaluation'][when][name]:{form}} {when}"
            for when in ("before", "after")
            if name in results["evaluation"].get(when, {})
        ]
        if parts:
            what = "The loss on the held-out rows" if name == "loss" else f"{name} on {results['evaluation']['task']}"
            lines.append(f"{what} is {' and '.join(parts)} training.")
    return lines


def side_by_side(ours: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """A table of a run with GradES and the same run without."""
    table: list[tuple[str, ...]] = [
        ("", "with GradES", "without"),
        ("steps", str(ours["steps_run"]), str(plain["steps_run"])),
    ]
    if "compute" in ours:
        table.append(("compute", f"{1 - ours['compute']['saved']:.2f}", "1.00"))
    table.append(("training time", *(f"{run['seconds']['training']:.0f} s" for run in (ours, plain))))
    for name, form in (("loss", ".3f"), ("acc", ".1%"), ("acc_norm", ".1%")):
        if name in ours["evaluation"]["after"]:
            cells = (f"{run['evaluation']['after'][name]:{form}}" for run in (ours, plain))
            table.append(("held-out loss" if name == "loss" else name, *cells))
    return [f"{what:15}{one:>12}{other:>12}" for what, one, other in table]
