"""One HTML page on one run or several: it needs no network, and shows only what was recorded.

The charts are the descriptions of `plots.py`, drawn in the browser by Vega, which the page carries with it. Its scripts
are allowed by their hashes alone, so that no text from a file can ever run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..history import FILE_NAME, History
from .comparison import METRICS, Way, compare, comparison_table, non_dominated, plot_comparison
from .plots import all_plots, component_rows, load_altair, save_chart, theme
from .summary import duration, last_step, sentence, summarize, table_rows

NONE = "not recorded"


@dataclass(frozen=True)
class Run:
    """What a directory holds of one run.

    Attributes:
        folder: The directory.
        label: Its name, short, and different from the other runs'.
        history: What GradES recorded; None for a run without GradES.
        results: `results.json` of `recipes/finetune.py`; None where there is none.
    """

    folder: Path
    label: str
    history: History | None
    results: dict[str, Any] | None

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps that were run, and planned ones."""
        if self.results is not None:
            return self.results["steps_run"], self.results["steps_planned"]
        assert self.history is not None
        return last_step(self.history), self.history.total_steps

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        run, planned = self.steps
        return self.results is not None or run >= planned or self.history is None or self.history.ended is not None

    @property
    def saved(self) -> tuple[float, str] | None:
        """The part of the FLOPs that was saved, and of which ones; None where they were not counted."""
        if self.history is not None and (savings := self.history.savings):
            if self.ended:
                return 1 - savings["used"] / savings["planned"], "of the planned FLOPs, counted"
            return 1 - savings["used"] / savings["full"], "of the FLOPs so far, counted"
        if self.results is not None and "saved" in (compute := self.results.get("compute") or {}):
            return compute["saved"], "of the planned FLOPs, counted"
        return None

    @property
    def seconds(self) -> float | None:
        """Wall time of training."""
        if self.history is not None and self.history.logs:
            return self.history.logs[-1]["seconds"]
        return ((self.results or {}).get("seconds") or {}).get("training")

    @property
    def loss(self) -> float | None:
        """The last training loss that was logged."""
        logs = [] if self.history is None else self.history.logs
        return next((row["loss"] for row in reversed(logs) if math.isfinite(row.get("loss", math.nan))), None)

    @property
    def model(self) -> str | None:
        """What was trained, where a file says so."""
        if self.results is not None and "sources" in self.results:
            return str(self.results["sources"]["model"])
        for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
            name = (_read_json(self.folder / file) or {}).get(key)
            if name:
                return str(name)
        return None


def load_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """What the directories hold: each a run, or a grid of runs (the --output of `recipes/compare.py`).

    Raises:
        ValueError: one of them holds no run, or a file is damaged; a single run has no history.
    """
    found: list[tuple[Path, History | None, dict[str, Any] | None]] = []
    for folder in map(Path, folders):
        cells = sorted(path.parent for path in folder.glob("*/*/seed-*/results.json"))
        for path in [folder] if _is_run(folder) or not cells else cells:
            history = History.load(path) if path.is_file() or (path / FILE_NAME).is_file() else None
            place = path.parent if path.is_file() else path
            results = _read_json(place / "results.json")
            if results is not None and not {"steps_run", "steps_planned"} <= results.keys():
                results = None  # of a run that has not ended, or of another program
            if history is None and (results is None or (len(folders) == 1 and not cells)):
                if path != folder:
                    continue  # a cell that has not ended
                raise ValueError(
                    f"RUN_DIR={str(folder)!r} holds no {FILE_NAME}: give the output directory of a run with GradES, or "
                    "save one there with engine.history.save."
                )
            found.append((place, history, results))
    if not found:
        raise ValueError(f"RUN_DIR={' '.join(map(str, folders))!r} holds no run that has ended.")
    places = [place.resolve() for place, _, _ in found]
    if len(set(places)) < len(places):
        raise ValueError(f"RUN_DIR={' '.join(map(str, folders))!r} names a run twice.")
    common = Path(os.path.commonpath([place.parent for place in places]))
    return [Run(place, str(place.resolve().relative_to(common)), history, results) for place, history, results in found]


def write_plots(runs: Sequence[Run], folder: str | os.PathLike[str], ending: str = "svg") -> list[Path]:
    """Write each plot of each run to a file: `<plot>.svg`, or with several runs `<run>-<plot>.svg`.

    Raises:
        ValueError: `ending` is no format that plots are written in.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    charts: dict[str, Any] = {}
    for run in runs:
        name = "" if len(runs) == 1 else re.sub(r"[^\w.-]+", "-", run.label) + "-"
        if run.history is not None:
            charts |= {name + plot: chart for plot, chart in all_plots(run.history).items()}
    if (chart := _comparison(runs).chart) is not None:
        charts["comparison"] = chart
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
        body = _comparison_section(runs, charts) + "".join(
            f'<details class="run"><summary><h2>{_text(run.label)}</h2> {_text(_short(run))}</summary>'
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
    plots = all_plots(history)
    missing = [name for name, plot in (("step time", "step_time"), ("loss", "loss")) if plot not in plots]
    frozen = history.frozen
    steps, planned = run.steps
    share = sum(c["numel"] for c in history.components if c["name"] in frozen)
    share /= max(1, sum(c["numel"] for c in history.components))
    first, last = min(frozen.values(), default=0), max(frozen.values(), default=0)
    when = f"at step {first:,}, " if first == last else f"between steps {first:,} and {last:,}, "
    when = when if frozen else ""
    tiles = [
        ("steps", f"{steps:,}", f"of {planned:,} planned"),
        (
            "matrices frozen",
            f"{len(frozen):,} of {len(history.components):,}",
            f"{when}{share:.0%} of their parameters",
        ),
        ("compute saved", f"{run.saved[0]:.1%}", run.saved[1]) if run.saved else ("compute saved", "not counted", ""),
        ("training time", NONE, "") if run.seconds is None else ("training time", duration(run.seconds), "wall clock"),
    ]
    model = f"<strong>{_text(run.model)}</strong>. " if run.model else ""
    going = ""
    if not run.ended:
        going = (
            '<p class="note" role="status">The record ends here without the end of the run: it is still going on, or '
            "was interrupted. Make the report again to see more.</p>"
        )
    extras = {key: (run.results or {}).get(key) for key in ("evaluation", "seconds", "compute")}
    facts = [(what.strip(), value) for what, value in table_rows(summarize(history, steps_run=steps, **extras))]
    options = [
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for key, value in {**history.config, **({"versions": history.versions} if history.versions else {})}.items()
    ]
    heads = ("name", "group", "layer", "parameters", "frozen", "value", "tau")
    components = [[row[head] for head in heads] for row in component_rows(history)]
    small = "".join(charts.figure(name, plots[name]) for name in ("frozen", "step_time", "loss") if name in plots)
    return (
        f'<p class="lead">{model}{_text(sentence(history))}</p>{going}<dl class="tiles">'
        + "".join(
            f"<div><dt>{_text(what)}</dt><dd>{_text(value)}<small>{_text(of)}</small></dd></div>"
            for what, value, of in tiles
        )
        + f"</dl>{charts.figure('freezing_map', plots['freezing_map'])}{charts.figure('statistic', plots['statistic'])}"
        f'<div class="small">{small}</div>'
        + (f'<p class="note">{" and ".join(missing).capitalize()}: {NONE} in this history.</p>' if missing else "")
        + f"<details><summary>Run and configuration</summary>{_table(('what', 'value'), [*facts, *options])}</details>"
        f"<details><summary>All {len(components):,} components as a table</summary>"
        "<p>Value: the one that froze it, or the last that was measured.</p>"
        f"{_table(heads, components, numbers={'parameters', 'value', 'tau'})}</details>"
    )


@dataclass(frozen=True)
class _Comparison:
    """Runs summed up by their results.json; `missing` says why there is no chart."""

    metric: str = ""
    ways: Sequence[Way] = ()
    chart: Any = None
    missing: str = ""


def _comparison(runs: Sequence[Run]) -> _Comparison:
    if len(runs) == 1:
        return _Comparison(missing="One run has nothing to compare with.")
    scored = [run for run in runs if _scores(run)]
    without = [run.label for run in runs if not _scores(run)]
    left = f" Without it: {', '.join(without)}." if without else ""
    if not scored:
        return _Comparison(
            missing="Quality against compute needs the results.json of recipes/finetune.py; no run has it."
        )
    metric = next((m for m in ("loss", "acc", "acc_norm") if all(m in _scores(run) for run in scored)), None)
    if metric is None:
        return _Comparison(missing="The runs were not measured by the same metric.")
    rows = []
    for run in scored:
        results: dict[str, Any] = run.results or {}
        cell = run.folder.resolve()
        grid = re.fullmatch(r"seed-(\d+)", cell.name)  # <task>/<arm>/seed-<n>, as recipes/compare.py writes it
        arm, seed = (cell.parent.name, grid[1]) if grid else (run.label, results.get("seed"))
        rows.append({"arm": arm, "task": results["evaluation"]["task"], "seed": seed, "results": results})
    try:
        ways = compare(rows, metric)
        chart = plot_comparison(ways, metric)
    except ValueError as error:
        return _Comparison(metric, missing=f"No plot of quality against compute: {error}{left}")
    return _Comparison(
        metric, ways, chart, f"Quality needs the results.json of recipes/finetune.py.{left}" if left else ""
    )


def _comparison_section(runs: Sequence[Run], charts: _Charts) -> str:
    found = _comparison(runs)
    heads = ["run", "steps", "frozen", "compute saved", "final training loss", "training time"]
    quality = f"quality ({found.metric})"
    heads += [quality] if found.metric else []
    rows = []
    for run in runs:
        history = run.history
        frozen = "no GradES" if history is None else f"{len(history.frozen):,} of {len(history.components):,}"
        score = _scores(run).get(found.metric)
        row = [
            run.label,
            f"{run.steps[0]:,} of {run.steps[1]:,}" + ("" if run.ended else ", not ended"),
            frozen,
            "not counted" if run.saved is None else f"{run.saved[0]:.1%}",
            NONE if run.loss is None else f"{run.loss:.4f}",
            NONE if run.seconds is None else duration(run.seconds),
        ]
        rows.append(row + ([NONE if score is None else f"{score:.4f}"] if found.metric else []))
    text = f'<p class="lead">{len(runs)} runs compared.</p>'
    if found.ways:
        best = non_dominated(found.ways, found.metric)
        names, cells = comparison_table(found.ways, found.metric)
        text += charts.figure("comparison", found.chart)
        text += "<h2>Means over seeds</h2><p>Bold: no other one is better for less compute.</p>"
        text += _table(names, cells, numbers=set(names[1:]), bold=best)
    if found.missing:
        text += f'<p class="note">{_text(found.missing)}</p>'
    return text + "<h2>Runs</h2>" + _table(heads, rows, numbers=set(heads[1:]))


def _scores(run: Run) -> Mapping[str, float]:
    """The qualities after training, by metric."""
    after = ((run.results or {}).get("evaluation") or {}).get("after") or {}
    return {metric: after[metric] for metric in METRICS if metric in after}


def _short(run: Run) -> str:
    assert run.history is not None
    saved = "" if run.saved is None else f", {run.saved[0]:.1%} of the compute saved"
    return f"{len(run.history.frozen):,} of {len(run.history.components):,} frozen{saved}"


def _table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: set[str] | frozenset[str] = frozenset(),
    bold: set[str] | frozenset[str] = frozenset(),
) -> str:
    """A table that scrolls by itself where it is too wide; the first cell of each row is its head."""
    kinds = ["number" if head in numbers else "" for head in heads]
    lines = [
        "".join(f'<th scope="col" class="{kind}">{_text(head)}</th>' for head, kind in zip(heads, kinds, strict=True))
    ]
    for first, *rest in rows:
        cells = "".join(f'<td class="{kind}">{_text(cell)}</td>' for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<th scope="row" class="{"best" if first in bold else ""}">{_text(first)}</th>{cells}')
    body = "".join(f"<tr>{line}</tr>" for line in lines[1:])
    return (
        '<div class="table" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    """As HTML, whatever it is; braces too, so that no text is taken for a place of the template."""
    return html.escape(text).replace("{", "&#123;")


def _is_run(folder: Path) -> bool:
    return folder.is_file() or any((folder / name).is_file() for name in (FILE_NAME, "results.json"))


def _read_json(path: Path) -> dict[str, Any] | None:
    """A file that holds an object; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return content if isinstance(content, dict) else None
