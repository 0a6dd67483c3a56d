"""The model card's section: what it says, that it replaces itself, and where trainers put it; read back offline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

from grades_hf import GradESCallback, GradESConfig, GradESTrainer, GradESTrainerMixin, History
from grades_hf.report import add_to_model_card, grades_card_section
from grades_hf.report.card import BEGIN, END
from tests import small
from tests.small import llama, lora

from .histories import history

CONFIG = GradESConfig(tau={"q": 1e9, "down": 1e9, ".*": 1e-30}, alpha=0.5)
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
    assert facts["compute saved, counted"] == ["5.0% (1.9e+12 of 2e+12 FLOPs)"]
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


# --- trainers ------------------------------------------------------------------------------------------------------


def saved_card(trainer: Trainer) -> tuple[ModelCard, dict[str, list[str]]]:
    card = ModelCard.load(Path(trainer.args.output_dir) / "README.md")
    assert card.text.count("## GradES") == 1
    assert "grades" in card.data.tags
    return card, table(card.text, "layer")


@pytest.mark.compatibility("Trainer", "create_model_card, push_to_hub's model card (GradESTrainer)", "works")
@pytest.mark.parametrize("make_model", [llama, lora])
def test_the_trainers_card(make_model, tmp_path):
    trainer = small.trainer(make_model(), tmp_path, [], cls=GradESTrainer, extra={"grades": CONFIG})
    trainer.create_model_card()
    assert "## GradES" not in (tmp_path / "README.md").read_text(), "there is nothing to say before training"
    trainer.train()
    trainer.save_model()  # PEFT writes a card of its own
    for _ in range(2):
        trainer.create_model_card(model_name="mine", tags=["mine"])
        card, cells = saved_card(trainer)
        assert cells["0"] == ["7", "-", "-", "-", "-", "-", "7"]
        assert "12 of 12 planned" in card.text
        assert "## Training procedure" in card.text
        assert "generated_from_trainer" in card.data.tags or make_model is lora
        assert (card.data.library_name == "peft") == (make_model is lora)
    saved = History.load(tmp_path)
    assert table(card.text, "")["versions"] == [", ".join(f"{n} {v}" for n, v in saved.versions.items())]


def test_the_card_that_is_pushed(tmp_path, monkeypatch):
    """All that `push_to_hub` does but the upload."""
    uploaded: list[str] = []

    class Hub:
        def upload_folder(self, *, folder_path, **kwargs):
            uploaded.append((Path(folder_path) / "README.md").read_text())

    options = {"save_strategy": "steps", "save_steps": 6, "hub_model_id": "me/mine"}
    trainer = small.trainer(llama(), tmp_path, [], cls=GradESTrainer, extra={"grades": CONFIG}, **options)
    trainer.train()
    trainer.hub_model_id = "me/mine"
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer.push_to_hub()
    (text,) = uploaded
    assert text.count("## GradES") == 1
    assert "# mine" in text


def test_other_processes_write_no_card(tmp_path, monkeypatch):
    trainer = small.trainer(llama(), tmp_path, [], cls=GradESTrainer, extra={"grades": CONFIG})
    trainer.train()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("peft", [False, True])
def test_trl(peft, tmp_path, tiny_model_dir):
    """SFTTrainer writes a card with every checkpoint, too."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class GradESSFTTrainer(GradESTrainerMixin, SFTTrainer):
        pass

    arguments = SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = GradESSFTTrainer(
        str(tiny_model_dir),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": [f"Once upon a time there were {n} fish." for n in range(8)]}),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None,
        grades=CONFIG,
    )
    trainer.train()
    card, cells = saved_card(trainer)
    assert "Step 4 of 4" in card.text, "as it was when the last checkpoint was saved"
    trainer.create_model_card()
    card, cells = saved_card(trainer)
    assert "Ended after all 4 steps" in card.text
    assert cells["0"][0] == "3"
    assert {"sft", "trl", "grades"} <= set(card.data.tags)


def test_with_the_callback_alone(tmp_path):
    callback = GradESCallback(CONFIG)
    trainer = small.trainer(llama(), tmp_path, [callback])
    trainer.train()
    trainer.create_model_card()
    add_to_model_card(tmp_path, callback.engine.history)
    card, cells = saved_card(trainer)
    assert cells["1"][0] == "7"
    assert "## Training procedure" in card.text
