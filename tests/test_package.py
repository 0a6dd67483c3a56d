"""The distributions: what they hold, what they say of themselves, and that they work where nothing else of us is."""

from __future__ import annotations

import configparser
import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import grades_hf
from benchmarks import first_run
from tests.standin import PROJECT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(PROJECT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(PROJECT / "setup.cfg", encoding="utf-8")
    return found


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith("METADATA")]
        return email.message_from_bytes(file.read(name))


@pytest.mark.slow
def test_the_metadata(distributions, setup):
    found = metadata(distributions[1])
    assert found["Version"] == grades_hf.__version__ == "0.2.0"
    assert found["Author"] == "grades_hf contributors"
    address = setup["metadata"]["url"]
    assert found["Home-page"] == address
    links = [line.partition(", ")[2] for line in found.get_all("Project-URL")]
    assert len(links) == 4
    assert all(link.startswith(address) for link in links)
    needed = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    names = {re.split(r"[<>=]", line)[0] for line in needed}
    assert names == {"torch", "transformers", "peft", "accelerate", "pyarrow", "rich"}
    text = found.get_payload()
    assert "](docs/" not in text, "links of the README lead into the repository"
    assert f"]({address}/raw/main/docs/first_run.png)" in text


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_need(distributions):
    with tarfile.open(distributions[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (PROJECT / name).is_file()}
    missing = {name for name in tracked - names if not name.startswith("results/")}
    assert missing == set()
    assert not any("__pycache__" in name or name.startswith((".venv", "runs/")) for name in names)


@pytest.mark.slow
def test_the_wheel_runs_the_first_block_of_the_readme(distributions, tmp_path):
    """In an environment of its own, which borrows what is installed here but for this project."""
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "environment")], check=True)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    own = Path(str(site).replace(str(tmp_path / "environment"), sys.prefix))
    for entry in own.iterdir():
        if not entry.name.lower().startswith(("grades_hf", "__editable__")):
            (site / entry.name).symlink_to(entry)
    with zipfile.ZipFile(distributions[1]) as file:
        file.extractall(site)
    (tmp_path / "block.py").write_text(first_run.block(), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = "import grades_hf; print(grades_hf.__file__)"
    command = [str(python), "-c", where]
    found = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(site))
    run = subprocess.run(
        [str(python), "block.py"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=550
    )
    assert run.returncode == 0, run.stderr
    steps, loss = re.search(r"^(\d+) steps, test loss ([\d.]+)$", run.stdout, re.MULTILINE).groups()
    assert int(steps) < 640
    assert float(loss) < 2.4, "without GradES it is 2.8 and more"
    assert f"the run ends at step {steps} of 640" in run.stderr


def test_the_readme_is_short():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    assert len(text.split()) <= 900


def test_the_table_of_the_readme_is_measured():
    import json

    found = json.loads(first_run.RESULT.read_text(encoding="utf-8"))
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert first_run.table(found) in text
    best = min(loss for _, loss in found["curve"])
    assert f"lowest point of the curve is {best:.2f}" in text
    first_run.seeded(1)  # what is replaced for other seeds is there
    first_run.replaced(first_run.block(), ("callbacks=[GradESCallback()]", "callbacks=[]"))


def test_the_address_is_in_one_place(setup):
    address = setup["metadata"]["url"].removeprefix("https://")
    places = [PROJECT / name for name in ("README.md", "mkdocs.yml", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md")]
    places += [*PROJECT.glob("docs/**/*.md"), *PROJECT.glob("src/**/*.py"), *PROJECT.glob(".github/**/*.yml")]
    assert [str(place) for place in places if address in place.read_text(encoding="utf-8")] == []


def test_citation_and_templates_can_be_read():
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == grades_hf.__version__
    assert citation["preferred-citation"]["authors"][0]["family-names"] == "Wen"
    for file in [*PROJECT.glob(".github/ISSUE_TEMPLATE/*.yml"), PROJECT / ".pre-commit-config.yaml"]:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))
