"""Tables and the figure of the race (`benchmarks/results/race.json`), for `python -m benchmarks.page`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from benchmarks.race_tasks import SETTINGS

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]

# Arm -> what it is; in the order of the tables.
ARMS = {
    "full": "all steps of the schedule",
    "stop at 0.3": "the same schedule, ended after 0.3 of the steps",
    "stop at 0.5": "the same, after 0.5",
    "stop at 0.7": "the same, after 0.7",
    "short": "a schedule of half the steps",
    "es": "early stopping as in the paper: validation every 5 % of the steps on all rows that are set aside, the third "
    "in a row without progress of 0.0005 ends the run, best weights",
    "es, rows of a look": "the same with no more rows than a look has",
    "schedule alone": "the default without the gradients: looks on the schedule only",
    "average, no look": "ends where the gradients of half of the components have risen to 1.5 times their minimum, and "
    "returns the average",
    "old default": "the same vote, and the last weights: the default of grades-hf 0.1",
    "look, last weights": 'the default with `return_weights="last"`',
    "threshold": "the paper's method, with a tau chosen for 0.7 of the compute on a run with another seed; alpha 0.5",
    "peer": "the PyPI package `grades` 1.0.6, its tau chosen likewise",
    "default": "`GradESConfig()`",
}
# Those of the figure.
MAIN = ("es", "short", "old default", "default")
NEAR, PART, MOST = 0.02, 0.75, 12  # the goals: loss above that of es, part of its compute, looks


@dataclass(frozen=True)
class Outcome:
    """What an arm does in a setting, as means over seeds; differences are to the full budget of the same seed.

    Attributes:
        error: Standard error of `loss`: over seeds; of one seed, over the rows of the test.
        accuracy: None where there is none.
        runs: Seed -> its difference in loss.
        row_errors: Seed -> the standard error of that over the rows of the test, where it is known.
        looks: Of each run.
    """

    loss: float
    error: float
    accuracy: float | None
    accuracy_error: float
    end: float
    compute: float
    runs: dict[int, float]
    row_errors: dict[int, float]
    looks: list[int]

    @property
    def worse(self) -> bool:
        """Than the full budget by more than two standard errors, in loss or accuracy."""
        return beyond(self.loss, self.error) or (self.accuracy or 0) < -2 * self.accuracy_error - 1e-9

    @property
    def wrong(self) -> list[int]:
        """Seeds whose own run is worse by more than two standard errors over the rows of the test."""
        return [s for s, d in self.runs.items() if s in self.row_errors and beyond(d, self.row_errors[s])]


def beyond(difference: float, error: float) -> bool:
    """Whether it is greater than 0 by more than two standard errors."""
    return difference > 2 * error + 1e-9


def outcomes(rows: Iterable[Row]) -> dict[str, dict[str, Outcome]]:
    """Setting -> arm -> what came of it."""
    by: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        by.setdefault((row["setting"], row["arm"]), {})[row["seed"]] = row
    found: dict[str, dict[str, Outcome]] = {}
    for (setting, arm), own in by.items():
        full = by[setting, "full"]
        own = {seed: row for seed, row in sorted(own.items()) if seed in full}
        if not own:
            continue
        losses = {seed: row["loss"] - full[seed]["loss"] for seed, row in own.items()}
        right = [row["accuracy"] - full[seed]["accuracy"] for seed, row in own.items() if "accuracy" in row]
        errors = {seed: row["error"] for seed, row in own.items() if "error" in row}
        error = standard_error(list(losses.values()))
        found.setdefault(setting, {})[arm] = Outcome(
            loss=statistics.fmean(losses.values()),
            error=next(iter(errors.values()), math.nan) if math.isnan(error) else error,
            accuracy=statistics.fmean(right) if right else None,
            accuracy_error=standard_error(right),
            end=statistics.fmean(row["end"] for row in own.values()),
            compute=statistics.fmean(row["compute"] for row in own.values()),
            runs=losses,
            row_errors=errors,
            looks=[row["looks"] for row in own.values()],
        )
    return found


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN of fewer than two values."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


# --- tables: heads and lines -----------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def losses(found: Mapping[str, Mapping[str, Outcome]], settings: Sequence[str], full: Mapping[str, float]) -> Table:
    """An arm a line, a setting a column: loss minus that of the full budget, and compute."""
    settings = [setting for setting in settings if setting in found]
    lines = [["full, its loss", *(f"{full[setting]:.3f}" for setting in settings)]]
    for arm in list(ARMS)[1:]:
        outcomes_ = [found[setting].get(arm) for setting in settings]
        if any(outcomes_):
            lines.append([named(arm), *("" if o is None else cell(o) for o in outcomes_)])
    return ["arm", *settings], lines


def cell(outcome: Outcome) -> str:
    text = f"{outcome.loss:+.3f} ± {outcome.error:.3f} for {outcome.compute:.2f}"
    return f"**{text}**" if beyond(outcome.loss, outcome.error) else text


def named(arm: str) -> str:
    return "**default**" if arm == "default" else arm


def accuracies(found: Mapping[str, Mapping[str, Outcome]], full: Mapping[str, float]) -> Table:
    """A setting a line, an arm a column: accuracy minus that of the full budget, in points."""
    arms = [arm for arm in list(ARMS)[1:] if arm not in ("threshold", "peer")]
    lines = []
    for setting, own in found.items():
        if own["full"].accuracy is None:
            continue
        cells = []
        for arm in arms:
            outcome = own[arm]
            assert outcome.accuracy is not None
            text = f"{100 * outcome.accuracy:+.1f} ± {100 * outcome.accuracy_error:.1f}"
            cells.append(f"**{text}**" if outcome.accuracy < -2 * outcome.accuracy_error - 1e-9 else text)
        lines.append([setting, f"{100 * full[setting]:.1f} %", *cells])
    return ["setting", "full", *map(named, arms)], lines


def ends(found: Mapping[str, Mapping[str, Outcome]]) -> Table:
    """A setting a line: where the default ends, how often it looked, and what it and early stopping cost."""
    lines = []
    for setting, own in found.items():
        default, es = own["default"], own["es"]
        few, many = min(default.looks), max(default.looks)
        looks = f"{few}" if few == many else f"{few} to {many}"
        parts = [f"{part:.2f}" for part in (default.compute, es.compute)]
        lines.append([setting, f"{len(default.runs)}", f"{default.end:.2f}", looks, *parts])
    return ["setting", "seeds", "end of the default", "looks", "compute", "compute of `es`"], lines


def worst(found: Mapping[str, Mapping[str, Outcome]]) -> Table:
    """An arm a line: its worst setting, its worst run, how often it is worse than the full budget, mean compute."""
    lines = []
    for arm in list(ARMS)[1:]:
        own = {setting: arms[arm] for setting, arms in found.items() if arm in arms}
        if not own:
            continue
        setting = max(own, key=lambda name: own[name].loss)
        run = max(max(o.runs.values()) for o in own.values())
        points = {name: o.accuracy for name, o in own.items() if o.accuracy is not None}
        lowest = min(points, key=lambda name: points[name]) if points else ""
        accuracy = f"{100 * points[lowest]:+.1f} ({lowest})" if points and points[lowest] < 0 else "never worse"
        lines.append(
            [
                named(arm),
                f"{own[setting].loss:+.3f} ({setting})" if own[setting].loss > 0 else "never worse",
                f"{run:+.3f}",
                accuracy if points else "",
                f"{sum(o.worse for o in own.values())} of {len(own)}",
                f"{statistics.fmean(o.compute for o in own.values()):.2f}",
            ]
        )
    heads = ["arm", "worst setting, loss", "worst run, loss", "worst setting, accuracy in points"]
    return [*heads, "settings worse by 2 standard errors", "mean compute"], lines


def goals(rows: Sequence[Row]) -> list[tuple[str, list[str], int]]:
    """Each goal of the race: in words, what misses it, and in how many cases it was asked."""
    found = outcomes(rows)
    loss = {(row["setting"], row["arm"], row["seed"]): row["loss"] for row in rows}
    worse, wrong, behind, dear, often = [], [], [], [], []
    helped = [s for s, own in found.items() if beyond(-own["es"].loss, own["es"].error)]
    runs = 0
    for setting, own in found.items():
        default = own["default"]
        runs += len(default.runs)
        if default.worse:
            worse.append(f"{setting} ({difference(default)})")
        for seed in default.wrong:
            wrong.append(f"{setting}, seed {seed} ({default.runs[seed]:+.3f} ± {default.row_errors[seed]:.3f})")
        if max(default.looks) > MOST:
            often.append(f"{setting} ({max(default.looks)})")
        if setting in helped:
            gaps = [loss[setting, "default", seed] - loss[setting, "es", seed] for seed in default.runs]
            gap, error = statistics.fmean(gaps), standard_error(gaps)
            error = math.hypot(default.error, own["es"].error) if math.isnan(error) else error
            if gap > NEAR and beyond(gap, error):
                behind.append(f"{setting} ({gap:+.3f} ± {error:.3f})")
            part = default.compute / own["es"].compute
            if part >= PART:
                dear.append(f"{setting} ({part:.2f})")
    return [
        ("The default is worse than the full budget by more than two standard errors in no setting", worse, len(found)),
        (f"It is within {NEAR} or two standard errors of `es` wherever that helps", behind, len(helped)),
        (f"It takes less than {PART} of the compute of `es` wherever that helps", dear, len(helped)),
        (f"It looks at most {MOST} times", often, len(found)),
        ("No single run is worse than the full budget by more than two standard errors of its test rows", wrong, runs),
    ]


def meaning(rows: Sequence[Row]) -> str:
    """What the race means for the reader, as a Markdown list: where it helps, what it costs, and what is no better."""
    found = outcomes(rows)
    helped = [own for own in found.values() if beyond(-own["es"].loss, own["es"].error)]
    runs = sum(len(own["default"].runs) for own in found.values())
    ended = [own["default"].compute - 1 for own in found.values() if own["default"].end == 1]
    most, dearest = max((own["default"].compute - own["default"].end, setting) for setting, own in found.items())
    worse, gain, cost, whole = (
        {arm: of(arm) for arm in ("default", "schedule alone", "es")}
        for of in (
            lambda arm: sum(own[arm].worse for own in found.values()) or "none",
            lambda arm: f"{statistics.fmean(-own[arm].loss for own in helped):.2f}",
            lambda arm: f"{statistics.fmean(own[arm].compute for own in helped):.2f}",
            lambda arm: f"{statistics.fmean(own[arm].compute for own in found.values()):.2f}",
        )
    )
    points = (
        f"**It was safe where it was tried.** Of {len(found)} settings ({runs} runs), the default was worse than all "
        f"planned steps in {worse['default']}. Early stopping with twenty full validations was worse in {worse['es']}.",
        f"**It helps where a model overfits.** In the {len(helped)} settings where early stopping helps, the default "
        f"lowers the test loss by {gain['default']} on average, for {cost['default']} of the full run's compute. Early "
        f"stopping lowers it by {gain['es']}, for {cost['es']}.",
        f"**It costs something where a model does not overfit.** Where all planned steps were made, the looks "
        f"add {100 * min(ended):.0f} to {100 * max(ended):.0f} % to them. The shorter the run, the more: at most "
        f"{100 * most:.0f} % of the full compute, in {dearest}.",
        f"**The gradients add little.** The arm `schedule alone` looks at fixed times and measures no gradient. It was "
        f"worse than all planned steps in {worse['schedule alone']}. Where early stopping helps, it lowers the test "
        f"loss by {gain['schedule alone']} for {cost['schedule alone']} of the compute. Over all settings it takes "
        f"{whole['schedule alone']}, and the default {whole['default']}. What makes the default safe is the look.",
        "**Where validation is cheap beside training, validate.** With a hundred held-out rows and thousands of steps, "
        "early stopping costs no more than looks, and may end sooner.",
    )
    return "What this means for you:\n\n" + "".join(f"- {point}\n" for point in points)


def passes(runs: Sequence[dict[str, Any]]) -> float:
    """How often all held-out rows pass through the model in a look, in the mean of the runs that no look has ended."""
    found = [
        look["rows"] / SETTINGS[run["key"]["setting"]].looks * (1 + (look["loss"] is not None))
        for run in runs
        if run["looks"] and not run["looks"][-1]["ended"]
        for look in run["looks"]
    ]
    return statistics.fmean(found)


def difference(outcome: Outcome) -> str:
    text = f"{outcome.loss:+.3f} ± {outcome.error:.3f}"
    if outcome.accuracy is not None:
        text += f", {100 * outcome.accuracy:+.1f} ± {100 * outcome.accuracy_error:.1f} points"
    return text


def goal_lines(rows: Sequence[Row]) -> str:
    """The goals as a Markdown list, each miss named."""
    lines = []
    for goal, misses, asked in goals(rows):
        missed = f"**missed in {len(misses)} of {asked}**: {'; '.join(misses)}."
        lines.append(f"- {goal}: {missed if misses else f'holds, in {asked}.'}")
    return "\n".join(lines) + "\n"


def extent(rows: Sequence[Row], settings: Sequence[str]) -> str:
    """How much of the race has been run, in a paragraph."""
    seeds: dict[str, set[int]] = {}
    for row in rows:
        seeds.setdefault(row["setting"], set()).add(row["seed"])
    numbers = sorted({len(own) for own in seeds.values()})
    each = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    runs = sum(len(own) for own in seeds.values())
    text = f"{len(seeds)} settings, {each} seed{'s' * (numbers[-1] > 1)} each, {runs} runs."
    missing = [setting for setting in settings if setting not in seeds]
    absent = [arm for arm in ARMS if arm not in {row["arm"] for row in rows}]
    for what, names in (("settings", missing), ("arms", absent)):
        if names:
            text += f" **Not run yet are the {what} {', '.join(names)}.**"
    if numbers[0] < 2:
        text += " Of a setting with one seed, the standard error is that over the test rows."
    return text + "\n"


def full_budget(rows: Iterable[Row], what: str) -> dict[str, float]:
    """Setting -> mean loss or accuracy of the full budget."""
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] == "full" and what in row:
            values.setdefault(row["setting"], []).append(row[what])
    return {setting: statistics.fmean(own) for setting, own in values.items()}


# --- the figure ------------------------------------------------------------------------------------------------------


def figure(rows: Sequence[Row], folder: Path) -> None:
    """Draw race.png: loss and compute of the main arms, a setting a line."""
    from grades_hf.report.charts import save_chart, theme

    marks = []
    found = outcomes(rows)
    for setting, own in found.items():
        for arm in MAIN:
            o = own[arm]
            ends = {"low": o.loss - 2 * o.error, "high": o.loss + 2 * o.error}
            marks.append({"setting": setting, "arm": arm, "difference": o.loss, "compute": o.compute, **ends})
    domain = alt.Scale(domain=list(MAIN))
    color = alt.Color("arm:N", scale=domain, legend=alt.Legend(title=None, orient="bottom"))
    shape = alt.Shape("arm:N", scale=domain)
    base = alt.Chart(alt.Data(values=marks))
    y = alt.Y("setting:N", sort=list(found), title=None, axis=alt.Axis(labelLimit=260, grid=True))
    scale = alt.Scale(type="symlog", constant=0.05)
    ticks = alt.Axis(values=[-2, -1, -0.5, -0.2, -0.05, 0, 0.05, 0.2, 0.5, 1, 2], format="+.2~f", labelOverlap=True)
    x = alt.X("difference:Q", scale=scale, axis=ticks, title="test loss minus that of the full budget")

    def line(at: float) -> Any:
        return alt.Chart(alt.Data(values=[{"x": at}])).mark_rule(opacity=0.6).encode(x="x:Q")

    points = {"size": 70, "filled": True, "opacity": 0.9}
    left = alt.layer(
        line(0),
        base.mark_rule(opacity=0.6).encode(x="low:Q", x2="high:Q", y=y, color=color),
        base.mark_point(**points).encode(x=x, y=y, color=color, shape=shape),
    ).properties(width=330, height=22 * len(found), title="Loss: further left is better")
    right = alt.layer(
        line(1),
        base.mark_point(**points).encode(
            x=alt.X("compute:Q", title="compute, full budget = 1"),
            y=alt.Y("setting:N", sort=list(found), title=None, axis=alt.Axis(labels=False, ticks=False, grid=True)),
            color=color,
            shape=shape,
        ),
    ).properties(width=250, height=22 * len(found), title="Compute: further left is cheaper")
    chart = alt.hconcat(left, right).properties(
        title=alt.TitleParams(
            "What ending early costs and saves",
            subtitle="Means over seeds; bars of two standard errors. The scale of the loss is linear near 0 only.",
        )
    )
    folder.mkdir(exist_ok=True)
    save_chart(chart.configure(**theme()), folder / "race.png")
