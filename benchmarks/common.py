"""What the benchmark commands share: models of real shapes with random weights, timing, JSON results."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "peft", "accelerate")


def _rope(theta: float, **options: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **options}


# As in the models' own config.json. "tiny" is for tests.
_SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        rope_parameters=_rope(100_000.0),
    ),
    "qwen3-0.6b": lambda: Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters=_rope(1_000_000.0),
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        rope_parameters=_rope(
            500_000.0,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
    ),
}
SHAPES = tuple(_SHAPES)


def parser(description: str, *, rounds: int | None) -> argparse.ArgumentParser:
    """The options that every benchmark has: device, shape, dtype, batch, length, threads, rounds, output.

    `rounds` is the default; None where nothing is repeated.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    result.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    result.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    result.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    result.add_argument("--batch", type=int, default=2, help="sequences in a batch")
    result.add_argument("--length", type=int, default=64, help="tokens in a sequence")
    result.add_argument("--rank", type=int, default=16, help="rank of the LoRA")
    result.add_argument("--threads", type=int, default=1, help="CPU threads")
    if rounds is not None:
        result.add_argument("--rounds", type=int, default=rounds, help="repetitions, interleaved")
    result.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    return result


def dtype(options: argparse.Namespace) -> torch.dtype:
    """The dtype that the options name."""
    name = options.dtype or ("float32" if torch.device(options.device).type == "cpu" else "bfloat16")
    return getattr(torch, name)


def shape(name: str) -> PretrainedConfig:
    """A fresh config of a model of that shape; no download.

    Raises:
        ValueError: no such shape.
    """
    if name not in _SHAPES:
        raise ValueError(f"shape={name!r} is unknown; use one of {', '.join(SHAPES)}.")
    config = _SHAPES[name]()
    config.use_cache = False
    return config


def model(
    config: PretrainedConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    rank: int | None = None,
) -> nn.Module:
    """A model in training mode with random weights, the same at every call; with `rank` a LoRA on all linear layers.

    The LoRA's B is random instead of 0, so that A has a gradient at once.
    """
    torch.manual_seed(0)
    with torch.device(device):
        result = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if rank is not None:
            result = get_peft_model(
                result,
                LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
                autocast_adapter_dtype=False,
            )
    return result.train()


def batch(
    config: PretrainedConfig, rows: int, length: int, *, device: str | torch.device = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Random `input_ids` and `labels`, (rows, length) each; the same for the same seed."""
    tokens = torch.randint(3, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(device)
    return {"input_ids": tokens, "labels": tokens}


def synchronize(device: str | torch.device) -> None:
    """Wait until an accelerator has done all that was asked of it."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(function: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """Wall-clock time of one call, the accelerator's work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, smallest and largest of several measurements of the same, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def ratio(times: Sequence[float], base: Sequence[float]) -> dict[str, float | int]:
    """The spread of `times / base`, round by round."""
    return spread([a / b for a, b in zip(times, base, strict=True)])


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What it was measured on: devices, threads, system."""
    result: dict[str, Any] = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result["accelerator"] = properties.name
        result["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
        result["cuda"] = torch.version.cuda
    return result


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def versions(*more: str) -> dict[str, str]:
    """Python and the packages that the figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, *more)}}


def commit() -> str:
    """The commit that is checked out; with "+" when tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Results of an earlier command do not make the next one's commit another.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def write(name: str, results: Any, options: argparse.Namespace, *packages: str) -> Path:
    """Write `<output>/<name>.json`: the results and all that is needed to judge and repeat them.

    Args:
        name: The benchmark's module name; the file's name also tells device and shape unless they are the defaults.
        results: What JSON can hold.
        options: The parsed options.
        packages: Further distributions whose versions belong to it.
    """
    device, shape = getattr(options, "device", "cpu"), getattr(options, "shape", "smollm2-135m")
    kind = torch.device(device).type
    suffix = "" if (kind, shape) == ("cpu", "smollm2-135m") else f"-{kind}-{shape}"
    document = {
        "command": command(name, options),
        "commit": commit(),
        "versions": versions(*packages),
        "machine": machine(device),
        "results": results,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}{suffix}.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def command(name: str, options: argparse.Namespace) -> str:
    """The command of the benchmark `name` with these options, defaults included; `output` is left out."""
    words = [f"python -m benchmarks.{name}"]
    for key, value in vars(options).items():
        flag = f"--{key.replace('_', '-')}"
        if key == "output" or value is None or value is False:
            continue
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return " ".join(words)


def say(line: str) -> None:
    """One line for the person at the terminal, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
