"""The map of when each matrix froze: layers by matrices, a cell for each component."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from ..record.history import History
from .charts import layered, load_altair
from .summary import PROJECTION_ORDER, group_label, visible

MOST_CELLS = 4000  # with more components a cell stands for all of a place
HEADS = ("name", "group", "layer", "parameters", "frozen", "value", "tau")


def component_rows(history: History) -> list[dict[str, str]]:
    """What people want to know of each component, as text under `HEADS`.

    The value is the one that froze it, or the one of the last check.
    """
    events, latest = {event["name"]: event for event in history.events}, history.latest()
    rows = []
    for component in history.components:
        name = component["name"]
        event = events.get(name)
        value = latest.get(name) if event is None else event["value"]
        rows.append(
            {
                "name": visible(name),
                "group": group_label(component),
                "layer": "none" if component["layer"] is None else str(component["layer"]),
                "parameters": f"{component['numel']:,}",
                "frozen": "never" if event is None else f"step {event['step']:,}",
                "value": "none measured" if value is None else f"{value:.4g}",
                "tau": "none" if component["tau"] is None else f"{component['tau']:.4g}",
            }
        )
    return rows


def plot_freezing_map(history: History) -> Any:
    """Layers by matrices, a cell for each component, coloured by the step at which it froze; crossed grey: never.

    Components that share a place (the experts of a layer) are cells of a small grid in it, row by row; where there are
    thousands, a cell stands for all of a place.
    """
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
    titles = {"name": "matrix", "tau": "τ"}
    tooltip = [alt.Tooltip(f"{field}:N", title=titles.get(field, field)) for field in HEADS]
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
        base = alt.Chart(alt.Data(values=frozen), name="frozen")
        drawn.append(base.mark_rect(style="cell").encode(**place, **described, color=color))
    if never:
        base = alt.Chart(alt.Data(values=never))
        drawn.append(base.properties(name="never").mark_rect(style="never").encode(**place, **described))
        drawn.append(base.mark_rule(style="cross", aria=False, tooltip=None).encode(**place))
    one = "one matrix" if len(cells) == len(history.components) else "all matrices of a place, at their median step"
    subtitle = f"{len(history.events):,} of {len(history.components):,} froze. A cell is {one}; layers go up."
    size = (min(max(240, 38 * edges[-1]), 900), max(round(step * len(layers)), 40))
    return layered(drawn, size, "When each matrix froze", subtitle + (" Crossed grey: never." if never else ""))


def grid_of(history: History) -> tuple[list[str], list[int | None]]:
    """Columns (matrix kinds, by tower, in PROJECTION_ORDER) and rows (layers, then None for what is in no layer)."""
    towers = list(dict.fromkeys(component.get("tower") for component in history.components))
    kinds = list(dict.fromkeys(component["projection"] for component in history.components))
    order = [kind for kind in PROJECTION_ORDER if kind in kinds] + [k for k in kinds if k not in PROJECTION_ORDER]
    keys = {(c.get("tower"), c["projection"]): group_label(c, "projection") for c in history.components}
    columns = [keys[tower, kind] for tower in towers for kind in order if (tower, kind) in keys]
    layers = {component["layer"] for component in history.components}
    rows: list[int | None] = sorted(layer for layer in layers if layer is not None)
    return columns, rows + ([None] if None in layers else [])


def _cells(
    history: History, columns: list[str], layers: list[int | None]
) -> tuple[list[dict[str, Any]], list[float], int]:
    """Where each component is drawn, with its texts; the columns' edges; the most cells above each other in a row."""
    places: dict[tuple[int, int], list[dict[str, Any]]] = {}
    column_of, layer_of = ({item: index for index, item in enumerate(items)} for items in (columns, layers))
    frozen = history.frozen
    for component, row in zip(history.components, component_rows(history), strict=True):
        key = (column_of[group_label(component, "projection")], layer_of[component["layer"]])
        places.setdefault(key, []).append({**row, "step": frozen.get(component["name"])})
    if len(history.components) > MOST_CELLS:
        places = {place: [_merged(here)] for place, here in places.items()}
    most = [max(len(here) for (column, _), here in places.items() if column == index) for index in range(len(columns))]
    across = [1 if n == 1 else math.ceil(math.sqrt(2 * n)) for n in most]
    edges = [0.0]
    for n in across:
        edges.append(edges[-1] + max(1.0, n / 4))
    cells: list[dict[str, Any]] = []
    for (column, layer), here in places.items():
        wide = across[column]
        high = math.ceil(most[column] / wide)
        margin = 0.0 if most[column] == 1 else 0.06
        width = (edges[column + 1] - edges[column] - 2 * margin) / wide
        height = (1 - 2 * margin) / high
        for number, row in enumerate(here):
            left = edges[column] + margin + number % wide * width
            top = layer + 1 - margin - number // wide * height
            box = {"x": left, "x2": left + width, "y": top - height, "y2": top}
            when = "never frozen" if row["frozen"] == "never" else f"frozen at {row['frozen']}"
            about = f"{row['name']}: {when}, value {row['value']}, τ {row['tau']}, {row['parameters']} parameters"
            cells.append({**row, **{side: round(value, 4) for side, value in box.items()}, "about": about})
    depth = max((math.ceil(n / wide) for n, wide in zip(most, across, strict=True)), default=1)
    return cells, edges, depth


def _merged(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row for all the components of a place."""
    if len(rows) == 1:
        return rows[0]
    steps = [row["step"] for row in rows if row["step"] is not None]
    when = f"step {min(steps):,} to {max(steps):,}, {len(steps):,} of {len(rows):,}" if steps else "never"
    same = {head: rows[0][head] if len({row[head] for row in rows}) == 1 else "differs" for head in HEADS}
    return {**same, "name": f"{len(rows):,} matrices", "frozen": when, "step": median(steps) if steps else None}


def _row_is_labelled(row: int, layers: Sequence[int | None], step: float) -> bool:
    """Every k-th layer, so that the labels have room, and the last row where it is not a layer."""
    if layers[row] is None:
        return True
    last = len(layers) > 1 and layers[-1] is None
    return row % math.ceil(18 / step) == 0 and not (last and (len(layers) - 1 - row) * step < 14)


def _labels(values: Sequence[float], texts: Sequence[str]) -> str:
    """A Vega expression for the labels of these axis values; as JSON strings the texts are data, never code."""
    return f"{json.dumps(list(texts))}[indexof({json.dumps(list(values))}, datum.value)]"
