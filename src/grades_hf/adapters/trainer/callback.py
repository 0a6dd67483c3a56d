"""GradESCallback: Trainer's events drive the engine. All decisions are the engine's; this file is only the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...config import GradESConfig, make_config
from ...engine import GradES
from ...freezing.freezer import unwrap_optimizer
from . import checkpoint, refusals, reporting, validation
from .held_out import held_out_rows
from .running import Binding, BoundCallback, running_trainer


class GradESCallback(BoundCallback, ExportableState):
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
    checkpoint's trainer_state.json, tensors in its optimizer.pt. A copy of a callback, also of one that is at work, is
    a new callback with the same options.

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

    # --- Trainer's events, in the order in which they come ---------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = running_trainer()
        if trainer is not None:
            Binding.of(trainer, self)
            args = trainer.args
        if isinstance(model := getattr(trainer, "model", kwargs.get("model")), nn.Module):
            GradES.release(model)  # an interrupted run may have left it half frozen, and the optimizer comes next
        refusals.refuse(self.config, args, state)
        validation.refuse_skipping(self.config, args, trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, original = running_trainer(), self
        if trainer is not None:
            args, original = trainer.args, Binding.of(trainer, self).put_back(self)  # type: ignore[assignment]
        original._begin(self.config, args, state, trainer, **kwargs)

    def _begin(
        self, config: GradESConfig, args: TrainingArguments, state: TrainerState, trainer: Trainer | None, **kwargs: Any
    ) -> None:
        self.end()
        refusals.refuse(config, args, state)
        model, optimizer = refusals.module(kwargs["model"], trainer), kwargs["optimizer"]
        skip = validation.skips(config, args, trainer, kwargs.get("lr_scheduler"))
        rows = held_out_rows(config, trainer, model, self.held_out, self.look_metric)
        path = Path(args.output_dir or ".")
        with ExitStack() as undo:
            engine = GradES(model, config, total_steps=state.max_steps, optimizer=optimizer, held_out=rows)
            undo.callback(engine.close)
            refusals.refuse_lost_adapters(args, engine)
            if state.global_step > 0:
                checkpoint.resume(engine, type(self).__name__, state, path, args)
            undo.pop_all()
        self.engine, self.checkpoint = engine, None
        self._run = reporting.Reports(
            engine,
            config=config,
            args=args,
            skip=skip,
            over=engine.done,
            path=path if state.is_world_process_zero else None,
            bar=reporting.progress_bar(trainer),
            hook=checkpoint.save_tensors_with(unwrap_optimizer(optimizer), engine),
        )
        self._run.begin()
        # Trainer fails when it saves after a resume from a checkpoint that did not know this callback.
        checkpoint.stateful(state)[type(self).__name__] = self.state()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None:
            refusals.refuse_more_steps(self._run.over, state)
            self.engine.reassert()

    on_substep_end = on_step_begin

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None:
            self.engine.step(epoch=state.epoch)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        args = self._run.args or args
        if self._run.skip:
            validation.leave_out(control, args, state, IntervalStrategy.STEPS)
        if self.engine is None:
            return control
        refusals.refuse_unmatched_steps(self.engine, state, running_trainer)
        if self.engine.done:
            control.should_training_stop = control.should_log = True
            control.should_save |= args.save_strategy == SaveStrategy.STEPS
            control.should_evaluate |= (
                args.eval_strategy == IntervalStrategy.STEPS
                and args.eval_delay <= state.global_step
                and not self._run.skip
            )
        reporting.show_progress(self.engine, self._run.bar)
        if control.should_save:
            self._run.write(urgent=True)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._run.skip:
            validation.leave_out(control, self._run.args or args, state, IntervalStrategy.EPOCH)
        if control.should_save:
            self._run.write(urgent=True)
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (logs := kwargs.get("logs")) is not None and state.log_history:
            self._run.log(logs, state.log_history[-1], self.metrics(logs))
            self._run.write(urgent=control.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        validation.say_what_was_loaded(self.engine, self._run.args or args, state)
        self.end()

    # --- what Trainer, its binding and GradESTrainer ask for -------------------------------------------------------

    def leaves_out(self, part: str, *, at_start: bool) -> bool:
        """Whether a part of Trainer's loop has nothing to do: see `Binding`."""
        return self._run.over if part == "_run_epoch" else self._run.skip and at_start and part == "_evaluate"

    def metrics(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The scalars that belong to a training log; see `reporting.metrics`. Empty for any other log."""
        return {} if self.engine is None else reporting.metrics(self.engine, logs)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: what a resumed run needs, but for the tensors (see `checkpoint.py`)."""
        saved = None if self.engine is None else checkpoint.state(self.engine, self._run.args)
        return {"args": {"config": (self._run.config or self.config).state_dict()}, "attributes": {"checkpoint": saved}}

    def end(self) -> None:
        """End the current run's engine, if any; it stays readable."""
        self._run.end()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is a fresh callback with the same options: a run cannot be copied."""
        return {**self.__dict__, "engine": None, "checkpoint": None, "_run": reporting.Reports()}
