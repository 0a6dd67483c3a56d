"""What a file must hold to be read as a history: one check, in one place.

Files come from elsewhere. Whatever is wrong with one ends in a ValueError of one sentence, and control characters in
its strings are shown as text (`\\x1b`), so that no name can write to a terminal.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

FORMAT = 1  # of the JSON file
ENDINGS = ("converged", "look", "completed", "stopped")
DEEPEST = 16  # levels of nesting

# What a frame is made of: everything but steps and values.
LISTS = ("components", "events", "looks", "logs")
SINGLE = ("config", "total_steps", "t_grace", "savings", "ended", "versions", "shares")


def parse(text: str | bytes) -> Any:
    """JSON as Python types.

    Raises:
        ValueError: it is no JSON, holds numbers that are none (NaN, Infinity), or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError as error:
        raise ValueError("the file is damaged: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"the file is damaged: {error}.") from error


def visible(text: str) -> str:
    """The text with each character that cannot be printed (control, direction, half a surrogate) as `\\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def frame(data: Any) -> dict[str, Any]:
    """The checked and cleaned frame of a history: all of `LISTS` and `SINGLE`.

    Args:
        data: What was read, a mapping; `components`, `config`, `total_steps`, `t_grace` and `events` must be there.

    Raises:
        ValueError: it is no frame; the message is a sentence.
    """
    if not isinstance(data, Mapping):
        _fail("the whole", data, "an object")
    for key in ("config", "total_steps", "t_grace", "components", "events"):
        if key not in data:
            raise ValueError(f"this GradES history is incomplete: it has no {key!r}.")
    data = clean({key: data[key] for key in (*LISTS, *SINGLE) if key in data})
    components = [
        _component(item, f"components[{i}]") for i, item in enumerate(_list(data["components"], "components"))
    ]
    names = {component["name"] for component in components}
    if len(names) != len(components):
        raise ValueError("this GradES history contradicts itself: two components have the same name.")
    events = [_event(item, f"events[{i}]", names) for i, item in enumerate(_list(data["events"], "events"))]
    if len({event["name"] for event in events}) != len(events):
        raise ValueError("this GradES history contradicts itself: a component is frozen twice.")
    logs = [_log(item, f"logs[{i}]") for i, item in enumerate(_list(data.get("logs") or [], "logs"))]
    if any(row["step"] <= before["step"] for before, row in itertools.pairwise(logs)):
        raise ValueError("this GradES history contradicts itself: the steps of its logs do not ascend.")
    ended = data.get("ended")
    if ended is not None and ended not in ENDINGS:
        _fail("ended", ended, f"one of {', '.join(ENDINGS)}")
    versions = _object(data.get("versions") or {}, "versions")
    return {
        "config": _config(data["config"]),
        "total_steps": count(data["total_steps"], "total_steps", 1),
        "t_grace": count(data["t_grace"], "t_grace"),
        "components": components,
        "events": events,
        "looks": [_look(item, f"looks[{i}]") for i, item in enumerate(_list(data.get("looks") or [], "looks"))],
        "logs": logs,
        "savings": _savings(data.get("savings")),
        "ended": ended,
        "versions": {name: _text(version, f"versions[{name!r}]") for name, version in versions.items()},
        "shares": _shares(data.get("shares"), names),
    }


def checks(data: Any) -> list[int]:
    """The steps of the checks.

    Raises:
        ValueError: they are no steps.
    """
    steps = _list(data, "steps")
    if set(map(type, steps)) - {int} or any(not 1 <= step < 2**63 for step in steps):
        raise ValueError("this GradES history is damaged: its steps are not whole numbers from 1 on.")
    if any(step < before for before, step in itertools.pairwise(steps)):
        raise ValueError("this GradES history contradicts itself: its steps do not ascend.")
    return list(steps)


def series(
    data: Any, components: Sequence[Mapping[str, Any]], number: int
) -> tuple[dict[str, Any], Any, dict[str, int]]:
    """The values of a JSON history.

    Args:
        data: Component name -> list of numbers, None where there is none.
        components: The checked components.
        number: How many checks there are.

    Returns:
        The series as they are; (number, components) in float32 with NaN where nothing is; and component name -> length
        of its series, where it is shorter than the record.

    Raises:
        ValueError: these are no such series.
    """
    found = {visible(str(name)): items for name, items in _object(data, "values").items()}
    if found.keys() != {component["name"] for component in components} or len(found) != len(data):
        raise ValueError("this GradES history contradicts itself: it has values of other components than it names.")
    values = np.full((number, len(components)), np.nan, dtype=np.float32)
    ends = {}
    for place, component in enumerate(components):
        name = component["name"]
        items = found[name]
        if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
            _fail(f"values[{name!r}]", items, "a list of numbers")
        if len(items) > number:
            raise ValueError(f"this GradES history contradicts itself: {name} has more values than there were checks.")
        if set(map(type, items)) - {int, float, type(None)}:
            raise ValueError(f"this GradES history is damaged: not all values of {name} are numbers.")
        try:
            numbers = np.array([math.nan if item is None else item for item in items], dtype=np.float64)
        except OverflowError:
            numbers = np.array([math.inf])
        if np.isinf(numbers).any():
            raise ValueError(f"this GradES history is damaged: {name} has a value beyond all numbers.")
        values[: len(items), place] = narrow(numbers)
        if len(items) < number:
            ends[name] = len(items)
    return found, values, ends


def ends(data: Any, names: Collection[str], number: int) -> dict[str, int]:
    """Component name -> how many checks its series has; at most all of them.

    Raises:
        ValueError: it is none.
    """
    found = {visible(str(name)): end for name, end in _object({} if data is None else data, "ends").items()}
    for name, end in found.items():
        if name not in names:
            raise ValueError("this GradES history contradicts itself: a series of another component ends.")
        count(end, "the end of a series")
    return {name: min(number, end) for name, end in found.items()}


def narrow(values: Any) -> Any:
    """Values in float32; what is not finite there is NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(values, dtype=np.float32)
    result[~np.isfinite(result)] = np.nan
    return result


def clean(value: Any, depth: int = 0) -> Any:
    """A copy of JSON types in which all strings are visible.

    Raises:
        ValueError: a number is infinite or beyond 64 bits, something is nested too deeply, or is no JSON.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, int):
        return value if abs(value) < 2**63 else _fail("a number", "it", "one of 64 bits")
    if isinstance(value, float):
        return value if not math.isinf(value) else _fail("a number", value, "finite")
    if depth >= DEEPEST:
        raise ValueError("this GradES history is damaged: it is nested too deeply.")
    if isinstance(value, Mapping):
        return {visible(str(key)): clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, depth + 1) for item in value]
    return _fail("a part of it", type(value).__name__, "JSON")


def merge(into: dict[str, Any], note: Any) -> None:
    """Take one note of a history's file into its frame: single values, and `[from, items]` for what is a list.

    Raises:
        ValueError: it is no note.
    """
    for key, value in _object(note, "a note").items():
        if key in LISTS:
            items = into.setdefault(key, [])
            if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], list):
                _fail(f"a note's {key}", value, "a position and a list")
            items[count(value[0], f"a note's {key}", 0, len(items) + 1) :] = value[1]
        elif key in SINGLE or key in ("format", "cut", "ends"):
            into[key] = value


def plain(value: Any) -> Any:
    """A copy as JSON types: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return plain(value.item()) if hasattr(value, "item") else str(value)


def sound(savings: Mapping[str, float] | None) -> dict[str, float] | None:
    """The savings if they can be read back, else None."""
    try:
        return _savings(None if savings is None else plain(savings))
    except ValueError:
        return None


def count(value: Any, where: str, least: int = 0, below: int = 2**63) -> int:
    """A whole number that has to be in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < below:
        _fail(where, value, f"a whole number from {least} on")
    return value


# --- parts -----------------------------------------------------------------------------------------------------------


def _component(data: Any, where: str) -> dict[str, Any]:
    item = {"layer": None, "tower": None, "adapter": False, "tau": None, **_object(data, where)}
    for key in ("name", "group", "projection", "monitor"):
        _text(item.get(key), f"{where}.{key}")
    if item["tower"] is not None:
        _text(item["tower"], f"{where}.tower")
    if item["layer"] is not None:
        count(item["layer"], f"{where}.layer")
    if not isinstance(item["adapter"], bool):
        _fail(f"{where}.adapter", item["adapter"], "true or false")
    count(item.get("numel"), f"{where}.numel", 1)
    if _number(item["tau"], f"{where}.tau") <= 0:
        _fail(f"{where}.tau", item["tau"], "greater than 0")
    return item


def _event(data: Any, where: str, names: set[str]) -> dict[str, Any]:
    item = _object(data, where)
    count(item.get("step"), f"{where}.step", 1)
    if _text(item.get("name"), f"{where}.name") not in names:
        _fail(f"{where}.name", item.get("name"), "the name of a component")
    for key in ("value", "tau"):
        if key not in item:
            raise ValueError(f"this GradES history is incomplete: {where} has no {key!r}.")
        _number(item[key], f"{where}.{key}")
    return item


def _log(data: Any, where: str) -> dict[str, Any]:
    item = _object(data, where)
    count(item.get("step"), f"{where}.step")
    count(item.get("frozen"), f"{where}.frozen")
    if not _number(item.get("seconds"), f"{where}.seconds", none=-1) >= 0:
        _fail(f"{where}.seconds", item.get("seconds"), "a number from 0 on")
    return {key: math.nan if value is None else _number(value, f"{where}.{key}") for key, value in item.items()}


def _look(data: Any, where: str) -> dict[str, Any]:
    item = _object(data, where)
    for key in ("step", "votes", "components", "rows"):
        count(item.get(key), f"{where}.{key}")
    item["rise"] = _number(item.get("rise"), f"{where}.rise")
    for key in ("average_loss", "loss", "difference", "error", "since", "since_error"):  # None: not computed
        if item.get(key) is not None:
            item[key] = _number(item[key], f"{where}.{key}")
    if not isinstance(item.get("ended"), bool):
        _fail(f"{where}.ended", item.get("ended"), "true or false")
    return item


def _savings(data: Any) -> dict[str, float] | None:
    if data is None:
        return None
    item = _object(data, "savings")
    for key in {"steps", "full", "used", "planned", *item}:
        if not math.isfinite(_number(item.get(key), f"savings.{key}")):
            _fail(f"savings.{key}", item.get(key), "a number")
    for key in ("full", "planned"):
        if item[key] <= 0:
            _fail(f"savings.{key}", item[key], "greater than 0")
    return item


def _shares(data: Any, names: set[str]) -> dict[str, float] | None:
    if data is None:
        return None
    item = _object(data, "shares")
    for name, share in item.items():
        if name not in names or not _number(share, f"shares[{name!r}]", none=-1) >= 0:
            _fail(f"shares[{name!r}]", share, "the share of a component")
    return item


def _at_least(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and least <= v <= most


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# The options that readers calculate with; None is always possible.
_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha": (_at_least(0, 1), "a number from 0 to 1"),
    "max_frozen_fraction": (_at_least(0, 1), "a number from 0 to 1"),
    "patience": (_whole, "a whole number from 1 on"),
    "check_every": (_whole, "a whole number from 1 on"),
    "delay_transfer": (lambda v: isinstance(v, bool), "true or false"),
    "freeze_prefix": (lambda v: isinstance(v, bool), "true or false"),
    "reduction": (lambda v: isinstance(v, str), "a text"),
    "criterion": (lambda v: isinstance(v, str), "a text"),
    "tau": (
        lambda v: all(map(_at_least(0), v.values())) if isinstance(v, dict) else _at_least(0)(v),
        "a number or an object of numbers",
    ),
}


def _config(data: Any) -> dict[str, Any]:
    item = _object(data, "config")
    for name, (fits, wanted) in _OPTIONS.items():
        if item.get(name) is not None and not fits(item[name]):
            _fail(f"config.{name}", item[name], wanted)
    return item


def _number(value: Any, where: str, none: float = math.nan) -> Any:
    """The number as it is; `none` stands for None."""
    if value is None:
        return none
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(where, value, "a number")
    return value


def _text(value: Any, where: str) -> str:
    return value if isinstance(value, str) else _fail(where, value, "a text")


def _list(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else _fail(where, value, "a list")


def _object(value: Any, where: str) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else _fail(where, value, "an object")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _fail(where: str, found: Any, wanted: str) -> NoReturn:
    try:
        shown = visible(repr(found))
    except (RecursionError, ValueError):  # a number with too many digits
        shown = type(found).__name__
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise ValueError(f"this GradES history is damaged: {visible(where)} is {shown}, not {wanted}.")


def first_difference(before: Sequence[Any], after: Sequence[Any], start: int = 0) -> int:
    """The first position from `start` on at which `after` goes on differently."""
    for place in range(start, min(len(before), len(after))):
        old, new = before[place], after[place]
        if old is not new and old != new:
            return place
    return min(len(before), len(after))
