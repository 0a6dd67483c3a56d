"""What of Trainer's arguments GradES cannot work with, and whether scheduled evaluations are left out."""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import (
    DefaultFlowCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ...config import GradESConfig
from ...engine import GradES
from ...parallel.refusals import DATA_PARALLEL, DEEPSPEED, FSDP1, under_deepspeed
from .checkpoint import stateful

logger = logging.getLogger(__name__)


def refuse(config: GradESConfig, args: TrainingArguments, state: TrainerState) -> None:
    """Raise for what cannot work, before training.

    Raises:
        ValueError: the message names the argument, its value and the remedy.
    """
    own = stateful(state).get("GradESCallback")
    if isinstance(own, list):
        raise ValueError(f"the trainer has {len(own)} GradESCallbacks; pass one.")
    if args.n_gpu > 1:
        raise ValueError(f"{DATA_PARALLEL} (n_gpu={args.n_gpu}; CUDA_VISIBLE_DEVICES=0 shows one device.)")
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None or under_deepspeed():
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
            "GradES does not support torch_compile=True in several processes yet. Drop torch_compile, or train in one "
            "process."
        )


def refuse_lost_adapters(args: TrainingArguments, engine: GradES) -> None:
    """Raise where FSDP2's full checkpoints of adapters, which hold what requires a gradient, would lose frozen ones."""
    plugin = AcceleratorState._shared_state.get("fsdp_plugin")
    kind = str(getattr(plugin, "state_dict_type", ""))
    adapters = engine.ranks.sharded and any(component.adapter for component in engine.components)
    if adapters and "FULL" in kind and args.save_strategy != SaveStrategy.NO:
        raise ValueError(
            f"state_dict_type={kind} leaves frozen adapters out of checkpoints under FSDP2. Use "
            'fsdp_config={"state_dict_type": "SHARDED_STATE_DICT"}, or save_strategy="no".'
        )


def skips_validation(config: GradESConfig, args: TrainingArguments, trainer: Trainer | None, scheduler: Any) -> bool:
    """Whether scheduled evaluations are left out of this run; one visible line says so.

    Raises:
        ValueError: `skip_validation=True`, and something needs them.
    """
    scheduled = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
    if config.skip_validation is False or not scheduled:
        return False
    needs = _needs_evaluations(args, trainer, scheduler)
    if needs is not None and config.skip_validation is True:
        raise ValueError(
            f"{needs} needs evaluations during training, and skip_validation=True leaves them out. Leave "
            f"skip_validation out of GradES's options, or drop {needs.split('=')[0]}."
        )
    instead = "looks at held-out rows decide" if config.tau is None else "GradES decides without them"
    if needs is not None:
        logger.warning("GradES: scheduled evaluations are run as usual, since %s needs them.", needs)
    else:
        logger.warning(
            "GradES: scheduled evaluations (eval_strategy=%r) are left out, since %s. skip_validation=False runs them.",
            str(getattr(args.eval_strategy, "value", args.eval_strategy)),
            instead,
        )
    return needs is None


def _needs_evaluations(args: TrainingArguments, trainer: Trainer | None, scheduler: Any) -> str | None:
    """What of this run reads evaluations, in the user's words; None for nothing."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.save_strategy == SaveStrategy.BEST:
        return 'save_strategy="best"'
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    if isinstance(scheduler, plateau) or kind in ("reduce_lr_on_plateau", "greedy"):
        return f"the learning-rate schedule {kind}"
    for callback in () if trainer is None else trainer.callback_handler.callbacks:
        if _reads_evaluations(callback):
            return type(callback).__name__
    return None


def _reads_evaluations(callback: TrainerCallback) -> bool:
    """Whether a callback does something with an evaluation, other than showing it."""
    shows = (DefaultFlowCallback, PrinterCallback, ProgressCallback)
    if isinstance(callback, shows) or type(callback).__module__.startswith(("transformers.integrations", "trl.")):
        return False
    return type(callback).on_evaluate is not TrainerCallback.on_evaluate and (
        type(callback).__module__ != "transformers.utils.notebook"
    )
