"""GradESTrainer: `Trainer` with GradES as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ...config import GradESConfig
from .callback import GradESCallback

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class GradESTrainerMixin(_Base):
    """Adds GradES to any trainer class: `class MyTrainer(GradESTrainerMixin, SFTTrainer): pass`.

    Args:
        grades: The options, a `GradESConfig` or a dict of its fields; default: `GradESConfig()`, without a tau. All
            other arguments are the trainer's own.
        held_out: See `GradESCallback`.
        look_metric: See `GradESCallback`.

    Raises:
        ValueError: the trainer has a `GradESCallback` besides.
    """

    def __init__(
        self,
        *args: Any,
        grades: GradESConfig | Mapping[str, Any] | None = None,
        held_out: Any = None,
        look_metric: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        callback = GradESCallback(grades, held_out=held_out, look_metric=look_metric)
        self.add_callback(callback)
        callback.on_init_end(self.args, self.state, self.control, model=self.model)

    @property
    def grades_callback(self) -> GradESCallback:
        """The callback at work.

        Raises:
            AttributeError: it has been removed.
        """
        found = next((c for c in self.callback_handler.callbacks if isinstance(c, GradESCallback)), None)
        if found is None:
            raise AttributeError("the trainer has no GradESCallback: it has been removed.")
        return found

    def train(self, *args: Any, **kwargs: Any) -> Any:
        found = [c for c in self.callback_handler.callbacks if isinstance(c, GradESCallback)]
        if len(found) > 1:
            raise ValueError(f"the trainer has {len(found)} GradESCallbacks; pass grades=... or a callback, not both.")
        return super().train(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """What the model has computed since the last call, counted (see `Savings`); Trainer sums it to `total_flos`.

        Where it is not counted (torch.compile), it is the base class's estimate.
        """
        engine = next((c.engine for c in self.callback_handler.callbacks if isinstance(c, GradESCallback)), None)
        flops = None if engine is None else engine.meter.take()
        return super().floating_point_ops(inputs) if flops is None else flops

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The base class's card with a section on GradES (see `add_to_model_card`), as `push_to_hub` uploads it."""
        from ...report.card import add_to_model_card

        super().create_model_card(*args, **kwargs)
        engine = next((c.engine for c in self.callback_handler.callbacks if isinstance(c, GradESCallback)), None)
        if engine is not None and self.is_world_process_zero():
            assert self.args.output_dir is not None
            add_to_model_card(Path(self.args.output_dir) / "README.md", engine.history)


class GradESTrainer(GradESTrainerMixin, Trainer):
    """`transformers.Trainer` with GradES: `GradESTrainer(model=..., args=..., grades=GradESConfig(tau=0.5))`."""
