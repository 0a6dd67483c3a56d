"""Write docs/compatibility.md from what test runs showed (`pytest --compatibility FILE`).

    python -m benchmarks.compatibility FILE [FILE ...]

Several files, of machines with and without a GPU say, make one page: a row is shown by the first run that did not have
to skip its tests.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.compatibility import AREAS, PACKAGES, VERDICTS

TARGET = Path(__file__).parents[1] / "docs" / "compatibility.md"

HEADER = """# What works with GradES

Made from a run of the test suite by `make compatibility`; the tests check that this page lists what they mark. Each row
is shown by the tests that it names. They passed, or were skipped where the row says "not run".

* **works**: with a tau, matrices freeze exactly as in Algorithm 1, and the work for them is saved. Without one,
  looks end the run as [Concepts](concepts.md) says.
* **works, saves no work**: training and freezing are right, but frozen matrices cost what they did.
* **refused**: an error before training says why, and what to do instead.
* **not run**: the tests were skipped where this page was made.

"""


def merge(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each mode, in the order of the areas.

    Raises:
        ValueError: a test of a row failed, or the runs give one mode two verdicts.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, run in enumerate(runs, start=1):
        for row in run["rows"]:
            if row["outcome"] == "failed":
                raise ValueError(f"{row['area']}, {row['mode']}: failed ({', '.join(row['tests'])}); no page is made.")
            own = rows.setdefault((row["area"], row["mode"]), {**row, "run": number})
            if own["verdict"] != row["verdict"]:
                raise ValueError(f"{row['area']}, {row['mode']}: both {own['verdict']!r} and {row['verdict']!r}.")
            if own["outcome"] == "skipped" and row["outcome"] == "passed":
                rows[row["area"], row["mode"]] = {**row, "run": number}
    order = {area: number for number, area in enumerate(AREAS)}
    return sorted(
        rows.values(), key=lambda row: (order[row["area"]], VERDICTS.index(row["verdict"]), row["mode"].lower())
    )


def render(runs: Sequence[dict[str, Any]]) -> str:
    """The whole page."""
    parts = [HEADER]
    rows = merge(runs)
    for area in AREAS:
        own = [row for row in rows if row["area"] == area]
        if not own:
            continue
        parts.append(f"## {area}\n\n| mode | verdict | shown by |\n|---|---|---|\n")
        for row in own:
            verdict = row["verdict"] + ("" if row["outcome"] == "passed" else ", not run")
            run = f" (run {row['run']})" if len(runs) > 1 else ""
            tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row["tests"])
            parts.append(f"| {row['mode']} | {verdict} | {tests}{run} |\n")
        parts.append("\n")
    names = ["python", *PACKAGES, "device"]
    parts.append("## Versions\n\n| |" + "".join(f" run {n} |" for n in range(1, len(runs) + 1)) + "\n|---|")
    parts.append("---|" * len(runs) + "\n")
    for name in names:
        if any(name in run["versions"] for run in runs):
            parts.append(f"| {name} |" + "".join(f" {run['versions'].get(name, '')} |" for run in runs) + "\n")
    return "".join(parts)


def rows_of(page: str) -> set[tuple[str, str, str]]:
    """(area, mode, verdict) of every row of a rendered page."""
    rows, area = set(), ""
    for line in page.splitlines():
        if line.startswith("## "):
            area = line[3:]
        elif line.startswith("| ") and area in AREAS and not line.startswith("| mode "):
            mode, verdict = (cell.strip() for cell in line.split("|")[1:3])
            rows.add((area, mode, verdict.removesuffix(", not run")))
    return rows


def main(files: Sequence[str]) -> None:
    if not files:
        sys.exit(__doc__)
    runs = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
    try:
        TARGET.write_text(render(runs), encoding="utf-8")
    except ValueError as error:
        sys.exit(f"compatibility: error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
