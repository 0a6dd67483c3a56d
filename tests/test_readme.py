"""Every Python block of the documentation runs, in order, one namespace per file, as a reader would run it.

What a reader brings (a data set, a loader, an optimizer) is there before each block; a model or tokenizer named by its
id on the hub is replaced by the small trained one; runs are cut to a few steps.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, default_data_collator

from tests.standin import PROJECT

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [path for path in (PROJECT / "README.md", *sorted(PROJECT.glob("docs/**/*.md"))) if path.exists()]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
MAX_STEPS = 4
# tests/clients/test_pages.py runs these.
RUN = [path for path in PAGES if path.parent.name != "clients"]


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line number, source) of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in BLOCK.finditer(text)]


@pytest.fixture
def hub(monkeypatch, tiny_model_dir):
    """`from_pretrained` of any id on the hub loads the small trained model."""
    for loader in (AutoModelForCausalLM, AutoTokenizer):

        def redirected(name, *args, original=loader.from_pretrained, **kwargs):
            is_id = HUB_ID.fullmatch(str(name)) and not Path(name).exists()
            return original(str(tiny_model_dir) if is_id else name, *args, **kwargs)

        monkeypatch.setattr(loader, "from_pretrained", redirected)


@pytest.fixture
def short_runs(monkeypatch):
    """`TrainingArguments` as the reader writes them, but for a few steps, on the CPU, without a progress bar."""

    def shortened(self: TrainingArguments, original=TrainingArguments.__post_init__) -> None:
        self.max_steps = MAX_STEPS
        self.use_cpu = True
        self.disable_tqdm = True
        self.dataloader_pin_memory = False
        original(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", shortened)


# TRL 1.16 asks transformers 5.23 by the old name.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*` is deprecated:FutureWarning")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_python_blocks_run(page, hub, short_runs, text_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = text_dataset(rows=32, length=32)
    namespace: dict[str, Any] = {"__name__": "__main__", "train_dataset": dataset, "eval_dataset": dataset}
    found = blocks(page)
    for line, source in found:
        model = namespace.get("model")
        if model is not None:
            trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
            namespace["optimizer"] = torch.optim.AdamW(trainable, lr=1e-3)
            namespace["loader"] = DataLoader(dataset, batch_size=8, collate_fn=default_data_collator)
        # The line numbers of a traceback are those of the page.
        code = compile("\n" * (line - 1) + source, str(page), "exec")
        exec(code, namespace)
    assert found or page.name != "README.md"


def test_a_block_that_fails_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\n```bash\nfalse\n```\n\n```python\ny = undefined\n```\n")
    assert blocks(page) == [(4, "x = 1\n"), (12, "y = undefined\n")]
