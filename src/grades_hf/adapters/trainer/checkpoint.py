"""GradES in Trainer's checkpoints: JSON in trainer_state.json, tensors beside the optimizer's state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from ...engine import GradES
from ...find.blocks import plain_path
from ...parallel.sharded import from_folder, from_rank_0
from ...record.history import History
from ...state import adopt_history

logger = logging.getLogger(__name__)

PREFIX = "grades_"  # of the keys under which our tensors travel in the optimizer's state


def stateful(state: TrainerState) -> dict[str, Any]:
    """The saved states of all callbacks by class name: a dict in truth, whatever the annotation says."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def state(engine: GradES, args: TrainingArguments | None) -> dict[str, Any]:
    """What trainer_state.json holds of a run."""
    return {**engine.state_dict(tensors=False), "training": {} if args is None else _training(args)}


def _training(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that the scale of a gradient depends on."""
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "world_size": args.world_size,
        "max_grad_norm": args.max_grad_norm,
    }


def resume(engine: GradES, name: str, state: TrainerState, path: Path, args: TrainingArguments) -> None:
    """Go on from the checkpoint that Trainer has loaded.

    Args:
        engine: The engine of the resumed run.
        name: The class name of the callback.
        state: Trainer's state.
        path: The directory of the history.
        args: The training arguments.

    Raises:
        ValueError: the checkpoint holds no usable state of GradES, or contradicts itself.
    """
    saved = _saved(state, name)
    if saved is None:
        begins = (
            "nothing is frozen so far" if engine.ending is None else "looks and the average of the weights begin here"
        )
        _say(state, "GradES: the checkpoint of step %d was made without GradES; %s.", state.global_step, begins)
        found: dict[str, Any] = {"step": state.global_step, "events": [], "criterion": {}}
    else:
        found = saved
    earlier = _step_of(found, state)
    engine.load_state_dict({**found, "step": state.global_step})
    tensors = _take_tensors(engine)
    if engine.ranks.sharded:
        tensors = _shards(engine, tensors, state, path)
    if earlier < state.global_step:
        _say(
            state,
            "GradES: steps %d to %d were trained without GradES. %s begins anew.",
            earlier + 1,
            state.global_step,
            "What had frozen before is frozen again, and what is compared over steps"
            if engine.ending is None
            else "The average of the weights",
        )
        tensors = {}
    engine.load_tensors(tensors)
    try:
        history = History.load(path)
        if earlier < state.global_step:
            history.truncate(earlier)
        adopt_history(engine, history, found.get("checksum"))
    except (FileNotFoundError, ValueError) as error:
        if saved is not None:
            _say(state, "GradES: earlier values are lost from the history, training is not affected: %s", error)
    if saved is not None and not engine.done:
        _compare(found.get("training"), _training(args), engine, state)
    if engine.done:
        logger.info("GradES: the checkpoint of step %d is the end of its run; nothing is left to train.", engine.t)


def _saved(state: TrainerState, name: str) -> dict[str, Any] | None:
    """The state of the callback of this class name, or of another GradESCallback (a subclass); None without any."""
    every = stateful(state)
    others = [key for key, value in every.items() if key != name and _is_ours(value)]
    for key in [name, *others]:
        if key in every:
            try:
                return dict(every[key]["attributes"]["checkpoint"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    "trainer_state.json of the checkpoint holds no usable state of GradES, so it is not known what was "
                    f"frozen ({error!r}). Resume from another checkpoint."
                ) from error
    return None


def _is_ours(saved: Any) -> bool:
    attributes = saved.get("attributes") if isinstance(saved, Mapping) else None
    found = attributes.get("checkpoint") if isinstance(attributes, Mapping) else None
    return isinstance(found, Mapping) and {"format", "frozen", "criterion"} <= found.keys()


def _step_of(found: Mapping[str, Any], state: TrainerState) -> int:
    """The step at which GradES saved its state.

    Raises:
        ValueError: it is none, or later than the checkpoint.
    """
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= state.global_step:
        raise ValueError(
            f"the checkpoint contradicts itself: GradES saved its state at step {str(step)[:50]!r}, "
            f"trainer_state.json says step {state.global_step}. Resume from another checkpoint."
        )
    return step


def _compare(before: Any, now: Mapping[str, Any], engine: GradES, state: TrainerState) -> None:
    """Say once where the gradients of the checkpoint's run had another scale than those of this one."""
    if not isinstance(before, Mapping) or before.keys() != now.keys():
        return
    rows, clipped = [], []
    for training in (before, now):
        numbers = [training[name] for name in now]  # a file has sorted keys
        if not all(isinstance(number, (int, float)) and 0 <= number < 1e9 for number in numbers):
            return
        rows.append(numbers[0] * numbers[1] * numbers[2])
        clipped.append(numbers[3])
    if rows[0] == rows[1] and (clipped[0] == clipped[1] or engine.ending is not None):
        return
    changed = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in now if before[name] != now[name])
    means = (
        "what falls below tau may do so for that reason"
        if engine.ending is None
        else "a rise over the minimum of before may be due to that, and looks come at other steps"
    )
    _say(
        state,
        "GradES: the checkpoint was trained with other arguments (%s), so gradients, and with them the statistic, have "
        "another scale from step %d on: %s.",
        changed,
        state.global_step + 1,
        means,
    )


def _say(state: TrainerState, line: str, *values: Any) -> None:
    if state.is_world_process_zero:
        logger.warning(line, *values)


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
    """Take our tensors out of the optimizer's state, into which Trainer has loaded them: kind -> parameter -> tensor.

    What does not fit its parameter (a damaged file) is left out.
    """
    found: dict[str, dict[Tensor, Tensor]] = {}
    for optimizer in engine.optimizers:
        parameters = {index: parameter for parameter, index in _indices(optimizer).items()}
        state = cast("dict[Any, Any]", optimizer.state)
        for key in [key for key in state if isinstance(key, str) and key.startswith(PREFIX)]:
            entries = state.pop(key)
            for index, tensor in entries.items() if isinstance(entries, Mapping) else ():
                if index in parameters:
                    found.setdefault(key.removeprefix(PREFIX), {})[parameters[index]] = tensor
        for parameter in list(state):
            own = state[parameter]
            for key in [key for key in own if str(key).startswith(PREFIX)] if isinstance(own, dict) else ():
                found.setdefault(key.removeprefix(PREFIX), {})[parameter] = own.pop(key)
            if not own:
                del state[parameter]
    sample = engine.config.sample_size
    return {
        kind: {p: t for p, t in tensors.items() if _fits(t, p, sample if kind == "previous" else None)}
        for kind, tensors in found.items()
    }


def _fits(tensor: Any, parameter: Tensor, sample: int | None) -> bool:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    return tensor.shape == parameter.shape or (sample is not None and tensor.shape == (min(sample, parameter.numel()),))


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
                names: dict[Tensor, str] = {p: plain_path(name) for name, p in engine.model.named_parameters()}
                keys = {p: f"optimizer.state.{names[p]}.{PREFIX}{kind}" for p in parameters}
                shards[kind] = from_folder(folder, keys)
    return shards


def _indices(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The number under which `optimizer.state_dict()["state"]` holds each parameter."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: index for index, parameter in enumerate(parameters)}
