"""Tables and figures of the race (`benchmarks/results/race.json`), for `python -m benchmarks.page`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.arms import MIN_DELTA, PATIENCE
from benchmarks.race import CANDIDATES, CONFOUNDERS, EVERY, REGIMES, STEPS, STOPS
from grades_hf import GradESConfig
from grades_hf.report.plots import save_chart, theme

Row = dict[str, Any]
LABELS = {"full": "all weights", "lora": "LoRA"}
# Those of the figure; the table has all.
MAIN = ("stop", "short", "es", "peer", "threshold", "budget", "default", "one by one", "no_new_minimum")


def outcomes(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """(regime, method) -> arm -> one row a seed, in one order of seeds; `stop` and `es` are read off the full runs."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["seed"]):
        if row["regime"] in REGIMES and row["arm"] != "thresholds":
            arms = found[row["regime"], row["method"]]
            arms[row["arm"]].append(row)
            if row["arm"] == "none":
                for part in STOPS:
                    arms[f"stop at {part:g}"].append({**row, **stopped(row, part)})
                arms["es"].append({**row, **early_stopped(row)})
                arms["best of the run"].append({**row, **best(row)})
    return found


def stopped(row: Row, part: float) -> Row:
    """The same schedule, ended after a part of the steps: the full run up to there."""
    step, _, loss = next(entry for entry in row["trace"] if entry[0] >= part * STEPS)
    return {"loss": loss, "compute": step / STEPS}


def early_stopped(row: Row) -> Row:
    """Early stopping as in the paper, with the weights of the best validation: every 5 % of the steps, 3 in a row."""
    lowest, loss, waiting = float("inf"), float("nan"), 0
    end, validations = STEPS, len(row["trace"])
    for number, (step, validation, test) in enumerate(row["trace"], start=1):
        waiting = 0 if validation < lowest - MIN_DELTA else waiting + 1  # as EarlyStoppingCallback counts
        if validation < lowest:
            lowest, loss = validation, test
        if waiting == PATIENCE:
            end, validations = step, number
            break
    return {"loss": loss, "compute": (end + validations * row["validation"]) / STEPS}


def best(row: Row) -> Row:
    """The checkpoint of the lowest test loss: no method knows it, so it is no arm but a bound."""
    step, _, loss = min(row["trace"], key=lambda entry: entry[2])
    return {"loss": loss, "compute": step / STEPS}


def against_full(rows: Sequence[Row], full: Sequence[Row]) -> tuple[float, float, float]:
    """Mean over seeds of the loss less that of the full budget with the same seed, its standard error, mean compute."""
    pairs = {row["seed"]: row["loss"] for row in full}
    differences = [row["loss"] - pairs[row["seed"]] for row in rows]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return statistics.fmean(differences), error, statistics.fmean(row["compute"] for row in rows)


def order() -> list[str]:
    """The arms of the tables."""
    stops = [f"stop at {part:g}" for part in STOPS]
    return [*stops, "short", "es", "peer", *CANDIDATES, "best of the run"]


def table(rows: Sequence[Row], method: str) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: an arm a line, a regime a column."""
    found = outcomes(rows)
    heads, lines = ["arm", *REGIMES], []
    for arm in order():
        cells = []
        for regime in REGIMES:
            arms = found[regime, method]
            if not arms[arm]:
                cells.append("")
                continue
            difference, error, compute = against_full(arms[arm], arms["none"])
            text = f"{difference:+.4f} ± {error:.4f} for {compute:.2f}"
            cells.append(f"**{text}**" if difference > 2 * error + 1e-9 else text)
        lines.append([f"`{arm}`" if arm in CANDIDATES or arm in ("short", "es", "peer") else arm, *cells])
    full = []
    for regime in REGIMES:
        losses = [row["loss"] for row in found[regime, method]["none"]]
        full.append(f"{statistics.fmean(losses):.4f}" if losses else "")
    return heads, [["full budget, its loss", *full], *lines]


def confounders(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines."""
    found = {row["regime"]: row for row in rows if row["arm"] == "confounder"}
    lines = [
        [name, f"{100 * found[name]['rise']:.0f} %", f"{100 * found[name]['votes']:.0f} %"]
        for name in CONFOUNDERS
        if name in found
    ]
    return ["first epoch, with", "highest mean rise", "components that rose by 50 %, at most"], lines


def figures(rows: Sequence[Row], folder: Path) -> None:
    """Draw statistic.png and race.png."""
    found = outcomes(rows)
    for name, chart in (("statistic", _statistic(found)), ("race", _race(found))):
        save_chart(chart.configure(**theme()), folder / f"{name}.png")


def _statistic(found: dict[tuple[str, str], dict[str, list[Row]]]) -> Any:
    """Test loss, and below it the statistic of the runs in which nothing froze; a regime a column."""
    points: list[dict[str, Any]] = []
    for (regime, method), arms in found.items():
        ends = [row["steps"] for row in arms["default"] if row["steps"] < STEPS]
        point = {"regime": regime, "method": LABELS[method], "end": statistics.fmean(ends) if ends else None}
        for step in range(1, STEPS + 1):
            values = [row["statistic"][step - 1] for row in arms["none"]]
            ratios = [value[0] for value in values if value is not None]
            if ratios:
                points.append({**point, "step": step, "what": "statistic", "value": statistics.fmean(ratios)})
            if step % EVERY == 0:
                losses = [entry[2] for row in arms["none"] for entry in row["trace"] if entry[0] == step]
                points.append({**point, "step": step, "what": "loss", "value": statistics.fmean(losses)})
    color = alt.Color("method:N", title=None, legend=alt.Legend(orient="bottom"))

    def panel(regime: str, what: str, title: str) -> Any:
        own = [point for point in points if (point["regime"], point["what"]) == (regime, what)]
        base = alt.Chart(alt.Data(values=own))
        x = alt.X("step:Q", title="optimizer step" if what == "statistic" else None, scale=alt.Scale(domain=[0, STEPS]))
        y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
        layers = [
            base.mark_line(strokeWidth=2).encode(x=x, y=y, color=color),
            base.mark_rule(strokeDash=[4, 3]).encode(x="end:Q", color=color),
        ]
        if what == "statistic":
            limit = alt.Chart(alt.Data(values=[{"y": 1 + GradESConfig().rise}]))
            layers.append(limit.mark_rule(strokeDash=[2, 2], opacity=0.6).encode(y="y:Q"))
        return alt.layer(*layers).properties(width=230, height=150, title=regime if what == "loss" else "")

    return alt.vconcat(
        alt.hconcat(*(panel(regime, "loss", "test loss") for regime in REGIMES)),
        alt.hconcat(*(panel(regime, "statistic", "statistic by its minimum") for regime in REGIMES)),
    ).properties(
        title=alt.TitleParams(
            "What the statistic does while nothing is frozen",
            subtitle="Means over seeds and matrices. Dashed: where the default ends. Dotted: risen by half.",
        )
    )


def _race(found: dict[tuple[str, str], dict[str, list[Row]]]) -> Any:
    """Loss against compute; a regime a column, a method a row."""
    marks = []
    for (regime, method), arms in found.items():
        for arm, own in arms.items():
            name = "stop" if arm.startswith("stop") else arm
            if name in MAIN and own:
                difference, error, compute = against_full(own, arms["none"])
                ends = {"low": difference - 2 * error, "high": difference + 2 * error}
                mark = {"regime": regime, "method": method, "arm": name, "difference": difference, "compute": compute}
                marks.append({**mark, **ends})
    domain = alt.Scale(domain=list(MAIN))
    color = alt.Color("arm:N", scale=domain, legend=alt.Legend(title=None, orient="bottom", columns=5))

    def panel(regime: str, method: str) -> Any:
        own = [mark for mark in marks if (mark["regime"], mark["method"]) == (regime, method)]
        base = alt.Chart(alt.Data(values=own))
        x = alt.X("compute:Q", title="compute, full budget = 1", scale=alt.Scale(zero=True))
        points = base.mark_point(size=90, filled=True, opacity=1)
        return alt.layer(
            alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule(opacity=0.5).encode(y="y:Q"),
            base.mark_rule().encode(x=x, y="low:Q", y2="high:Q", color=color),
            points.encode(
                x=x,
                y=alt.Y("difference:Q", title="loss less that of the full budget"),
                color=color,
                shape=alt.Shape("arm:N", scale=domain),
            ),
        ).properties(width=230, height=170, title=f"{regime}, {LABELS[method]}")

    rows = (alt.hconcat(*(panel(regime, method) for regime in REGIMES)) for method in LABELS)
    return alt.vconcat(*rows).properties(
        title=alt.TitleParams(
            "Loss against compute",
            subtitle="Means over seeds, bars of two standard errors; lower and further left is better.",
        )
    )
