"""Vision-language models: real images and questions, a threshold for each tower."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_hf import GradESCallback, find_components
from recipes import finetune_vlm
from tests.small import Spy, arguments, between


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_each_tower_has_its_own_threshold(kind: str, vqa_dir: Path, tmp_path: Path) -> None:
    rows = finetune_vlm.load_rows(str(vqa_dir), "train", 64)

    def train(tau: dict[str, float], alpha: float, folder: str) -> tuple[GradESCallback, Spy]:
        torch.manual_seed(0)
        model, processor = finetune_vlm.random_model(rows)
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        callback, spy = GradESCallback(tau=tau, alpha=alpha), Spy()
        Trainer(
            model=model,
            args=arguments(tmp_path / folder, max_steps=8, remove_unused_columns=False, learning_rate=5e-3),
            train_dataset=rows,
            data_collator=DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True),
            callbacks=[callback, spy],
        ).train()
        spy.weights[9] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return callback, spy

    record, _ = train({".*": 1e-30}, 0.3, "record")
    towers = {
        tower: {c.name: record.engine.history.values[c.name] for c in record.engine.components if c.tower == tower}
        for tower in ("vision", "language")
    }
    assert {tower: len(values) for tower, values in towers.items()} == {"vision": 12, "language": 14}
    tau = {tower: between(values) for tower, values in towers.items()}

    callback, spy = train(tau, 0.3, "run")
    engine = callback.engine
    assert {c.tau for c in engine.components if c.tower == "vision"} == {tau["vision"]}
    frozen = {c.tower for c in engine.components if c.frozen_at is not None}
    assert frozen == {"vision", "language"}
    assert 0 < len(engine.frozen) < len(engine.components)
    assert min(engine.frozen.values()) >= 4  # ceil(0.3 * 8) = 3 steps of grace
    prefix = "base_model.model." if kind == "lora" else ""
    for component in engine.components:
        own = [name for name in spy.weights[1] if name.startswith(f"{prefix}{component.name}.")]
        own = [name for name in own if kind == "full" or ".lora_" in name]
        if component.frozen_at is not None:
            for name in own:
                assert torch.equal(spy.weights[component.frozen_at][name], spy.weights[9][name])
        else:
            assert any(not torch.equal(spy.weights[8][name], spy.weights[9][name]) for name in own)


def test_both_towers_are_found_under_lora(vqa_dir: Path) -> None:
    model, _ = finetune_vlm.random_model(finetune_vlm.load_rows(str(vqa_dir), "train", 8))
    full = [(c.name, c.tower) for c in find_components(model)]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert [(c.name, c.tower) for c in find_components(adapted)] == full
