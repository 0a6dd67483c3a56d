"""sentence-transformers: a random BERT with pooling, trained on pairs, with and without LoRA."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel, BertTokenizerFast

from tests.clients.checks import OPTIONS, check, config, same_weights, train


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    """A SentenceTransformer on a BERT of two layers that reads single letters."""
    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return SentenceTransformer(str(tmp_path / "bert"), device="cpu")


def pairs() -> Dataset:
    letters = string.ascii_lowercase
    anchors = [" ".join(letters[n : n + 3]) for n in range(24)]
    return Dataset.from_dict({"anchor": anchors, "positive": [text[::-1] for text in anchors]})


@pytest.mark.compatibility(
    "Client trainers", "sentence-transformers, SentenceTransformerTrainer, full and LoRA, callback and mixin", "works"
)
@pytest.mark.parametrize("mixin", [False, True], ids=["callback", "mixin"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_sentence_transformers(peft: bool, mixin: bool, model: SentenceTransformer, tmp_path: Path) -> None:
    if peft:
        model.add_adapter(LoraConfig(r=2, target_modules=["query", "value", "dense"]))
    arguments = SentenceTransformerTrainingArguments(str(tmp_path / "out"), **OPTIONS)
    loss = MultipleNegativesRankingLoss(model)
    run = train(
        SentenceTransformerTrainer,
        config("q", "v"),
        mixin=mixin,
        model=model,
        args=arguments,
        train_dataset=pairs(),
        loss=loss,
    )
    check(*run, ("q", "v"))
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert same_weights(model, loaded)
