"""A run in a few numbers: what froze and when, and what the caller knows besides (accuracy, time, compute)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..history import History

# As data flows through a block; anything else follows in the order of the model.
PROJECTION_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


def summarize(
    history: History,
    *,
    steps_run: int | None = None,
    evaluation: Mapping[str, Any] | None = None,
    seconds: Mapping[str, float] | None = None,
    compute: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The run as a dict that JSON can hold.

    Args:
        history: What GradES recorded.
        steps_run: Optimizer steps that were run; default: the last one at which a check was made.
        evaluation: Accuracy, as `{"task": str, "rows": int, "before": {...}, "after": {...}}`, the inner mappings with
            `acc` and `acc_norm` as fractions and their `_stderr`, or `loss`. Each part may be missing.
        seconds: Wall time by what it went into, e.g. `{"training": 212.0, "evaluation": 95.0}`.
        compute: FLOPs, as `{"used": float, "full": float, "saved": fraction}`, and `validation` where there was any.

    Returns:
        Keys: steps_run, steps_planned, grace_steps, monitors, tau (smallest and largest, where the criterion has one),
        criterion (its name, where it is not the threshold alone), components, frozen,
        parameters, frozen_parameters, groups (one dict per group: group, components, frozen, first, last), and
        `evaluation`, `seconds` and `compute` as they were given, where they were.
    """
    frozen = history.frozen
    groups: dict[str, list[dict[str, Any]]] = {}
    for component in history.components:
        groups.setdefault(group_label(component), []).append(component)
    rows = []
    for label, members in groups.items():
        steps = sorted(frozen[member["name"]] for member in members if member["name"] in frozen)
        first, last = (steps[0], steps[-1]) if steps else (None, None)
        rows.append({"group": label, "components": len(members), "frozen": len(steps), "first": first, "last": last})
    taus = [component["tau"] for component in history.components if component["tau"] is not None]
    criterion = history.config.get("criterion", "threshold")
    summary: dict[str, Any] = {
        "steps_run": steps_run if steps_run is not None else max(history.steps, default=0),
        "steps_planned": history.total_steps,
        "grace_steps": history.t_grace,
        "monitors": list(dict.fromkeys(component["monitor"] for component in history.components)),
        **({"tau": [min(taus), max(taus)]} if taus else {}),
        **({"criterion": criterion} if criterion != "threshold" else {}),
        "components": len(history.components),
        "frozen": len(frozen),
        "parameters": sum(component["numel"] for component in history.components),
        "frozen_parameters": sum(c["numel"] for c in history.components if c["name"] in frozen),
        "groups": rows,
    }
    extras = {"evaluation": evaluation, "seconds": seconds, "compute": compute}
    return summary | {name: dict(value) for name, value in extras.items() if value}


def group_label(component: Mapping[str, Any]) -> str:
    """The group as people say it, with its tower where the model has several: `"vision attention"`."""
    return f"{component['tower']} {component['group']}" if component.get("tower") else str(component["group"])


def sentence(history: History) -> str:
    """How far a run has come, what is frozen and what that has saved, in one sentence; what is not known is left out.

    For example `"Step 57 of 90: 36 of 210 components are frozen (29% of their parameters), 0.2% of the compute so
    far saved, loss 2.31, 3.3 s a step, at most 1 min 48 s left."`
    """
    step, planned, frozen = last_step(history), history.total_steps, history.frozen
    head = {
        None: f"Step {step} of {planned}",
        "converged": f"Ended by GradES at step {step} of {planned}",
        "completed": f"Ended after all {planned} steps",
    }.get(history.ended, f"Stopped at step {step} of {planned}")
    share = sum(c["numel"] for c in history.components if c["name"] in frozen)
    share /= max(1, sum(component["numel"] for component in history.components))
    parts = [f"{len(frozen)} of {len(history.components)} components are frozen ({share:.0%} of their parameters)"]
    if savings := history.savings:
        when = "so far" if history.ended is None else "of these steps"
        parts.append(f"{1 - savings['used'] / savings['full']:.1%} of the compute {when} saved")
        if history.ended == "converged" and step < planned:
            parts[-1] += f" and {1 - savings['used'] / savings['planned']:.1%} of the planned"
    losses = [row["loss"] for row in history.logs if "loss" in row]
    if losses:
        parts.append(f"loss {losses[-1]:.4g}")
    seconds = seconds_per_step(history)
    if seconds is not None:
        parts.append(f"{seconds:.3g} s a step")
        if history.ended is None and step < planned:
            parts.append(f"at most {duration((planned - step) * seconds)} left")
    return f"{head}: {', '.join(parts)}."


def places(history: History) -> dict[str | None, dict[str, dict[int | None, list[dict[str, Any]]]]]:
    """The components by tower, projection (in PROJECTION_ORDER) and layer (None: outside of the layers).

    Several can share a place: the experts of a layer, or the attentions of a decoder.
    """
    order = {projection: index for index, projection in enumerate(PROJECTION_ORDER)}
    found: dict[str | None, dict[str, dict[int | None, list[dict[str, Any]]]]] = {}
    for c in sorted(history.components, key=lambda component: order.get(component["projection"], len(order))):
        found.setdefault(c.get("tower"), {}).setdefault(c["projection"], {}).setdefault(c["layer"], []).append(c)
    towers = dict.fromkeys(component.get("tower") for component in history.components)
    return {tower: found[tower] for tower in towers}


def last_step(history: History) -> int:
    """The last optimizer step that the record tells of; 0 before the first."""
    return int(max(history.steps[-1:] + [row["step"] for row in history.logs[-1:]], default=0))


def seconds_per_step(history: History) -> float | None:
    """Wall time of an optimizer step: over the whole run once it has ended, else over the last ten logs."""
    rows: list[dict[str, float]] = [{"step": 0, "seconds": 0.0}, *history.logs]
    first, last = rows[0 if history.ended else -11 :][0], rows[-1]
    steps = last["step"] - first["step"]
    return (last["seconds"] - first["seconds"]) / steps if steps else None


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The summary as (what, value) pairs of text, for a table on the terminal or in markdown.

    Args:
        summary: What `summarize` returns, or a dict with some of its keys: what is missing is left out.
    """
    rows = []
    if "steps_run" in summary:
        rows.append(("steps", f"{summary['steps_run']} of {summary['steps_planned']} planned"))
    if "components" in summary:
        share = summary["frozen_parameters"] / max(summary["parameters"], 1)
        rows.append(
            (
                "frozen",
                f"{summary['frozen']} of {summary['components']} components, {share:.0%} of their parameters",
            )
        )
    for group in summary.get("groups", ()):
        text = f"{group['frozen']} of {group['components']}"
        if group["frozen"]:
            text += f", first at step {group['first']}, last at step {group['last']}"
        rows.append((f"  {group['group']}", text))
    rows += _accuracy_rows(summary.get("evaluation") or {})
    if seconds := summary.get("seconds"):
        parts = ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
        rows.append(("time", parts))
    if compute := summary.get("compute"):
        text = f"{compute['saved']:.1%} ({compute['used']:.3g} of {compute['full']:.3g} FLOPs)"
        if compute.get("validation"):
            text += f", besides {compute['validation']:.3g} for validation"
        rows.append(("compute saved", text))
    return rows


def to_markdown(summary: Mapping[str, Any], title: str = "GradES run", notes: Mapping[str, str] | None = None) -> str:
    """The summary as a markdown page.

    Args:
        summary: What `summarize` returns.
        title: Heading of the page.
        notes: More rows for the table, in front: what the caller knows of model, data and options.
    """
    lines = [f"# {title}", "", "| | |", "|---|---|"]
    pairs = [*(notes or {}).items(), *table_rows(summary)]
    if not {"tau", "criterion"}.isdisjoint(summary):
        rule = [*summary["monitors"], *([f"criterion {summary['criterion']}"] if "criterion" in summary else [])]
        if "tau" in summary:
            low, high = summary["tau"]
            rule.append(f"tau {low:g}" + ("" if low == high else f" to {high:g}"))
        pairs.append(("statistic", f"{', '.join(rule)}, none frozen up to step {summary['grace_steps']}"))
    lines += [f"| {escape(what.strip())} | {escape(value)} |" for what, value in pairs]
    return "\n".join(lines) + "\n"


def _accuracy_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for metric in ("acc", "acc_norm"):
        parts = [
            f"{scores[metric]:.1%} ± {scores[f'{metric}_stderr']:.1%} {when}"
            for when in ("before", "after")
            if (scores := evaluation.get(when)) and metric in scores
        ]
        if parts:
            label = " ".join(filter(None, (evaluation.get("task"), metric)))
            rows.append((label, ", ".join(parts)))
    losses = [
        f"{scores['loss']:.4f} {when}"
        for when in ("before", "after")
        if "loss" in (scores := evaluation.get(when) or {})
    ]
    if losses:
        rows.append((" ".join(filter(None, (evaluation.get("task"), "loss"))), ", ".join(losses)))
    return rows


def duration(seconds: float) -> str:
    """Seconds as people say them: `"48 s"`, `"3 min 32 s"`, `"2 h 5 min"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def escape(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")
