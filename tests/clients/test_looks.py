"""Without a tau: the looks of TRL's and sentence-transformers' trainers see the trained loss and leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from grades_hf import GradESCallback
from tests.adapters import looks
from tests.clients.test_sentence_transformers import model, pairs  # noqa: F401
from tests.clients.test_trl import folder, preferences, reward, texts  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

OPTIONS: dict[str, Any] = {
    "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2, "save_strategy": "no", "report_to": "none",
    "learning_rate": 1e-3, "lr_scheduler_type": "constant", "disable_tqdm": True, "use_cpu": True, "bf16": False,
    "dataloader_pin_memory": False,
}  # fmt: skip
LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def completions() -> Dataset:
    rows = {
        "prompt": [f"Once upon {n}" for n in range(24)],
        "completion": [f" there was a cat {n}." for n in range(24)],
    }
    return Dataset.from_dict(rows)


def judged() -> Dataset:
    rows = preferences().to_dict()
    return Dataset.from_dict(
        {"prompt": rows["prompt"], "completion": rows["chosen"], "label": [n % 2 == 0 for n in range(24)]}
    )


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any], bool]] = {
    "SFT": (SFTTrainer, SFTConfig, texts, {}, False),
    "SFT, LoRA": (SFTTrainer, SFTConfig, texts, {}, True),
    "SFT, dft": (SFTTrainer, SFTConfig, texts, {"loss_type": "dft"}, False),
    "SFT, nll": (SFTTrainer, SFTConfig, texts, {"loss_type": "nll"}, False),
    "SFT, packing": (SFTTrainer, SFTConfig, texts, {"packing": True, "max_length": 32, "eval_packing": False}, False),
    "SFT, completions only": (SFTTrainer, SFTConfig, completions, {"completion_only_loss": True}, False),
    "DPO": (DPOTrainer, DPOConfig, preferences, {}, False),
    "DPO, LoRA": (DPOTrainer, DPOConfig, preferences, {}, True),
    "DPO, reference log-probabilities beforehand": (
        DPOTrainer, DPOConfig, preferences, {"precompute_ref_log_probs": True}, False,
    ),
    "KTO": (KTOTrainer, KTOConfig, judged, {}, False),
    "Reward": (RewardTrainer, RewardConfig, lambda: preferences().remove_columns("prompt"), {}, False),
}  # fmt: skip


@pytest.mark.compatibility(
    "Client trainers", "TRL SFT (nll, dft, packing, completions only), DPO, KTO, Reward, without a tau", "works"
)
@pytest.mark.parametrize("name", CASES)
def test_trl(name: str, folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    cls, config, rows, options, peft = CASES[name]

    def build(output: Path, callbacks: list[Any]) -> Trainer:
        data = rows()
        made: Any = AutoModelForCausalLM
        if cls is RewardTrainer:
            made, more = AutoModelForSequenceClassification, {"num_labels": 1}
        else:
            more = {}
        torch.manual_seed(0)  # a reward model's head is new
        network = made.from_pretrained(folder, **more)
        network.config.pad_token_id = tiny_tokenizer.pad_token_id or 0
        arguments = config(str(output), **{"max_length": 24, **OPTIONS, **options})
        return cls(
            model=network,
            args=arguments,
            train_dataset=data.select(range(8)),
            eval_dataset=data.select(range(8, 24)),
            processing_class=tiny_tokenizer,
            callbacks=callbacks,
            peft_config=LORA if peft else None,
        )

    looks.check(build, tmp_path)
    looks.same_as_evaluation(build(tmp_path / "e", []))


@pytest.mark.compatibility("Client trainers", "TRL GRPO, RLOO, on-policy distillation, without a tau", "refused")
def test_what_trains_on_generated_text_is_refused(folder: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    arguments = GRPOConfig(str(tmp_path), **OPTIONS, max_completion_length=8, num_generations=2)
    rows = preferences().select_columns("prompt")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder), args=arguments, train_dataset=rows, eval_dataset=rows,
        reward_funcs=reward, processing_class=tiny_tokenizer, callbacks=[GradESCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="trains on what the model generates"):
        trainer.train()
    assert trainer.state.global_step == 0


LOSSES: dict[str, Any] = {
    "MultipleNegativesRankingLoss": losses.MultipleNegativesRankingLoss,
    "CachedMultipleNegativesRankingLoss": lambda m: losses.CachedMultipleNegativesRankingLoss(m, mini_batch_size=2),
    "CosineSimilarityLoss": losses.CosineSimilarityLoss,
}


@pytest.mark.compatibility(
    "Client trainers", "sentence-transformers without a tau (MNRL, CachedMNRL, CosineSimilarity)", "works"
)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("model_fixture", ["model"])
def test_sentence_transformers(name: str, model_fixture: str, request: Any, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    request.getfixturevalue(model_fixture)
    data = pairs()
    if name == "CosineSimilarityLoss":
        data = data.add_column("score", [n % 2 * 1.0 for n in range(24)])

    def build(output: Path, callbacks: list[Any]) -> Trainer:
        network = SentenceTransformer(str(tmp_path / "bert"), device="cpu")
        arguments = SentenceTransformerTrainingArguments(str(output), **OPTIONS)
        return SentenceTransformerTrainer(
            model=network, args=arguments, train_dataset=data.select(range(8)), eval_dataset=data.select(range(8, 24)),
            loss=LOSSES[name](network), callbacks=callbacks,
        )  # fmt: skip

    callback = looks.check(build, tmp_path)
    look = callback.engine.ending.looks[0]
    assert look["rows"] == 8, "16 rows, two a batch"
    assert look["average_loss"] > 0
    if name == "CosineSimilarityLoss":  # for the others it matters which rows share a batch
        looks.same_as_evaluation(build(tmp_path / "e", []))
