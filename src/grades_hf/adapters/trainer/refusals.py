"""What of Trainer, its arguments and its loop GradES cannot work with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ...config import GradESConfig
from ...engine import GradES
from ...parallel.refusals import DATA_PARALLEL, DEEPSPEED, FSDP1, under_deepspeed
from .checkpoint import stateful


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


def module(model: Any, trainer: Trainer | None) -> nn.Module:
    """What is trained: the model that the callback is told of, or the trainer's, if that is none (SetFit).

    Raises:
        ValueError: there is no `nn.Module`.
    """
    if not isinstance(model, nn.Module) and trainer is not None:
        model = trainer.model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"GradESCallback was called with a {type(model).__name__} as the model, which is no torch.nn.Module, so it "
            "cannot know what is trained. Use GradES in a loop of your own."
        )
    return model


def refuse_more_steps(over: bool, state: TrainerState) -> None:
    """Raise where a trainer with a loop of its own trains on after the end of a run."""
    if over:
        raise RuntimeError(
            f"GradES had ended the run at step {state.global_step}, at which the checkpoint was saved, and this "
            "trainer has a loop of its own that trains on. Do not resume it, or resume without GradESCallback."
        )


def refuse_unmatched_steps(engine: GradES, state: TrainerState, find: Callable[[], Any]) -> None:
    """Raise where the engine has not been called once for each optimizer step.

    Args:
        engine: The engine.
        state: Trainer's state after a step.
        find: Gives the trainer.
    """
    if engine.t == state.global_step:
        return
    name = type(find()).__name__
    if engine.t < state.global_step:
        raise RuntimeError(
            f"GradES has seen {engine.t} optimizer steps and {name} has made {state.global_step}: its loop does not "
            "call its callbacks' on_pre_optimizer_step, where the gradients are looked at. Call it after backward and "
            "clipping and before optimizer.step(), or train without GradESCallback."
        )
    raise RuntimeError(
        f"GradES has been called for {engine.t} optimizer steps and {name} has made {state.global_step}: its loop "
        "calls its callbacks' on_pre_optimizer_step more than once a step (at each micro-batch?). Call it once, before "
        "optimizer.step(), or train without GradESCallback."
    )
