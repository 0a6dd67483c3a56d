"""A model card's section on GradES: what was done to the model, when each matrix froze, and how to cite it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..record.history import History
from .summary import (
    LOOK_HEADS,
    by_group,
    escape,
    has_thresholds,
    last_step,
    look_rows,
    markdown_table,
    places,
    saved,
    sentence,
)

TAG = "grades"
BEGIN, END = "<!-- grades_hf: begin -->", "<!-- grades_hf: end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)
LONG = 32  # rows of the map that are folded away
FREEZING = (
    "gradient-based early stopping of single weight matrices: each one is frozen when its gradient statistic says that "
    "it has converged."
)
ENDING = (
    "which ends a fine-tune before it overfits: where gradients rise it looks at held-out rows, and where they say that "
    "the weights have got worse than their moving average, training ends with that average."
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
        markdown_table(["", ""], _facts(history)),
    ]
    if history.events:
        parts += ["### Frozen matrices", _map(history)]
    if history.looks:
        parts += ["### Looks at held-out rows", markdown_table(LOOK_HEADS, look_rows(history))]
    parts += [_folded("Options of GradES", f"```json\n{options}\n```"), "### Citation of GradES", CITATION]
    return "\n\n".join(parts) + "\n"


def _facts(history: History) -> list[list[str]]:
    frozen, freezes = history.frozen, has_thresholds(history)
    after = f"; freezing after {history.t_grace}" if freezes else ""
    rows = [["steps", f"{last_step(history)} of {history.total_steps} planned{after}"]]
    for label, members in by_group(history).items():
        steps = [frozen[component["name"]] for component in members if component["name"] in frozen]
        when = f", first at step {min(steps)}, last at step {max(steps)}" if steps else ""
        rows.append([label, f"{len(steps)} of {len(members)} frozen{when}" if freezes else f"{len(members)} matrices"])
    if found := saved(history):
        rows.append(["compute saved", f"{found[0]:.1%} {found[1]}"])
    if history.versions:
        rows.append(["versions", ", ".join(f"{name} {version}" for name, version in history.versions.items())])
    return rows


def _map(history: History) -> str:
    """For each tower a table of layers by matrices with the step of freezing."""
    frozen, blocks, long = history.frozen, [], 0
    for tower, columns in places(history).items():
        layers = sorted({layer for column in columns.values() for layer in column if layer is not None})
        outside = any(None in column for column in columns.values())
        body = []
        for layer in [*layers, *([None] if outside else [])]:
            cells = [_cell(column.get(layer), frozen) for column in columns.values()]
            body.append(["outside" if layer is None else str(layer), *cells])
        if tower is not None:
            blocks.append(f"**{escape(tower)}**")
        blocks.append(markdown_table(["layer", *columns], body))
        long = max(long, len(body))
    blocks.append(
        "A number is the optimizer step from which on the matrix was frozen, `-` one that was not frozen"
        + ("; `k/n`: k of n matrices in this place were frozen." if any("/" in block for block in blocks) else ".")
    )
    text = "\n\n".join(blocks)
    return _folded("Steps of freezing, by layer and matrix", text) if long > LONG else text


def _cell(components: Sequence[Mapping[str, Any]] | None, frozen: Mapping[str, int]) -> str:
    if not components:
        return ""
    steps = sorted({frozen[component["name"]] for component in components if component["name"] in frozen})
    number = sum(component["name"] in frozen for component in components)
    if not steps:
        return "-"
    span = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    return span if number == len(components) else f"{number}/{len(components)}: {span}"


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"
