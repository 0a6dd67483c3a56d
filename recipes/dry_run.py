"""A small random model of a real architecture, built without download: what `--dry_run` trains."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

from recipes.models import locate_model

VOCABULARY, LAYERS, HEAD_DIM, MAX_LENGTH = 512, 2, 32, 512  # widths that 4-bit blocks of 64 divide

# The models of the configs, by what of their config.json makes the architecture; of sizes width and heads.
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        LlamaConfig,
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-0.6B": (
        Qwen3Config,
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-14B": (
        Qwen3Config,
        {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 8, "tie_word_embeddings": False},
    ),
    "microsoft/phi-4": (
        Phi3Config,
        {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10, "tie_word_embeddings": False},
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        LlamaConfig,
        {
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
            },
        },
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        MistralConfig,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None},
    ),
}  # fmt: skip


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture with two layers, narrow, and with as few heads as keep the ratio of queries to keys.

    Raises:
        ValueError: the configuration has none of the sizes that are shrunk here.
    """
    small = type(config).from_dict(config.to_dict())
    heads, keys = getattr(small, "num_attention_heads", None), getattr(small, "num_key_value_heads", None)
    if not heads or not hasattr(small, "num_hidden_layers"):
        raise ValueError(f"dry_run=True cannot shrink {type(config).__name__}: it has no number of layers and heads.")
    if keys:
        common = math.gcd(heads, keys)
        heads, keys = (2 * heads // common, 2 * keys // common) if keys != heads else (4, 4)
        small.num_key_value_heads = keys
    else:
        heads = 4
    small.num_attention_heads, small.num_hidden_layers = heads, LAYERS
    small.hidden_size = heads * HEAD_DIM
    if getattr(small, "head_dim", None):
        small.head_dim = HEAD_DIM
    if getattr(small, "intermediate_size", None):
        small.intermediate_size = 2 * small.hidden_size
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:LAYERS]
    small.vocab_size = VOCABULARY
    small.pad_token_id, small.bos_token_id, small.eos_token_id = 0, 1, 2
    return small


def write_small_model(model: str, texts: Iterable[str], dtype: str, folder: Path) -> str:
    """Save a small random model like `model`, with a tokenizer that is trained on `texts`.

    Args:
        model: Hub id in `ARCHITECTURES`, local directory, or another hub id where the hub can be reached.
        texts: What the tokenizer is trained on.
        dtype: Type of the weights; auto: float32.
        folder: Where to save it.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        ValueError: the model's configuration is to be had from nowhere, or cannot be shrunk.
    """
    if model in ARCHITECTURES:
        kind, sizes = ARCHITECTURES[model]
        config = kind(**sizes)
    else:
        config = AutoConfig.from_pretrained(locate_model(model)[0])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=MAX_LENGTH
    )
    set_seed(0)
    network = AutoModelForCausalLM.from_config(shrunken(config))
    network.to(torch.float32 if dtype == "auto" else getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
