"""GradES for Hugging Face Transformers and PEFT: freeze each weight matrix when its gradient says it has converged."""

from .callback import GradESCallback
from .components import Component, find_components
from .config import GradESConfig
from .engine import GradES
from .history import History
from .trainer import GradESTrainer, GradESTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "Component",
    "GradES",
    "GradESCallback",
    "GradESConfig",
    "GradESTrainer",
    "GradESTrainerMixin",
    "History",
    "find_components",
]
