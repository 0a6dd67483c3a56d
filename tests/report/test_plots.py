"""The figures draw for models of any shape, and show what the history holds."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grades_hf import History
from grades_hf.report import plot_freezing_map, plot_looks, plot_losses, plot_run, plot_statistic, plot_votes
from grades_hf.report.charts import MOST_POINTS, OKABE_ITO, averaged, save_chart, theme, thin
from grades_hf.report.curves import plot_progress
from grades_hf.report.freezing_map import MOST_CELLS
from grades_hf.report.plots import all_plots

from .histories import PROJECTIONS, changed, history, look, looked

SHAPES: dict[str, dict[str, Any]] = {
    "one layer, nothing frozen": {"layers": 1, "projections": PROJECTIONS[:4], "frozen": 0.0},
    "eighty layers, all frozen": {"layers": 80, "frozen": 1.0},
    "thirty kinds": {"projections": (*PROJECTIONS, *(f"kind_{number}" for number in range(23)))},
    "three towers": {"towers": ("vision", "language", "audio")},
    "experts": {"experts": 8},
    "outside the blocks": {"outside": True},
    "one step": {"steps": 1, "frozen": 0.0},
}


def layers(chart: Any, mark: str, style: str | None = None) -> list[dict[str, Any]]:
    """The layers of this mark (and style), with their rows as `rows`."""
    spec = chart.to_dict()
    found = []
    for layer in spec["layer"]:
        if layer["mark"]["type"] == mark and layer["mark"].get("style") == style:
            data = layer.get("data") or spec["data"]
            rows = spec["datasets"][data["name"]] if "name" in data else data["values"]
            found.append({**layer, "rows": rows})
    return found


@pytest.mark.parametrize("shape", list(SHAPES))
def test_it_draws(shape: str, tmp_path: Path) -> None:
    plot_run(history(**SHAPES[shape]), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize("ending", ["svg", "PNG", "pdf", "html"])
def test_the_ending_decides_the_format(ending: str, tmp_path: Path) -> None:
    plot_run(history(), tmp_path / f"run.{ending}")
    begins = {"svg": b"<svg", "PNG": b"\x89PNG", "pdf": b"%PDF", "html": b"<!DOCTYPE html>"}[ending]
    content = (tmp_path / f"run.{ending}").read_bytes()
    assert content.lstrip().startswith(begins)
    assert b"cdn.jsdelivr" not in content


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run.jpeg' must end in one of .png, .svg, .pdf, .html"):
        plot_run(history(), tmp_path / "run.jpeg")
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_not_begun_draws_too(tmp_path: Path) -> None:
    run = history(frozen=0.0)
    run.truncate(0)
    assert "no values were measured" in json.dumps(plot_statistic(run).to_dict())
    plot_run(run, tmp_path / "run.png")
    assert list(all_plots(run)) == ["statistic"]


def test_medians_and_quartiles() -> None:
    run = history(layers=4, projections=("q",), frozen=0.0, steps=4)
    run = changed(run, values={f"None.{layer}.q.0": [math.nan, layer + 1.0, 1.0, 1.0] for layer in range(4)})
    (line,) = layers(plot_statistic(run), "line")
    assert [row["step"] for row in line["rows"]] == [2, 3, 4]  # no value at the first check
    assert {key: line["rows"][0][key] for key in ("low", "median", "high", "count")} == {
        "low": 1.75, "median": 2.5, "high": 3.25, "count": 4,
    }  # fmt: skip


def test_thresholds_are_drawn() -> None:
    def levels(run: History) -> set[float]:
        return {row["tau"] for layer in layers(plot_statistic(run), "rule", "tau") for row in layer["rows"]}

    assert levels(history(tau=(1.0, 2.0))) == {1.0, 2.0}
    assert levels(history(tau=(0.5, 0.5))) == {0.5}
    (texts,) = layers(plot_statistic(history(tau=(1.0, 1.02))), "text", "note")[1:2]
    assert [row["text"] for row in texts["rows"]] == ["τ 1 to 1.02"], "near ones stand together"
    assert levels(history(tau=(1e-300, 1e-300))) == set()  # would leave no room for the values
    run = history()
    for component in run.components:
        component["tau"] = None
    assert levels(run) == set()


def test_the_grace_period_and_the_end_are_shown() -> None:
    run = history(steps=20, planned=24)
    (area,) = layers(plot_statistic(run), "rect", "grace")
    assert area["rows"] == [{"step": 0, "to": 12}]
    (rule,) = layers(plot_statistic(run), "rule", "end")
    assert rule["rows"] == [{"step": 20}]
    assert "recorded so far" in json.dumps(plot_statistic(run).to_dict())
    run.ended = "converged"
    assert "training ended" in json.dumps(plot_statistic(run).to_dict())
    assert not layers(plot_statistic(history(steps=24)), "rule", "end")


def test_the_map_shows_what_froze_when() -> None:
    run = history(layers=2, projections=("q", "up"), frozen=0.0)
    run.events = [{"step": 13, "name": "None.1.q.0", "value": 0.1, "tau": 1.0}]
    chart = plot_freezing_map(run)
    (frozen,) = layers(chart, "rect", "cell")
    (never,) = layers(chart, "rect", "never")
    (crosses,) = layers(chart, "rule", "cross")
    assert [(row["name"], row["step"], row["x"], row["y"]) for row in frozen["rows"]] == [("None.1.q.0", 13, 0, 1)]
    assert {(row["x"], row["y"]) for row in never["rows"]} == {(0, 0), (1, 0), (1, 1)}
    assert crosses["rows"] == never["rows"]
    assert frozen["rows"][0]["about"] == "None.1.q.0: frozen at step 13, value 0.1, τ 1, 10 parameters"
    axis = frozen["encoding"]["x"]["axis"]
    assert axis["values"] == [0.5, 1.5]
    assert '["q", "up"]' in axis["labelExpr"]


@pytest.mark.parametrize("experts", [1, 2, 8, 128])
def test_cells_neither_overlap_nor_leave_their_place(experts: int) -> None:
    run = history(layers=2, projections=("q", "up"), frozen=0.5, experts=experts)
    chart = plot_freezing_map(run)
    cells = [row for style in ("cell", "never") for layer in layers(chart, "rect", style) for row in layer["rows"]]
    assert len(cells) == len(run.components)
    for place in {(row["name"].split(".")[1], row["name"].split(".")[2]) for row in cells}:
        here = [row for row in cells if tuple(row["name"].split(".")[1:3]) == place]
        assert all(int(place[0]) <= row["y"] < row["y2"] <= int(place[0]) + 1 for row in here)
        for one in here:
            for other in here:
                apart = one["x2"] <= other["x"] + 1e-3 or other["x2"] <= one["x"] + 1e-3
                apart |= one["y2"] <= other["y"] + 1e-3 or other["y2"] <= one["y"] + 1e-3
                assert apart or one is other


def test_frozen_fraction_step_time_and_loss() -> None:
    run = history(layers=2, projections=("q", "up"), frozen=0.0)
    run.events = [
        {"step": step, "name": f"None.{layer}.q.0", "value": 0.1, "tau": 1.0} for step, layer in ((13, 0), (15, 1))
    ]
    run.logs = [
        {"step": 4, "seconds": 4.0, "frozen": 0, "loss": 2.0},
        {"step": 8, "seconds": 6.0, "frozen": 0, "loss": float("nan")},
    ]
    charts = plot_progress(run)
    rows = {
        name: [(r["step"], r["value"]) for r in layers(chart, "line", "plain")[0]["rows"]]
        for name, chart in charts.items()
    }
    assert rows == {
        "frozen": [(0, 0.0), (13, 0.25), (15, 0.5), (20, 0.5)],
        "step_time": [(4, 1.0), (8, 0.5)],
        "loss": [(4, 2.0)],
    }


def test_long_runs_are_thinned_to_every_kth_check() -> None:
    assert thin(range(MOST_POINTS)) == range(MOST_POINTS)
    assert list(thin(range(2 * MOST_POINTS + 1)))[:2] == [0, 3]
    assert list(thin(range(2 * MOST_POINTS)))[-2:] == [2 * MOST_POINTS - 2, 2 * MOST_POINTS - 1]
    run = history(layers=1, projections=("q",), steps=3000, planned=4000, frozen=0.0)
    run.logs = [{"step": t, "seconds": t / 2, "frozen": 0, "loss": float(t), "votes": 0.1} for t in range(1, 3001)]
    (line,) = layers(plot_statistic(run), "line")
    assert len(line["rows"]) <= MOST_POINTS + 1
    assert re.search("1,00[01] of 3,000 checks are drawn", plot_statistic(run).to_dict()["title"]["subtitle"])
    for chart in (*plot_progress(run).values(), plot_votes(run)):
        assert all(len(line["rows"]) <= MOST_POINTS + 1 for line in layers(chart, "line", "plain"))


def test_losses_are_averaged_where_there_are_many() -> None:
    assert averaged([(1, 1.0), (2, 3.0)], 5) == [(1, 1.0), (2, 3.0)]
    assert averaged([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(2, 2.0), (3, 5.0)]


def test_thousands_of_experts_share_the_cells_of_their_place() -> None:
    run = history(layers=2, projections=("up",), experts=MOST_CELLS // 2 + 1, frozen=0.5)
    chart = plot_freezing_map(run)
    (cells,) = layers(chart, "rect", "cell")
    assert len(cells["rows"]) == 2
    assert cells["rows"][0]["name"] == f"{MOST_CELLS // 2 + 1:,} matrices"
    assert "median step" in chart.to_dict()["title"]["subtitle"]


# --- runs without a tau ----------------------------------------------------------------------------------------------


def test_votes_are_drawn_with_the_quorum_and_the_looks() -> None:
    chart = plot_votes(looked())
    (line,) = layers(chart, "line", "plain")
    assert [(row["step"], row["share"]) for row in line["rows"]][-2:] == [(18, 0.9), (20, 1.0)]
    (quorum,) = layers(chart, "rule", "tau")
    assert quorum["rows"] == [{"share": 0.5}]
    verdicts = [layer["rows"] for layer in layers(chart, "point") if "verdict" in layer["rows"][0]]
    assert [(row["step"], row["verdict"]) for row in verdicts[0]] == [(12, "said to go on"), (20, "ended the run")]


def test_the_quorum_is_that_of_the_rule() -> None:
    from grades_hf.ending import ending
    from grades_hf.report import summary

    assert summary.QUORUM == ending.QUORUM
    assert ending.MARGIN == 3.0, "what the bar of a look stands for"


def test_a_look_has_both_losses_and_three_errors_of_their_difference() -> None:
    run = looked()
    run.looks = [look(12, 2.5, 2.4, False, error=0.1), look(20, 2.5, 2.4, True, error=float("inf"))]
    points = layers(plot_looks(run), "point")[0]["rows"]
    found = {(row["step"], row["which"].split()[-1]): (row["loss"], row["low"], row["high"]) for row in points}
    assert found[12, "weights"] == (2.4, pytest.approx(2.1), pytest.approx(2.7))
    assert found[12, "are"] == (2.5, 2.5, 2.5)
    assert found[20, "weights"] == (2.4, 2.4, 2.4), "one row has no error"


@pytest.mark.parametrize("ended", ["look", "completed", None])
def test_a_run_in_which_nothing_froze_has_no_map(ended: str | None, tmp_path: Path) -> None:
    run = looked(ended)
    plots = set(all_plots(run))
    assert plots == {"votes", "statistic", "loss", "step_time"} | ({"looks"} if ended == "look" else set())
    plot_run(run, tmp_path / "run.png")
    assert "Votes for a look" in json.dumps(plot_run(run).to_dict())


def test_losses_of_several_runs_are_overlaid() -> None:
    chart = plot_losses({"with": looked(), "without": [(1, 3.0), (50, 2.0)]})
    (line,) = layers(chart, "line")
    assert {row["run"] for row in line["rows"]} == {"with", "without"}
    assert line["encoding"]["x"]["scale"]["domain"] == [0, 50]
    ends = layers(chart, "point")[-1]["rows"]
    assert {(row["run"], row["step"]) for row in ends} == {("with", 20), ("without", 50)}


def test_more_groups_than_colours_differ_by_dashes() -> None:
    run = history(layers=1, projections=tuple(f"k{i}" for i in range(8)), frozen=0.0)
    for number, component in enumerate(run.components):
        component["group"] = f"g{number}"
    assert len(run.components) > len(OKABE_ITO)
    (line,) = layers(plot_statistic(run), "line")
    assert "range" in line["encoding"]["strokeDash"]["scale"]


def test_labels_are_data_and_never_code(tmp_path: Path) -> None:
    run = history(layers=1, projections=('"]+warn("x")+["',), frozen=0.0)
    chart = plot_freezing_map(run)
    save_chart(chart, tmp_path / "map.svg")
    assert "warn" in (tmp_path / "map.svg").read_text(encoding="utf-8")


def test_themes_have_the_same_parts() -> None:
    light, dark = theme(), theme(dark=True)
    assert light.keys() == dark.keys()
    assert light["style"].keys() == dark["style"].keys()
    assert light["background"] != dark["background"]


def test_altair_is_loaded_only_when_something_is_drawn() -> None:
    code = "import sys, grades_hf.report.page; sys.exit(bool({'altair', 'vl_convert'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("package", ["altair", "vl_convert"])
def test_a_missing_package_is_explained(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'grades-hf\[plots\]'"):
        plot_statistic(history())
