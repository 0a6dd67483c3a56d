"""A model card's section on GradES: what was done to the model, when each matrix froze, and how to cite it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCard

from ..record.history import History
from .summary import (
    CELLS,
    LOOK_HEADS,
    LOOKS_NOTE,
    escape,
    facts,
    has_thresholds,
    look_rows,
    markdown_table,
    sentence,
    step_tables,
)  # fmt: skip

TAG = "grades"
BEGIN, END = "<!-- grades_hf: begin -->", "<!-- grades_hf: end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
LONG = 32  # rows of the map that are folded away
FREEZING = "gradient-based early stopping of single weight matrices: each one is frozen when its gradient says so."
ENDING = (
    "which ends a fine-tune before it overfits: where gradients rise it looks at held-out rows, and where these say "
    "that the weights have got worse than their moving average, training ends with that average."
)

CITATION = """\
```bibtex
@misc{wen2025grades,
  title         = {{GradES}: Significantly Faster Training in Transformers with Gradient-Based Early Stopping},
  author        = {Wen, Qifu and Zeng, Xi and Zhou, Zihan and Liu, Shuaijun and Hosseinzadeh, Mehdi and
                   Rawassizadeh, Reza},
  year          = {2025},
  eprint        = {2509.01842},
  archivePrefix = {arXiv},
  primaryClass  = {cs.LG},
  url           = {https://arxiv.org/abs/2509.01842}
}
```"""


def add_to_model_card(card: ModelCard | str | os.PathLike[str], history: History | str | os.PathLike[str]) -> ModelCard:
    """Put the section of `grades_card_section` and the tag `grades` into a model card; an earlier section is replaced.

    ```python
    trainer.save_model()
    add_to_model_card("run", callback.engine.history)
    ```

    Args:
        card: A `huggingface_hub.ModelCard`, which is changed; or a Markdown file, or the directory of a model with its
            `README.md`, which is written, and made where there is none.
        history: What GradES recorded, or the directory of the run.

    Returns:
        The card.

    Raises:
        FileNotFoundError, ValueError: there is no history, or it is damaged.
    """
    section = grades_card_section(history)
    if isinstance(card, ModelCard):
        return _add(card, section)
    path = Path(card)
    if path.suffix.lower() != ".md":
        path = path / "README.md"
    made = _add(ModelCard.load(path) if path.exists() else ModelCard("---\n{}\n---\n"), section)
    made.save(path)
    return made


def _add(card: ModelCard, section: str) -> ModelCard:
    marked = f"{BEGIN}\n{section}{END}"
    text, found = _SECTION.subn(lambda _: marked, card.text)
    card.text = text if found else f"{card.text.rstrip()}\n\n{marked}\n".lstrip("\n")
    tags = card.data.get("tags") or []
    card.data["tags"] = tags if TAG in tags else [*tags, TAG]
    return card


def grades_card_section(history: History | str | os.PathLike[str]) -> str:
    """The section as Markdown, from its heading on: what froze when, compute saved, options, versions, citation.

    It says what the history holds and nothing else: what was not recorded or counted is left out.

    Args:
        history: What GradES recorded, or the directory of the run.

    Raises:
        FileNotFoundError, ValueError: there is no history, or it is damaged.
    """
    if not isinstance(history, History):
        history = History.load(history)
    options = json.dumps(history.config, indent=2).replace("<", "\\u003c")
    freezes = has_thresholds(history)
    parts = [
        "## GradES",
        f"Fine-tuned with [GradES](https://arxiv.org/abs/2509.01842), {FREEZING if freezes else ENDING}",
        escape(sentence(history)),
        markdown_table(["", ""], facts(history)),
    ]
    if history.events:
        parts += ["### Frozen matrices", _map(history)]
    if history.looks:
        parts += ["### Looks at held-out rows", markdown_table(LOOK_HEADS, look_rows(history)), LOOKS_NOTE]
    parts += [_folded("Options of GradES", f"```json\n{options}\n```"), "### Citation of GradES", CITATION]
    return "\n\n".join(parts) + "\n"


def _map(history: History) -> str:
    """For each tower a table of layers by matrices with the step of freezing."""
    blocks, long = [], 0
    for tower, rows in step_tables(history, history.frozen):
        blocks += [f"**{escape(tower)}**"] if tower is not None else []
        blocks.append(markdown_table(rows[0], rows[1:]))
        long = max(long, len(rows))
    text = "\n\n".join([*blocks, CELLS])
    return _folded("Steps of freezing, by layer and matrix", text) if long > LONG else text


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
