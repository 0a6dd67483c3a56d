"""Every notebook runs from the first cell to the last, and its file holds the outputs of such a run."""

from __future__ import annotations

import ast
import base64
import configparser
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from notebooks.execute import HERE, execute
from tests.standin import PROJECT

NOTEBOOKS = sorted(HERE.glob("*.ipynb"))
INSTALL = '%pip install -q -c ../constraints.txt -e "..[notebooks]"'
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|opt|var|Users|private)/|[A-Z]:\\\\")
NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?")


def read(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode) -> list[Any]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def only_ours(output: Any) -> bool:
    """Whether all that it says on stderr is how a run with GradES ended."""
    said = ("the run ends at step", "components are frozen after step", "looks at held-out rows in")
    return all(any(words in line for words in said) for line in output.text.splitlines() if line)


def shape(notebook: nbformat.NotebookNode) -> list[Any]:
    """What the outputs are; of text also the words, but for cells whose words depend on the machine."""
    found: list[Any] = []
    for cell in code_cells(notebook):
        kinds = [(o.output_type, o.get("name"), sorted(o.get("data", {}))) for o in cell.outputs]
        texts = [output.text for output in cell.outputs if "text" in output]
        varies = "varies" in cell.metadata.get("tags", [])
        found.append((kinds, [] if varies else [NUMBER.sub("#", text).split() for text in texts]))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks run: they share the small model, as they do beside each other in a checkout."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_and_its_outputs_are_those_of_a_run(file: Path, folder: Path) -> None:
    before = {path for path in HERE.rglob("*") if "__pycache__" not in path.parts}
    executed, committed = execute(file, folder), read(file)
    assert [cell.source for cell in executed.cells] == [cell.source for cell in committed.cells]
    assert [output for output in outputs(executed) if output.get("name") == "stderr" and not only_ours(output)] == []
    assert shape(executed) == shape(committed)
    assert {path for path in HERE.rglob("*") if "__pycache__" not in path.parts} == before


def test_there_are_three() -> None:
    assert [file.name for file in NOTEBOOKS] == ["01_default.ipynb", "02_paper.ipynb", "03_any_loop.ipynb"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
class TestTheFile:
    def test_it_was_run_from_the_first_cell_to_the_last(self, file: Path) -> None:
        notebook = read(file)
        nbformat.validate(notebook)
        install, *cells = code_cells(notebook)
        assert (install.source, install.metadata.tags, install.execution_count) == (INSTALL, ["install"], None)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not any("install" in cell.metadata.get("tags", []) for cell in cells)

    def test_its_outputs_are_worth_keeping(self, file: Path) -> None:
        notebook = read(file)
        found = outputs(notebook)
        assert {output.output_type for output in found} <= {"stream", "display_data", "execute_result"}
        assert all(output.name == "stdout" or only_ours(output) for output in found if output.output_type == "stream")
        figures = [output.data["image/png"] for output in found if "image/png" in output.get("data", {})]
        assert figures
        assert all(base64.b64decode(figure).startswith(b"\x89PNG") for figure in figures)
        kinds = {kind for output in found for kind in output.get("data", {})}
        assert kinds <= {"text/plain", "text/html", "image/png"}
        assert file.stat().st_size < 300_000

    def test_it_names_no_machine_and_no_time(self, file: Path) -> None:
        notebook = read(file)
        assert set(notebook.metadata) == {"kernelspec", "language_info"}
        assert dict(notebook.metadata.language_info) == {"name": "python"}
        assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
        text = [cell.source for cell in notebook.cells]
        for output in outputs(notebook):
            text += [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
        assert [found.group() for part in text if (found := MACHINE_PATH.search(part))] == []

    def test_what_it_links_to_is_there(self, file: Path) -> None:
        cells = [cell.source for cell in read(file).cells if cell.cell_type == "markdown"]
        links = [link for source in cells for link in re.findall(r"\]\(([^)]+)\)", source)]
        assert all((HERE / link).exists() for link in links if not link.startswith("http"))


def test_together_they_are_small() -> None:
    assert sum(file.stat().st_size for file in NOTEBOOKS) < 600_000


def test_the_install_cell_asks_for_what_there_is() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg", encoding="utf-8")
    assert "trl" in setup["options.extras_require"]["notebooks"]
    assert (HERE / ".." / "constraints.txt").is_file()


def test_a_comparison_that_is_told_is_the_one_that_was_run() -> None:
    """02 says in words that stopping was better with every seed."""
    cells = read(HERE / "02_paper.ipynb").cells
    (text,) = [o.text for c in cells for o in c.get("outputs", []) if "minus loss of stopping" in o.get("text", "")]
    differences = [ast.literal_eval(value) for value in re.findall(r"[-+]\d\.\d+", text)]
    assert len(differences) == 3
    assert all(difference > 0 for difference in differences)
    assert any("stopping is better, with every seed" in cell.source for cell in cells if cell.cell_type == "markdown")
