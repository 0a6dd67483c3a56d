"""The comparison of a grid: means and errors by hand, what dominates what, and files that can be read."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.comparison import (
    Way,
    compare,
    comparison_csv,
    comparison_markdown,
    comparison_rows,
    non_dominated,
    plot_comparison,
)


def run(arm: str, seed: int, quality: float, used: float = 6.0, task: str = "siqa", **more: Any) -> dict[str, Any]:
    metric = more.pop("metric", "acc")
    results = {
        "steps_run": 10, "steps_planned": 20, "compute": {"used": used, "full": 10.0, "saved": 0.4},
        "seconds": {"training": 3.0, "evaluation": 9.0},
        "evaluation": {"task": task, "rows": 5, "after": {metric: quality, f"{metric}_stderr": 0.1}},
    }  # fmt: skip
    for key, value in more.items():
        results[key] = {**results[key], **value}
    return {"arm": arm, "task": task, "seed": seed, "results": results}


def test_means_and_standard_errors_over_seeds() -> None:
    ways = compare([run("none", seed, quality) for seed, quality in ((1, 0.5), (2, 0.6), (3, 0.7))], "acc")
    (way,) = ways
    assert way.seeds == 3
    assert way.quality["siqa"].value == way.quality["average"].value == pytest.approx(0.6)
    assert way.quality["siqa"].error == pytest.approx(0.1 / math.sqrt(3))  # 0.1: their standard deviation
    assert (way.steps, way.planned, way.compute, way.seconds["training"]) == (10, 20, 6, 3)
    assert "average" not in comparison_markdown(ways, "acc")  # of one benchmark it is the same


def test_tasks_are_columns_whose_costs_add_up() -> None:
    runs = [run("none", s, 0.5 + s / 10, task=task) for s in (1, 2) for task in ("siqa", "boolq")]
    runs[-1]["results"]["evaluation"]["after"]["acc"] = 0.1
    (way,) = compare(runs, "acc")
    assert list(way.quality) == ["siqa", "boolq", "average"]
    assert way.quality["average"].value == pytest.approx((0.6 + 0.6 + 0.7 + 0.1) / 4)
    assert way.quality["average"].error == pytest.approx(0.1)  # of the seeds' averages, 0.6 and 0.4
    assert (way.steps, way.compute, way.seconds["training"]) == (20, 12, 6)
    assert "| average acc (%) |" in comparison_markdown([way], "acc")


def test_a_mixture_counts_as_its_benchmarks() -> None:
    cell = run("none", 1, 0.5, task="siqa+boolq")
    cell["results"]["evaluation"]["after"]["tasks"] = {"siqa": {"acc": 0.4}, "boolq": {"acc": 0.6}}
    (way,) = compare([cell], "acc")
    assert {name: estimate.value for name, estimate in way.quality.items()} == {
        "siqa": 0.4, "boolq": 0.6, "average": 0.5,
    }  # fmt: skip
    assert math.isnan(way.quality["siqa"].error)
    with pytest.raises(ValueError, match="siqa is measured in two tasks"):
        compare([cell, run("none", 1, 0.5)], "acc")


def test_only_whole_seeds_count() -> None:
    runs = [run("none", 1, 0.5), run("none", 1, 0.5, task="boolq"), run("none", 2, 0.9), run("es", 1, 0.5)]
    (way,) = compare(runs, "acc")
    assert (way.arm, way.seeds, way.quality["siqa"].value) == ("none", 1, 0.5)
    with pytest.raises(ValueError, match="arm 'none' has siqa with seed 1 twice"):
        compare([runs[0], runs[0]], "acc")
    with pytest.raises(ValueError, match="a run of siqa was not measured by 'loss'; it has acc"):
        compare([run("none", 1, 0.5)], "loss")


def ways(metric: str = "acc") -> list[Way]:
    points = {"none": (0.8, 10.0), "stop": (0.7, 5.0), "worse": (0.6, 6.0), "twin": (0.7, 5.0), "slow": (0.8, 11.0)}
    runs = [run(arm, seed, q, used, metric=metric) for arm, (q, used) in points.items() for seed in (1, 2)]
    validated = {"used": 4.0, "validation": 3.0}
    return compare([*runs, *(run("es", s, 0.65, metric=metric, compute=validated) for s in (1, 2))], metric)


def test_what_is_not_dominated() -> None:
    assert non_dominated(ways(), "acc") == {"none", "stop", "twin"}  # of two equal ones neither dominates
    assert non_dominated(ways("loss"), "loss") == {"stop", "twin", "worse"}  # less is better
    assert {way.arm: way.compute for way in ways()}["es"] == 7.0


def test_the_files(tmp_path: Path) -> None:
    found = ways()
    rows = list(csv.DictReader(comparison_csv(found, "acc").splitlines()))
    assert [row["arm"] for row in rows] == [way.arm for way in found]
    assert rows[0]["siqa acc"] == str(found[0].quality["siqa"].value)
    assert [row["non-dominated"] for row in rows] == ["True", "True", "False", "True", "False", "False"]
    assert rows[-1]["validation FLOPs"] == "3.0"
    table = comparison_markdown(found, "acc").splitlines()
    assert len(table) == 2 + len(found)
    assert "| **none** | 2 | 80.00 ± 0.00 |" in table[2]
    assert "| 10 of 20 | 10 | 0 | 90.9% | 3.0 | 0.0 | 0.0 |" in table[2]
    assert table[4].startswith("| worse |")
    plot_comparison(found, "acc", tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_every_arm_and_fills_the_best() -> None:
    found = ways("loss")
    spec = plot_comparison(found, "loss").to_dict()
    points = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "point")
    rows = spec["data"]["values"]
    assert {row["arm"] for row in rows} == {way.arm for way in found}
    assert {row["arm"] for row in rows if row["best"]} == {"stop", "twin", "worse"}
    assert points["encoding"]["fillOpacity"]["condition"]["test"] == "datum.best"
    assert points["encoding"]["y"]["scale"]["reverse"] is True


def test_what_was_not_counted_is_said() -> None:
    cell = run("none", 1, 0.5)
    del cell["results"]["compute"]
    found = compare([cell], "acc")
    assert "not counted" in comparison_markdown(found, "acc")
    assert comparison_rows(found, "acc")[0]["non-dominated"] is False
    assert csv.DictReader(comparison_csv(found, "acc").splitlines()).__next__()["training FLOPs"] == ""
    with pytest.raises(ValueError, match=r"needs the FLOPs of every arm, and has them not \(none\)"):
        plot_comparison(found, "acc")
