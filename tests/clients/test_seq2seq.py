"""Transformers' own trainer for encoder-decoder models, with generation in its evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.clients.checks import OPTIONS, check, config, same_weights, train


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj="gated-gelu"))


def bart() -> nn.Module:
    torch.manual_seed(0)
    sides = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("ffn_dim", 24), ("attention_heads", 2))
    }
    return BartForConditionalGeneration(
        BartConfig(vocab_size=64, d_model=16, max_position_embeddings=32, init_std=0.1, forced_eos_token_id=2, **sides)
    )


def pairs() -> Dataset:
    ids = torch.randint(3, 64, (24, 2, 8), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids[:, 0].tolist(), "labels": ids[:, 1].tolist()})


@pytest.mark.compatibility("Client trainers", "Seq2SeqTrainer, predict_with_generate", "works")
@pytest.mark.parametrize("mixin", [False, True], ids=["callback", "mixin"])
@pytest.mark.parametrize("make", [t5, bart])
def test_seq2seq(make, mixin: bool, tmp_path: Path) -> None:
    lengths: list[int] = []

    def metrics(prediction) -> dict[str, float]:
        lengths.append(prediction.predictions.shape[1])
        return {"length": float(lengths[-1])}

    options = {"predict_with_generate": True, "eval_strategy": "steps", "eval_steps": 2}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), **{**OPTIONS, **options})
    grades = config("q")
    grades.skip_validation = False
    data = {"train_dataset": pairs(), "eval_dataset": pairs().select(range(4)), "compute_metrics": metrics}
    model = make()
    model.generation_config.max_new_tokens = 6
    run = train(Seq2SeqTrainer, grades, mixin=mixin, model=model, args=arguments, **data)
    check(*run, ("q",))
    assert len(lengths) == 3
    assert min(lengths) > 1
    run[0].save_model(str(tmp_path / "saved"))
    assert same_weights(run[0].model, type(run[0].model).from_pretrained(tmp_path / "saved"))
