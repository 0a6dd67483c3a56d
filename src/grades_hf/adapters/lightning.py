"""GradES for Lightning: `lightning.Trainer(callbacks=[GradESLightningCallback()])`."""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import GradESConfig, make_config
from ..ending import Rows
from ..ending.look import unseen
from ..engine import GradES
from .unnoted import unnoted

_CLIP = "configure_gradient_clipping"

WAYS_OUT = (
    "Return the loss from validation_step, pass held_out= (also a function from the LightningModule to the losses of "
    "held-out rows), or pass a tau."
)


class GradESLightningCallback(Callback):
    """GradES for a LightningModule with one optimizer; its state is saved and resumed with checkpoints.

    Without a `tau` looks at held-out rows decide when the run ends. They see the loss that `validation_step` returns.

    Args:
        config: The options, as a `GradESConfig` or a dict of its fields.
        held_out: Held-out rows for the looks, a Dataset or DataLoader, or a function from the LightningModule to the
            losses of the rows; default: the trainer's `val_dataloaders`.
        **options: Single options by name; they override `config`. Evaluations are Lightning's, whatever
            `skip_validation` says.

    Attributes:
        engine: The `GradES` engine of the current or last `fit`; None before the first.

    Raises:
        ValueError: manual optimization, several optimizers, a run without a planned end or with a smallest length, or
            without a tau no held-out rows or no loss for them; before the first step.
    """

    def __init__(
        self, config: GradESConfig | Mapping[str, Any] | None = None, *, held_out: Any = None, **options: Any
    ) -> None:
        self.config = make_config(config, **options)
        self.held_out = held_out
        self.engine: GradES | None = None
        self._loss: Tensor | None = None  # of the micro-batches since the last step, added up
        self._loaded: dict[str, Any] = {}  # the state of a checkpoint, or of a run that has ended

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(pl_module)
        total = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1 or total == float("inf"):
            raise ValueError(
                f"automatic_optimization={pl_module.automatic_optimization}, {len(trainer.optimizers)} optimizers and "
                f"{total} steps: GradESLightningCallback needs automatic optimization by one optimizer, and max_steps "
                "or max_epochs. Otherwise call GradES in training_step."
            )
        if trainer.min_steps or trainer.min_epochs:
            raise ValueError(
                f"min_steps={trainer.min_steps} and min_epochs={trainer.min_epochs} keep Lightning training after "
                "GradES has ended a run. Drop them."
            )
        rows = self._rows(trainer, pl_module) if self.config.tau is None else self.held_out
        engine = GradES(
            pl_module, self.config, total_steps=int(total), optimizer=trainer.optimizers[0], held_out=rows,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
        )  # fmt: skip
        with ExitStack() as undo:
            undo.callback(engine.close)
            if self._loaded and trainer.global_step:
                engine.load_state_dict(self._loaded)
            undo.pop_all()
        self.engine, self._loss, self._loaded = engine, None, {}
        trainer.should_stop |= engine.done  # resumed from its own end
        pl_module.__dict__[_CLIP] = _ClipAndCheck(self, trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.engine is not None:
            self.engine.reassert()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        engine = self.engine
        if engine is None:
            return
        if engine.t != trainer.global_step:
            raise RuntimeError(
                f"GradES has seen {engine.t} optimizer steps and Lightning has made {trainer.global_step}: it is "
                "called where Lightning clips gradients. If the LightningModule overrides optimizer_step, let it call "
                "super().optimizer_step(...) once a step."
            )
        trainer.should_stop |= engine.done
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if engine.t and (trainer.should_stop or (every and engine.t % every == 0)):
            engine.log(outputs["loss"] if isinstance(outputs, Mapping) else None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._end(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self._loaded or ({} if self.engine is None else self.engine.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a fresh callback with the same options: a run cannot be copied."""
        return {**self.__dict__, "engine": None, "_loss": None, "_loaded": {}}

    def check_and_freeze(self, epoch: int) -> None:
        """The gradients of a step are complete and clipped."""
        assert self.engine is not None
        loss, self._loss = self._loss, None
        self.engine.step(loss=loss, epoch=float(epoch))

    def _rows(self, trainer: Trainer, module: LightningModule) -> Any:
        """What the engine gets as `held_out`; one row is tried.

        Raises:
            ValueError: there are no rows, or `validation_step` returns no loss.
        """
        source = self.held_out
        if callable(source) and not hasattr(source, "__getitem__"):
            return source
        if source is None and trainer.val_dataloaders is None:  # Lightning makes them before the first validation
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        source = trainer.val_dataloaders if source is None else source
        loss = _ValidationLoss(trainer)
        parts = list(_parts(source))
        if not parts:
            return None
        number = -(-self.config.look_rows // len(parts))
        rows = Rows(parts, number, loss)
        with unseen(module):
            rows.first(module)
        return rows

    def _end(self, module: LightningModule) -> None:
        if module.__dict__.pop(_CLIP, None) is not None and self.engine is not None:
            self.engine.flush()
            self._loaded = self.engine.state_dict(tensors=False)
            self.engine.close()


class _ClipAndCheck:
    """Stands in for a module's `configure_gradient_clipping`: Lightning has no hook between clipping and the update.

    A copied or pickled module has its own method instead.
    """

    def __init__(self, callback: GradESLightningCallback, trainer: Trainer, module: LightningModule) -> None:
        self._callback, self._trainer, self._module = weakref.ref(callback), weakref.ref(trainer), weakref.ref(module)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        callback, trainer, module = self._callback(), self._trainer(), self._module()
        assert callback is not None
        assert trainer is not None
        getattr(type(module), _CLIP)(module, *args, **kwargs)
        callback.check_and_freeze(trainer.current_epoch)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = self._module()
        return types.MethodType(getattr(type(module), _CLIP), memo[id(module)])

    def __reduce__(self) -> Any:
        return getattr, (self._module(), _CLIP)


class _ValidationLoss:
    """What a LightningModule's `validation_step` returns for a batch; what it logs and notes is taken back."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        trainer = self._trainer()
        assert trainer is not None
        assert isinstance(module, LightningModule)
        batch = trainer.strategy.batch_to_device(batch, module.device, 0)
        named = inspect.signature(module.validation_step).parameters
        more = {"dataloader_idx": 0} if "dataloader_idx" in named else {}
        metrics = [m for m in module.modules() if type(m).__module__.startswith("torchmetrics")]
        with unnoted([module], log=_silent, log_dict=_silent), unnoted(metrics, every_tensor=True):
            try:
                with trainer.precision_plugin.val_step_context():
                    found = module.validation_step(batch, 0, **more)
            except (AttributeError, LookupError, TypeError, ValueError) as error:  # as rows of another kind raise
                raise ValueError(
                    f"GradES without a tau looks at the loss of held-out rows, and validation_step fails for the "
                    f"first: {error!r}. {WAYS_OUT}"
                ) from error
        loss = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                "GradES without a tau looks at the loss of held-out rows, and validation_step returns "
                f"{type(found).__name__}. {WAYS_OUT}"
            )
        return loss


def _parts(source: Any) -> Iterator[Any]:
    """The datasets and loaders in what Lightning takes as `val_dataloaders`, or a user as `held_out`."""
    if isinstance(source, Mapping):
        for item in source.values():
            yield from _parts(item)
    elif isinstance(source, (list, tuple)) and source and isinstance(source[0], DataLoader):
        yield from source
    elif source is not None and not (isinstance(source, (list, tuple)) and not source):
        yield source


def _silent(*_: Any, **__: Any) -> None:
    """Stands in for `log` meanwhile."""
