"""GradES for `transformers.Trainer` and every trainer derived from it."""

from .callback import GradESCallback
from .mixin import GradESTrainer, GradESTrainerMixin

__all__ = ["GradESCallback", "GradESTrainer", "GradESTrainerMixin"]
