"""One HTML page on one run or several: it needs no network, and shows only what was recorded.

The charts are the descriptions of `plots.py`, drawn in the browser by Vega, which the page carries with it. Its scripts
are allowed by their hashes alone, so that no text from a file can ever run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .charts import load_altair, save_chart, theme
from .curves import lines
from .freezing_map import HEADS, component_rows
from .plots import all_plots, plot_losses
from .runs import Run
from .summary import (
    LOOK_HEADS,
    LOOKS_NOTE,
    duration,
    ended_by_look,
    facts,
    finite,
    has_thresholds,
    look_rows,
    rule,
    sentence,
    visible,
)  # fmt: skip

NONE = "not recorded"
MOST_ROWS = 2000  # of the table of components
SMALL = ("frozen", "loss", "step_time")


def write_plots(runs: Sequence[Run], folder: str | os.PathLike[str], ending: str = "svg") -> list[Path]:
    """Write each plot of each run to a file: `<plot>.svg`, or with several runs `<run>-<plot>.svg`.

    Raises:
        ValueError: `ending` is no format that plots are written in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    charts = dict(_overlaid(runs))
    for run in runs:
        name = "" if len(runs) == 1 else re.sub(r"[^\w.-]+", "-", run.label) + "-"
        if run.history is not None:
            charts |= {name + plot: chart for plot, chart in all_plots(run.history).items()}
    files = [folder / f"{name}.{ending}" for name in charts]
    for file, chart in zip(files, charts.values(), strict=True):
        save_chart(chart, file)
    return files


def to_html(runs: Sequence[Run]) -> str:
    """The page.

    Raises:
        ImportError: altair or vl-convert-python is not installed.
    """
    load_altair()
    from vl_convert import javascript_bundle

    charts = _Charts()
    if len(runs) == 1:
        title, body = f"GradES: {runs[0].label}", _section(runs[0], charts)
    else:
        title = f"GradES: {len(runs)} runs"
        body = _comparison(runs, charts) + "".join(
            f'<details class="run"><summary><h2>{_text(run.label)}</h2> {_text(_did(run))}</summary>'
            f"{_section(run, charts)}</details>"
            for run in runs
            if run.history is not None
        )
    data = {"charts": charts.specs, "themes": {name: theme(dark=name == "dark") for name in ("light", "dark")}}
    parts = {
        "title": _text(title),
        "body": body,
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "vega": javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts.get(match[1], match[0]), template)
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    ]
    return page.replace("{{scripts}}", " ".join(f"'sha256-{digest}'" for digest in hashes), 1)


class _Charts:
    """The charts of a page; each is drawn where its number stands."""

    def __init__(self) -> None:
        self.specs: list[dict[str, Any]] = []

    def figure(self, name: str, chart: Any) -> str:
        """A place for the chart, with its title as text, which wraps on a phone."""
        spec = chart.to_dict()
        del spec["config"]
        self.specs.append({"name": name, "spec": spec})
        title, subtitle = spec["title"]["text"], spec["title"].get("subtitle")
        subtitle = " ".join(subtitle) if isinstance(subtitle, list) else subtitle
        return (
            f'<figure class="{name}" data-chart="{len(self.specs) - 1}"><figcaption><h3>{_text(title)}</h3>'
            f"{f'<p>{_text(subtitle)}</p>' if subtitle else ''}</figcaption>"
            '<div class="chart"></div><p class="export">Save as '
            + " ".join(
                f'<button type="button" data-format="{form}" aria-label="Save {_text(title)} as {form.upper()}">'
                f"{form.upper()}</button>"
                for form in ("svg", "png")
            )
            + "</p></figure>"
        )


def _section(run: Run, charts: _Charts) -> str:
    """All about one run."""
    history = run.history
    assert history is not None
    plots, steps = all_plots(history), run.steps
    missing = [name for name, plot in (("step time", "step_time"), ("loss", "loss")) if plot not in plots]
    model = f"<strong>{_text(run.model)}</strong>. " if run.model else ""
    notes = [f"{' and '.join(missing).capitalize()}: {NONE} in this history."] if missing else []
    if not run.ended:
        notes.append("The record ends before the run: it is still going on, or was interrupted.")
    options = facts(history) + [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in history.config.items()
    ]
    rows = component_rows(history)
    components = [[row[head] for head in HEADS] for row in rows[:MOST_ROWS]]
    cut = f" The first {MOST_ROWS:,} of them." if len(rows) > MOST_ROWS else ""
    looks = ""
    if history.looks:
        looks = (
            _table(LOOK_HEADS, look_rows(history), numbers=set(LOOK_HEADS[:7])) + f'<p class="rule">{LOOKS_NOTE}</p>'
        )
    pair = "".join(charts.figure(name, plots[name]) for name in ("votes", "looks") if name in plots)
    large = "".join(charts.figure(name, plots[name]) for name in ("freezing_map", "statistic") if name in plots)
    small = "".join(charts.figure(name, plots[name]) for name in SMALL if name in plots)
    if run.held_out:
        small += charts.figure("held_out", lines({"": run.held_out}, max(1, *steps), "Held-out loss", "loss"))
    return (
        f'<p class="lead">{model}{_text(sentence(history))}</p>'
        + "".join(f'<p class="note" role="status">{_text(note)}</p>' for note in notes)
        + '<dl class="tiles">'
        + "".join(
            f"<div><dt>{_text(what)}</dt><dd>{_text(value)}<small>{_text(of)}</small></dd></div>"
            for what, value, of in _tiles(run)
        )
        + f'</dl><p class="rule">{_text(rule(history))}</p><div class="pair">{pair}</div>{looks}{large}'
        f'<div class="small">{small}</div>'
        f"<details><summary>Run and configuration</summary>{_table(('what', 'value'), options)}</details>"
        f"<details><summary>All {len(rows):,} components as a table</summary>"
        f"<p>Value: the one that froze it, or the one of the last check.{cut}</p>"
        f"{_table(HEADS, components, numbers={'parameters', 'value', 'tau'})}</details>"
    )


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: what, the figure, and of what it is."""
    history, (steps, planned), saved, seconds = run.history, run.steps, run.saved, run.seconds
    assert history is not None
    tiles = [("steps", f"{steps:,}", f"of {planned:,} planned")]
    if has_thresholds(history):
        froze = sorted(history.frozen.values())
        when = f"between steps {froze[0]:,} and {froze[-1]:,}" if froze else ""
        tiles.append(("matrices frozen", f"{len(froze):,} of {len(history.components):,}", when))
    else:
        said = "none was proposed" if run.ended else "none so far"
        for look in history.looks[-1:]:
            said = "the last one ended the run" if look["ended"] else "all said to go on"
            of = f"; {look['loss']:.4f} without averaging" if finite(look["loss"]) else ""
            loss = f"{look['average_loss']:.4f}" if finite(look["average_loss"]) else NONE
            tiles.append(("held-out loss", loss, f"at the last look{of}"))
        tiles.insert(1, ("looks at held-out rows", f"{len(history.looks)}", said))
    tiles.append(("compute saved", f"{saved[0]:.1%}", saved[1]) if saved else ("compute saved", "not counted", ""))
    return [*tiles, ("training time", *((NONE, "") if seconds is None else (duration(seconds), "wall clock")))]


def _comparison(runs: Sequence[Run], charts: _Charts) -> str:
    """The runs side by side."""
    columns: dict[str, list[str]] = {
        "run": [run.label for run in runs],
        "steps": [f"{r.steps[0]:,} of {r.steps[1]:,}" + ("" if r.ended else ", not ended") for r in runs],
        "what GradES did": [_did(run) for run in runs],
        "compute saved": ["" if r.history is None else f"{r.saved[0]:.1%}" if r.saved else "not counted" for r in runs],
        "training loss": [f"{run.losses[-1][1]:.4f}" if run.losses else NONE for run in runs],
        "held-out loss": [f"{run.held_out[-1][1]:.4f}" if run.held_out else NONE for run in runs],
        "after training": [run.quality or NONE for run in runs],
        "training time": [NONE if run.seconds is None else duration(run.seconds) for run in runs],
    }
    columns = {head: cells for head, cells in columns.items() if set(cells) != {NONE}}
    text = "".join(charts.figure(name, chart) for name, chart in _overlaid(runs).items())
    numbers = columns.keys() - {"run", "what GradES did", "after training"}
    table = _table(list(columns), list(zip(*columns.values(), strict=True)), numbers)
    return f'<p class="lead">{len(runs)} runs side by side.</p>{table}{text}<h2>Each run</h2>'


def _overlaid(runs: Sequence[Run]) -> dict[str, Any]:
    """The losses of several runs, each kind in one chart."""
    to = max(1, *(max(run.steps) for run in runs))
    held_out = {visible(run.label): run.held_out for run in runs if run.held_out}
    training = {visible(run.label): run.losses for run in runs if run.losses}
    kinds = {"held_out": ("Held-out loss", held_out), "losses": ("Training loss", training)}
    kinds = kinds if len(runs) > 1 else {}
    return {n: plot_losses(curves, title, total_steps=to) for n, (title, curves) in kinds.items() if curves}


def _did(run: Run) -> str:
    history = run.history
    if history is None:
        return "no GradES"
    if has_thresholds(history):
        return f"{len(history.frozen):,} of {len(history.components):,} frozen"
    if ended_by_look(history):
        return f"ended by a look at step {history.looks[-1]['step']:,}"
    number = len(history.looks)
    return f"{number} look{'s' if number > 1 else ''}, went on" if number else "no look"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of each row is its head."""
    kinds = ["number" if head in numbers else "" for head in heads]
    head = "".join(
        f'<th scope="col" class="{kind}">{_text(name)}</th>' for name, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f'<td class="{kind}">{_text(cell)}</td>' for cell, kind in zip(rest, kinds[1:], strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    return (
        '<div class="table" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    """As HTML, whatever it is; braces too, so that no text is taken for a place of the template."""
    return html.escape(visible(text)).replace("{", "&#123;")
