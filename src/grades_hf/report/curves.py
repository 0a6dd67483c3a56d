"""Curves over the optimizer steps: the statistic, votes and looks, losses, step time, frozen fraction."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..record.history import History
from .charts import (
    MOST_POINTS,
    OKABE_ITO,
    Point,
    averaged,
    checks,
    color_of,
    end,
    end_of,
    grace,
    layered,
    load_altair,
    note,
    step_axis,
    thin,
)  # fmt: skip
from .summary import QUORUM, by_group, finite, group_label, last_step, losses, votes

AVERAGED, PRESENT = "with averaged weights", "with the weights as they are"
VERDICTS = ["said to go on", "ended the run"]


def plot_statistic(history: History) -> Any:
    """The statistic over the optimizer steps: by group, median (line) and quartiles (band) of what is not frozen yet.

    Thresholds are dashed lines in their group's colour (grey where all have the same), the grace period is shaded.
    """
    alt = load_altair()
    groups = by_group(history)
    points, number = _quartiles(history, groups)
    low, high = _value_range(history, [point[cut] for point in points for cut in ("low", "high")])
    color, dash = color_of(list(groups))
    base = alt.Chart(alt.Data(values=points))
    monitors = dict.fromkeys(component["monitor"].replace("_", " ") for component in history.components)
    form = "~g" if low >= 1e-3 and high < 1e5 else ".1~e"
    y = {
        "scale": alt.Scale(type="log", domain=[low, high], nice=False, clamp=True),
        "axis": alt.Axis(format=form, tickCount=6, labelOverlap="greedy"),
        "title": f"{' / '.join(monitors)} ({history.config.get('reduction', 'sum')})",
    }
    x = step_axis(end_of(history))
    hover = alt.selection_point(name="hover", on="pointerover", nearest=True, empty=False, clear="pointerout")
    cuts = [alt.Tooltip(f"{cut}:Q", title=title, format=".4~g") for cut, title in
            (("median", "median"), ("low", "lower quartile"), ("high", "upper quartile"))]  # fmt: skip
    dots = base.mark_point(filled=True, size=60, aria=False).encode(
        x=x, y=alt.Y("median:Q", **y), color=color,
        opacity=alt.value(1) if len(history.steps) < 3 else alt.condition(hover, alt.value(1), alt.value(0)),
        tooltip=["group:N", alt.Tooltip("step:Q", format=",d"), *cuts, alt.Tooltip("count:Q", title="matrices")],
    )  # fmt: skip
    layers = [
        *grace(history, note_it=True),
        base.mark_area(opacity=0.22, aria=False).encode(x=x, y=alt.Y("low:Q", **y), y2="high:Q", color=color),
        *_thresholds(groups, (low, high), y, color),
        base.mark_line(strokeWidth=2, aria=False).encode(x=x, y=alt.Y("median:Q", **y), color=color, strokeDash=dash),
        dots.add_params(hover),
        *end(history, note_it=True),
    ]
    if not points:
        layers.append(note("no values were measured", x=alt.value(150), y=alt.value(130)))
    some = f" {number:,} of {len(history.steps):,} checks are drawn." if number < len(history.steps) else ""
    dashed = " Dashed: threshold τ." if any(c["tau"] is not None for c in history.components) else ""
    live = " not frozen yet" if history.events or dashed else ""
    subtitle = f"Median (line) and quartiles (band) by group.{dashed}{some}"
    return layered(layers, (480, 300), f"Statistic of the matrices{live}", subtitle)


def plot_votes(history: History) -> Any:
    """The share of components that vote for a look, over the steps, with the looks and what each of them said."""
    alt = load_altair()
    shares = dict(votes(history))
    rows = [{"step": step, "share": share} for step, share in thin(list(shares.items()))]
    looks = [
        {"step": look["step"], "share": shares[look["step"]], "verdict": VERDICTS[bool(look["ended"])]}
        for look in history.looks
    ]
    axis = alt.Axis(format=".0%", values=[0, 0.25, 0.5, 0.75, 1])
    scale = alt.Scale(domain=[0, 1], nice=False)
    place = {"x": step_axis(end_of(history)), "y": alt.Y("share:Q", title="matrices that vote", scale=scale, axis=axis)}
    tooltip = [alt.Tooltip("step:Q", format=",d"), alt.Tooltip("share:Q", title="vote", format=".0%")]
    base = alt.Chart(alt.Data(values=rows))
    dots = base.mark_point(filled=True, size=50, aria=False, opacity=1 if len(rows) == 1 else 0)
    quorum = alt.Chart(alt.Data(values=[{"share": QUORUM}])).mark_rule(style="tau", aria=False)
    layers = [
        *grace(history),
        base.mark_area(style="plain", opacity=0.18, aria=False).encode(**place),
        base.mark_line(style="plain", strokeWidth=2, aria=False).encode(**place),
        dots.encode(**place, tooltip=tooltip),
        quorum.encode(y=place["y"], strokeDash=alt.value([5, 4])),
        *end(history, note_it=True),
    ]
    if looks:
        legend = alt.Legend(title="a look", orient="top", symbolSize=110)
        colors, shapes = (alt.Scale(domain=VERDICTS, range=range_) for range_ in
                          ([OKABE_ITO[4], OKABE_ITO[1]], ["circle", "diamond"]))  # fmt: skip
        mark = alt.Chart(alt.Data(values=looks)).mark_point(size=110, filled=True, opacity=1, aria=False).encode(
            **place, tooltip=[*tooltip, "verdict:N"], color=alt.Color("verdict:N", scale=colors, legend=legend),
            shape=alt.Shape("verdict:N", scale=shapes, legend=legend),
        )  # fmt: skip
        layers.append(mark)
    subtitle = f"A matrix votes while its gradient has risen. At {QUORUM:.0%} (dashed) held-out rows are looked at."
    return layered(layers, (480, 200), "Votes for a look", subtitle)


def plot_looks(history: History) -> Any:
    """The held-out loss of each look, with the weights as they were and with their average."""
    alt = load_altair()
    rows, most = [], max((look["rows"] for look in history.looks), default=0)
    for look in history.looks:
        margin = 3 * look["error"] if finite(look["error"]) else 0.0
        for which, loss, around in ((AVERAGED, look["average_loss"], margin), (PRESENT, look["loss"], 0.0)):
            if finite(loss):  # a look that saw the average improve did not need the other one
                box = {"low": loss - around, "high": loss + around}
                point = {"step": look["step"], "which": which, "loss": loss, "rows": look["rows"], **box}
                rows.append(point | {"opacity": 1 if look["rows"] == most else 0.45})
    x, axis = step_axis(end_of(history)), alt.Axis(format="~g", tickCount=5)
    y = {"title": "held-out loss", "axis": axis, "scale": alt.Scale(zero=False, padding=12)}
    legend = alt.Legend(title=None, orient="top", symbolSize=90, columns=1)
    domain = {"domain": [AVERAGED, PRESENT]}
    base = alt.Chart(alt.Data(values=rows))
    color = alt.Color("which:N", scale=alt.Scale(**domain), legend=legend)
    shape = alt.Shape("which:N", legend=legend, scale=alt.Scale(**domain, range=["circle", "square"]))
    tooltip = ["which:N", alt.Tooltip("step:Q", format=",d"), alt.Tooltip("loss:Q", format=".5~g"), "rows:Q"]
    opacity = alt.Opacity("opacity:Q", scale=None, legend=None)
    bars = base.mark_rule(strokeWidth=2, aria=False).transform_filter(f"datum.which === '{AVERAGED}'")
    dots = base.mark_point(filled=True, size=90, aria=False)
    layers = [
        bars.encode(x=x, y=alt.Y("low:Q", **y), y2="high:Q", color=color, opacity=opacity),
        dots.encode(x=x, y=alt.Y("loss:Q", **y), color=color, shape=shape, opacity=opacity, tooltip=tooltip),
    ]
    fewer = " Pale: fewer rows, whose mean is another." if any(row["opacity"] < 1 for row in rows) else ""
    subtitle = [
        f"Bar: three standard errors of the difference.{fewer}",
        "A look ends the run if its bar is below its square, and the square above the last look's circle.",
    ]
    return layered(layers, (480, 200), "What the looks saw", subtitle)


def plot_progress(history: History) -> dict[str, Any]:
    """Small charts over the steps: `"frozen"` (fraction), `"loss"` and `"step_time"`, as far as there is data."""
    charts, to, around = {}, end_of(history), (grace(history), end(history))
    if history.events:
        total, number = max(len(history.components), 1), 0
        fractions: dict[float, float] = {0: 0.0}
        for step, froze in sorted(Counter(history.frozen.values()).items()):
            number += froze
            fractions[step] = number / total
        fractions[last_step(history)] = number / total
        charts["frozen"] = lines(
            {"": list(fractions.items())}, to, "Frozen fraction", "part of the matrices", around=around, format=".0%",
            scale={"domain": [0, 1]}, interpolate="step-after",
        )  # fmt: skip
    if logged := losses(history):
        charts["loss"] = lines({"": logged}, to, "Training loss", "loss", around=around)
    times, before, seconds = [], 0.0, 0.0
    for row in history.logs:
        if row["step"] > before and row["seconds"] >= seconds:
            times.append((row["step"], (row["seconds"] - seconds) / (row["step"] - before)))
        before, seconds = row["step"], row["seconds"]
    if times:
        charts["step_time"] = lines({"": times}, to, "Step time", "seconds a step", around=around, scale={"zero": True})
    return charts


def lines(
    curves: Mapping[str, Sequence[Point]],
    to: int,
    title: str,
    y_title: str,
    *,
    around: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
    format: str = "~g",
    scale: Mapping[str, Any] | None = None,
    interpolate: str = "linear",
    size: tuple[int, int] = (300, 170),
) -> Any:
    """One curve for each label over the steps up to `to`, a dot where it ends; `around`: layers below and above."""
    alt = load_altair()
    most, thinned = max(50, MOST_POINTS // max(1, len(curves))), averaged if interpolate == "linear" else thin
    drawn = {label: list(thinned(points, most)) for label, points in curves.items()}
    rows = [{"run": label, "step": s, "value": v} for label, points in drawn.items() for s, v in points]
    ends = [{"run": label, "step": p[-1][0], "value": p[-1][1]} for label, p in drawn.items() if p]
    color, dash = color_of(list(curves), "run")
    several = len(curves) > 1
    style = {} if several else {"style": "plain"}
    axis, scale_ = alt.Axis(format=format, tickCount=4), alt.Scale(**(scale or {"zero": False}))
    encoding = {"x": step_axis(to), "y": alt.Y("value:Q", title=y_title, axis=axis, scale=scale_)}
    encoding |= {"color": color} if several else {}
    base = alt.Chart(alt.Data(values=rows)).encode(**encoding)
    tooltip = [alt.Tooltip("step:Q", format=",d"), alt.Tooltip("value:Q", title=y_title, format=".4~g")]
    tooltip = ["run:N", *tooltip] if several else tooltip
    line = base.mark_line(strokeWidth=2, aria=False, interpolate=interpolate, **style).encode(strokeDash=dash)
    dots = base.mark_point(filled=True, size=50, opacity=0, aria=False).encode(tooltip=tooltip)
    last = alt.Chart(alt.Data(values=ends)).mark_point(filled=True, size=45, opacity=1, aria=False, **style)
    last = last.encode(**encoding, tooltip=tooltip)
    return layered([*around[0], line, dots, last, *around[1]], size, title)


def _thresholds(
    groups: Mapping[str, Sequence[Mapping[str, Any]]], view: tuple[float, float], y: Mapping[str, Any], color: Any
) -> list[Any]:
    """Dashed lines for the thresholds within `view`; their values stand beside the chart, near ones together."""
    alt = load_altair()
    one = len({component["tau"] for members in groups.values() for component in members}) == 1
    rows: list[dict[str, Any]] = []
    for label, members in groups.items():
        for tau in sorted({member["tau"] for member in members if member["tau"] is not None}):
            kinds = dict.fromkeys(group_label(member, "projection") for member in members if member["tau"] == tau)
            rows.append({"group": label, "tau": tau, "of": "all" if one else ", ".join(kinds)})
    rows = [row for row in rows[: 1 if one else None] if view[0] <= row["tau"] <= view[1]]
    if not rows:
        return []
    tooltip = [alt.Tooltip("tau:Q", title="τ", format=".4~g"), alt.Tooltip("of:N", title="of")]
    rule = alt.Chart(alt.Data(values=rows)).mark_rule(style="tau", aria=False)
    rule = rule.encode(y=alt.Y("tau:Q", **y), tooltip=tooltip, strokeDash=alt.value([5, 4]))  # else the legend has it
    apart, together = (view[1] / view[0]) ** (1 / 20), list[list[float]]()
    for tau in sorted({row["tau"] for row in rows}):
        if together and tau / together[-1][-1] < apart:
            together[-1].append(tau)
        else:
            together.append([tau])
    labels = [
        {"tau": math.sqrt(taus[0] * taus[-1]), "text": f"τ {taus[0]:.3g}" + (f" to {taus[-1]:.3g}" if taus[1:] else "")}
        for taus in together
    ]
    text = alt.Chart(alt.Data(values=labels)).mark_text(style="note", align="left", baseline="middle", dx=5, aria=False)
    text = text.encode(x=alt.value("width"), y=alt.Y("tau:Q", **y), text="text:N")
    return [rule if one else rule.encode(color=color), text]


def _value_range(history: History, values: Sequence[float]) -> tuple[float, float]:
    """What the axis of the statistic shows: all values, and the thresholds that are within two decades of them."""
    taus = [component["tau"] for component in history.components if component["tau"] is not None]
    if values:
        taus = [tau for tau in taus if min(values) / 100 <= tau <= max(values) * 100]
    shown = [*values, *taus] or [1.0]
    low, high = min(shown), max(shown)
    margin = max(high / low, 1.5)
    return max(low / margin**0.05, 5e-324), high * margin**0.18  # room for the notes


def _quartiles(history: History, groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], int]:
    """By group, at each step that has a value which a logarithmic axis can show: the quartiles, and of how many.

    The second is the number of checks that were looked at.
    """
    import numpy as np

    steps, values = checks(history, max(50, 3 * MOST_POINTS // max(3, len(groups))))
    rows: list[dict[str, Any]] = []
    for label, members in groups.items():
        table = np.full((len(members), len(steps)), math.nan)
        for row, member in zip(table, members, strict=True):
            series = np.asarray(values[member["name"]], dtype=np.float64)[: len(steps)]
            row[: len(series)] = series
        table[~((table > 1e-300) & (table < 1e300))] = math.nan
        for column, step in enumerate(steps):
            found = table[:, column][~np.isnan(table[:, column])]
            if len(found):
                low, middle, high = np.quantile(found, (0.25, 0.5, 0.75)).tolist()
                cuts = {"low": low, "median": middle, "high": high, "count": len(found)}
                rows.append({"group": label, "step": int(step), **cuts})
    return rows, len(steps)
