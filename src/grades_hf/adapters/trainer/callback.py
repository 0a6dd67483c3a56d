"""GradESCallback: Trainer's events drive the engine. All decisions are the engine's; this file is only the adapter."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .config import GradESConfig
from .distributed import DEEPSPEED, FSDP1, from_folder, from_rank_0
from .engine import GradES
from .freezer import parameter_indices, unwrap_optimizer
from .history import FILE_NAME, History
from .structure import plain_path

logger = logging.getLogger(__name__)

# Under this key the tensors that the statistic compares with travel in the optimizer's part of a checkpoint.
PREVIOUS_KEY = "grades_previous"

# The callback that a user made for a model: `restore_callback_states_from_checkpoint` replaces it by a copy.
_made_by_user: WeakKeyDictionary[nn.Module, ref[GradESCallback]] = WeakKeyDictionary()


class GradESCallback(TrainerCallback, ExportableState):
    """GradES for `transformers.Trainer` and every trainer derived from it.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=dataset, callbacks=[GradESCallback()])
    trainer.train()
    ```

    Without a `tau` the run ends when its model overfits; `GradESCallback(tau=0.5)` is the paper's method.

    Args:
        config: The options, as a `GradESConfig` or a dict of its fields.
        **options: Single options by name; they override `config`.

    Attributes:
        engine: The `GradES` engine of the current or last `train()`; None before the first.

    The history goes to `<output_dir>/grades_history.json`. A resumed run goes on exactly: the frozen set and the
    counters are in the checkpoint's trainer_state.json, the tensors of the step before in its optimizer.pt.

    Raises:
        ValueError: an option that cannot be, or that does not go together with the training arguments; before
            training starts.
    """

    def __init__(self, config: GradESConfig | Mapping[str, Any] | None = None, **options: Any) -> None:
        if config is None:
            self.config = GradESConfig(**options)
        elif isinstance(config, GradESConfig):
            self.config = dataclasses.replace(config, **options)
        elif isinstance(config, Mapping):
            self.config = GradESConfig(**{**config, **options})
        else:
            raise ValueError(
                f"config={config!r} must be a GradESConfig or a dict of its fields; a threshold goes by name: "
                "GradESCallback(tau=0.5)."
            )
        self.engine: GradES | None = None
        self.checkpoint: dict[str, Any] | None = None  # set by Trainer when it restores callbacks from a checkpoint
        self._optimizer_hook: RemovableHandle | None = None
        self._over = False  # resumed from the end of a finished run
        self._skip_start_evaluation = False
        self._history_path: Path | None = None
        self._last_write = 0.0
        self._write_seconds = 0.0

    # --- Trainer's events, in the order in which they come --------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if model is not None:
            GradES.release(model)  # an interrupted run may have left it half frozen, and the optimizer comes next
            _made_by_user[model] = ref(self)
        self._refuse(args, state, kwargs.get("lr_scheduler"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        self._refuse(args, state, kwargs.get("lr_scheduler"))
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        path = Path(args.output_dir or ".") / FILE_NAME
        engine = GradES(model, self.config, total_steps=state.max_steps, optimizer=optimizer)
        try:
            _refuse_lost_adapters(args, engine)
            if state.global_step > 0:
                self._resume(engine, model, state, path)
        except ValueError:
            GradES.release(model)
            raise
        self.engine = engine
        original = _made_by_user.get(model)
        if self.checkpoint is not None and original is not None and (callback := original()) is not None:
            callback.engine = engine
        self.checkpoint = None
        if args.eval_on_start and self.config.skip_validation:
            args.eval_on_start = False
            self._skip_start_evaluation = True
        if self.config.skip_validation and (args.eval_strategy != IntervalStrategy.NO or self._skip_start_evaluation):
            logger.warning(
                "GradES: evaluations are scheduled (eval_strategy=%r) and will not be run, since GradES decides "
                "without them; pass skip_validation=False to run them.",
                str(getattr(args.eval_strategy, "value", args.eval_strategy)),
            )
        # Trainer fails when it saves after a resume from a checkpoint that did not know this callback.
        _stateful(state)[type(self).__name__] = self.state()
        torch_optimizer = unwrap_optimizer(optimizer)
        if torch_optimizer is not None:
            self._optimizer_hook = torch_optimizer.register_state_dict_post_hook(self._add_previous_tensors)
        self._history_path = path if state.is_world_process_zero else None
        if self._history_path is not None:
            engine.history.save(self._history_path)  # a directory that cannot be written is known before the first step

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._skip_start_evaluation:
            args.eval_on_start = True
            self._skip_start_evaluation = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None and not self._over:
            self.engine.reassert()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None and not self._over:
            self.engine.reassert()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is None:
            return
        if self._over:
            self.engine.scale.remove()  # a gradient scaler wants to see gradients once a step
            kwargs["model"].zero_grad(set_to_none=True)
        else:
            self.engine.step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        engine = self.engine
        if engine is None:
            return control
        if self._over:  # this step changed nothing and does not count
            state.global_step -= 1
            control.should_training_stop = True
            control.should_log = control.should_save = control.should_evaluate = False
            return control
        if engine.done:
            control.should_training_stop = True
            control.should_log = True
            if args.save_strategy == SaveStrategy.STEPS:
                control.should_save = True
            if args.eval_strategy == IntervalStrategy.STEPS and args.eval_delay <= state.global_step:
                control.should_evaluate = True
        if self.config.skip_validation:
            control.should_evaluate = False
        if control.should_save:
            self._write_history(always=True)
        self._show_progress(state)
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.config.skip_validation:
            control.should_evaluate = False
        if control.should_save:
            self._write_history(always=True)
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is None or not state.log_history:
            return
        if self._over and "train_loss" in logs:  # Trainer divides the loss of that one void step by no steps
            del logs["train_loss"], state.log_history[-1]["train_loss"]
        metrics = self.metrics(logs)
        logs.update(metrics)  # for the callbacks after this one: the progress bar prints them
        state.log_history[-1].update(metrics)
        if metrics and self.engine is not None and not self._over:
            self.engine.log(logs.get("loss"))
        self._write_history(always=control.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.engine is not None:
            self.engine.flush()
            if not self.engine.history.logs or self.engine.history.logs[-1]["step"] < self.engine.t:
                self.engine.log()
            self._write_history(always=True)
            logger.info("GradES: %s", self.engine.conclude())
        self._end()

    # --- what Trainer and GradESTrainer ask for --------------------------------------------------------------------

    def metrics(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The scalars that belong to a training log.

        `grades/frozen_fraction`, `grades/compute_saved` (the part of the FLOPs so far, where they are counted), and
        the quartiles of each group's statistic at the last check, over what was not frozen before it:
        `grades/attention/statistic_q25`, `_q50` and `_q75` (`grades/vision/attention/...` in a model with towers),
        left out where no value was measured. Empty for the logs of an evaluation and for the summary at the end.
        """
        if self.engine is None or any(key.startswith("eval_") for key in logs) or "train_runtime" in logs:
            return {}
        metrics = {"grades/frozen_fraction": self.engine.frozen_fraction}
        if self.engine.meter is not None and self.engine.meter.measured:
            metrics["grades/compute_saved"] = self.engine.savings().fraction
        latest, groups = self.engine.history.latest(), defaultdict[str, list[float]](list)
        for component in self.engine.components:
            if component.name in latest:
                label = f"{component.tower}/{component.group}" if component.tower else component.group
                groups[label].append(latest[component.name])
        for label, values in groups.items():
            cuts = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            metrics |= {f"grades/{label}/statistic_q{part}": cut for part, cut in zip((25, 50, 75), cuts, strict=True)}
        return metrics

    def report_through(self, trainer: Trainer) -> None:
        """Give the trackers of `trainer` (`report_to`) the options, under `grades`, and the scalars of every log.

        ```python
        trainer = Trainer(..., callbacks=[callback])
        callback.report_through(trainer)
        ```

        Without it they get neither, since Trainer runs them before the callbacks of its user. Call it once, before
        `trainer.train()`. `GradESTrainer` does so by itself.

        Raises:
            ValueError: the callback is not one of `trainer`'s.
        """
        handler = trainer.callback_handler
        if self not in handler.callbacks:
            raise ValueError("report_through(trainer): pass the callback to the trainer first, callbacks=[callback].")
        begin, log = handler.on_train_begin, handler.on_log

        def on_train_begin(args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
            at_work = next((c for c in handler.callbacks if isinstance(c, GradESCallback)), self)
            to_dict, ours = args.to_dict, {"grades": at_work.config.resolved(rest[0].max_steps).to_dict()}
            # Every tracker's integration asks for the options of a run in this way, when it begins.
            args.__dict__["to_dict"] = lambda: {**to_dict(), **ours}
            try:
                return begin(args, *rest, **kwargs)
            finally:
                args.__dict__.pop("to_dict", None)

        def on_log(
            args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
        ) -> Any:
            logs.update(self.metrics(logs))
            return log(args, state, control, logs, **kwargs)

        handler.__dict__.update(on_train_begin=on_train_begin, on_log=on_log)

    def state(self) -> dict[str, Any]:
        """For trainer_state.json: what a resumed run needs, but for the tensors (see `_add_previous_tensors`)."""
        checkpoint = None if self.engine is None else self.engine.state_dict(tensors=False)
        return {"args": {"config": self.config.state_dict()}, "attributes": {"checkpoint": checkpoint}}

    # --- parts -----------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """End the current run's engine, if any; it stays readable."""
        if self.engine is not None:
            self.engine.close()
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        self._over = False

    def _refuse(self, args: TrainingArguments, state: TrainerState, lr_scheduler: Any) -> None:
        """Raise for what cannot work, before training."""
        own = _stateful(state).get(type(self).__name__)
        if isinstance(own, list):
            raise ValueError(f"the trainer has {len(own)} {type(self).__name__}s; pass one.")
        if args.n_gpu > 1:
            raise ValueError(
                f"GradES cannot work under DataParallel (n_gpu={args.n_gpu}): its replicas do not see what is frozen. "
                "Start with `torchrun` or `accelerate launch`, or show one device (CUDA_VISIBLE_DEVICES=0)."
            )
        under_deepspeed = AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED
        if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None or under_deepspeed:
            raise ValueError(DEEPSPEED)
        if (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 1:
            raise ValueError(FSDP1)
        optim = str(getattr(args.optim, "value", args.optim))
        if optim.endswith("_layerwise") or optim in ("lomo", "adalomo"):
            raise ValueError(
                f"GradES cannot work with optim={optim!r}: it updates each weight during the backward pass, before its "
                f"gradient can be looked at. Use {optim.removesuffix('_layerwise') if '_' in optim else 'adafactor'}."
            )
        if args.torch_compile and args.world_size > 1:
            raise ValueError(
                "GradES does not support torch_compile=True in several processes yet; drop torch_compile, or train in "
                "one process."
            )
        if args.label_smoothing_factor and self.config.needs_loss:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor}: Trainer then computes the loss outside of the "
                "model, and without a tau GradES looks at the gradient by the loss that the model returns. Pass "
                "monitor='gradient_norm' and rise=0.25 to GradES, or a tau."
            )
        if not self.config.skip_validation:
            return
        needs = None
        if args.load_best_model_at_end:
            needs = "load_best_model_at_end=True"
        elif args.save_strategy == SaveStrategy.BEST:
            needs = 'save_strategy="best"'
        elif isinstance(lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or str(
            getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        ) in ("reduce_lr_on_plateau", "greedy"):
            needs = f"the learning-rate schedule {args.lr_scheduler_type!s}"
        elif state.global_step == 0 and any("EarlyStopping" in name for name in _stateful(state)):
            needs = "EarlyStoppingCallback"
        if needs is not None:
            raise ValueError(
                f"{needs} needs evaluations during training, and skip_validation=True leaves them out. Pass "
                f"skip_validation=False to GradES, or drop {needs.split('=')[0]}."
            )

    def _resume(self, engine: GradES, model: nn.Module, state: TrainerState, path: Path) -> None:
        saved = _stateful(state).get(type(self).__name__)
        try:
            checkpoint = None if saved is None else dict(saved["attributes"]["checkpoint"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "trainer_state.json of the checkpoint holds no usable state of GradES, so it is not known what was "
                f"frozen ({error!r}). Resume from another checkpoint."
            ) from error
        if checkpoint is None:
            logger.warning(
                "GradES: the checkpoint of step %d was made without GradES; nothing is frozen so far.",
                state.global_step,
            )
            checkpoint = {"step": state.global_step, "events": [], "criterion": {}}
        elif checkpoint.get("step") != state.global_step:
            raise ValueError(
                f"the checkpoint contradicts itself: GradES saved its state at step {checkpoint.get('step')!r}, "
                f"trainer_state.json says step {state.global_step}. Resume from another checkpoint."
            )
        engine.load_state_dict(checkpoint)
        self._take_previous_tensors(engine)
        if engine.ranks.sharded and engine.remembers:
            self._take_previous_shards(engine, model, state, path.parent)
        try:
            engine.adopt_history(History.load(path), checkpoint.get("checksum"))
        except (FileNotFoundError, ValueError) as error:
            if saved is not None and state.is_world_process_zero:
                logger.warning("GradES: earlier values are lost from the history, training is not affected: %s", error)
        self._over = engine.done
        if self._over:
            # Trainer takes one more step before it looks whether it should stop; nothing may change in it, but
            # backward needs something that requires a gradient.
            engine.freezer.release()
            if engine.merger is not None:
                engine.merger.close()
            logger.info("GradES: the checkpoint of step %d is the end of its run; nothing is left to train.", engine.t)

    def _add_previous_tensors(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Post-hook of the optimizer's `state_dict`: what the statistic compares with is saved beside the moments."""
        if self.engine is None:
            return
        previous = self.engine.previous_tensors()
        alone: dict[int, torch.Tensor] = {}  # Adam fails when it loads a state without its own entries
        for parameter, index in parameter_indices(optimizer).items():
            if parameter in previous:
                own = state_dict["state"].get(index, {})
                if own or self.engine.ranks.sharded:
                    state_dict["state"][index] = {**own, PREVIOUS_KEY: previous[parameter]}
                else:
                    alone[index] = previous[parameter]
        if alone:
            state_dict["state"][PREVIOUS_KEY] = alone

    @staticmethod
    def _take_previous_tensors(engine: GradES) -> None:
        """Take back what `_add_previous_tensors` saved and Trainer has loaded into the optimizer's state."""
        if not engine.freezer.optimizers:
            return
        (optimizer,) = engine.freezer.optimizers
        monitor_of = {p: engine.monitors[c.monitor] for c in engine.components for p in c.measured}
        parameters = {index: parameter for parameter, index in parameter_indices(optimizer).items()}
        for index, tensor in cast("dict[Any, Any]", optimizer.state).pop(PREVIOUS_KEY, {}).items():
            parameter = parameters[index]
            optimizer.state[parameter] = {PREVIOUS_KEY: tensor.to(parameter.device)}
        for parameter in list(optimizer.state):
            kept = optimizer.state[parameter].pop(PREVIOUS_KEY, None)
            monitor = monitor_of.get(parameter) if engine.remembers else None
            if kept is not None and monitor is not None and monitor.compares_steps:
                monitor.previous[parameter] = kept
            if not optimizer.state[parameter]:
                del optimizer.state[parameter]

    @staticmethod
    def _take_previous_shards(engine: GradES, model: nn.Module, state: TrainerState, output_dir: Path) -> None:
        """The same under FSDP2, where Trainer loads no more of a checkpoint than the optimizer has already.

        With full state dicts rank 0 has got whole tensors all the same. Sharded ones are read from the checkpoint's
        folder, which Trainer does not tell: it is the usual one, and holds this state.
        """
        monitor_of = {
            p: engine.monitors[c.monitor]
            for c in engine.components
            if c.frozen_at is None and engine.monitors[c.monitor].compares_steps
            for p in c.measured
        }
        whole = {p: m.previous.pop(p) for p, m in monitor_of.items() if p in m.previous}
        tensors = from_rank_0(whole, list(monitor_of))
        checkpoint = output_dir / f"checkpoint-{state.global_step}"
        folder = checkpoint / "optimizer_0"
        if not tensors and folder.is_dir():
            held = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if (held.log_history, held.stateful_callbacks) == (state.log_history, state.stateful_callbacks):
                names: dict[torch.Tensor, str] = {p: plain_path(name) for name, p in model.named_parameters()}
                keys = {p: f"optimizer.state.{names[p]}.{PREVIOUS_KEY}" for p in monitor_of}
                tensors = from_folder(folder, keys)
        for parameter, tensor in tensors.items():
            monitor_of[parameter].previous[parameter] = tensor

    def _write_history(self, *, always: bool) -> None:
        """Write grades_history.json; unless `always`, so seldom that it takes at most 1 % of the time.

        A disk that is full by then costs the record, not the run: nothing that a resume needs is in that file.
        """
        if self._history_path is None or self.engine is None:
            return
        now = time.monotonic()
        if not always and now - self._last_write < 100 * self._write_seconds:
            return
        try:
            self.engine.history.save(self._history_path)
        except OSError as error:
            logger.warning("GradES: %s could not be written, training goes on: %s", self._history_path, error)
        self._last_write = time.monotonic()
        self._write_seconds = self._last_write - now

    def _show_progress(self, state: TrainerState) -> None:
        """Write "frozen k/n" behind Trainer's progress bar, which a callback can only find among all open bars."""
        if self.engine is None or not state.is_world_process_zero:
            return
        for bar in list(getattr(tqdm, "_instances", ())):
            if bar.total == state.max_steps and not bar.disable and bar.desc == "":
                text = f"frozen {len(self.engine.history.events)}/{len(self.engine.components)}"
                bar.set_postfix_str(text, refresh=False)


def _refuse_lost_adapters(args: TrainingArguments, engine: GradES) -> None:
    """FSDP2's full checkpoints of adapters hold what requires a gradient: frozen ones would be missing."""
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    kind = str(getattr(plugin, "state_dict_type", ""))
    adapters = engine.ranks.sharded and any(component.adapter for component in engine.components)
    if adapters and "FULL" in kind and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"state_dict_type={kind} leaves frozen adapters out of checkpoints under FSDP2. Use "
            'fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}, or save_strategy="no".'
        )


def _stateful(state: TrainerState) -> dict[str, Any]:
    """The saved states of all callbacks by class name: a dict in truth, whatever the annotation says."""
    return cast("dict[str, Any]", state.stateful_callbacks)
