"""The figures draw for models of any shape, and show what the history holds."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle

from grades_hf import History
from grades_hf.report import plot_freezing_map, plot_run, plot_statistic
from grades_hf.report.plots import NEVER

from .histories import PROJECTIONS, history

SHAPES: dict[str, dict[str, Any]] = {
    "one layer, nothing frozen": {"layers": 1, "projections": PROJECTIONS[:4], "frozen": 0.0},
    "eighty layers, all frozen": {"layers": 80, "frozen": 1.0},
    "thirty kinds": {"projections": (*PROJECTIONS, *(f"kind_{number}" for number in range(23)))},
    "three towers": {"towers": ("vision", "language", "audio")},
    "experts": {"experts": 8},
    "outside the blocks": {"outside": True},
    "one step": {"steps": 1, "frozen": 0.0},
}


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_draws(shape: str, tmp_path: Path) -> None:
    figure = plot_run(history(**SHAPES[shape]), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert len(figure.axes) == 3  # two figures and the colour bar
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    for axes in figure.axes:
        labels = [label.get_window_extent(renderer) for label in axes.get_xticklabels() if label.get_text()]
        assert not any(left.overlaps(right) for left, right in pairwise(labels))


def test_a_run_that_was_not_begun_draws_too() -> None:
    run = history(frozen=0.0)
    run.truncate(0)
    axes = plot_statistic(run)
    assert "no values were measured" in [text.get_text() for text in axes.texts]
    plot_freezing_map(run)


def test_medians_and_quartiles() -> None:
    run = history(layers=4, projections=("q",), frozen=0.0, steps=4)
    for layer in range(4):
        run.values[f"None.{layer}.q.0"][1] = layer + 1.0
    axes = plot_statistic(run)
    line = axes.lines[0]
    assert list(line.get_xdata()) == [2, 3, 4]  # no value at the first check
    assert line.get_ydata()[0] == 2.5
    band = axes.collections[0].get_paths()[0].vertices
    assert {1.75, 3.25} <= {y for x, y in band.tolist() if x == 2}


def test_thresholds_are_drawn() -> None:
    def levels(run: History) -> set[float]:
        return {line.get_ydata()[0] for line in plot_statistic(run).lines if list(line.get_xdata()) == [0, 1]}

    assert levels(history(tau=(1.0, 2.0))) == {1.0, 2.0}
    assert levels(history(tau=(0.5, 0.5))) == {0.5}


def test_the_map_shows_what_froze_when() -> None:
    run = history(layers=2, projections=("q", "up"), frozen=0.0)
    run.events = [{"step": 13, "name": "None.1.q.0", "value": 0.1, "tau": 1.0}]
    axes = plot_freezing_map(run)
    cells = {(p.get_x() + 0.5, p.get_y() + 0.5): p for p in axes.patches if isinstance(p, Rectangle)}
    assert set(cells) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    hatched = {place for place, patch in cells.items() if patch.get_hatch()}
    assert hatched == {(0, 0), (1, 0), (1, 1)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "up"]
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["never frozen"]
    assert legend.get_patches()[0].get_hatch()
    assert NEVER.lower() == "#e4e4e4"


def test_matplotlib_is_loaded_only_when_something_is_drawn() -> None:
    code = "import sys, grades_hf.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_matplotlib_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'grades-hf\[plots\]'"):
        plot_statistic(history())
