"""What a checkpoint holds of an engine, and how a resumed run goes on from it.

Loading has two phases: everything is checked first, which may refuse, and then everything is taken over, which cannot.
So a refused checkpoint changes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .contracts import Check
from .joining import set_aside
from .record.history import History
from .statistics import Statistic

if TYPE_CHECKING:
    from .engine import GradES

logger = logging.getLogger(__name__)

FORMAT = 2

# The options that decide what is measured, and those that decide what freezes or ends the run, and when.
SCALE = ("monitor", "reduction", "sample_size")
RULE = (
    "tau", "alpha", "patience", "rise", "look_rows", "return_weights", "check_every", "target_modules",
    "exclude_modules", "max_frozen_fraction", "freeze_prefix", "delay_transfer",
)  # fmt: skip
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


def save(engine: GradES, *, tensors: bool) -> dict[str, Any]:
    """The state of `engine`.

    Returns:
        JSON types: `format`, `step`, `frozen` (what froze when, at which value), `joined` (names of the components that
        became trainable in the course of the run), `learned` and `took_part` (names of
        the components that ever had a value other than 0, or a gradient), `criterion` (name -> the numbers that it
        keeps), `open` (a check that is not decided upon yet), `ended`, `config` and `total_steps` (what they were made
        with), `checksum` (of the history), `extensions` (name -> its state). With `tensors` also `history`, `previous`
        (component -> a tensor or None for each measured tensor) and `tensors` (extension -> parameter name -> tensor).
    """
    names = [component.name for component in engine.components]
    values = {event["name"]: event["value"] for event in engine.history.events}
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": engine.t,
        "frozen": [{"name": n, "step": step, "value": values.get(n)} for n, step in engine.frozen.items()],
        "joined": list(engine.joined),
        "learned": [names[place] for place in engine.learned.nonzero().flatten().tolist()],
        "took_part": [names[place] for place in engine.took_part.nonzero().flatten().tolist()],
        "criterion": {names[place]: row for place, row in enumerate(engine.criterion.memory.tolist()) if any(row)},
        "open": None if engine._open is None else engine._open.state_dict(),
        "ended": engine.ended,
        "config": engine.config.state_dict(),
        "total_steps": engine.total_steps,
        "checksum": engine.history.checksum(),
        "extensions": {x.name: found for x in engine.extensions if (found := x.state_dict())},
    }
    if tensors:
        parameters: dict[Tensor, str] = {parameter: name for name, parameter in engine.model.named_parameters()}
        state["history"] = engine.history.state_dict()
        state["previous"] = {
            component.name: [engine.statistics[component.monitor].previous.get(p) for p in component.measured]
            for component in engine.live
        }
        state["tensors"] = {
            x.name: {parameters[p]: tensor for p, tensor in kept.items()}
            for x in engine.extensions
            if (kept := x.tensors())
        }
    return state


@dataclasses.dataclass
class _Checked:
    """A state that fits the engine."""

    step: int
    frozen: list[dict[str, Any]]
    learned: list[str]
    took_part: list[str]
    criterion: dict[str, list[float]]
    open: Check | None
    ended: str | None
    extensions: list[tuple[Any, Any]]
    history: History | None
    previous: list[tuple[Statistic, Tensor, Tensor]]
    tensors: dict[str, dict[str, Tensor]] | None


def load(engine: GradES, saved: Mapping[str, Any]) -> None:
    """Take over `saved`; see `GradES.load_state_dict`."""
    state = _modern(saved)
    try:
        changed = _changed_options(engine, state)
        state, absent = _without_absent(engine, state)
        checked = _check(engine, state, changed)
    except _MALFORMED as error:
        if type(error) is ValueError:
            raise
        raise ValueError(f"this is no state of GradES: {str(error)[:200]!r} is missing or malformed.") from error
    engine._absent = absent
    if changed:
        logger.warning(
            "GradES: the checkpoint was made with other options (%s). The new ones hold from here on: what is frozen "
            "stays frozen, other components may freeze from step %d on, and patience starts to count anew.",
            "; ".join(f"{name}: {before!r} -> {now!r}" for name, (before, now) in changed.items()),
            max(engine.t_grace, checked.step) + 1,
        )
    _take_over(engine, checked, changed)


def _without_absent(engine: GradES, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """A state without the components that have not joined this session yet, and what it says of those."""
    try:
        absent = {str(name) for name in state.get("joined", ())} - {c.name for c in engine.components}
        return set_aside(state, absent) if absent else (state, {})
    except _MALFORMED as error:
        raise ValueError(f"this is no state of GradES: {error!r} is missing or malformed.") from error


def _check(engine: GradES, state: Mapping[str, Any], changed: Mapping[str, Any]) -> _Checked:
    try:
        step = int(state["step"])
        frozen: list[dict[str, Any]] = [
            {"name": str(item["name"]), "step": int(item["step"]), "value": _number(item["value"])}
            for item in state["frozen"]
        ]
        learned, took_part = [str(n) for n in state["learned"]], [str(n) for n in state["took_part"]]
        criterion = {str(name): [float(number) for number in row] for name, row in state["criterion"].items()}
        opened = None if state.get("open") is None else Check.from_state(state["open"])
        ended = None if state.get("ended") is None else str(state["ended"])
        previous = {str(name): list(tensors) for name, tensors in state.get("previous", {}).items()}
        tensors = None
        if "tensors" in state:
            tensors = {str(name): dict(found) for name, found in state["tensors"].items()}
        extensions = dict(state.get("extensions", {}))
    except _MALFORMED as error:
        raise ValueError(f"this is no state of GradES: {error!r} is missing or malformed.") from error
    by_name = {component.name: component for component in engine.components}
    open_names = () if opened is None else opened.names
    mentioned = {*(item["name"] for item in frozen), *learned, *took_part, *criterion, *previous, *open_names}
    if unknown := sorted(mentioned - by_name.keys()):
        raise ValueError(
            f"the checkpoint knows components that the model does not have ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}): resume with the same model, adapter and target_modules that the "
            "checkpoint was made with."
        )
    if step < 0 or any(not 1 <= item["step"] <= step for item in frozen):
        raise ValueError(f"the state of GradES contradicts itself: of step {step}, it has freezings of later ones.")
    if len({item["name"] for item in frozen}) != len(frozen):
        raise ValueError("the state of GradES contradicts itself: a component is frozen twice.")
    if changed:
        criterion = {}
    if not all(len(row) == engine.criterion.width and all(map(math.isfinite, row)) for row in criterion.values()):
        raise ValueError(f"the state of GradES holds numbers that are none of criterion {engine.criterion.name!r}.")
    for name, found in previous.items():
        if len(found) != len(by_name[name].measured):
            raise ValueError(
                f"the checkpoint measured {len(found)} tensors of {name}, the model has "
                f"{len(by_name[name].measured)}: resume with the same adapter that it was made with."
            )
    known = dict(engine.model.named_parameters())
    kept: list[tuple[Statistic, Tensor, Tensor]] = []
    try:
        for name, found in previous.items() if not changed.keys() & {*SCALE} else ():
            statistic = engine.statistics[by_name[name].monitor]
            pairs = zip(by_name[name].measured, found, strict=True)
            kept += [(statistic, p, statistic.fitting(p, tensor)) for p, tensor in pairs if tensor is not None]
        for name, tensors_of in (tensors or {}).items():
            for key, tensor in tensors_of.items():
                if key in known and tensor.shape != known[key].shape:
                    raise ValueError(
                        f"the checkpoint's {name} of {key} has the shape {tuple(tensor.shape)}, and the model's is "
                        f"{tuple(known[key].shape)}: resume with the same model that it was made with."
                    )
    except _MALFORMED as error:
        raise ValueError(f"a tensor in this state of GradES does not fit: {_said(error)}") from error
    checked = []
    for extension in engine.extensions:
        if extension.name in extensions:
            try:
                checked.append((extension, extension.check(extensions[extension.name])))
            except _MALFORMED as error:
                raise ValueError(
                    f"the part {extension.name!r} of this state of GradES cannot be used: {_said(error)}"
                ) from error
    history = None
    if "history" in state:
        try:
            history = History.from_dict(state["history"])
        except _MALFORMED as error:
            if not changed:
                raise ValueError(f"the history in this state of GradES cannot be read: {error}") from error
    if changed.keys() & {*SCALE}:
        opened = None
    return _Checked(
        step, frozen, learned, took_part, criterion, opened, ended, checked, history, kept, tensors
    )  # fmt: skip


def _take_over(engine: GradES, checked: _Checked, changed: Mapping[str, Any]) -> None:
    by_name = {component.name: component for component in engine.components}
    engine.t = checked.step
    engine._resumed = True
    engine._open = checked.open
    engine.history.events = [{**item, "tau": by_name[item["name"]].tau} for item in checked.frozen]
    engine._mark({item["name"]: item["step"] for item in checked.frozen})
    for name in checked.learned:
        engine.learned[engine._place[name]] = True
    for name in checked.took_part:
        engine.took_part[engine._place[name]] = True
    for name, row in checked.criterion.items():
        engine.criterion.memory[engine._place[name]] = torch.tensor(row, dtype=torch.float64)
    for name in engine.frozen:
        engine.freezer.freeze(by_name[name].parameters)
    if checked.ended is not None or engine.progress >= 1:
        engine.ended = checked.ended or engine.conclude()
    for extension, found in checked.extensions:
        extension.load(found)
    if engine.frozen:
        engine._settle()
    if checked.history is not None:
        try:
            adopt_history(engine, checked.history)
        except _MALFORMED as error:
            logger.warning("GradES: earlier values are lost from the history: %s", error)
    engine._remembers = not changed.keys() & {*SCALE}
    if not engine._remembers:
        return
    for statistic, parameter, tensor in checked.previous:
        statistic.previous[parameter] = tensor
    parameters = dict(engine.model.named_parameters())
    kept = checked.tensors
    for extension in engine.extensions if kept is not None else ():
        found = (kept or {}).get(extension.name, {})
        extension.load_tensors({parameters[key]: tensor for key, tensor in found.items() if key in parameters})


def adopt_history(engine: GradES, history: History, checksum: int | None = None) -> None:
    """Continue an earlier record of this run, as far as it goes up to the current step.

    Args:
        engine: What has been loaded.
        history: The record.
        checksum: What the state said of it, None if that is not known.

    Raises:
        ValueError: the record is of another run; nothing has been changed then.
    """
    history.truncate(engine.t, None if engine._open is None else engine._open.step - 1)
    checks, own = len(history.steps), engine.history
    fits = history.values.keys() == own.values.keys() and history.frozen == engine.frozen
    fits = fits and (checksum is None or checksum == history.checksum())
    if not fits or any(len(history.values[component.name]) != checks for component in engine.live):
        raise ValueError("the history is of another run: its components, its frozen set or its values differ.")
    if _scale(history) != _scale(own):
        raise ValueError("the history is of another statistic (monitor, reduction or sample_size).")
    own.adopt(history)


def _scale(history: History) -> tuple[dict[str, str], Any, Any]:
    """What the values of a history measure."""
    monitors = {component["name"]: component["monitor"] for component in history.components}
    return monitors, history.config.get("reduction"), history.config.get("sample_size")


def _changed_options(engine: GradES, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options of `state` that are others now: name -> (before, now)."""
    own, earlier = engine.config.state_dict(), dict(state.get("config") or {})
    names = [name for name in (*RULE, *SCALE) if name in earlier and earlier[name] != own[name]]
    changed: dict[str, tuple[Any, Any]] = {name: (earlier[name], own[name]) for name in names}
    total = state.get("total_steps", engine.total_steps)
    if total != engine.total_steps:
        changed["total_steps"] = (total, engine.total_steps)
    return changed


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


# --- states of version 0.1.0 ---------------------------------------------------------------------------------------


def _modern(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """`saved` in today's format.

    Raises:
        ValueError: it is of a later version, or made with something that this one has no more.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"this is no state of GradES, but a {type(saved).__name__}.")
    if type(saved.get("format")) is int and saved["format"] == FORMAT:
        return saved
    if "format" in saved:
        raise ValueError(
            f"the state of GradES has format {saved['format']!r}, and this version reads up to {FORMAT}. Resume with "
            "the version of grades-hf that wrote it, or a later one."
        )
    config = saved.get("config") or {}
    if not isinstance(config, Mapping):
        raise ValueError(f"this is no state of GradES: its options are a {type(config).__name__}.")
    config = dict(config)
    deleted = [name for name in ("budget", "thaw") if config.get(name) is not None]
    if config.get("criterion", "threshold") not in ("auto", "threshold", "rise"):
        deleted.append("criterion")
    if deleted:
        raise ValueError(
            f"the checkpoint was made with {deleted[0]}={config[deleted[0]]!r}, which is gone since grades-hf 0.2.0. "
            "Finish this run with grades-hf 0.1.0."
        )
    try:
        events = [dict(event) for event in saved["events"]]
        tau_free = config.get("criterion") == "rise"
        for name in ("max_frozen_fraction", "alpha", "rise") if tau_free else ("rise",):
            config.pop(name, None)
        criterion = {name: list(row)[:3] if tau_free else list(row) for name, row in saved["criterion"].items()}
        known = {event["name"] for event in events} | criterion.keys()
        history = saved.get("history")
        if isinstance(history, Mapping):
            known |= {n for n, series in history["values"].items() if any(v for v in series if v is not None)}
        extensions: dict[str, Any] = {}
        if "prefix" in saved:
            extensions["prefix"] = saved["prefix"]
        if "learning_rate" in saved:
            extensions["warm_up"] = {"rate": saved["learning_rate"]}
        if "flops" in saved:
            extensions["meter"] = {"format": 1, **saved["flops"]}
        return {
            **saved,
            "format": FORMAT,
            "config": config,
            "frozen": events,
            "learned": sorted(known),
            "took_part": sorted(known),
            "criterion": criterion,
            "open": saved.get("reading"),
            "extensions": extensions,
        }
    except _MALFORMED as error:
        raise ValueError(f"this is no state of GradES: {error!r} is missing or malformed.") from error


def _said(error: BaseException) -> str:
    """What an error says; its type, too, where it is not written for people."""
    return str(error) if type(error) is ValueError else f"{error!r} is missing or malformed."
