"""Reports on a run: a summary as numbers or text, and figures (which need the extra `plots`).

Importing this loads nothing but what is asked for, so that `grades-hf status` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .card import add_to_model_card, grades_card_section
    from .plots import plot_freezing_map, plot_looks, plot_losses, plot_run, plot_statistic, plot_votes
    from .summary import summarize, table_rows, to_markdown

_HOMES = {
    "card": ("add_to_model_card", "grades_card_section"),
    "plots": ("plot_freezing_map", "plot_looks", "plot_losses", "plot_run", "plot_statistic", "plot_votes"),
    "summary": ("summarize", "table_rows", "to_markdown"),
}

__all__ = [
    "add_to_model_card",
    "grades_card_section",
    "plot_freezing_map",
    "plot_looks",
    "plot_losses",
    "plot_run",
    "plot_statistic",
    "plot_votes",
    "summarize",
    "table_rows",
    "to_markdown",
]


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'grades_hf.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{home}", __name__), name)
