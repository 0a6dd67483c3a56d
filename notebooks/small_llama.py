"""What the notebooks train: a Llama of 201,280 parameters, and text for it. Nothing is downloaded, Python brings both.

The model has read Python's language reference (`pydoc_data.topics`), as its user would have a model of the hub that has
read the web. It is fine-tuned on source code of the standard library. Its tokens are bytes, so it needs no tokenizer.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import logging
import pickle
import shutil
import subprocess
import tarfile
import tempfile
import typing
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

LENGTH = 128  # bytes in a row
TRAINING = (argparse, ast, dataclasses, logging, pickle, subprocess, tarfile, typing)
HELD_OUT = (inspect,)


def pretrained_model(folder: str = "runs/small-llama") -> str:
    """A folder that `from_pretrained` takes; at the first call the model is trained, which takes some seconds."""
    target = Path(folder)
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as unfinished:
            pretrain().save_pretrained(unfinished)
            shutil.copytree(unfinished, target)
    return folder


def pretrain(steps: int = 150, rows: int = 8) -> LlamaForCausalLM:
    """A Llama of four layers, trained on `rows` random rows of the language reference at each of `steps` steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    text = torch.tensor(in_rows(topics[name] for name in sorted(topics)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 3, steps)
    for _ in range(steps):
        batch = text[torch.randint(len(text), (rows,))]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model


def source_code(modules: Iterable[ModuleType], rows: int) -> Dataset:
    """`rows` rows of these modules' source, always the same ones, with `input_ids` and `labels`.

    Raises:
        ValueError: there is less source than that.
    """
    found = in_rows(inspect.getsource(module) for module in modules)
    if rows > len(found):
        raise ValueError(f"rows={rows}: there are only {len(found)} rows; take more modules.")
    return Dataset.from_dict({"input_ids": found, "labels": found}).shuffle(seed=0).select(range(rows))


def in_rows(texts: Iterable[str]) -> list[list[int]]:
    """The bytes of these texts, LENGTH in a row; what is left at the end is dropped."""
    data = "\n\n".join(texts).encode()
    return [list(data[start : start + LENGTH]) for start in range(0, len(data) - LENGTH + 1, LENGTH)]
