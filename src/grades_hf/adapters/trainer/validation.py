"""Scheduled evaluations: left out where nothing needs them, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...config import GradESConfig
from ...engine import GradES

logger = logging.getLogger(__name__)

# Packages whose callbacks show or record evaluations, and do nothing else with them.
_SHOW = ("transformers.integrations.", "transformers.utils.notebook", "trl.", "sentence_transformers.", "setfit.")


def refuse_skipping(
    config: GradESConfig, args: TrainingArguments, trainer: Trainer | None, scheduler: Any = None
) -> None:
    """Raise where the user wants no evaluations and has asked for something that needs them.

    Raises:
        ValueError: `skip_validation=True`, and something needs evaluations that are scheduled.
    """
    needs = _needs(args, trainer, scheduler) if _scheduled(args) else None
    if config.skip_validation is True and needs is not None:
        raise ValueError(
            f"{needs} needs evaluations during training, and skip_validation=True leaves them out. Leave "
            f"skip_validation out of GradES's options (or set skip_validation=False), or drop {needs.split('=')[0]}."
        )


def skips(config: GradESConfig, args: TrainingArguments, trainer: Trainer | None, scheduler: Any) -> bool:
    """Whether scheduled evaluations are left out of this run; one visible line says so.

    Raises:
        ValueError: see `refuse_skipping`.
    """
    refuse_skipping(config, args, trainer, scheduler)
    if config.skip_validation is False or not _scheduled(args):
        return False
    needs = _needs(args, trainer, scheduler)
    if args.process_index == 0:
        if needs is not None:
            loaded = ""
            if args.load_best_model_at_end:
                loaded = (
                    ". At the end Trainer loads the checkpoint with the best evaluation; if GradES ends the run, the "
                    "last checkpoint holds the weights that GradES returns"
                )
            logger.warning("GradES: scheduled evaluations are run as usual, since %s needs them%s.", needs, loaded)
        else:
            logger.warning(
                "GradES: scheduled evaluations (eval_strategy=%r) are left out, since %s. skip_validation=False runs "
                "them.",
                str(getattr(args.eval_strategy, "value", args.eval_strategy)),
                "looks at held-out rows decide" if config.tau is None else "GradES decides without them",
            )
    return needs is None


def leave_out(control: TrainerControl, args: TrainingArguments, state: TrainerState, at: IntervalStrategy) -> None:
    """Take back the evaluation that Trainer has scheduled for this moment; what a callback asks for stays.

    Args:
        control: Trainer's switches.
        args: The training arguments.
        state: Trainer's state.
        at: The moment: the end of a step, or of an epoch.
    """
    if args.eval_strategy != at:
        return
    last = state.global_step >= state.max_steps
    if at == IntervalStrategy.EPOCH or last or state.global_step % (state.eval_steps or 1) == 0:
        control.should_evaluate = False


def say_what_was_loaded(engine: GradES | None, args: TrainingArguments, state: TrainerState) -> None:
    """Where GradES has ended a run and Trainer has loaded the best checkpoint, say which weights the user has got."""
    best = state.best_model_checkpoint
    if engine is None or not engine.done or not args.load_best_model_at_end or best is None:
        return
    if state.is_world_process_zero and state.best_global_step is not None:
        which = "what GradES returned" if state.best_global_step == engine.t else "an earlier one"
        logger.warning(
            "GradES: load_best_model_at_end=True has loaded %s, %s: its %s of %.4g is the best of the run.",
            best,
            which,
            args.metric_for_best_model,
            state.best_metric,
        )


def _scheduled(args: TrainingArguments) -> bool:
    return args.eval_strategy != IntervalStrategy.NO or bool(args.eval_on_start)


def _needs(args: TrainingArguments, trainer: Trainer | None, scheduler: Any) -> str | None:
    """What of this run reads evaluations, in the user's words; None for nothing."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.save_strategy == SaveStrategy.BEST:
        return 'save_strategy="best"'
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    scheduler = getattr(trainer, "lr_scheduler", None) if scheduler is None else scheduler
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or kind in ("reduce_lr_on_plateau", "greedy"):
        return f"the learning-rate schedule {kind}"
    if getattr(trainer, "hp_search_backend", None) is not None:
        return "hyperparameter_search"
    for callback in () if trainer is None else trainer.callback_handler.callbacks:
        if _reads_evaluations(callback):
            return type(callback).__name__
    if args.metric_for_best_model is not None:  # Trainer keeps track of the best checkpoint then
        return f"metric_for_best_model={args.metric_for_best_model!r}"
    return None


def _reads_evaluations(callback: TrainerCallback) -> bool:
    """Whether a callback may do something with an evaluation, other than showing it."""
    kind = type(callback)
    shows = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
    if isinstance(callback, shows) or f"{kind.__module__}.".startswith(_SHOW):
        return False
    if kind.on_evaluate is not TrainerCallback.on_evaluate:
        return True
    own = kind.on_log  # evaluations are logs, too
    return own is not TrainerCallback.on_log and any(
        text.startswith("eval_") for text in _texts(getattr(own, "__code__", None))
    )


def _texts(code: CodeType | None) -> Iterator[str]:
    """The strings that a function is written with."""
    for constant in () if code is None else code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _texts(constant)
