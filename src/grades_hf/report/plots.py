"""Plots of a run: the map of when each matrix froze, the statistic, and how training went. Needs the extra `plots`.

One description (Vega-Lite, by Altair) serves notebooks, files for papers and the HTML page. Colours are the Okabe-Ito
palette and viridis, which people with colour blindness can tell apart; what never froze is crossed out besides, so
that it also shows in black and white. Colours of text, lines and areas are named styles of `theme`, not of the plots:
the page swaps them when it turns dark.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any, TypeVar

from ..history import History
from .summary import PROJECTION_ORDER, group_label, last_step

if TYPE_CHECKING:
    from altair import HConcatChart, LayerChart

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ([1, 0], [6, 2], [2, 2])  # where there are more groups than colours
FORMATS = (".png", ".svg", ".pdf", ".html")
MOST_POINTS = 1000  # of a line
T = TypeVar("T")


def plot_run(history: History, path: str | os.PathLike[str] | None = None) -> HConcatChart:
    """The statistic and the freezing map side by side.

    Args:
        history: What GradES recorded.
        path: Where to save it; the ending decides the format (.png, .svg, .pdf, .html). Default: not saved.

    Returns:
        The chart, which a notebook shows.

    Raises:
        ImportError: altair is not installed.
        ValueError: `path` has another ending.
    """
    freezing_map = _freezing_map(history)
    statistic = _statistic(history).properties(height=max(260, min(freezing_map.height, 420)))
    chart: HConcatChart = load_altair().hconcat(statistic, freezing_map, spacing=40).configure(**theme())
    if path is not None:
        save_chart(chart, path)
    return chart


def plot_statistic(history: History) -> LayerChart:
    """The statistic over the optimizer steps: by group, median (line) and quartiles (band) of what is not frozen yet.

    Thresholds are dashed lines in their group's colour (grey where all have the same), the grace period is shaded.
    Of more than a thousand checks every k-th is drawn.

    Raises:
        ImportError: altair is not installed.
    """
    chart: LayerChart = _statistic(history).configure(**theme())
    return chart


def plot_freezing_map(history: History) -> LayerChart:
    """Layers by matrices, a cell for each component, coloured by the step at which it froze; crossed grey: never.

    Components that share a place (the experts of a layer) are cells of a small grid in it, row by row.

    Raises:
        ImportError: altair is not installed.
    """
    chart: LayerChart = _freezing_map(history).configure(**theme())
    return chart


def plot_progress(history: History) -> dict[str, LayerChart]:
    """Three small charts over the optimizer steps: `"frozen"` (fraction), `"step_time"` and `"loss"`.

    The last two need the training logs; where none were recorded they are left out.

    Raises:
        ImportError: altair is not installed.
    """
    return {name: chart.configure(**theme()) for name, chart in _progress(history).items()}


def all_plots(history: History) -> dict[str, LayerChart]:
    """Every plot of a run that there is data for, by the name of its file."""
    return {
        "freezing_map": plot_freezing_map(history),
        "statistic": plot_statistic(history),
        **plot_progress(history),
    }


def save_chart(chart: Any, path: str | os.PathLike[str]) -> None:
    """Write a chart to a file, without a browser and without a network.

    Raises:
        ValueError: the ending is none of .png (3 pixels a point), .svg, .pdf and .html.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in FORMATS:
        raise ValueError(f"path={str(path)!r} must end in one of {', '.join(FORMATS)}: the ending decides the format.")
    chart.save(str(path), format=ending[1:], inline=ending == ".html", scale_factor=3 if ending == ".png" else 1)


def theme(*, dark: bool = False) -> dict[str, Any]:
    """Vega-Lite's configuration: fonts, and the colours of everything that is no data."""
    ink, muted, grid, paper = ("#E6E8EB", "#A9B0B8", "#343A41", "#15191E") if dark else (
        "#1B1F24", "#57606A", "#E1E4E8", "#FFFFFF"
    )  # fmt: skip
    colors = [*OKABE_ITO[:-1], "#F2F2F2" if dark else OKABE_ITO[-1]]
    if dark:
        colors[0] = "#3D9BE0"  # the palette's blue is too dark on black
    return {
        "background": paper,
        "font": "Arial, Helvetica, Liberation Sans, sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": muted, "titleColor": ink, "gridColor": grid, "domain": False, "ticks": False,
            "labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "labelPadding": 5, "titlePadding": 8,
        },
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12,
                   "titleFontWeight": "normal", "labelLimit": 220},
        "title": {"color": ink, "subtitleColor": muted, "anchor": "start", "frame": "group", "fontSize": 15,
                  "subtitleFontSize": 12, "subtitlePadding": 5, "offset": 12},
        "range": {"category": colors},
        "style": {
            "grace": {"color": "#232930" if dark else "#F3F0E8"},
            "plain": {"color": colors[0]},
            "tau": {"color": muted, "strokeWidth": 1.5},
            "end": {"color": muted, "strokeWidth": 1},
            "front": {"color": muted, "strokeWidth": 1.2},
            "note": {"color": muted, "fontSize": 11},
            "cell": {"stroke": paper, "strokeWidth": 1},
            "never": {"color": "#3A4048" if dark else "#DDE0E3", "stroke": paper, "strokeWidth": 1},
            "cross": {"color": "#7C848D" if dark else "#8B939B", "strokeWidth": 1},
        },
    }  # fmt: skip


def component_rows(history: History) -> list[dict[str, Any]]:
    """What people want to know of each component, as text: name, group, layer, parameters, step, value, tau.

    The value is the one that froze it, or the last finite one that was measured.
    """
    events = {event["name"]: event for event in history.events}
    rows = []
    for component in history.components:
        name = component["name"]
        event = events.get(name)
        series = history.values[name] if event is None else [event["value"]]
        value = next((v for v in reversed(series) if v is not None and math.isfinite(v)), None)
        rows.append(
            {
                "name": name,
                "group": group_label(component),
                "layer": "none" if component["layer"] is None else str(component["layer"]),
                "parameters": f"{component['numel']:,}",
                "frozen": "never" if event is None else f"step {event['step']:,}",
                "value": "none measured" if value is None else f"{value:.4g}",
                "tau": "none" if component["tau"] is None else f"{component['tau']:.4g}",
            }
        )
    return rows


def load_altair() -> Any:
    """The module, imported when it is needed.

    Raises:
        ImportError: it is not installed, or vl-convert-python, which draws without a browser, is not.
    """
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "plots need altair and vl-convert-python: pip install 'grades-hf[plots]'.", name=error.name
        ) from error
    return altair


def _statistic(history: History) -> Any:
    alt = load_altair()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for component in history.components:
        groups.setdefault(group_label(component), []).append(component)
    points: list[dict[str, Any]] = []
    for label, members in groups.items():
        points += [{"group": label, **row} for row in _quartiles(history, [member["name"] for member in members])]
    low, high = _value_range(history, [point[cut] for point in points for cut in ("low", "high")])
    color = alt.Color(
        "group:N", scale=alt.Scale(domain=list(groups)),
        legend=alt.Legend(title=None, orient="top", columns=3, symbolType="stroke", symbolStrokeWidth=3,
                          symbolOpacity=1),
    )  # fmt: skip
    dash = alt.value([1, 0])
    if len(groups) > len(OKABE_ITO):
        dashes = [DASHES[index // len(OKABE_ITO) % len(DASHES)] for index in range(len(groups))]
        dash = alt.StrokeDash("group:N", scale=alt.Scale(domain=list(groups), range=dashes), legend=None)
    base = alt.Chart(alt.Data(values=points))
    monitors = dict.fromkeys(component["monitor"].replace("_", " ") for component in history.components)
    reduction = history.config.get("reduction", "sum")
    y_axis = alt.Axis(format="~g" if low >= 1e-3 and high < 1e5 else ".1~e", tickCount=6, labelOverlap="greedy")
    y = {
        "scale": alt.Scale(type="linear" if _signed(history) else "log", domain=[low, high], nice=False, clamp=True),
        "axis": y_axis,
        "title": f"{' / '.join(monitors)} ({reduction})",
    }
    x = _step_axis(history)
    hover = alt.selection_point(name="hover", on="pointerover", nearest=True, empty=False, clear="pointerout")
    single = len({point["step"] for point in points}) == 1
    cuts = [alt.Tooltip(f"{cut}:Q", title=title, format=".4~g") for cut, title in
            (("median", "median"), ("low", "lower quartile"), ("high", "upper quartile"))]  # fmt: skip
    layers = [
        *_grace(history, note=True),
        base.mark_area(opacity=0.22, aria=False).encode(
            x=x, y=alt.Y("low:Q", **y), y2="high:Q", color=color
        ),
        *_thresholds(history, groups, (low, high), y, color),
        base.mark_line(strokeWidth=2, aria=False).encode(x=x, y=alt.Y("median:Q", **y), color=color, strokeDash=dash),
        base.mark_point(filled=True, size=60, aria=False)
        .encode(
            x=x, y=alt.Y("median:Q", **y), color=color,
            opacity=alt.value(1) if single else alt.condition(hover, alt.value(1), alt.value(0)),
            tooltip=["group:N", alt.Tooltip("step:Q", format=",d"), *cuts, alt.Tooltip("count:Q", title="not frozen")],
        )
        .add_params(hover),
        *_end(history, note=True),
    ]  # fmt: skip
    if not points:
        layers.append(_note("no values were measured", x=alt.value(150), y=alt.value(130)))
    drawn = len(thin(history.steps))
    some = "" if drawn == len(history.steps) else f" {drawn:,} of {len(history.steps):,} checks are drawn."
    dashed = " Dashed: threshold τ." if any(c["tau"] is not None for c in history.components) else ""
    return alt.layer(*layers).properties(
        width=480,
        height=300,
        title=alt.TitleParams(
            "Statistic of the matrices not frozen yet",
            subtitle=f"Median (line) and quartiles (band) by group.{dashed}{some}",
        ),
        description="Line chart of the statistic by group over the optimizer steps, with the thresholds.",
    )


def _thresholds(
    history: History,
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
    view: tuple[float, float],
    y: Mapping[str, Any],
    color: Any,
) -> list[Any]:
    """Dashed lines for the thresholds within `view`, and their values where there is room."""
    alt = load_altair()
    one = len({component["tau"] for component in history.components}) == 1
    rows: list[dict[str, Any]] = []
    for label, members in groups.items():
        for tau in sorted({member["tau"] for member in members if member["tau"] is not None}):
            kinds = dict.fromkeys(_column(member) for member in members if member["tau"] == tau)
            rows.append({"group": label, "tau": tau, "of": "all" if one else ", ".join(kinds)})
    rows = [row for row in rows[: 1 if one else None] if view[0] <= row["tau"] <= view[1]]
    if not rows:
        return []
    base = alt.Chart(alt.Data(values=rows))
    tooltip = [alt.Tooltip("tau:Q", title="τ", format=".4~g"), alt.Tooltip("of:N", title="of")]
    rule = base.mark_rule(style="tau", aria=False).encode(
        y=alt.Y("tau:Q", **y),
        tooltip=tooltip,
        strokeDash=alt.value([5, 4]),  # as a style the legend would have it too
    )
    labelled = []
    higher = math.inf
    for row in sorted(rows, key=lambda row: -row["tau"]):
        if higher / row["tau"] > (view[1] / view[0]) ** (1 / 18):  # room below the next line
            labelled.append({"tau": row["tau"], "text": f"τ = {row['tau']:.4g}"})
        higher = row["tau"]
    text = (
        alt.Chart(alt.Data(values=labelled))
        .mark_text(style="note", align="left", baseline="bottom", dx=4, dy=-2, aria=False)
        .encode(x=alt.value(0), y=alt.Y("tau:Q", **y), text="text:N")
    )
    return [rule if one else rule.encode(color=color), text]


def _freezing_map(history: History) -> Any:
    alt = load_altair()
    columns, layers = grid_of(history)
    cells, edges, depth = _cells(history, columns, layers)
    step = min(max(420 / max(len(layers), 1), 10, 5 * depth + 3), max(26, 5 * depth + 3))
    axis = {"grid": False, "labelOverlap": False, "title": None}
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    turned = len(columns) > 9 or max((len(label) for label in columns), default=0) > 6
    x = {
        "scale": alt.Scale(domain=[0, edges[-1]], nice=False, zero=False),
        "axis": alt.Axis(
            values=middles, labelExpr=_labels(middles, columns), orient="top", labelAngle=-90 if turned else 0,
            labelAlign="left" if turned else "center", labelLimit=130, **axis,
        ),
    }  # fmt: skip
    rows = [row + 0.5 for row in range(len(layers)) if _row_is_labelled(row, layers, step)]
    y = {
        "scale": alt.Scale(domain=[0, max(len(layers), 1)], nice=False, zero=False),
        "axis": alt.Axis(
            values=rows, **{**axis, "title": "layer"},
            labelExpr=_labels(rows, ["none" if (n := layers[int(row)]) is None else str(n) for row in rows]),
        ),
    }  # fmt: skip
    place = {"x": alt.X("x:Q", **x), "x2": "x2:Q", "y": alt.Y("y:Q", **y), "y2": "y2:Q"}
    titles = {"name": "matrix", "group": "group", "layer": "layer", "parameters": "parameters", "frozen": "frozen",
              "value": "value", "tau": "τ"}  # fmt: skip
    tooltip = [alt.Tooltip(f"{field}:N", title=title) for field, title in titles.items()]
    frozen = [cell for cell in cells if cell["step"] is not None]
    never = [cell for cell in cells if cell["step"] is None]
    low, high = history.t_grace + 1, max(history.total_steps, history.t_grace + 2)
    legend = alt.Legend(
        title="frozen at optimizer step", orient="bottom", direction="horizontal", gradientLength=220,
        gradientThickness=12, format=",d", tickCount=4, titleLimit=300,
    )  # fmt: skip
    color = alt.Color(
        "step:Q", legend=legend,
        scale=alt.Scale(domain=[low, high], scheme=alt.SchemeParams("viridis", extent=[0.08, 1])),
    )  # fmt: skip
    described = {"tooltip": tooltip, "description": "about:N"}
    drawn = []
    if frozen or not cells:
        drawn.append(
            alt.Chart(alt.Data(values=frozen), name="frozen")
            .mark_rect(style="cell")
            .encode(**place, **described, color=color)
        )
    if never:
        base = alt.Chart(alt.Data(values=never))
        drawn.append(base.properties(name="never").mark_rect(style="never").encode(**place, **described))
        drawn.append(base.mark_rule(style="cross", aria=False, tooltip=None).encode(**place))
    subtitle = f"{len(frozen):,} of {len(cells):,} froze. A cell is one matrix, layers go up."
    crossed = " Crossed grey: never."
    return alt.layer(*drawn).properties(
        width=min(max(240, 38 * edges[-1]), 900),
        height=max(round(step * len(layers)), 40),
        title=alt.TitleParams("When each matrix froze", subtitle=subtitle + (crossed if never else "")),
        description=f"Map of layers by matrices: {subtitle}",
    )


def _cells(
    history: History, columns: list[str], layers: list[int | None]
) -> tuple[list[dict[str, Any]], list[float], int]:
    """Where each component is drawn, with its texts; the columns' edges; the most cells above each other in a row."""
    places: dict[tuple[int, int], list[int]] = {}
    column_of, layer_of = ({item: index for index, item in enumerate(items)} for items in (columns, layers))
    for index, component in enumerate(history.components):
        places.setdefault((column_of[_column(component)], layer_of[component["layer"]]), []).append(index)
    most = [max(len(here) for (column, _), here in places.items() if column == index) for index in range(len(columns))]
    across = [1 if n == 1 else math.ceil(math.sqrt(2 * n)) for n in most]
    edges = [0.0]
    for n in across:
        edges.append(edges[-1] + max(1.0, n / 4))
    rows, frozen = component_rows(history), history.frozen
    cells: list[dict[str, Any]] = [{} for _ in rows]
    for (column, layer), here in places.items():
        wide = across[column]
        high = math.ceil(most[column] / wide)
        margin = 0.0 if most[column] == 1 else 0.06
        width = (edges[column + 1] - edges[column] - 2 * margin) / wide
        height = (1 - 2 * margin) / high
        for number, index in enumerate(here):
            row, name = rows[index], rows[index]["name"]
            left = edges[column] + margin + number % wide * width
            top = layer + 1 - margin - number // wide * height
            box = {"x": left, "x2": left + width, "y": top - height, "y2": top}
            how = "frozen at" if name in frozen else "frozen"
            when = "never frozen" if row["frozen"] == "never" else f"{how} {row['frozen']}"
            about = f"{name}: {when}, value {row['value']}, τ {row['tau']}, {row['parameters']} parameters"
            sides = {side: round(value, 4) for side, value in box.items()}
            cells[index] = {**row, **sides, "step": frozen.get(name), "about": about}
    depth = max((math.ceil(n / wide) for n, wide in zip(most, across, strict=True)), default=1)
    return cells, edges, depth


def _row_is_labelled(row: int, layers: Sequence[int | None], step: float) -> bool:
    """Every k-th layer, so that the labels have room, and the last row where it is not a layer."""
    if layers[row] is None:
        return True
    last = len(layers) > 1 and layers[-1] is None
    return row % math.ceil(18 / step) == 0 and not (last and (len(layers) - 1 - row) * step < 14)


def _labels(values: Sequence[float], texts: Sequence[str]) -> str:
    """A Vega expression for the labels of these axis values; as JSON strings the texts are data, never code."""
    return f"{json.dumps(list(texts))}[indexof({json.dumps(list(values))}, datum.value)]"


def _progress(history: History) -> dict[str, Any]:
    alt = load_altair()
    total = max(len(history.components), 1)
    changes: Counter[int] = Counter(history.frozen.values())
    number, fractions = 0, {0: 0.0}
    for step in sorted(changes):
        number += changes[step]
        fractions[step] = number / total
    fractions[last_step(history)] = len(history.events) / total
    times, before, seconds = [], 0.0, 0.0
    for row in history.logs:
        if row["step"] > before and row["seconds"] >= seconds:
            times.append((row["step"], (row["seconds"] - seconds) / (row["step"] - before)))
        before, seconds = row["step"], row["seconds"]
    losses = [(row["step"], row["loss"]) for row in history.logs if math.isfinite(row.get("loss", math.nan))]

    def chart(points: Sequence[tuple[float, float]], title: str, y_title: str, **options: Any) -> Any:
        rows = [{"step": step, "value": value} for step, value in thin(points)]
        form = options.pop("format", "~g")
        base = alt.Chart(alt.Data(values=rows)).encode(
            x=_step_axis(history),
            y=alt.Y(
                "value:Q", title=y_title, axis=alt.Axis(format=form, tickCount=4), scale=alt.Scale(**options["scale"])
            ),
        )
        line = base.mark_line(
            strokeWidth=2, style="plain", aria=False, interpolate=options.get("interpolate", "linear")
        )
        dots = base.mark_point(filled=True, size=50, aria=False).encode(
            opacity=alt.value(1 if len(rows) == 1 else 0),
            tooltip=[alt.Tooltip("step:Q", format=",d"), alt.Tooltip("value:Q", title=y_title, format=".4~g")],
        )
        return alt.layer(*_grace(history), line, dots, *_end(history)).properties(
            width=300, height=170, title=alt.TitleParams(title), description=f"{title} over the optimizer steps."
        )

    charts = {
        "frozen": chart(
            list(fractions.items()), "Frozen fraction", "part of the matrices", format=".0%",
            scale={"domain": [0, 1]}, interpolate="step-after",
        )
    }  # fmt: skip
    if times:
        charts["step_time"] = chart(times, "Step time", "seconds a step", scale={"zero": True})
    if losses:
        charts["loss"] = chart(losses, "Training loss", "loss", scale={"zero": False})
    return charts


def _step_axis(history: History) -> Any:
    alt = load_altair()
    end = max(history.total_steps, last_step(history), 1)
    axis = alt.Axis(format="~s" if end >= 10_000 else "d", tickCount=6, tickMinStep=1, grid=False)
    return alt.X("step:Q", title="optimizer step", axis=axis, scale=alt.Scale(domain=[0, end], nice=False))


def _grace(history: History, note: bool = False) -> list[Any]:
    """The grace period as a shaded area."""
    if not history.t_grace:
        return []
    alt = load_altair()
    data = alt.Data(values=[{"step": 0, "to": history.t_grace}])
    area = alt.Chart(data).mark_rect(style="grace", aria=False, tooltip=None)
    layers = [area.encode(x=_step_axis(history), x2="to:Q")]
    return layers + ([_note("grace period", x=_step_axis(history), y=alt.value(12), data=data)] if note else [])


def _end(history: History, note: bool = False) -> list[Any]:
    """Where the record ends, if that is before the planned end."""
    last = last_step(history)
    if not 0 < last < history.total_steps:
        return []
    alt = load_altair()
    data = alt.Data(values=[{"step": last}])
    rule = alt.Chart(data).mark_rule(style="end", aria=False).encode(x=_step_axis(history))
    text = "training ended" if history.ended else "recorded so far"
    left = last > 0.8 * history.total_steps
    return [rule] + ([_note(text, x=_step_axis(history), y=alt.value(12), data=data, left=left)] if note else [])


def _note(text: str, *, x: Any, y: Any, data: Any = None, left: bool = False) -> Any:
    """Grey text in a plot."""
    alt = load_altair()
    chart = alt.Chart(data or alt.Data(values=[{}]))
    align = {"align": "right", "dx": -5} if left else {"align": "left", "dx": 5}
    return chart.mark_text(style="note", aria=False, **align).encode(x=x, y=y, text=alt.value(text))


def thin(items: Sequence[T]) -> Sequence[T]:
    """Every k-th item, so that at most `MOST_POINTS` are left, and the last one."""
    stride = math.ceil(len(items) / MOST_POINTS)
    return items if stride <= 1 else [*items[:-1:stride], items[-1]]


def _value_range(history: History, values: Sequence[float]) -> tuple[float, float]:
    """What the axis of the statistic shows: all values, and the thresholds that are within two decades of them."""
    taus = [component["tau"] for component in history.components if component["tau"] is not None]
    if values:
        taus = [tau for tau in taus if min(values) / 100 <= tau <= max(values) * 100]
    shown = [*values, *taus] or [1.0]
    low, high = min(shown), max(shown)
    if _signed(history):
        margin = high - low or abs(high)
        return low - 0.05 * margin, high + 0.16 * margin
    margin = max(high / low, 1.5)
    return low / margin**0.05, high * margin**0.16  # room for the notes


def _quartiles(history: History, names: Sequence[str]) -> list[dict[str, float]]:
    """At each step with a value of these components that an axis can show: the quartiles, and of how many."""
    rows, signed = [], _signed(history)
    for index in thin(range(len(history.steps))):
        values = [series[index] for name in names if len(series := history.values[name]) > index]
        values = [value for value in values if math.isfinite(value) and (signed or value > 0)]
        if values:
            low, median, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            row = {"step": history.steps[index], "low": low, "median": median, "high": high, "count": len(values)}
            rows.append(row)
    return rows


def _signed(history: History) -> bool:
    """Whether values of the statistic may be below 0, where an axis cannot be logarithmic."""
    return any(component["monitor"] == "gradient_product" for component in history.components)


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
