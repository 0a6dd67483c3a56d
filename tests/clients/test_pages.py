"""The pages of docs/clients: each block runs where its client is installed."""

from __future__ import annotations

import importlib.util
import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grades_hf import GradESCallback, History
from tests.standin import PROJECT

PAGES = sorted((PROJECT / "docs" / "clients").glob("*.md"))


def blocks(name: str, language: str = "python") -> list[str]:
    text = (PROJECT / "docs" / "clients" / f"{name}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs {module}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_is_short_and_its_blocks_compile(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 40
    found = blocks(page.stem) + blocks(page.stem, "py")
    assert found
    for block in found:
        compile(block, str(page), "exec")
    for block in blocks(page.stem, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
def test_trl_sft(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl

    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        rows = [json.dumps({"text": f"The cat sat on {split} mat {n}."}) for n in range(16)]
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = yaml.safe_load(blocks("trl_sft", "yaml")[0])
    assert {"model_name_or_path", "dataset_name", "eval_strategy", "output_dir"} == config.keys()
    config |= {"model_name_or_path": str(tiny_model_dir), "dataset_name": str(tmp_path / "rows"), "max_steps": 12}
    config |= {
        "output_dir": "out",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", "my.yaml"])
    monkeypatch.setattr(trl, "SFTTrainer", trl.SFTTrainer)  # as it was afterwards
    (block,) = blocks("trl_sft")
    exec(compile(block, "trl_sft.md", "exec"), {"__name__": "__main__"})
    history = History.load(tmp_path / "out")
    assert len(history.steps) == 12
    assert (tmp_path / "out" / "model.safetensors").is_file()


@needs("lightning")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec.*:FutureWarning")
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    (block,) = blocks("lightning")
    exec(compile(block, "lightning.md", "exec"), names)
    callback = next(c for c in names["trainer"].callbacks if type(c).__name__ == "GradESLightningCallback")
    assert callback.engine.ending.looks


@needs("axolotl")
def test_axolotl() -> None:
    (block,) = blocks("axolotl")
    exec(compile(block, "axolotl.md", "exec"), {"__name__": "__main__"})


@needs("swift")
def test_ms_swift() -> None:
    from swift.callbacks import callbacks_map

    (block,) = blocks("ms_swift")
    exec(compile(block, "ms_swift.md", "exec"), {"__name__": "grades_plugin"})
    assert isinstance(callbacks_map.pop("grades")(None, None), GradESCallback)


@needs("llamafactory")
def test_llama_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.train import tuner

    given: list[Any] = []
    monkeypatch.setattr(tuner, "_training_function", lambda config: given.append(config))
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (block,) = blocks("llama_factory")
    exec(compile(block, "llama_factory.md", "exec"), {"__name__": "__main__"})
    assert isinstance(given[0]["callbacks"][0], GradESCallback)


@needs("setfit")
@pytest.mark.filterwarnings("ignore")
def test_setfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the page, with a tiny random body."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel, Trainer, TrainingArguments
    from sklearn.linear_model import LogisticRegression
    from transformers import BertConfig, BertModel, BertTokenizerFast

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path)
    model = SetFitModel(model_body=SentenceTransformer(str(tmp_path)), model_head=LogisticRegression())
    rows = Dataset.from_dict({"text": [chr(97 + n % 26) for n in range(32)], "label": [n % 2 for n in range(32)]})
    callback = GradESCallback(tau=1e9, alpha=0.5)
    options: dict[str, Any] = {"max_steps": 10, "batch_size": 8, "report_to": "none"}
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), num_epochs=1, **options)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    assert callback.engine is not None
    assert set(callback.engine.frozen.values()) == {6}
