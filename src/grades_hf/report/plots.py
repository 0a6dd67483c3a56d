"""Figures of a run, for notebooks and files. They need the extra `plots`.

All functions raise an ImportError that says so where Altair is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..record.history import History
from .charts import Point, load_altair, save_chart, theme
from .curves import lines, look_chart, progress, statistic, vote_chart
from .freezing_map import freezing_map
from .summary import losses, votes

if TYPE_CHECKING:
    from altair import HConcatChart, LayerChart

__all__ = [
    "all_plots", "plot_freezing_map", "plot_looks", "plot_losses", "plot_run", "plot_statistic", "plot_votes",
    "save_chart", "theme",
]  # fmt: skip


def plot_run(history: History, path: str | os.PathLike[str] | None = None) -> HConcatChart:
    """The statistic, and beside it what came of it: when each matrix froze, or the votes for a look.

    Args:
        history: What GradES recorded.
        path: Where to save it; the ending decides the format (.png, .svg, .pdf, .html). Default: not saved.

    Returns:
        The chart, which a notebook shows.

    Raises:
        ValueError: `path` has another ending.
    """
    left = statistic(history)
    if history.events or not votes(history):
        right = freezing_map(history)
        left = left.properties(height=max(260, min(right.height, 420)))
    else:
        right = vote_chart(history).properties(height=left.height)
    chart: HConcatChart = load_altair().hconcat(left, right, spacing=40).resolve_scale(color="independent")
    chart = chart.configure(**theme())
    if path is not None:
        save_chart(chart, path)
    return chart


def plot_statistic(history: History) -> LayerChart:
    """The statistic over the optimizer steps: by group, median (line) and quartiles (band) of what is not frozen yet.

    Thresholds are dashed lines in their group's colour (grey where all have the same), the grace period is shaded.
    Of more than a thousand checks every k-th is drawn.
    """
    chart: LayerChart = statistic(history).configure(**theme())
    return chart


def plot_freezing_map(history: History) -> LayerChart:
    """Layers by matrices, a cell for each component, coloured by the step at which it froze; crossed grey: never.

    Components that share a place (the experts of a layer) are cells of a small grid in it, row by row; where there are
    thousands, a cell stands for all of a place.
    """
    chart: LayerChart = freezing_map(history).configure(**theme())
    return chart


def plot_votes(history: History) -> LayerChart:
    """The share of components that vote for a look, over the steps, with the looks and what each of them said."""
    chart: LayerChart = vote_chart(history).configure(**theme())
    return chart


def plot_looks(history: History) -> LayerChart:
    """The held-out loss of each look, with the weights as they were and with their average."""
    chart: LayerChart = look_chart(history).configure(**theme())
    return chart


def plot_losses(
    runs: Mapping[str, History | Sequence[Point]], title: str = "Training loss", *, total_steps: int | None = None
) -> LayerChart:
    """The losses of several runs in one chart, a dot where each one ends.

    Args:
        runs: Label -> a history, whose logs are taken, or pairs of optimizer step and loss.
        title: The title.
        total_steps: Where the axis of steps ends; default: with the longest plan, or the last step.
    """
    curves = {label: losses(run) if isinstance(run, History) else list(run) for label, run in runs.items()}
    planned = [run.total_steps for run in runs.values() if isinstance(run, History)]
    last = max([step for points in curves.values() for step, _ in points], default=1)
    to = total_steps or max([int(last), *planned])
    chart: LayerChart = lines(curves, to, title, "loss", size=(480, 260)).configure(**theme())
    return chart


def all_plots(history: History) -> dict[str, Any]:
    """Every plot of a run that there is data for, by the name of its file, the most telling first."""
    charts: dict[str, Any] = {}
    if history.events:
        charts["freezing_map"] = freezing_map(history)
    if votes(history):
        charts["votes"] = vote_chart(history)
    if history.looks:
        charts["looks"] = look_chart(history)
    charts["statistic"] = statistic(history)
    charts |= progress(history)
    return {name: chart.configure(**theme()) for name, chart in charts.items()}
