"""GradESCallback: Trainer's events drive the engine. All decisions are the engine's; this file is only the adapter."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...config import GradESConfig, make_config
from ...engine import GradES
from ...freezing.freezer import unwrap_optimizer
from ...record.history import FILE_NAME
from . import checkpoint, refusals, reporting
from .held_out import held_out_rows
from .running import running_trainer

logger = logging.getLogger(__name__)

# The callback that a user gave to a trainer: `restore_callback_states_from_checkpoint` replaces it by a copy.
_made_by_user: weakref.WeakKeyDictionary[Trainer, weakref.ref[GradESCallback]] = weakref.WeakKeyDictionary()


class GradESCallback(TrainerCallback, ExportableState):
    """GradES for `transformers.Trainer` and every trainer derived from it.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, callbacks=[GradESCallback()])
    trainer.train()
    ```

    Without a `tau` looks at held-out rows decide when the run ends; `GradESCallback(tau=0.5)` is the paper's method.

    Args:
        config: The options, as a `GradESConfig` or a dict of its fields.
        held_out: Held-out rows for the looks, a Dataset or DataLoader; default: the trainer's `eval_dataset`. Also a
            function from the model to the losses of the rows.
        look_metric: The name of a number that the trainer's `compute_metrics` returns, to look at in place of the loss.
            It is computed row by row, so it must be a mean over rows (accuracy is, F1 is not).
        **options: Single options by name; they override `config`.

    Attributes:
        engine: The `GradES` engine of the current or last `train()`; None before the first.

    The history goes to the output directory. A resumed run goes on exactly: the frozen set and the counters are in the
    checkpoint's trainer_state.json, tensors in its optimizer.pt.

    Raises:
        ValueError: an option that cannot be, or that does not go together with the training arguments; before training
            starts.
    """

    def __init__(
        self,
        config: GradESConfig | Mapping[str, Any] | None = None,
        *,
        held_out: Any = None,
        look_metric: str | None = None,
        **options: Any,
    ) -> None:
        self.config = make_config(config, **options)
        self.held_out, self.look_metric = held_out, look_metric
        self.engine: GradES | None = None
        self.checkpoint: dict[str, Any] | None = None  # set by Trainer when it restores callbacks from a checkpoint
        self._run = reporting.Reports()

    def bind(self, trainer: Trainer) -> None:
        """Learn which trainer this callback belongs to. Trainer's constructor does so; `add_callback` does not.

        From then on trackers get the options and figures of GradES, and the model is trainable as before when
        `train()` ends, also by an error or Ctrl-C.
        """
        if trainer in _made_by_user:
            return
        _made_by_user[trainer] = weakref.ref(self)
        loop, handler = trainer._inner_training_loop, trainer.callback_handler
        reporting.report_through(trainer, lambda: next(filter(_is_ours, handler.callbacks), None))

        @functools.wraps(loop)
        def with_an_end(*args: Any, **kwargs: Any) -> Any:
            try:
                return loop(*args, **kwargs)
            finally:
                for callback in filter(_is_ours, handler.callbacks):
                    callback._end()

        trainer._inner_training_loop = with_an_end

    # --- Trainer's events, in the order in which they come ---------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (trainer := running_trainer()) is not None:
            self.bind(trainer)
        if (model := kwargs.get("model")) is not None:
            GradES.release(model)  # an interrupted run may have left it half frozen, and the optimizer comes next
        refusals.refuse(self.config, args, state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        refusals.refuse(self.config, args, state)
        trainer, original = running_trainer(), None
        if trainer is not None:
            self.bind(trainer)
            original = _made_by_user[trainer]()
        if original is not None and original is not self:
            self.held_out, self.look_metric = original.held_out, original.look_metric
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        rows = held_out_rows(self.config, trainer, self.held_out, self.look_metric)
        engine = GradES(model, self.config, total_steps=state.max_steps, optimizer=optimizer, held_out=rows)
        path = Path(args.output_dir or ".") / FILE_NAME
        try:
            refusals.refuse_lost_adapters(args, engine)
            if state.global_step > 0:
                checkpoint.resume(engine, type(self).__name__, state, path)
        except ValueError:
            engine.close()
            raise
        self.engine, self.checkpoint = engine, None
        if original is not None:
            original.engine = engine
        self._run = reporting.Reports(
            skip=refusals.skips_validation(self.config, args, trainer, kwargs.get("lr_scheduler")),
            over=engine.done,
            path=path if state.is_world_process_zero else None,
            hook=checkpoint.save_tensors_with(unwrap_optimizer(optimizer), engine),
        )
        self._run.begin(engine, args)
        # Trainer fails when it saves after a resume from a checkpoint that did not know this callback.
        checkpoint.stateful(state)[type(self).__name__] = self.state()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._run.restore(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None and not self._run.over:
            self.engine.reassert()

    on_substep_end = on_step_begin

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is None:
            return
        if self._run.over:
            checkpoint.void_step(self.engine, kwargs["model"])
        else:
            self.engine.step(epoch=state.epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.engine is None:
            return control
        if self._run.over:  # this step changed nothing and does not count
            state.global_step -= 1
            control.should_training_stop = True
            control.should_log = control.should_save = control.should_evaluate = False
            return control
        if self.engine.done:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
            control.should_evaluate |= (
                args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step
            )
        reporting.show_progress(self.engine, state)
        return self.on_epoch_end(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._run.skip:
            control.should_evaluate = False
        if control.should_save:
            self._run.write(always=True)
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (logs := kwargs.get("logs")) is not None and state.log_history:
            self._run.log(logs, state.log_history[-1], self.metrics(logs))
            self._run.write(always=control.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()

    # --- what Trainer and GradESTrainer ask for --------------------------------------------------------------------

    def metrics(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The scalars that belong to a training log; see `reporting.metrics`. Empty for any other log."""
        return {} if self.engine is None else reporting.metrics(self.engine, logs)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: what a resumed run needs, but for the tensors (see `checkpoint.py`)."""
        saved = None if self.engine is None else self.engine.state_dict(tensors=False)
        return {"args": {"config": self.config.state_dict()}, "attributes": {"checkpoint": saved}}

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a fresh callback with the same options: a run cannot be copied."""
        return {**self.__dict__, "engine": None, "checkpoint": None, "_run": reporting.Reports()}

    def _end(self) -> None:
        """End the current run's engine, if any; it stays readable."""
        if self.engine is not None:
            self._run.end(self.engine)


def _is_ours(callback: TrainerCallback) -> bool:
    return isinstance(callback, GradESCallback)
