"""The compatibility page lists what the tests mark, and a row is there only if all of its tests passed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks import compatibility as page
from tests import compatibility

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent


@pytest.fixture
def committed(request):
    if request.config.getoption("--compatibility"):
        pytest.skip("this run makes the page anew")
    return page.TARGET.read_text(encoding="utf-8")


def test_the_page_lists_what_the_tests_mark(committed):
    assert page.rows_of(committed) == compatibility.marks_in(TESTS).keys(), "make compatibility writes it anew"


def assert_exists(test: str) -> None:
    file, *names = test.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(names) <= defined, test


def test_the_tests_that_the_page_names_exist(committed):
    for line in committed.splitlines():
        for cell in line.split("`")[1::2]:
            if "::" in cell:
                assert_exists(cell)


def test_each_claim_stands_on_its_page_and_its_tests_exist():
    page_, words, count = "", "", 0
    for line in (TESTS / "CLAIMS.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            page_ = line.removeprefix("## ")
            words = " ".join((TESTS.parent / page_).read_text(encoding="utf-8").split())
        elif line.startswith("| ") and not line.startswith("| claim"):
            claim, tests = line.strip("| ").split(" | ")
            assert claim in words, f"{page_} does not say: {claim}"
            assert tests, claim
            for test in tests.strip("`").split("`, `"):
                assert_exists(test)
            count += 1
    assert count > 20


def test_no_mode_has_two_verdicts():
    modes = [(area, mode) for area, mode, _ in compatibility.marks_in(TESTS)]
    assert len(modes) == len(set(modes))


SAMPLE = """
    import pytest

    @pytest.mark.compatibility("Trainer", "good", "works")
    @pytest.mark.parametrize("case", [1, 2])
    def test_good(case): pass

    @pytest.mark.compatibility("Trainer", "partly", "works")
    @pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.skip)])
    def test_partly(case): pass

    @pytest.mark.compatibility("Faults", "left out", "refused")
    @pytest.mark.skip
    def test_left_out(): pass

    def test_unmarked(): pass
"""
CONFTEST = """
    from tests.compatibility import pytest_addoption, pytest_collection_modifyitems, pytest_configure
"""


@pytest.fixture
def record(pytester, monkeypatch):
    """`record(source, *options)`: what a run of `source` writes, by pytest in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS.parent))
    pytester.makeconftest(CONFTEST)
    pytester.makeini("[pytest]\nmarkers =\n  compatibility(area, mode, verdict): a row\n")

    def run(source: str, *options: str) -> dict:
        pytester.makepyfile(test_sample=source)
        pytester.runpytest_subprocess("--compatibility", "out.json", *options)
        return json.loads((pytester.path / "out.json").read_text())

    return run


@pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_a_run_records_what_passed(options, record):
    data = record(SAMPLE, *options)
    assert data["versions"].keys() >= {"python", "torch", "transformers", "peft", "accelerate"}
    assert {row["mode"]: row["outcome"] for row in data["rows"]} == {
        "good": "passed", "partly": "passed", "left out": "skipped",
    }  # fmt: skip
    rendered = page.render([data])
    assert page.rows_of(rendered) == {
        ("Trainer", "good", "works"), ("Trainer", "partly", "works"), ("Faults", "left out", "refused"),
    }  # fmt: skip
    assert "| good | works | `test_sample.py::test_good` |" in rendered
    assert "| left out | refused, not run |" in rendered
    # The rows that a run on another machine did not have to skip are its own.
    other = json.loads(json.dumps(data).replace('"skipped"', '"passed"'))
    assert "| left out | refused | `test_sample.py::test_left_out` (run 2) |" in page.render([data, other])


def test_one_failed_case_of_a_mode_makes_no_page(record):
    data = record(SAMPLE.replace("def test_good(case): pass", "def test_good(case): assert case == 1"))
    with pytest.raises(ValueError, match=r"Trainer, good: failed .*test_good"):
        page.render([data])


@pytest.mark.parametrize("mark", [("Trainers", "m", "works"), ("Trainer", "m", "fine"), ("Trainer", "", "works")])
def test_an_unknown_area_or_verdict_is_refused(mark):
    with pytest.raises(ValueError, match="compatibility: "):
        compatibility.checked(*mark)


def test_a_mark_that_is_no_literal_is_refused(tmp_path):
    (tmp_path / "test_x.py").write_text("@pytest.mark.compatibility('Trainer', NAME, 'works')\ndef test_x(): pass\n")
    with pytest.raises(ValueError, match=r"test_x\.py, line 1"):
        compatibility.marks_in(tmp_path)
