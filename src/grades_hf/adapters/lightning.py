"""GradES for Lightning: `lightning.Trainer(callbacks=[GradESLightningCallback(tau=0.5)])`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .config import GradESConfig
from .engine import GradES


class GradESLightningCallback(Callback):
    """Freezes matrices of a LightningModule with one optimizer; its state is saved and resumed with checkpoints.

    Args:
        **options: The fields of `GradESConfig`. Evaluations are Lightning's, whatever `skip_validation` says.

    Raises:
        ValueError: manual optimization, several optimizers, or a run without a planned end; before the first step.
    """

    def __init__(self, **options: Any) -> None:
        self.config = GradESConfig(**options)
        self.engine: GradES | None = None  # of the current or last `fit`
        self._loss: Tensor | None = None  # of the micro-batches since the last step, added up
        self._loaded: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1 or total == float("inf"):
            raise ValueError(
                f"automatic_optimization={pl_module.automatic_optimization}, {len(trainer.optimizers)} optimizers and "
                f"{total} steps: GradESLightningCallback needs automatic optimization by one optimizer, and max_steps "
                "or max_epochs. Otherwise call GradES in training_step."
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        engine = GradES(pl_module, self.config, total_steps=int(total), optimizer=trainer.optimizers[0], scaler=scaler)
        if self._loaded:
            engine.load_state_dict(self._loaded)
        self.engine, clip = engine, pl_module.configure_gradient_clipping

        def clip_and_check(*args: Any, **kwargs: Any) -> None:  # Lightning has no hook between clipping and the update
            clip(*args, **kwargs)
            engine.step(loss=self._loss)
            self._loss = None

        pl_module.__dict__["configure_gradient_clipping"] = clip_and_check

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if self.engine is None:
            return
        trainer.should_stop |= self.engine.done
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.engine.t and (trainer.should_stop or (every and self.engine.t % every == 0)):
            self.engine.log(outputs["loss"] if isinstance(outputs, Mapping) else None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if pl_module.__dict__.pop("configure_gradient_clipping", None) is not None and self.engine is not None:
            self.engine.close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.engine is None else self.engine.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
