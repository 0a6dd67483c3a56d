"""What the notebooks train: a small Llama with its tokenizer, and text for it. Nothing is downloaded.

The model has read the docstrings of the standard library, as a model of the hub has read the web. It is fine-tuned on
English (`pydoc_data.topics`, Python's language reference) or on source code. A token is a byte.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import logging
import pickle
import random
import shutil
import subprocess
import tarfile
import tempfile
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup
from transformers.convert_slow_tokenizer import bytes_to_unicode

END, PADDING = 256, 257  # tokens besides the 256 bytes
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
            tokenizer().save_pretrained(unfinished)
            shutil.copytree(unfinished, target)
    return folder


def pretrain(steps: int = 150, rows: int = 8) -> LlamaForCausalLM:
    """A Llama of four layers, trained on `rows` random rows of docstrings at each of `steps` steps."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PADDING,
        )
    )
    text = torch.tensor(in_rows(docstrings()))
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


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": END, "<padding>": PADDING}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<padding>")


def docstrings() -> Iterator[str]:
    """Docstrings of modules of the standard library."""
    for module in TRAINING + HELD_OUT:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield text


def english(rows: int) -> list[str]:
    """`rows` pieces of Python's language reference, LENGTH bytes each, always the same ones."""
    pieces = [bytes(row).decode(errors="ignore") for row in in_rows(topics[name] for name in sorted(topics))]
    return random.Random(0).sample(pieces, rows)


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
