"""A run in the terminal: one sentence, a map of layers by matrices, and how near each group is to its threshold."""

from __future__ import annotations

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

from ..history import FILE_NAME, History
from .summary import duration, group_label, places, sentence

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
        run_dir: The directory with `grades_history.json`, or that file.
        follow: Show it anew whenever the file changes, until the run ends; wait for the file if it is not there yet.
            Where the output is no terminal, every change gives one line, and the end the whole view.
        console: Where to print; default: standard output.

    Raises:
        ValueError: there is no record, or it is damaged.
    """
    console = Console() if console is None else console
    path = run_dir if run_dir.is_file() else run_dir / FILE_NAME
    waiting = f"Waiting for {path} ..."
    if not follow:
        history, age = next(watch(path))
        if history is None:
            raise ValueError(f"RUN_DIR={str(run_dir)!r} holds no {FILE_NAME}; --follow waits for it.")
        console.print(View(history, age))
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            for history, age in watch(path):
                live.update(Text(waiting) if history is None else View(history, age), refresh=True)
    else:
        told = None
        for history, _ in watch(path):
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
    stamp: int | None = None
    history: History | None = None
    while True:
        try:
            status = path.stat()
            if status.st_mtime_ns != stamp:
                stamp, history = status.st_mtime_ns, History.load(path)
        except FileNotFoundError:
            status, stamp, history = None, None, None
        except NotADirectoryError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        yield history, 0.0 if status is None else max(0.0, time.time() - status.st_mtime)
        if history is not None and history.ended is not None:
            return
        time.sleep(interval)


class View:
    """The whole view of a record, as wide as the terminal is; `age` is the seconds since it was written, if known."""

    def __init__(self, history: History, age: float | None = None) -> None:
        self.history, self.age = history, age

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        unicode = options.encoding.lower().startswith("utf")
        yield Text(sentence(self.history), style="bold")
        yield Text(_rule(self.history))
        if self.age is not None and self.history.ended is None and self.age > OLD:
            yield Text(
                f"Written {duration(self.age)} ago: if nothing trains there any more, the run was killed.",
                style="yellow",
            )
        yield Text()
        yield from freezing_map(self.history, options.max_width, unicode=unicode)
        yield Text()
        yield _groups(self.history, options.max_width, unicode=unicode)


def freezing_map(history: History, width: int, *, unicode: bool = True) -> Iterator[Text]:
    """Lines with one cell for each place (tower, matrix, layer), layers from left to right, wrapped at `width`."""
    frozen, latest = history.frozen, history.latest()
    for tower, rows in places(history).items():
        if tower is not None:
            yield Text(tower, style="underline")
        label = min(max(map(len, rows)), max(4, width // 3))
        layers = sorted({layer for row in rows.values() for layer in row if layer is not None})
        across = max(1, width - label - 1)
        for start in range(0, len(layers), across):
            part = layers[start : start + across]
            yield Text(f"{'':{label}} {_ruler(part)}", style="bright_black")
            for projection, row in rows.items():
                cells = [row.get(layer) for layer in part]
                if any(cells):
                    yield _row(projection, label, cells, frozen, latest, unicode)
        outside = {projection: row[None] for projection, row in rows.items() if None in row}
        if outside and layers:
            yield Text("outside of the layers", style="bright_black")
        for projection, components in outside.items():
            yield _row(projection, label, [components], frozen, latest, unicode)
    legend = Text(style="bright_black")
    for state, (symbol, ascii_symbol, style) in STATES.items():
        legend.append(symbol if unicode else ascii_symbol, style).append(f" {state}  ")
    legend.rstrip()
    yield legend


def _row(
    name: str,
    label: int,
    cells: Sequence[Sequence[Mapping[str, Any]] | None],
    frozen: Mapping[str, int],
    latest: Mapping[str, float],
    unicode: bool,
) -> Text:
    line = Text(f"{name[:label]:{label}} ")
    for components in cells:
        if components is None:
            line.append(" ")
            continue
        symbol, ascii_symbol, style = STATES[_state(components, frozen, latest)]
        line.append(symbol if unicode else ascii_symbol, style)
    return line


def _state(components: Sequence[Mapping[str, Any]], frozen: Mapping[str, int], latest: Mapping[str, float]) -> str:
    number = sum(component["name"] in frozen for component in components)
    if number:
        return "frozen" if number == len(components) else "partly frozen"
    values = [latest[c["name"]] / c["tau"] for c in components if c["name"] in latest and c["tau"] is not None]
    return "below 2 tau" if values and median(values) < NEAR else "live"


def _ruler(layers: Sequence[int]) -> str:
    """The numbers of the first layer and of every tenth one, each above its own column."""
    line = ""
    for column, layer in enumerate(layers):
        if (column == 0 or layer % 10 == 0) and (not line or len(line) < column):
            line = f"{line:{column}}{layer}"
    return line[: len(layers)] if len(layers) > 3 else line


def _rule(history: History) -> str:
    """What freezes when, in one line."""
    monitors = ", ".join(dict.fromkeys(component["monitor"] for component in history.components))
    taus = sorted({component["tau"] for component in history.components if component["tau"] is not None})
    criterion = history.config.get("criterion", "threshold")
    rule = [] if criterion == "threshold" else [f"criterion {criterion}"]
    if taus:
        rule.append(f"tau {taus[0]:g}" if len(taus) == 1 else f"tau {taus[0]:g} to {taus[-1]:g}")
    return f"{monitors}, {', '.join(rule)}, freezing from step {history.t_grace + 1} of {history.total_steps} on."


def _groups(history: History, width: int, *, unicode: bool) -> Table:
    """A row per group: how many are frozen, and the median of what is live, by tau, and over the checks."""
    with_tau = all(component["tau"] is not None for component in history.components)
    wide, trend = width >= 56, width >= 72 and unicode
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    table.add_column("group", overflow="fold")
    table.add_column("frozen", justify="right", no_wrap=True)
    if wide or not with_tau:
        table.add_column("live median", justify="right", no_wrap=True)
    if with_tau:
        table.add_column("by tau", justify="right", no_wrap=True)
    if trend:
        table.add_column("over the checks", no_wrap=True)
    frozen, latest = history.frozen, history.latest()
    groups: dict[str, list[dict[str, Any]]] = {}
    for component in history.components:
        groups.setdefault(group_label(component), []).append(component)
    for label, members in groups.items():
        live = [component for component in members if component["name"] in latest.keys() - frozen.keys()]
        row = [label, f"{sum(component['name'] in frozen for component in members)}/{len(members)}"]
        if wide or not with_tau:
            row.append(f"{median(latest[c['name']] for c in live):.3g}" if live else "-")
        if with_tau:
            row.append(f"{median(latest[c['name']] / c['tau'] for c in live):.3g}" if live else "-")
        bars = [Text(sparkline(_trend(history, members)), style="cyan")] if trend else []
        table.add_row(*row, *bars)
    return table


def _trend(history: History, members: Sequence[Mapping[str, Any]]) -> list[float]:
    """The median over the group of value / tau at up to TREND checks, evenly spaced, the last one included."""
    last = len(history.steps) - 1
    checks = sorted({round(last * i / (TREND - 1)) for i in range(TREND)}) if last >= 0 else []
    medians = []
    for check in checks:
        series = [(history.values[c["name"]], c["tau"] or 1.0) for c in members]
        values = [s[check] / tau for s, tau in series if len(s) > check and math.isfinite(s[check])]
        if values:
            medians.append(median(values))
    return medians


def sparkline(values: Sequence[float]) -> str:
    """A bar for each value, from 0 (or less) to the largest."""
    top = max(values, default=0.0)
    heights = [int(max(0.0, value) / top * len(BARS)) if top > 0 else 0 for value in values]
    return "".join(BARS[min(len(BARS) - 1, height)] for height in heights)
