"""Ways of training compared: quality and cost of each over seeds, as a table in the paper's shape, and a figure.

The figure shows quality against compute and marks the ways that no other one dominates: none is at least as good for
at most as many FLOPs, and better in one of both.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from grades_hf.report.charts import load_altair, save_chart, theme

if TYPE_CHECKING:
    from altair import LayerChart

AVERAGE = "average"
# Of a results.json: what the quality of a run is, and whether more of it is better.
METRICS = {"acc_norm": True, "acc": True, "loss": False}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `error` is its standard error, NaN where there is one seed only."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of one value a seed."""
        error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(mean(values), error)

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Way:
    """One way of training; all but `seeds` are means over seeds.

    Attributes:
        arm: Its name.
        seeds: How many runs of each task.
        quality: Benchmark -> quality; also their average, as `"average"`.
        steps: Steps that were made; `planned` ones. Sums over the tasks that are trained one by one, like all below.
        training: FLOPs of training.
        validation: FLOPs of validation during training.
        seconds: Wall time: `training`, `validation`, `saving`.
    """

    arm: str
    seeds: int
    quality: dict[str, Estimate]
    steps: float
    planned: float
    training: float
    validation: float
    seconds: dict[str, float]

    @property
    def compute(self) -> float:
        """FLOPs of training and validation; NaN where they were not counted."""
        return self.training + self.validation


def compare(runs: Iterable[Mapping[str, Any]], metric: str) -> list[Way]:
    """The runs of a grid, summed up.

    Args:
        runs: Each with `arm`, `task`, `seed` and `results`: the content of its results.json.
        metric: `"acc"`, `"acc_norm"` or `"loss"`.

    Returns:
        One entry an arm that has at least one seed with all tasks, in the order of `runs`. Seeds that lack a task are
        left out, so that every mean of an arm is over the same seeds.

    Raises:
        ValueError: a run has no such metric, or a task was run twice with one seed.
    """
    grid: dict[str, dict[Any, dict[str, Mapping[str, Any]]]] = {}
    tasks: list[str] = []
    for run in runs:
        cells = grid.setdefault(run["arm"], {}).setdefault(run["seed"], {})
        if run["task"] in cells:
            raise ValueError(f"arm {run['arm']!r} has {run['task']} with seed {run['seed']} twice.")
        cells[run["task"]] = run["results"]
        if run["task"] not in tasks:
            tasks.append(run["task"])
    ways = []
    for arm, by_seed in grid.items():
        whole = [cells for cells in by_seed.values() if len(cells) == len(tasks)]
        if not whole:
            continue
        scores = [_scores([cells[task] for task in tasks], metric) for cells in whole]

        def total(*keys: str, whole: list[dict[str, Mapping[str, Any]]] = whole, missing: float = 0.0) -> float:
            return mean(sum(_at(results, keys, missing) for results in cells.values()) for cells in whole)

        ways.append(
            Way(
                arm=arm,
                seeds=len(whole),
                quality={name: Estimate.of([score[name] for score in scores]) for name in scores[0]},
                steps=total("steps_run"),
                planned=total("steps_planned"),
                training=total("compute", "used", missing=math.nan),
                validation=total("compute", "validation"),
                seconds={name: total("seconds", name) for name in ("training", "validation", "saving")},
            )
        )
    return ways


def non_dominated(ways: Sequence[Way], metric: str) -> set[str]:
    """The arms that no other arm dominates by the average quality and the compute; none where it was not counted."""
    if any(math.isnan(way.compute) for way in ways):
        return set()
    sign = 1 if METRICS[metric] else -1
    points = {way.arm: (sign * way.quality[AVERAGE].value, -way.compute) for way in ways}
    return {
        arm
        for arm, point in points.items()
        if not any(
            other != point and all(theirs >= own for theirs, own in zip(other, point, strict=True))
            for other in points.values()
        )
    }


def comparison_rows(ways: Sequence[Way], metric: str) -> list[dict[str, Any]]:
    """One row an arm, with plain numbers (FLOPs, seconds; qualities as they are in results.json)."""
    best = non_dominated(ways, metric)
    rows = []
    for way in ways:
        row: dict[str, Any] = {"arm": way.arm, "seeds": way.seeds}
        for name, estimate in way.quality.items():
            row |= {f"{name} {metric}": estimate.value, f"{name} {metric} standard error": estimate.error}
        row |= {"steps": way.steps, "steps planned": way.planned}
        row |= {"training FLOPs": way.training, "validation FLOPs": way.validation}
        row |= {f"{name} seconds": seconds for name, seconds in way.seconds.items()}
        rows.append(row | {"non-dominated": way.arm in best})
    return rows


def comparison_csv(ways: Sequence[Way], metric: str) -> str:
    """`comparison_rows` as CSV; an empty field is a number that there is none of."""
    rows = comparison_rows(ways, metric)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["arm"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: "" if isinstance(v, float) and math.isnan(v) else v for key, v in row.items()})
    return text.getvalue()


def comparison_table(ways: Sequence[Way], metric: str) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table in the paper's shape: an arm a row, a benchmark a column, and what it cost.

    Accuracies are in percent; their average is left out where there is one benchmark only. FLOPs are also given as
    parts of the largest arm's.
    """
    percent = METRICS[metric]
    names = [] if not ways else list(ways[0].quality)
    if len(names) == 2:  # the average of one benchmark is that benchmark
        names.remove(AVERAGE)
    heads = ["arm", "seeds", *(f"{name} {metric}{' (%)' if percent else ''}" for name in names), "steps"]
    heads += ["training FLOPs", "validation FLOPs", "compute", "training s", "validation s", "saving s"]
    largest = max((way.compute for way in ways), default=math.nan)
    rows = []
    for way in ways:
        cells = [way.arm, str(way.seeds)]
        for name in names:
            estimate = way.quality[name]
            scaled = Estimate(100 * estimate.value, 100 * estimate.error) if percent else estimate
            error = "" if math.isnan(scaled.error) else f" ± {scaled.error:.{2 if percent else 4}f}"
            cells.append(f"{scaled.value:.{2 if percent else 4}f}{error}")
        cells.append(f"{way.steps:.0f} of {way.planned:.0f}")
        cells += [_number(way.training), _number(way.validation), _number(way.compute / largest, ".1%")]
        rows.append(cells + [f"{way.seconds[name]:.1f}" for name in ("training", "validation", "saving")])
    return heads, rows


def comparison_markdown(ways: Sequence[Way], metric: str) -> str:
    """`comparison_table` as markdown. Bold: not dominated."""
    best = non_dominated(ways, metric)
    heads, rows = comparison_table(ways, metric)
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for arm, *cells in rows:
        lines.append("| " + " | ".join([f"**{arm}**" if arm in best else arm, *cells]) + " |")
    return "\n".join(lines) + "\n"


def plot_comparison(ways: Sequence[Way], metric: str, path: str | os.PathLike[str] | None = None) -> LayerChart:
    """The average quality against the compute, standard errors as bars; a line joins what is not dominated.

    Args:
        ways: What `compare` returns.
        metric: As there.
        path: Where to save it; the ending decides the format (.png, .svg, .pdf, .html). Default: not saved.

    Raises:
        ValueError: there is nothing to show, the FLOPs of an arm were not counted, or `path` has another ending.
        ImportError: altair is not installed.
    """
    if not ways or any(math.isnan(way.compute) for way in ways):
        missing = ", ".join(way.arm for way in ways if math.isnan(way.compute)) or "no arm is finished"
        raise ValueError(f"the figure needs the FLOPs of every arm, and has them not ({missing}).")
    alt = load_altair()
    best = non_dominated(ways, metric)
    percent = METRICS[metric]
    scale = 100 if percent else 1
    points = []
    for way in ways:
        estimate = way.quality[AVERAGE]
        error = 0.0 if math.isnan(estimate.error) else scale * estimate.error
        value = scale * estimate.value
        points.append(
            {
                "arm": way.arm, "compute": way.compute, "quality": value, "low": value - error, "high": value + error,
                "best": way.arm in best, "text": str(Estimate(value, estimate.error * scale)),
            }
        )  # fmt: skip
    arms = [way.arm for way in ways]
    x = alt.X(
        "compute:Q",
        title="FLOPs of training and validation, counted",
        axis=alt.Axis(format="~s", tickCount=5),
        scale=alt.Scale(zero=False, padding=24),
    )
    title = f"{metric}{' (%), more' if percent else ', less'} is better"
    y = {"title": title, "axis": alt.Axis(format="~g", tickCount=6)}
    y["scale"] = alt.Scale(zero=False, padding=18, reverse=not percent)  # better is up
    # Shapes besides colours: more arms than colours, and print.
    legend = alt.Legend(title=None, orient="bottom", columns=4, symbolSize=110)
    color = alt.Color("arm:N", scale=alt.Scale(domain=arms), legend=legend)
    shape = alt.Shape("arm:N", scale=alt.Scale(domain=arms), legend=legend)
    base = alt.Chart(alt.Data(values=points))
    front = base.transform_filter("datum.best").mark_line(style="front", aria=False)
    marks = base.mark_point(size=130, strokeWidth=2, opacity=1).encode(
        x=x, y=alt.Y("quality:Q", **y), color=color, shape=shape,
        fillOpacity=alt.condition("datum.best", alt.value(1), alt.value(0)), fill=color,
        tooltip=["arm:N", alt.Tooltip("compute:Q", title="FLOPs", format=".4~s"), alt.Tooltip("text:N", title=metric)],
    )  # fmt: skip
    seeds = sorted({way.seeds for way in ways})
    of = "One seed" if seeds == [1] else f"Mean over {' to '.join(map(str, seeds))} seeds with standard error"
    chart: LayerChart = (
        alt.layer(
            front.encode(x=x, y=alt.Y("quality:Q", **y), order="compute:Q"),
            base.mark_rule(strokeWidth=1.5, aria=False).encode(x=x, y=alt.Y("low:Q", **y), y2="high:Q", color=color),
            marks,
        )
        .properties(
            width=520,
            height=340,
            title=alt.TitleParams(
                "Quality against compute", subtitle=f"{of}. Filled, joined: no other one is better for less."
            ),
            description=f"Scatter plot of {title} against the FLOPs, of {', '.join(arms)}.",
        )
        .configure(**theme())
    )
    if path is not None:
        save_chart(chart, path)
    return chart


def _scores(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Benchmark -> quality of one seed, and their average; a mixture of tasks counts as its benchmarks."""
    scores: dict[str, float] = {}
    for result in results:
        evaluation = result["evaluation"]
        after = evaluation.get("after", {})
        if metric not in after:
            raise ValueError(
                f"a run of {evaluation['task']} was not measured by {metric!r}; it has {', '.join(after)}."
            )
        for name, part in after.get("tasks", {evaluation["task"]: after}).items():
            if name in scores:
                raise ValueError(f"{name} is measured in two tasks of the grid; name it in one.")
            scores[name] = float(part[metric])
    return {**scores, AVERAGE: mean(scores.values())}


def _at(results: Mapping[str, Any], keys: tuple[str, ...], missing: float) -> float:
    value: Any = results
    for key in keys:
        if key not in value:
            return missing
        value = value[key]
    return float(value)


def _number(value: float, form: str = ".3g") -> str:
    return "not counted" if math.isnan(value) else format(value, form)
