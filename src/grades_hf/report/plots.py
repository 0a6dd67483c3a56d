"""Figures of a run, for notebooks and files. They need the extra `plots`, and raise an ImportError that says so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..record.history import History
from .charts import Point, load_altair, save_chart, theme
from .curves import lines, plot_looks, plot_progress, plot_statistic, plot_votes
from .freezing_map import plot_freezing_map
from .summary import losses, votes

__all__ = ["all_plots", "plot_freezing_map", "plot_looks", "plot_losses", "plot_run", "plot_statistic", "plot_votes"]


def plot_run(history: History, path: str | os.PathLike[str] | None = None) -> Any:
    """The statistic, and beside it what came of it: when each matrix froze, or the votes for a look.

    Args:
        history: What GradES recorded.
        path: Where to save it; the ending decides the format (.png, .svg, .pdf, .html). Default: not saved.

    Returns:
        The chart, which a notebook shows.

    Raises:
        ValueError: `path` has another ending.
    """
    alt, left = load_altair(), plot_statistic(history)
    if history.events or not votes(history):
        right = plot_freezing_map(history)
        left = left.properties(height=max(260, min(right.height, 420)))
    else:
        right = plot_votes(history).properties(height=left.height)
    left.config = right.config = alt.Undefined  # only the whole may have one
    chart = alt.hconcat(left, right, spacing=40).resolve_scale(color="independent").configure(**theme())
    if path is not None:
        save_chart(chart, path)
    return chart


def plot_losses(
    runs: Mapping[str, History | Sequence[Point]], title: str = "Training loss", *, total_steps: int | None = None
) -> Any:
    """The losses of several runs in one chart, a dot where each one ends.

    Args:
        runs: Label -> a history, whose logs are taken, or pairs of optimizer step and loss.
        title: The title.
        total_steps: Where the axis of steps ends; default: with the longest plan, or the last step.
    """
    curves = {label: losses(run) if isinstance(run, History) else list(run) for label, run in runs.items()}
    ends = [run.total_steps for run in runs.values() if isinstance(run, History)]
    ends += [int(step) for points in curves.values() for step, _ in points[-1:]]
    return lines(curves, total_steps or max(ends, default=1), title, "loss", size=(480, 260))


def all_plots(history: History) -> dict[str, Any]:
    """Every plot of a run that there is data for, by the name of its file, the most telling first."""
    charts = {"freezing_map": plot_freezing_map(history)} if history.events else {}
    if votes(history):
        charts["votes"] = plot_votes(history)
    if history.looks:
        charts["looks"] = plot_looks(history)
    return {**charts, "statistic": plot_statistic(history), **plot_progress(history)}
