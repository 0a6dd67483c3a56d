"""The shape of the source: who imports whom, how long a file is, and that a statistic is one class and one line."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import grades_hf
from grades_hf import GradES, GradESConfig
from grades_hf.statistics import STATISTICS, GradientNorm
from tests import toy

SOURCE = Path(grades_hf.__file__).parent
FILES = {
    ".".join(("grades_hf", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(SOURCE.rglob("*.py"))
}
LONGER: set[str] = set()


def imports(name: str) -> Iterator[tuple[str, str]]:
    """The modules that a module imports while it runs, and the names it takes from them (or "")."""
    tree = ast.parse(FILES[name].read_text())
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for branch in node.body
        for inner in ast.walk(branch)
    }
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (home, node.module) if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner, "") if inner in FILES else (module, alias.name)


OURS = {name: {module for module, _ in imports(name) if module in FILES} - {name} for name in FILES}


def room(name: str) -> str:
    return name.split(".")[1] if name.count(".") else ""


def test_there_is_no_circle():
    """Whatever is imported, at the top or later."""
    left = dict(OURS)
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("name", [name for name in FILES if room(name) not in ("report", "tools")])
def test_what_is_imported_exists(name):
    for module, taken in imports(name):
        if module.split(".")[0] == "grades_hf":
            assert module in FILES, (module, taken)


def test_only_the_adapters_know_trainer():
    for name in FILES:
        known = {taken for module, taken in imports(name) if module == "transformers"}
        deep = {
            module
            for module, _ in imports(name)
            if module.startswith(("transformers.trainer", "transformers.training"))
        }
        if room(name) not in ("adapters", "report", "tools"):
            assert {taken for taken in known if taken.startswith(("Train", "Seq2SeqTrain"))} | deep == set(), name
        assert not any(module.split(".")[0] in ("recipes", "benchmarks", "tests") for module, _ in imports(name)), name


def test_the_record_decides_nothing():
    """Only what puts a run together, what saves it, and what shows it, reads the record."""
    readers = {name for name, needs in OURS.items() if any(room(module) == "record" for module in needs)}
    rooms = {room(name) for name in readers} - {"record", "report", "tools", "adapters"}
    assert rooms <= {"assembly", "engine", "state", "contracts", "joining", "reading", "words"}


def test_rooms_below_do_not_know_those_above():
    top = {"engine", "assembly", "state", "joining", "reading", "words"}  # the engine, in several files
    above = {*top, "adapters", "report", "tools"}
    for name, needs in OURS.items():
        if room(name) and room(name) not in above:
            assert not {module for module in needs if room(module) in above}, name
        if room(name) in top:
            assert not {module for module in needs if room(module) in ("adapters", "report", "tools")}, name


@pytest.mark.parametrize("module", ["grades_hf.engine", "grades_hf"])
def test_the_engine_imports_neither_trainer_nor_peft(module):
    code = (
        f"import {module}, sys\n"
        "print([name for name in ('transformers.trainer', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer_than_400_lines(name):
    lines = len(FILES[name].read_text().splitlines())
    assert (lines > 400) <= (name in LONGER), f"{lines} lines"


def test_there_are_at_most_20_options():
    options = dataclasses.fields(GradESConfig)
    assert len(options) <= 20
    assert all(option.metadata["help"].strip() for option in options)


class LargestElement(GradientNorm):
    """The largest element of the gradient."""

    name = "largest_element"

    def measure(self, parameters):
        found = [i for i, p in enumerate(parameters) if p.grad is not None]
        return found, torch.tensor([parameters[i].grad.abs().max() for i in found], dtype=torch.float64)


@pytest.mark.parametrize("tau", [None, 0.5])
def test_a_new_statistic_is_a_class_and_a_line(tau, monkeypatch):
    monkeypatch.setitem(STATISTICS, LargestElement.name, LargestElement)
    config = GradESConfig(tau=tau, monitor="largest_element", **({} if tau is None else {"alpha": 0.0}))
    rows = {"held_out": lambda model: torch.ones(2)} if tau is None else {}
    model = toy.build("full")
    engine = GradES(model, config, total_steps=3, **rows)
    model(**toy.batches(0)[0][0]).loss.backward()
    largest = {c.name: c.measured[0].grad.abs().max().item() for c in engine.components}
    engine.step()
    assert {name: series[0] for name, series in engine.history.values.items()} == pytest.approx(largest)
    assert set(engine.frozen) == {name for name, value in largest.items() if tau is not None and value < tau}
    engine.close()
    assert GradESConfig(**config.to_dict()) == config
