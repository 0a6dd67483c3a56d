"""A run in the terminal: one sentence, what decides, and how near the run is to it.

With thresholds that is a map of layers by matrices and the distance of each group to its threshold; without, the votes
over time and each look.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..record.history import History
from .charts import checks, thin
from .runs import read_history
from .summary import (
    LOOK_HEADS,
    LOOKS_NOTE,
    QUORUM,
    by_group,
    duration,
    has_thresholds,
    look_rows,
    places,
    rule,
    sentence,
    visible,
    votes,
)  # fmt: skip

# A place of the map: what it says, its symbol (and in plain ASCII), its colour. The symbols differ without colour, too.
STATES = {
    "frozen": ("█", "#", "bold blue"),
    "partly frozen": ("▄", "+", "cyan"),
    "below 2 tau": ("░", "o", "yellow"),
    "live": ("·", ".", "bright_black"),
}
NEAR = 2.0  # times tau
BARS = "▁▂▃▄▅▆▇█"
TREND = 24  # bars
OLD = 60  # seconds without news before the age of the file is told


def show(run_dir: Path, *, follow: bool = False, console: Console | None = None) -> None:
    """Print the state of a run.

    Args:
        run_dir: The directory with the record of GradES, or its file.
        follow: Show it anew whenever the record changes, until the run ends; wait for it if it is not there yet. Where
            the output is no terminal, every change gives one line, and the end the whole view.
        console: Where to print; default: standard output.

    Raises:
        ValueError: there is no record, or it is damaged.
    """
    console = Console() if console is None else console
    waiting = f"Waiting for a record of GradES in {run_dir} ..."
    if not follow:
        history, age = next(watch(run_dir))
        if history is None:
            raise ValueError(f"RUN_DIR={str(run_dir)!r} holds no record of GradES; --follow waits for it.")
        console.print(View(history, age))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for history, age in watch(run_dir):
                live.update(Text(waiting) if history is None else View(history, age), refresh=True)
    else:
        told = None
        for history, _ in watch(run_dir):
            text = waiting if history is None else sentence(history)
            if text != told:
                console.print(text, soft_wrap=True, highlight=False, markup=False)
                told = text
        if history is not None:
            console.print(View(history))


def watch(path: Path, interval: float = 0.5) -> Iterator[tuple[History | None, float]]:
    """The record at `path` (None: not there yet) and its age in seconds, every `interval` seconds until the run ends.

    Raises:
        ValueError: the record is damaged.
    """
    stamp, history = 0.0, None
    while True:
        now = _written(path)
        if history is None or now != stamp:
            stamp, history = now, read_history(path)
        yield history, max(0.0, time.time() - stamp) if stamp else 0.0
        if history is not None and history.ended is not None:
            return
        time.sleep(interval)


def _written(path: Path) -> float:
    """When the newest file of the record was written; 0 where there is none."""
    newest = 0.0
    for file in [path] if path.is_file() else [*path.glob("grades_history*"), *path.glob("grades_history*/*")]:
        with contextlib.suppress(FileNotFoundError):  # it has just been replaced
            newest = max(newest, file.stat().st_mtime)
    return newest


class View:
    """The whole view of a record, as wide as the terminal is; `age` is the seconds since it was written, if known."""

    def __init__(self, history: History, age: float | None = None) -> None:
        self.history, self.age = history, age

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        history, unicode = self.history, options.encoding.lower().startswith("utf")
        yield Text(sentence(history), style="bold")
        yield Text(rule(history))
        if self.age is not None and history.ended is None and self.age > OLD:
            yield Text(
                f"Written {duration(self.age)} ago: if nothing trains there any more, the run was killed.",
                style="yellow",
            )
        yield Text()
        if has_thresholds(history):
            yield from freezing_map(history, options.max_width, unicode=unicode)
        else:
            yield from _votes(history, unicode=unicode)
            if history.looks:
                yield _looks(history)
        yield Text()
        yield _groups(history, options.max_width, unicode=unicode)


def _votes(history: History, *, unicode: bool) -> Iterator[Text]:
    """The share of votes over time, in one line."""
    shares = [share for _, share in thin(votes(history), TREND)]
    if shares:
        bars = [BARS[min(len(BARS) - 1, int(share * len(BARS)))] for share in shares] if unicode else []
        line = Text("votes ").append("".join(bars), "cyan")
        yield line.append(f" {shares[-1]:.0%} at the last; a look is due at {QUORUM:.0%}")
    else:
        yield Text("No votes were recorded.", style="bright_black")


def _looks(history: History) -> Table:
    """Each look, with both losses."""
    table = Table(
        box=None, padding=(0, 2, 0, 0), header_style="bright_black", caption=LOOKS_NOTE, caption_justify="left"
    )
    for head in LOOK_HEADS:
        table.add_column(head, justify="left" if head == "verdict" else "right", overflow="fold")
    for row in look_rows(history):
        table.add_row(*map(Text, row))
    return table


def freezing_map(history: History, width: int, *, unicode: bool = True) -> Iterator[Text]:
    """Lines with one cell for each place (tower, matrix, layer), layers from left to right, wrapped at `width`."""
    frozen, latest = history.frozen, history.latest()
    for tower, rows in places(history).items():
        if tower is not None:
            yield Text(visible(tower), style="underline")
        label = min(max(map(len, rows)), max(4, width // 3))
        layers = sorted({layer for row in rows.values() for layer in row if layer is not None})
        across = max(1, width - label - 1)

        def row_of(name: str, cells: Sequence[Any], label: int = label) -> Text:
            line = Text(f"{visible(name)[:label]:{label}} ")
            for components in cells:
                symbol, plain, style = STATES[_state(components, frozen, latest)] if components else (" ", " ", "")
                line.append(symbol if unicode else plain, style)
            return line

        for start in range(0, len(layers), across):
            part = layers[start : start + across]
            yield Text(f"{'':{label}} {_ruler(part)}", style="bright_black")
            for projection, row in rows.items():
                cells = [row.get(layer) for layer in part]
                if any(cells):
                    yield row_of(projection, cells)
        outside = {projection: row[None] for projection, row in rows.items() if None in row}
        if outside and layers:
            yield Text("outside of the layers", style="bright_black")
        for projection, components in outside.items():
            yield row_of(projection, [components])
    legend = Text(style="bright_black")
    for state, (symbol, ascii_symbol, style) in STATES.items():
        legend.append(symbol if unicode else ascii_symbol, style).append(f" {state}  ")
    legend.rstrip()
    yield legend


def _state(components: Sequence[Mapping[str, Any]], frozen: Mapping[str, int], latest: Mapping[str, float]) -> str:
    number = sum(component["name"] in frozen for component in components)
    if number:
        return "frozen" if number == len(components) else "partly frozen"
    values = [latest[c["name"]] / c["tau"] for c in components if c["name"] in latest and c["tau"]]
    return "below 2 tau" if values and median(values) < NEAR else "live"


def _ruler(layers: Sequence[int]) -> str:
    """The numbers of the first layer and of every tenth one, each above its own column."""
    line = ""
    for column, layer in enumerate(layers):
        if (column == 0 or layer % 10 == 0) and (not line or len(line) < column):
            line = f"{line:{column}}{layer}"
    return line[: len(layers)] if len(layers) > 3 else line


def _groups(history: History, width: int, *, unicode: bool) -> Table:
    """A row per group: how many are frozen, and the median of what is live, by tau, and over the checks."""
    with_tau = all(component["tau"] for component in history.components)
    freezes = has_thresholds(history)
    wide, trend = width >= 56, width >= 72 and unicode
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    table.add_column("group", overflow="fold")
    table.add_column("frozen" if freezes else "components", justify="right", no_wrap=True)
    if wide or not with_tau:
        table.add_column("live median" if freezes else "median", justify="right", no_wrap=True)
    if with_tau:
        table.add_column("by tau", justify="right", no_wrap=True)
    if trend:
        table.add_column("over the checks", no_wrap=True)
    frozen, latest = history.frozen, history.latest()
    measured = latest.keys() - frozen.keys()
    _, values = checks(history, TREND) if trend else ((), {})
    for label, members in by_group(history).items():
        live = [component for component in members if component["name"] in measured]
        number = sum(component["name"] in frozen for component in members)
        row = [label, f"{number}/{len(members)}" if freezes else f"{len(members)}"]
        if wide or not with_tau:
            row.append(f"{median(latest[c['name']] for c in live):.3g}" if live else "-")
        if with_tau:
            row.append(f"{median(latest[c['name']] / c['tau'] for c in live):.3g}" if live else "-")
        bars = [Text(sparkline(_trend(values, members)), style="cyan")] if trend else []
        table.add_row(*map(Text, row), *bars)
    return table


def _trend(values: Mapping[str, Sequence[float]], members: Sequence[Mapping[str, Any]]) -> list[float]:
    """The median over the group of value / tau at each of these checks that has one."""
    series = [(list(values[component["name"]]), component["tau"] or 1.0) for component in members]
    columns = [
        [found[place] / tau for found, tau in series if place < len(found) and math.isfinite(found[place])]
        for place in range(max((len(found) for found, _ in series), default=0))
    ]
    return [median(column) for column in columns if column]


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from 0 (or less) to the largest."""
    top = max(values, default=0.0)
    heights = [int(max(0.0, value) / top * len(BARS)) if top > 0 else 0 for value in values]
    return "".join(BARS[min(len(BARS) - 1, height)] for height in heights)
