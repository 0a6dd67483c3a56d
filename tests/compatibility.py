"""What `@pytest.mark.compatibility(area, mode, verdict)` means: the rows of docs/compatibility.md, as a run shows them.

`pytest --compatibility FILE` writes which marked tests passed, and on which versions, as JSON;
`python -m benchmarks.compatibility FILE ...` makes the page of it.
"""

from __future__ import annotations

import ast
import json
import platform
from collections import defaultdict
from importlib import metadata
from pathlib import Path

import pytest
import torch

AREAS = (
    "Trainer", "Distributed", "Client trainers", "Custom loops", "Precision and memory", "Optimizers", "Adapters",
    "Faults",
)  # fmt: skip
VERDICTS = ("works", "works, saves no work", "refused")
PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "trl", "sentence-transformers", "lightning", "deepspeed",
    "bitsandbytes",
)  # fmt: skip
PROPERTY = "compatibility"

Row = tuple[str, str, str]


def checked(area: object, mode: object, verdict: object) -> Row:
    """The three arguments of a mark.

    Raises:
        ValueError: an area or a verdict that the page does not have.
    """
    if area not in AREAS:
        raise ValueError(f"compatibility: area={area!r} is unknown; use one of {', '.join(AREAS)}.")
    if not isinstance(mode, str) or not mode or "|" in mode:
        raise ValueError(f"compatibility: mode={mode!r} must be a few words without '|'.")
    if verdict not in VERDICTS:
        raise ValueError(f"compatibility: verdict={verdict!r} is unknown; use one of {', '.join(VERDICTS)}.")
    return str(area), mode, str(verdict)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write which modes the marked tests have shown, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--compatibility")
    if file is not None and not hasattr(config, "workerinput"):  # not in the workers of pytest-xdist
        config.pluginmanager.register(Recorder(Path(file).absolute()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the reports of marked tests carry their rows; pytest-xdist sends them to the process that records."""
    for item in items:
        for mark in item.iter_markers("compatibility"):
            item.user_properties.append((PROPERTY, list(checked(*mark.args, **mark.kwargs))))


class Recorder:
    """The pytest plugin behind `--compatibility FILE`."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[Row, dict[str, str]] = defaultdict(dict)  # row -> test id -> its worst outcome

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        rank = ("passed", "skipped", "failed")
        for name, row in report.user_properties:
            if name == PROPERTY:
                outcomes = self.outcomes[checked(*row)]  # type: ignore[misc]
                outcomes[report.nodeid] = max(outcomes.get(report.nodeid, "passed"), report.outcome, key=rank.index)

    def pytest_sessionfinish(self) -> None:
        rows = []
        for (area, mode, verdict), outcomes in self.outcomes.items():
            found = set(outcomes.values())
            rows.append(
                {
                    "area": area, "mode": mode, "verdict": verdict,
                    "outcome": next(o for o in ("failed", "passed", "skipped") if o in found),
                    "tests": sorted({test.split("[")[0] for test in outcomes}),
                }
            )  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """The versions that this process runs on; packages that are not installed are left out."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        installed["device"] = torch.cuda.get_device_name()
    return installed


def marks_in(folder: Path) -> dict[Row, list[str]]:
    """All rows that the test files in `folder` promise -> the files, read from their source without running them.

    Raises:
        ValueError: a mark whose arguments are not three literal strings.
    """
    found: dict[Row, list[str]] = defaultdict(list)
    for file in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.compatibility"):
                continue
            try:
                literal = [ast.literal_eval(argument) for argument in node.args]
                row = checked(*literal, **{str(k.arg): ast.literal_eval(k.value) for k in node.keywords})
            except (TypeError, ValueError) as error:
                raise ValueError(f"{file.name}, line {node.lineno}: {error} (three literal strings)") from error
            found[row].append(file.name)
    return dict(found)
