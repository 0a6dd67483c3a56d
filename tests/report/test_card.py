"""The model card's section: what it says, that it replaces itself, and where trainers put it; read back offline."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard

from grades_hf import GradESConfig
from grades_hf.report import add_to_model_card, grades_card_section
from grades_hf.report.card import BEGIN, END

from .histories import history, looked

CARD = "---\nlicense: mit\ntags:\n- llama\n---\n# My model\n\nWhat I did.\n\n## Citation\n\nMe.\n"


def table(section: str, first: str) -> dict[str, list[str]]:
    """The Markdown table whose header begins with `first`: first cell of a row -> the others."""
    lines = section.split(f"| {first} |", 1)[1].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (f"{first} |{lines[0]}", *lines[2:])]
    return {row[0]: row[1:] for row in rows}


def test_the_section_says_what_the_history_holds():
    run = history(layers=2, projections=("q", "up"), frozen=0.0, steps=6, planned=8)
    run.config = GradESConfig(tau=1.0).to_dict()
    run.events = [{"step": 5, "name": "None.0.q.0", "value": 0.5, "tau": 1.0}]
    run.savings = {"steps": 6, "full": 2e12, "used": 1.9e12, "planned": 2.6e12}
    run.versions = {"python": "3.11.7", "torch": "2.13.0"}
    section = grades_card_section(run)
    assert section.startswith("## GradES\n")
    assert table(section, "layer") == {"layer": ["q", "up"], "0": ["5", "-"], "1": ["-", "-"]}
    facts = table(section, "")
    assert facts["steps"] == ["6 of 8 planned; freezing after 4"]
    assert facts["attention"] == ["1 of 2 frozen, first at step 5, last at step 5"]
    assert facts["mlp"] == ["0 of 2 frozen"]
    assert facts["compute saved"] == ["5.0% of the FLOPs so far, counted"]
    assert facts["versions"] == ["python 3.11.7, torch 2.13.0"]
    (options,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    assert json.loads(options) == run.config
    assert "eprint        = {2509.01842}" in section
    assert "https://arxiv.org/abs/2509.01842" in section.split("```")[0], "so that the hub links the paper"


def test_what_is_not_known_is_left_out():
    run = history(layers=1, projections=("q",), frozen=0.0)
    section = grades_card_section(run)
    assert not re.search("compute|versions|loss|s a step", section)


def test_experts_towers_and_large_models():
    run = history(
        towers=("vision", "language"), layers=40, projections=("q", "up"), experts=3, frozen=0.5, outside=True
    )
    section = grades_card_section(run)
    assert section.count("<details>") == 2
    for tower in ("vision", "language"):
        cells = table(section.split(f"**{tower}**")[1], "layer")
        assert len(cells) == 1 + 40 + 1
        for place, column in (("7", 0), ("12", 1), ("outside", 1)):
            names = [
                f"{tower}.{None if place == 'outside' else place}.{'q' if column == 0 else 'up'}.{e}" for e in range(3)
            ]
            steps = [run.frozen[name] for name in names if name in run.frozen]
            cell = cells[place][column]
            assert cell.startswith(f"{len(steps)}/3: ") if 0 < len(steps) < 3 else cell != ""
            assert (cell == "-") == (steps == [])
            assert all(str(step) in cell for step in {min(steps, default="-"), max(steps, default="-")})
    assert "k of n" in section


@pytest.mark.parametrize("kind", ["card", "file", "directory"])
def test_a_second_call_replaces_the_first(kind, tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    card = {"card": ModelCard(CARD), "file": tmp_path / "README.md", "directory": str(tmp_path)}[kind]
    run = history(frozen=0.2)
    add_to_model_card(card, run)
    run.ended = "completed"
    first = add_to_model_card(card, run).content
    again = add_to_model_card(card, run)
    assert again.content == first
    assert first.count(BEGIN) == first.count(END) == first.count("## GradES") == 1
    assert "Ended after all" in first
    assert "\n# My model\n\nWhat I did.\n\n## Citation\n\nMe.\n" in first
    assert again.data.tags == ["llama", "grades"]
    assert again.data.license == "mit"
    if kind != "card":
        assert (tmp_path / "README.md").read_text() == first
        assert ModelCard.load(tmp_path / "README.md").content == first


def test_what_stands_around_the_section_stays(tmp_path):
    file = tmp_path / "card.md"
    add_to_model_card(file, history())
    written = file.read_text()
    file.write_text(written.replace(BEGIN, f"Before.\n\n{BEGIN}\n\nA stray mark.\n\n{BEGIN}") + "\nAfter.\n")
    text = add_to_model_card(file, history()).content
    assert "Before." in text
    assert "A stray mark." in text
    assert "After." in text
    assert text.count("## GradES") == 1


def test_from_a_run_directory(tmp_path):
    history().save(tmp_path / "grades_history.json")
    assert grades_card_section(tmp_path) == grades_card_section(history())
    with pytest.raises(FileNotFoundError):
        add_to_model_card(tmp_path / "model", tmp_path / "nothing")
    assert not (tmp_path / "model").exists()


def test_a_run_without_a_tau_has_its_looks_and_no_map():
    section = grades_card_section(looked())
    assert "ends a fine-tune before it overfits" in section
    assert table(section, "step")["20"] == ["6 of 6", "128", "2.4000", "-0.1200", "2.6000", "-0.2000 ± 0.0100", "end"]
    assert "Frozen matrices" not in section
    assert "frozen" not in " ".join(cell for row in table(section, "").values() for cell in row)


def test_hostile_names_are_text():
    run = history(layers=1, projections=("q",), frozen=1.0)
    strange = "<script>x</script>`|\x1b[2J"
    run.components[0] |= {"projection": strange, "group": strange}
    run.config["tau"] = {strange: 1.0}
    run.versions = {strange: strange}
    section = grades_card_section(run)
    assert "<script" not in section
    assert "\x1b" not in section
    assert "&lt;script&gt;" in section
