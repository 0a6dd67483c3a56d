"""What all charts share: colours, axes, notes, thinning, files. Needs the extra `plots`.

One description (Vega-Lite, by Altair) serves notebooks, files for papers and the HTML page. Colours are the Okabe-Ito
palette and viridis, which people with colour blindness can tell apart. Colours of text, lines and areas are named
styles of `theme`, not of the charts: the page swaps them when it turns dark.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from ..record.history import History
from .summary import last_step

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ([1, 0], [6, 2], [2, 2])  # where there are more lines than colours
FORMATS = (".png", ".svg", ".pdf", ".html")
MOST_POINTS = 1000  # of a chart's lines together, or of one line
T = TypeVar("T")
Point = tuple[float, float]


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
        "legend": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "columns": 3,
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


def layered(layers: Sequence[Any], size: tuple[float, int], title: str, subtitle: str | Sequence[str] = "") -> Any:
    """The layers as one chart, with its title, in the theme."""
    alt = load_altair()
    text = {"subtitle": subtitle} if subtitle else {}
    about = f"{title}. {subtitle if isinstance(subtitle, str) else ' '.join(subtitle)}".rstrip()
    chart = alt.layer(*layers).properties(width=size[0], height=size[1], description=about)
    return chart.properties(title=alt.TitleParams(title, **text)).configure(**theme())


def thin(items: Sequence[T], most: int = MOST_POINTS) -> Sequence[T]:
    """Every k-th item, so that about `most` are left, and the last one."""
    stride = math.ceil(len(items) / most)
    return items if stride <= 1 else [*items[:-1:stride], items[-1]]


def averaged(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """The means of k points in a row, at the last one's step, so that at most `most` are left."""
    stride = math.ceil(len(points) / most)
    if stride <= 1:
        return points
    parts = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(part[-1][0], mean(value for _, value in part)) for part in parts]


def checks(history: History, most: int = MOST_POINTS) -> tuple[Sequence[int], Mapping[str, Sequence[float]]]:
    """The steps of about `most` checks, evenly spaced, the last one included; and component name -> values at these.

    A series may be shorter than the steps: it ends where its component froze.
    """
    if hasattr(history, "sampled"):
        found = history.sampled(most)
        return found.steps, found.values
    places = thin(range(len(history.steps)), most)
    if len(places) == len(history.steps):
        return history.steps, history.values
    values = {name: [series[i] for i in places if i < len(series)] for name, series in history.values.items()}
    return [history.steps[place] for place in places], values


def end_of(history: History) -> int:
    """Where the axis of steps ends."""
    return max(history.total_steps, last_step(history), 1)


def step_axis(end: int) -> Any:
    """The optimizer steps from 0 to `end`."""
    alt = load_altair()
    axis = alt.Axis(format="~s" if end >= 10_000 else "d", tickCount=6, tickMinStep=1, grid=False)
    return alt.X("step:Q", title="optimizer step", axis=axis, scale=alt.Scale(domain=[0, end], nice=False))


def color_of(labels: Sequence[str], field: str = "group") -> tuple[Any, Any]:
    """Colour and dash by label, with a legend above the chart: more labels than colours differ by their dashes."""
    alt = load_altair()
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1)
    scale = alt.Scale(domain=list(labels))
    color = alt.Color(f"{field}:N", scale=scale, legend=legend if len(labels) > 1 else None)
    if len(labels) <= len(OKABE_ITO):
        return color, alt.value([1, 0])
    dashes = [DASHES[index // len(OKABE_ITO) % len(DASHES)] for index in range(len(labels))]
    return color, alt.StrokeDash(f"{field}:N", scale=alt.Scale(domain=list(labels), range=dashes), legend=None)


def grace(history: History, note_it: bool = False) -> list[Any]:
    """The grace period as a shaded area."""
    if not history.t_grace:
        return []
    alt, x = load_altair(), step_axis(end_of(history))
    data = alt.Data(values=[{"step": 0, "to": history.t_grace}])
    area = alt.Chart(data).mark_rect(style="grace", aria=False, tooltip=None).encode(x=x, x2="to:Q")
    return [area, note("grace period", x=x, y=alt.value(10), data=data)] if note_it else [area]


def end(history: History, note_it: bool = False) -> list[Any]:
    """Where the record ends, if that is before the planned end."""
    last = last_step(history)
    if not 0 < last < history.total_steps:
        return []
    alt, x = load_altair(), step_axis(end_of(history))
    data = alt.Data(values=[{"step": last}])
    rule = alt.Chart(data).mark_rule(style="end", aria=False).encode(x=x)
    text = "training ended" if history.ended else "recorded so far"
    left = last > 0.6 * history.total_steps
    return [rule, note(text, x=x, y=alt.value(26), data=data, left=left)] if note_it else [rule]


def note(text: str, *, x: Any, y: Any, data: Any = None, left: bool = False) -> Any:
    """Grey text in a chart."""
    alt = load_altair()
    chart = alt.Chart(data or alt.Data(values=[{}]))
    align = {"align": "right", "dx": -5} if left else {"align": "left", "dx": 5}
    return chart.mark_text(style="note", aria=False, **align).encode(x=x, y=y, text=alt.value(text))
