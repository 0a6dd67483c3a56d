"""A run in a few numbers: what froze and when, and what the caller knows besides (accuracy, time, compute)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..history import History


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
        Keys: steps_run, steps_planned, grace_steps, monitors, tau (smallest and largest), components, frozen,
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
    taus = [component["tau"] for component in history.components]
    summary: dict[str, Any] = {
        "steps_run": steps_run if steps_run is not None else max(history.steps, default=0),
        "steps_planned": history.total_steps,
        "grace_steps": history.t_grace,
        "monitors": list(dict.fromkeys(component["monitor"] for component in history.components)),
        "tau": [min(taus), max(taus)],
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
        parts = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items())
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
    if "tau" in summary:
        low, high = summary["tau"]
        tau = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        pairs.append(
            (
                "statistic",
                f"{', '.join(summary['monitors'])}, tau {tau}, none frozen up to step {summary['grace_steps']}",
            )
        )
    lines += [f"| {_escape(what.strip())} | {_escape(value)} |" for what, value in pairs]
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


def _duration(seconds: float) -> str:
    """Seconds as people say them: `"48 s"`, `"3 min 32 s"`, `"2 h 5 min"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
