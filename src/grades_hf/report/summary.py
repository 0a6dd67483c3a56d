"""A run in a few numbers and sentences: what froze when, what the looks said, what was saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from ..record.history import History

# As data flows through a block; anything else follows in the order of the model.
PROJECTION_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
QUORUM = 0.5  # the share of votes at which a look is due (ending/ending.py, which imports torch)


def visible(text: str) -> str:
    """`text` with its control characters as text, so that a terminal shows them and does not obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def group_label(component: Mapping[str, Any], by: str = "group") -> str:
    """The group (or the projection) as people say it, with its tower where there are several: `"vision attention"`."""
    tower = component.get("tower")
    return visible(f"{tower} {component[by]}" if tower else str(component[by]))


def by_group(history: History) -> dict[str, list[dict[str, Any]]]:
    """The components by the label of their group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for component in history.components:
        groups.setdefault(group_label(component), []).append(component)
    return groups


def has_thresholds(history: History) -> bool:
    """Whether matrices freeze at a tau; else a look at held-out rows decides when the run ends."""
    return any(component["tau"] is not None for component in history.components) or bool(history.events)


def finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def losses(history: History) -> list[tuple[float, float]]:
    """Step and training loss of each log that has one."""
    return [(row["step"], row["loss"]) for row in history.logs if finite(row.get("loss"))]


def votes(history: History) -> list[tuple[float, float]]:
    """Step and share of votes of each log that has one, and of each look."""
    shares = {row["step"]: float(row["votes"]) for row in history.logs if finite(row.get("votes"))}
    shares |= {look["step"]: look["votes"] / max(1, look["components"]) for look in history.looks}
    return sorted(shares.items())


def saved(history: History) -> tuple[float, str] | None:
    """The part of the FLOPs that was saved, and of which FLOPs; None where they were not counted."""
    savings = history.savings
    if not savings or not (savings["full"] > 0 and savings["planned"] > 0):
        return None
    if history.ended is None:
        return 1 - savings["used"] / savings["full"], "of the FLOPs so far, counted"
    return 1 - savings["used"] / savings["planned"], "of the planned FLOPs, counted"


def ended_by_look(history: History) -> bool:
    """Whether a look has ended the run."""
    return bool(history.looks) and bool(history.looks[-1]["ended"])


def last_step(history: History) -> int:
    """The last optimizer step that the record tells of; 0 before the first."""
    looked = [look["step"] for look in history.looks[-1:]]
    return int(max([*list(history.steps[-1:]), *(row["step"] for row in history.logs[-1:]), *looked], default=0))


def sentence(history: History) -> str:
    """How far a run has come and what has come of it, in one sentence; what is not known is left out.

    For example `"Step 57 of 90: 36 of 210 components are frozen (29% of their parameters), 0.2% of the compute so
    far saved, loss 2.31, 3.3 s a step, at most 1 min 48 s left."`
    """
    step, planned = last_step(history), history.total_steps
    head = {
        None: f"Step {step} of {planned}",
        "converged": f"Ended by GradES at step {step} of {planned}",
        "look": f"Ended by a look at step {step} of {planned}",
        "completed": f"Ended after all {planned} steps",
    }.get("look" if ended_by_look(history) else history.ended, f"Stopped at step {step} of {planned}")
    names, numel = history.frozen, sum(component["numel"] for component in history.components)
    share = sum(c["numel"] for c in history.components if c["name"] in names) / max(1, numel)
    frozen = f"{len(names):,} of {len(history.components):,} components are frozen ({share:.0%} of their parameters)"
    parts = [frozen if has_thresholds(history) else looks_part(history)]
    savings = history.savings
    if savings and (found := saved(history)):
        early = history.ended in ("converged", "look") and step < planned
        part = savings["full"] and 1 - savings["used"] / savings["full"]
        if has_thresholds(history):
            parts.append(f"{part:.1%} of the compute {'so far' if history.ended is None else 'of these steps'} saved")
            if early:
                parts[-1] += f" and {found[0]:.1%} of the planned"
        elif early:
            parts.append(f"{found[0]:.1%} of the planned compute saved")
    if logged := losses(history):
        parts.append(f"loss {logged[-1][1]:.4g}")
    seconds = seconds_per_step(history)
    if seconds is not None:
        parts.append(f"{seconds:.3g} s a step")
        if history.ended is None and step < planned:
            parts.append(f"at most {duration((planned - step) * seconds)} left")
    return f"{head}: {', '.join(parts)}."


def looks_part(history: History) -> str:
    """How many components vote, and what the looks at held-out rows have said."""
    parts = [f"{share:.0%} of the components vote for a look" for _, share in votes(history)[-1:]]
    looks = history.looks
    if looks:
        said = (
            "the last one ended the run"
            if looks[-1]["ended"]
            else f"{'it' if len(looks) == 1 else 'each'} said to go on"
        )
        parts = [
            f"{len(looks)} look{'s' if len(looks) > 1 else ''} at held-out rows, {said} ({look_losses(looks[-1])})"
        ]
    elif history.ended is None:
        parts.append("no look so far")
    else:
        parts = ["no look was proposed"]
    return ", ".join(parts)


def look_losses(look: Mapping[str, Any]) -> str:
    """The losses of a look: of the averaged weights, and where it was computed that of the weights themselves."""
    if not finite(look["average_loss"]):
        return "no row has a finite loss"
    without = f", {look['loss']:.4g} without" if finite(look["loss"]) else ""
    return f"loss {look['average_loss']:.4g} with averaged weights{without}"


LOOK_HEADS = ("step", "votes", "rows", "averaged", "change", "present", "difference", "verdict")
LOOKS_NOTE = (
    "Losses of held-out rows: with averaged weights; its change since the last look, over the rows of both; with the "
    "weights as they are (present); averaged minus present ± standard error. What a look did not need is left empty."
)


def look_rows(history: History) -> Sequence[tuple[str, ...]]:
    """Each look as text under `LOOK_HEADS`: its losses, with averaged weights and with the present weights."""
    rows = []
    for look in history.looks:
        error = f" ± {look['error']:.4f}" if finite(look["error"]) else ""
        voted, verdict = f"{look['votes']:,} of {look['components']:,}", "end" if look["ended"] else "go on"
        difference = f"{look['difference']:+.4f}{error}" if finite(look["difference"]) else ""
        forms = {"average_loss": ".4f", "since": "+.4f", "loss": ".4f"}
        losses = (f"{look[key]:{form}}" if finite(look.get(key)) else "" for key, form in forms.items())
        rows.append((f"{look['step']:,}", voted, f"{look['rows']:,}", *losses, difference, verdict))
    return rows


def rule(history: History) -> str:
    """What is measured, and what it decides, in one line."""
    monitors = visible(", ".join(dict.fromkeys(component["monitor"] for component in history.components)))
    taus = sorted({component["tau"] for component in history.components if component["tau"] is not None})
    if taus or history.events:
        tau = [f"tau {taus[0]:g}" if len(taus) == 1 else f"tau {taus[0]:g} to {taus[-1]:g}"] if taus else []
        when = f"freezing from step {history.t_grace + 1} of {history.total_steps} on"
        return ", ".join([monitors, *tau, when]) + "."
    rise = history.config.get("rise")
    over = f"{rise:.0%} over its own minimum" if finite(rise) else "well over its own minimum"
    return (
        f"{monitors}: a matrix votes while this statistic, smoothed, is {over} (more after each look that votes have "
        "brought). Held-out rows are looked at when half of the matrices vote, and now and then in any case."
    )


def summarize(history: History, *, steps_run: int | None = None, **extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """The run as a dict that JSON can hold.

    Args:
        history: What GradES recorded.
        steps_run: Optimizer steps that were run; default: the last one that the record tells of.
        extras: What the caller knows besides (evaluation, seconds, compute); kept as it is where there is any.

    Returns:
        Keys: steps_run, steps_planned, grace_steps, monitors, tau (smallest and largest, where there is one), looks
        (how many, and `ended`, whether the last one ended the run; where nothing freezes), components, frozen,
        parameters, frozen_parameters, groups (one dict per group: group, components, frozen, first, last), and extras.
    """
    frozen, rows = history.frozen, []
    for label, members in by_group(history).items():
        steps = sorted(frozen[member["name"]] for member in members if member["name"] in frozen)
        first, last = (steps[0], steps[-1]) if steps else (None, None)
        rows.append({"group": label, "components": len(members), "frozen": len(steps), "first": first, "last": last})
    taus = [component["tau"] for component in history.components if component["tau"] is not None]
    looks = {"number": len(history.looks), "ended": ended_by_look(history)}
    summary: dict[str, Any] = {
        "steps_run": steps_run if steps_run is not None else last_step(history),
        "steps_planned": history.total_steps,
        "grace_steps": history.t_grace,
        "monitors": list(dict.fromkeys(component["monitor"] for component in history.components)),
        **({"tau": [min(taus), max(taus)]} if taus else {}),
        **({} if has_thresholds(history) else {"looks": looks}),
        "components": len(history.components),
        "frozen": len(frozen),
        "parameters": sum(component["numel"] for component in history.components),
        "frozen_parameters": sum(c["numel"] for c in history.components if c["name"] in frozen),
        "groups": rows,
    }
    return summary | {name: dict(value) for name, value in extras.items() if value}


def facts(history: History) -> list[tuple[str, str]]:
    """The run as (what, value) pairs of text, for a table."""
    freezes, summary = has_thresholds(history), summarize(history)
    after = f"; freezing after {history.t_grace}" if freezes else ""
    rows = [("steps", f"{summary['steps_run']} of {history.total_steps} planned{after}")]
    for group in summary["groups"]:
        when = f", first at step {group['first']}, last at step {group['last']}" if group["frozen"] else ""
        number = f"{group['frozen']} of {group['components']} frozen{when}"
        rows.append((group["group"], number if freezes else f"{group['components']} matrices"))
    if found := saved(history):
        rows.append(("compute saved", f"{found[0]:.1%} {found[1]}"))
    if history.versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in history.versions.items())))
    return rows


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


def step_tables(history: History, frozen: Mapping[str, int]) -> Iterator[tuple[str | None, list[list[str]]]]:
    """For each tower its name and a table of layers by matrices, heads first, with the steps of freezing (`CELLS`)."""
    for tower, columns in places(history).items():
        layers = sorted({layer for column in columns.values() for layer in column if layer is not None})
        outside: list[int | None] = [None] if any(None in column for column in columns.values()) else []
        rows = [["layer", *map(visible, columns)]]
        for layer in [*layers, *outside]:
            cells = [_cell(column.get(layer, ()), frozen) for column in columns.values()]
            rows.append(["outside" if layer is None else str(layer), *cells])
        yield tower, rows


CELLS = "A number is the step at which the matrix freezes, - one that does not; k/n: k of n matrices in this place do."


def _cell(components: Sequence[Mapping[str, Any]], frozen: Mapping[str, int]) -> str:
    steps = sorted(frozen[component["name"]] for component in components if component["name"] in frozen)
    if not steps:
        return "-" if components else ""
    span = str(steps[0]) if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
    return span if len(steps) == len(components) else f"{len(steps)}/{len(components)}: {span}"


def seconds_per_step(history: History) -> float | None:
    """Wall time of an optimizer step: over the whole run once it has ended, else over the last ten logs."""
    rows: list[dict[str, float]] = [{"step": 0, "seconds": 0.0}, *history.logs]
    first, last = rows[0 if history.ended else -11 :][0], rows[-1]
    steps = last["step"] - first["step"]
    return (last["seconds"] - first["seconds"]) / steps if steps > 0 else None


def to_markdown(summary: Mapping[str, Any], title: str = "GradES run") -> str:
    """What `summarize` returns as a table in Markdown."""
    rows = [(name.replace("_", " "), str(value)) for name, value in summary.items() if name != "groups"]
    rows += [(row["group"], f"{row['frozen']} of {row['components']} frozen") for row in summary.get("groups", ())]
    return f"# {escape(title)}\n\n{markdown_table(('', ''), rows)}\n"


def duration(seconds: float) -> str:
    """Seconds as people say them: `"48 s"`, `"3 min 32 s"`, `"2 h 5 min"`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def escape(text: str) -> str:
    """Text for a cell of a Markdown table: neither Markdown nor HTML is made of it."""
    for mark, instead in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("`", "&#96;")):
        text = text.replace(mark, instead)
    for mark in "|[]":
        text = text.replace(mark, f"\\{mark}")
    return visible(text).replace("\n", " ").replace("\t", " ")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, every cell escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in lines)
