"""GradES in Trainer's checkpoints: JSON in trainer_state.json, tensors beside the optimizer's state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerState

from ...engine import GradES
from ...find.structure import plain_path
from ...parallel.sharded import from_folder, from_rank_0
from ...record.history import History
from ...state import adopt_history

logger = logging.getLogger(__name__)

PREFIX = "grades_"  # of the keys under which our tensors travel in the optimizer's state


def stateful(state: TrainerState) -> dict[str, Any]:
    """The saved states of all callbacks by class name: a dict in truth, whatever the annotation says."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def resume(engine: GradES, name: str, state: TrainerState, path: Path) -> None:
    """Go on from the checkpoint that Trainer has loaded.

    Args:
        engine: The engine of the resumed run.
        name: The class name of the callback.
        state: Trainer's state.
        path: The history's file.

    Raises:
        ValueError: the checkpoint holds no usable state of GradES, or contradicts itself.
    """
    saved = stateful(state).get(name)
    try:
        found = None if saved is None else dict(saved["attributes"]["checkpoint"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "trainer_state.json of the checkpoint holds no usable state of GradES, so it is not known what was frozen "
            f"({error!r}). Resume from another checkpoint."
        ) from error
    if found is None:
        logger.warning(
            "GradES: the checkpoint of step %d was made without GradES; nothing is frozen so far.", state.global_step
        )
        found = {"step": state.global_step, "events": [], "criterion": {}}
    elif found.get("step") != state.global_step:
        raise ValueError(
            f"the checkpoint contradicts itself: GradES saved its state at step {found.get('step')!r}, "
            f"trainer_state.json says step {state.global_step}. Resume from another checkpoint."
        )
    engine.load_state_dict(found)
    tensors = _take_tensors(engine)
    if engine.ranks.sharded:
        tensors = _shards(engine, tensors, state, path.parent)
    engine.load_tensors(tensors)
    try:
        adopt_history(engine, History.load(path), found.get("checksum"))
    except (FileNotFoundError, ValueError) as error:
        if saved is not None and state.is_world_process_zero:
            logger.warning("GradES: earlier values are lost from the history, training is not affected: %s", error)
    if engine.done:
        # Trainer takes one more step before it looks whether it should stop; nothing may change in it, but backward
        # needs something that requires a gradient.
        engine.freezer.release()
        if (merging := engine.extension("merging")) is not None:
            merging.release()
        logger.info("GradES: the checkpoint of step %d is the end of its run; nothing is left to train.", engine.t)


def void_step(engine: GradES, model: nn.Module) -> None:
    """The one step that Trainer takes after a run that is over: the update finds no gradient."""
    if (scaler := engine.extension("scaler")) is not None:
        scaler.unscale()  # a gradient scaler wants to see gradients once a step
    model.zero_grad(set_to_none=True)


def save_tensors_with(optimizer: torch.optim.Optimizer | None, engine: GradES) -> Callable[[], None]:
    """Let the `state_dict` of `optimizer` hold the engine's tensors; what is returned ends that."""
    if optimizer is None:
        return lambda: None

    def add(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        indices = _indices(optimizer)
        for kind, tensors in engine.tensors().items():
            alone: dict[int, Tensor] = {}
            for parameter, tensor in tensors.items():
                if (index := indices.get(parameter)) is None:
                    continue
                own = state_dict["state"].get(index, {})
                # Adam fails when it loads a state without its own entries, and torch casts what is saved beside a
                # parameter to its type.
                if engine.ranks.sharded or (own and tensor.dtype == parameter.dtype):
                    state_dict["state"][index] = {**own, PREFIX + kind: tensor}
                else:
                    alone[index] = tensor
            if alone:
                state_dict["state"][PREFIX + kind] = alone

    return optimizer.register_state_dict_post_hook(add).remove


def _take_tensors(engine: GradES) -> dict[str, dict[Tensor, Tensor]]:
    """Take our tensors out of the optimizer's state, into which Trainer has loaded them: kind -> parameter -> tensor."""
    found: dict[str, dict[Tensor, Tensor]] = {}
    for optimizer in engine.optimizers:
        parameters = {index: parameter for parameter, index in _indices(optimizer).items()}
        state = cast("dict[Any, Any]", optimizer.state)
        for key in [key for key in state if isinstance(key, str) and key.startswith(PREFIX)]:
            for index, tensor in state.pop(key).items():
                if index in parameters:
                    found.setdefault(key.removeprefix(PREFIX), {})[parameters[index]] = tensor
        for parameter in list(state):
            for key in [key for key in state[parameter] if str(key).startswith(PREFIX)]:
                found.setdefault(key.removeprefix(PREFIX), {})[parameter] = state[parameter].pop(key)
            if not state[parameter]:
                del state[parameter]
    return found


def _shards(
    engine: GradES, found: Mapping[str, Mapping[Tensor, Tensor]], state: TrainerState, output_dir: Path
) -> dict[str, dict[Tensor, Tensor]]:
    """The same under FSDP2, where Trainer loads no more of a checkpoint than the optimizer has already.

    With full state dicts rank 0 has got whole tensors all the same. Sharded ones are read from the checkpoint's folder,
    which Trainer does not tell: it is the usual one, and holds this state.
    """
    checkpoint = output_dir / f"checkpoint-{state.global_step}"
    folder = checkpoint / "optimizer_0"
    shards: dict[str, dict[Tensor, Tensor]] = {}
    for kind, parameters in engine.kept().items():
        shards[kind] = from_rank_0(found.get(kind, {}), parameters)
        if not shards[kind] and folder.is_dir():
            held = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if (held.log_history, held.stateful_callbacks) == (state.log_history, state.stateful_callbacks):
                names = {p: plain_path(name) for name, p in engine.model.named_parameters()}
                keys = {p: f"optimizer.state.{names[p]}.{PREFIX}{kind}" for p in parameters}
                shards[kind] = from_folder(folder, keys)
    return shards


def _indices(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The number under which `optimizer.state_dict()["state"]` holds each parameter."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: index for index, parameter in enumerate(parameters)}
