"""Fixtures for the whole suite: a small trained model, real text, and a machine that behaves the same every time."""

from __future__ import annotations

import os

# Before transformers, datasets and torch are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gc
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests import standin
from tests.compatibility import pytest_addoption, pytest_collection_modifyitems, pytest_configure  # noqa: F401

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: containers have no user namespaces. The rest keeps the browser itself off the network.
BROWSER_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def pytest_report_header() -> str:
    return f"grades_hf stand-ins: {standin.describe()}"


def pytest_collection_finish() -> None:
    """What the libraries have made while they were imported is not gone through at each garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Every test starts from the same seeds, with one torch thread, and leaves no logger louder than it was."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    levels = {name: logging.getLogger(name).level for name in ("grades_hf", "recipes")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    if torch.nn.modules.module._global_forward_hooks:  # of an engine that the test has left open, in a counted step
        gc.collect()
    plugin = AcceleratorState._shared_state.get("dynamo_plugin")
    if plugin is not None and plugin.backend != DynamoBackend.NO:  # else all later models would count as compiled
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """A folder with a small *trained* Llama (260,032 parameters, vocabulary 512) and its tokenizer."""
    return standin.model_dir()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def real_text() -> list[str]:
    """Several hundred paragraphs of English."""
    return standin.text()


@pytest.fixture(scope="session")
def vqa_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with questions about pictures: easy-VQA, or drawn ones."""
    if (found := standin.find("data", "easy_vqa")) is not None:
        return found
    folder = tmp_path_factory.mktemp("vqa")
    standin.questions(200, 0).to_parquet(folder / "train.parquet")
    standin.questions(60, 1).to_parquet(folder / "validation.parquet")
    return folder


@pytest.fixture(scope="session")
def text_blocks(real_text: list[str], tiny_tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """The text as one row of tokens of the small model, at least 20,000."""
    tokens: list[int] = []
    for paragraph in real_text:
        tokens += tiny_tokenizer(paragraph)["input_ids"]
        if len(tokens) >= 20_000:
            break
    return torch.tensor(tokens)


@pytest.fixture(scope="session")
def text_dataset(text_blocks: torch.Tensor) -> Callable[..., Dataset]:
    """`text_dataset(rows, length, skip=0)`: blocks of `length` tokens with `input_ids` and `labels`."""

    def make(rows: int = 64, length: int = 32, skip: int = 0) -> Dataset:
        assert (skip + rows) * length <= len(text_blocks), "more text was asked for than the fixture tokenizes"
        blocks = text_blocks[skip * length : (skip + rows) * length].view(rows, length).tolist()
        return Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium; a machine without it skips the tests, except in CI."""
    path = os.environ.get("GRADES_HF_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = f"none of {', '.join(BROWSERS)} is installed; GRADES_HF_CHROMIUM names another one"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGUMENTS))
        yield chromium
        chromium.close()
