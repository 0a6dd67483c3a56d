"""Where trainers put the model card's section; read back offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import Trainer

from grades_hf import GradESCallback, GradESConfig, GradESTrainer, GradESTrainerMixin, History
from grades_hf.report import add_to_model_card
from tests import small
from tests.small import llama, lora

from .test_card import table

CONFIG = GradESConfig(tau={"q": 1e9, "down": 1e9, ".*": 1e-30}, alpha=0.5)


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
