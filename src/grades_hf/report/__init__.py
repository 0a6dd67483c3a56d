"""Reports on a run: a summary as numbers or text, and figures (which need the extra `plots`).

What is asked for is loaded then, and nothing else, so that `grades-hf status` answers at once.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "add_to_model_card": "card", "grades_card_section": "card", "plot_freezing_map": "plots", "plot_looks": "plots",
    "plot_losses": "plots", "plot_run": "plots", "plot_statistic": "plots", "plot_votes": "plots",
    "summarize": "summary", "to_markdown": "summary",
}  # fmt: skip
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grades_hf.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
