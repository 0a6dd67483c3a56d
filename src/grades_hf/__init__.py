"""GradES for Hugging Face Transformers and PEFT: stop training what has converged.

Importing this imports neither Trainer nor PEFT; the names that need them are loaded when they are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import GradESConfig

if TYPE_CHECKING:
    from .adapters.lightning import GradESLightningCallback
    from .adapters.trainer import GradESCallback, GradESTrainer, GradESTrainerMixin
    from .engine import GradES
    from .find.components import Component, find_components
    from .record.history import History

__version__ = "0.2.0"

_HOMES = {
    "Component": "find.components",
    "GradES": "engine",
    "GradESCallback": "adapters.trainer",
    "GradESLightningCallback": "adapters.lightning",
    "GradESTrainer": "adapters.trainer",
    "GradESTrainerMixin": "adapters.trainer",
    "History": "record.history",
    "find_components": "find.components",
}

__all__ = [
    "Component",
    "GradES",
    "GradESCallback",
    "GradESConfig",
    "GradESLightningCallback",
    "GradESTrainer",
    "GradESTrainerMixin",
    "History",
    "find_components",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'grades_hf' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
