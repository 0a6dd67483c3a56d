"""Figures of a run: the statistic over the steps, and a map of when each matrix froze. Needs the extra `plots`.

Colours are the Okabe-Ito palette and cividis, which people with colour blindness can tell apart; what never froze is
hatched besides, so that it also shows in black and white.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from ..history import History
from .summary import group_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
NEVER = "#E4E4E4"
# Left to right in the map, as data flows through a block; anything else follows in the order of the model.
PROJECTION_ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")


def plot_run(history: History, path: str | os.PathLike[str] | None = None) -> Figure:
    """Both figures side by side.

    Args:
        history: What GradES recorded.
        path: Where to save it; the ending decides the format (.png, .pdf, .svg). Default: not saved.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    make_figure = figure_type()
    columns, rows = grid_of(history)
    height = min(max(4.6, 1.8 + 0.13 * len(rows)), 12.0)
    figure = make_figure(figsize=(7.2 + min(max(5.0, 1.6 + 0.36 * len(columns)), 12.0), height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(7.2, figure.get_figwidth() - 7.2))
    plot_statistic(history, left)
    plot_freezing_map(history, right)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def plot_statistic(history: History, ax: Axes | None = None) -> Axes:
    """The statistic over the optimizer steps: by group, median (line) and quartiles (band) of what is not frozen yet.

    Thresholds are dashed lines in their group's colour (grey where all have the same), the grace period is shaded.

    Args:
        history: What GradES recorded.
        ax: Axes to draw on; default: those of a new figure.
    """
    make_figure = figure_type()
    from matplotlib.ticker import LogFormatter

    ax = ax or make_figure(figsize=(7.2, 4.6), layout="constrained").subplots()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for component in history.components:
        groups.setdefault(group_label(component), []).append(component)
    taus = {component["tau"] for component in history.components}
    for index, (label, members) in enumerate(groups.items()):
        color = OKABE_ITO[index % len(OKABE_ITO)]
        style = LINE_STYLES[index // len(OKABE_ITO) % len(LINE_STYLES)]
        steps, low, middle, high = _quartiles(history, [member["name"] for member in members])
        if steps:
            marker = "o" if len(steps) == 1 else None
            ax.plot(steps, middle, color=color, linestyle=style, marker=marker, linewidth=1.8, label=label)
            ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        if len(taus) > 1:
            for tau in sorted({member["tau"] for member in members}):
                ax.axhline(tau, color=color, linestyle=(0, (4, 3)), linewidth=1.1)
    if len(taus) == 1:
        ax.axhline(next(iter(taus)), color="#555555", linestyle=(0, (4, 3)), linewidth=1.1)
    ax.plot([], [], color="#555555", linestyle=(0, (4, 3)), linewidth=1.1, label="threshold tau")
    if history.t_grace:
        ax.axvspan(0, history.t_grace, color="#F0EDE4", zorder=0, linewidth=0, label="grace period")
    last = max(history.steps, default=0)
    if 0 < last < history.total_steps:
        ax.axvline(last, color="#999999", linewidth=0.8)
        ax.annotate(
            "training ended", (last, 0), xycoords=("data", "axes fraction"), xytext=(3, 4), textcoords="offset points",
            ha="left", va="bottom", fontsize=8, color="#666666", rotation=90,
        )  # fmt: skip
    if not last:
        ax.text(0.5, 0.5, "no values were measured", transform=ax.transAxes, ha="center", va="center")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter())
    ax.set_xlim(0, max(history.total_steps, last, 1))
    monitors = dict.fromkeys(component["monitor"].replace("_", " ") for component in history.components)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(f"{' / '.join(monitors)} ({history.config.get('reduction', 'sum')})")
    ax.set_title("Statistic of the matrices not frozen yet: median, quartiles", fontsize=11, loc="left")
    ax.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=9, frameon=True, framealpha=0.85, edgecolor="none", ncols=1 + len(groups) // 6)
    return ax


def plot_freezing_map(history: History, ax: Axes | None = None) -> Axes:
    """Layers by matrices, coloured by the step at which each froze; hatched grey: never.

    Where several components share a place (the experts of a layer), the colour is the mean step of those that froze,
    and a dot says that some did not.

    Args:
        history: What GradES recorded.
        ax: Axes to draw on; default: those of a new figure.
    """
    make_figure = figure_type()
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import MaxNLocator

    ax = ax or make_figure(figsize=(6.0, 4.6), layout="constrained").subplots()
    columns, rows = grid_of(history)
    cells: dict[tuple[int, int], list[int | None]] = {}
    frozen = history.frozen
    for component in history.components:
        place = (columns.index(_column(component)), rows.index(component["layer"]))
        cells.setdefault(place, []).append(frozen.get(component["name"]))
    low, high = history.t_grace + 1, max(history.total_steps, history.t_grace + 2)
    scale = ScalarMappable(Normalize(low, high), "cividis")
    colors = scale.cmap
    edge: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.3 if len(rows) > 40 else 1.0}
    for (column, row), steps in cells.items():
        known = [step for step in steps if step is not None]
        corner = (column - 0.5, row - 0.5)
        if known:
            ax.add_patch(
                Rectangle(corner, 1, 1, facecolor=colors((sum(known) / len(known) - low) / (high - low)), **edge)
            )
            if len(known) < len(steps):
                ax.plot(column, row, marker="o", markersize=3, color="white", markeredgecolor="black")
        else:
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=NEVER, hatch="////", **edge))
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(-0.5, len(rows) - 0.5)
    many = len(columns) > 9 or max(len(label) for label in columns) > 6
    ax.set_xticks(range(len(columns)), columns, rotation=90 if many else 0, fontsize=8 if len(columns) > 16 else 9)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=min(12, max(len(rows), 1)), integer=True, min_n_ticks=1))
    if None in rows:  # the last row holds what lies outside the blocks
        shown = [i for i in range(len(rows) - 1) if i % max(1, len(rows) // 10) == 0]
        ax.set_yticks([*shown, len(rows) - 1], [*(str(rows[i]) for i in shown), "none"])
    elif rows != list(range(len(rows))):
        shown = [i for i in range(len(rows)) if i % max(1, len(rows) // 10) == 0]
        ax.set_yticks(shown, [str(rows[i]) for i in shown])
    ax.set_ylabel("layer")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"When each matrix froze ({len(frozen)} of {len(history.components)})", fontsize=11, loc="left")
    bar = ax.figure.colorbar(scale, ax=ax, pad=0.02)
    bar.set_label("optimizer step")
    bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    bar.outline.set_visible(False)
    if any(None in steps and not any(steps) for steps in cells.values()):
        never = Patch(facecolor=NEVER, hatch="////", edgecolor="white", label="never frozen")
        ax.legend(
            handles=[never],
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=9,
            frameon=False,
            borderpad=0,
        )
    return ax


def figure_type() -> type[Figure]:
    """matplotlib's Figure, imported when it is needed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'grades-hf[plots]'.") from error
    return Figure


def _quartiles(history: History, names: list[str]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps with at least one positive value of these components, and the three quartiles there."""
    steps, cuts = [], []
    for index, step in enumerate(history.steps):
        values = [series[index] for name in names if len(series := history.values[name]) > index]
        values = [value for value in values if math.isfinite(value) and value > 0]
        if values:
            steps.append(step)
            cuts.append(quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3)
    low, middle, high = ([cut[part] for cut in cuts] for part in range(3))
    return steps, low, middle, high


def _column(component: Mapping[str, Any]) -> str:
    """Label of a component's column in the map."""
    tower = component.get("tower")
    return f"{tower} {component['projection']}" if tower else str(component["projection"])


def grid_of(history: History) -> tuple[list[str], list[int | None]]:
    """Columns (matrix kinds, by tower, in PROJECTION_ORDER) and rows (layers, then None for what is in no layer)."""
    towers = list(dict.fromkeys(component.get("tower") for component in history.components))
    kinds = list(dict.fromkeys(component["projection"] for component in history.components))
    order = [kind for kind in PROJECTION_ORDER if kind in kinds] + [k for k in kinds if k not in PROJECTION_ORDER]
    keys = {(component.get("tower"), component["projection"]): _column(component) for component in history.components}
    columns = [keys[tower, kind] for tower in towers for kind in order if (tower, kind) in keys]
    layers = {component["layer"] for component in history.components}
    rows: list[int | None] = sorted(layer for layer in layers if layer is not None)
    return columns, rows + ([None] if None in layers else [])
