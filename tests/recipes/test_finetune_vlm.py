"""The recipe for vision-language models: real images and questions, a threshold for each tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from grades_hf import History
from recipes import dry_run, finetune_vlm
from tests import standin

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
VISION = sorted(file.stem for file in CONFIGS.glob("vlm_*.yaml"))


def test_what_is_learned_is_the_answer(vqa_dir: Path) -> None:
    rows = finetune_vlm.load_rows(str(vqa_dir), "train", 32)
    _, processor = finetune_vlm.random_model(rows)
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([rows[0], rows[1], rows[2]])
    for number in range(3):
        learned = batch["labels"][number]
        words = processor.tokenizer.decode(learned[learned != -100])
        assert words.replace("<end_of_utterance>", "").strip() == rows[number]["completion"][0]["content"]
        assert words.endswith("<end_of_utterance>")
        kept = batch["input_ids"][number][batch["attention_mask"][number] == 1]
        assert rows[number]["prompt"][0]["content"] in processor.tokenizer.decode(kept)
        assert (kept == processor.image_token_id).sum() == 4
    assert batch["pixel_values"].shape == (3, 1, 3, 32, 32)


@pytest.mark.compatibility("Trainer", "vision-language models (recipes/finetune_vlm.py)", "works")
@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("peft", ["true", "false"])
def test_the_recipe_runs_without_the_hub(peft: str, name: str, vqa_dir: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["tau"] == {"vision": 3.3, "language": 33.0}
    options = ["--config", str(CONFIGS / f"{name}.yaml"), "--data_dir", str(vqa_dir), "--dry_run", "true"]
    results = finetune_vlm.run([*options, "--use_peft", peft, "--output_dir", str(tmp_path)])
    assert results["steps_planned"] == dry_run.STEPS
    frozen = {tower: results[f"frozen {tower}"].split(" of ") for tower in ("vision", "language")}
    assert [number for _, number in frozen.values()] == ["12", "14"]
    assert sum(int(number) for number, _ in frozen.values()) > 0
    assert results["after"]["loss"] < results["before"]["loss"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert History.load(tmp_path).config["alpha"] == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data_dir", "nowhere"], "holds no train.parquet"),
        (["--tau", '{"vision": 1.0}'], "leaves 14 of 26 components without a threshold"),
        (["--test_rows", "0"], "must be 1 or more"),
    ],
)
def test_the_recipe_refuses(change: list[str], message: str, vqa_dir: Path, tmp_path: Path) -> None:
    argv = ["--config", str(CONFIGS / f"{VISION[0]}.yaml"), "--data_dir", str(vqa_dir), "--dry_run", "true"]
    with pytest.raises(ValueError, match=message):
        finetune_vlm.run([*argv, "--output_dir", str(tmp_path / "run"), "--train_rows", "32", *change])


def test_rows_that_lack_a_column(tmp_path: Path) -> None:
    standin.questions(4, 0).remove_columns("answer").to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="lacks the column 'answer'"):
        finetune_vlm.load_rows(str(tmp_path), "train", None)
    with pytest.raises(ValueError, match="data_dir is missing"):
        finetune_vlm.load_rows(None, "train", None)
