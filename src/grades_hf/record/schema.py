"""What a file must hold to be read as a history: one check, in one place.

Files come from elsewhere. Whatever is wrong with one ends in a ValueError of one sentence, and control characters in
its strings are shown as text (`\\x1b`), so that no name can write to a terminal.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

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
    data = clean({key: item for key, item in _object(data, "the whole").items() if key in (*LISTS, *SINGLE)})
    item = _checked(data, FRAME)
    item |= {key: item[key] or empty for key, empty in (("looks", []), ("logs", []), ("versions", {}))}
    components = [_checked(c, COMPONENT, f"components[{i}]") for i, c in enumerate(item["components"])]
    names = {component["name"] for component in components}
    if len(names) != len(components):
        raise ValueError("this GradES history contradicts itself: two components have the same name.")
    known = {**EVENT, "name": Check(lambda v: isinstance(v, str) and v in names, "the name of a component")}
    events = [_checked(event, known, f"events[{i}]") for i, event in enumerate(item["events"])]
    if len({event["name"] for event in events}) != len(events):
        raise ValueError("this GradES history contradicts itself: a component is frozen twice.")
    logs = [
        _checked(row, {**dict.fromkeys(_object(row, f"logs[{i}]"), OR_NONE), **LOG}, f"logs[{i}]")
        for i, row in enumerate(item["logs"])
    ]
    logs = [{key: math.nan if value is None else value for key, value in row.items()} for row in logs]
    if any(row["step"] <= before["step"] for before, row in itertools.pairwise(logs)):
        raise ValueError("this GradES history contradicts itself: the steps of its logs do not ascend.")
    looks = [_checked(look, LOOK, f"looks[{i}]") for i, look in enumerate(item["looks"])]
    parts: dict[str, Any] = {
        "config": _checked(item["config"], CONFIG, "config"),
        "components": components,
        "events": events,
        "looks": [look | {"rise": math.nan} if look["rise"] is None else look for look in looks],
        "logs": logs,
        "savings": _savings(item["savings"]),
        "versions": _checked(item["versions"], dict.fromkeys(item["versions"], TEXT), "versions"),
    }
    if item["shares"] is not None:
        share = Check(lambda v: _real(v) and v >= 0, "the share of a component")
        nobody = Check(lambda _: False, "the share of a component")
        shares = {name: share if name in names else nobody for name in item["shares"]}
        parts["shares"] = _checked(item["shares"], shares, "shares")
    return {**item, **parts}


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


# --- what each field must be -----------------------------------------------------------------------------------------


NEEDED, LEFT_OUT = object(), object()  # instead of a default: the field must be there, or may be missing


class Check(NamedTuple):
    """What the value of a field must be, in code and in words; and what stands for one that is missing."""

    fits: Callable[[Any], bool]
    wanted: str
    default: Any = NEEDED

    def or_none(self, default: Any = None) -> Check:
        """The same check, which None passes as well."""
        return Check(lambda value: value is None or self.fits(value), self.wanted, default)


def _real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _one(kind: type, words: str, default: Any = NEEDED) -> Check:
    return Check(lambda value: isinstance(value, kind), words, default)


TEXT, FLAG, COUNT = _one(str, "a text"), _one(bool, "true or false"), Check(_whole, "a whole number from 0 on")
FROM_1 = Check(lambda value: _whole(value, 1), "a whole number from 1 on")
FINITE = Check(lambda value: _real(value) and math.isfinite(value), "a number")
POSITIVE = Check(lambda value: _real(value) and 0 < value < math.inf, "a number greater than 0")
OR_NONE = Check(_real, "a number").or_none(NEEDED)

# The parts of a history: field -> check. What has a default may be missing in a file of an earlier version.
FRAME = {
    "config": _one(dict, "an object"),
    "total_steps": FROM_1,
    "t_grace": COUNT,
    "components": _one(list, "a list"),
    "events": _one(list, "a list"),
    "looks": _one(list, "a list").or_none(),
    "logs": _one(list, "a list").or_none(),
    "savings": _one(dict, "an object").or_none(),
    "ended": Check(lambda value: value in ENDINGS, f"one of {', '.join(ENDINGS)}").or_none(),
    "versions": _one(dict, "an object").or_none(),
    "shares": _one(dict, "an object").or_none(),
}
COMPONENT = {
    **dict.fromkeys(("name", "group", "projection", "monitor"), TEXT),
    "numel": FROM_1,
    "layer": COUNT.or_none(),
    "tower": TEXT.or_none(),
    "adapter": _one(bool, "true or false", False),
    "tau": POSITIVE.or_none(),
}
EVENT = {"step": FROM_1, "value": OR_NONE, "tau": OR_NONE}
LOG = {
    "step": COUNT,
    "frozen": COUNT,
    "seconds": Check(lambda value: _real(value) and value >= 0, "a number from 0 on"),
}
LOOK = {
    **dict.fromkeys(("step", "votes", "components", "rows"), COUNT),
    **dict.fromkeys(("rise", "average_loss", "loss", "difference", "error"), OR_NONE.or_none()),
    **dict.fromkeys(("since", "since_error"), OR_NONE.or_none(LEFT_OUT)),
    "ended": FLAG,
}
# The options that readers calculate with.
CONFIG = {
    "alpha": Check(lambda value: _real(value) and 0 <= value < 1, "a number from 0 to below 1").or_none(LEFT_OUT),
    "max_frozen_fraction": Check(lambda value: _real(value) and 0 < value <= 1, "a number above 0, up to 1").or_none(
        LEFT_OUT
    ),
    **dict.fromkeys(("patience", "check_every"), FROM_1.or_none(LEFT_OUT)),
    **dict.fromkeys(("delay_transfer", "freeze_prefix"), FLAG.or_none(LEFT_OUT)),
    **dict.fromkeys(("reduction", "criterion"), TEXT.or_none(LEFT_OUT)),
    "tau": Check(
        lambda value: all(map(POSITIVE.fits, value.values() if isinstance(value, dict) else [value])),
        "a number greater than 0 or an object of such numbers",
    ).or_none(LEFT_OUT),
}


def _checked(data: Any, fields: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """A copy of an object whose fields are what the table says; a missing one has its default."""
    item = _object(data, where)
    for name, check in fields.items():
        if name not in item and check.default is NEEDED:
            raise ValueError(f"this GradES history is incomplete: {visible(where) or 'it'} has no {name!r}.")
        if name not in item and check.default is not LEFT_OUT:
            item[name] = check.default
        if name in item and not check.fits(item[name]):
            _fail(f"{where}.{name}".lstrip("."), item[name], check.wanted)
    return item


def _savings(data: Any) -> dict[str, float] | None:
    if data is None:
        return None
    every = {"steps": FINITE, "full": POSITIVE, "used": FINITE, "planned": POSITIVE}
    return _checked(data, {**dict.fromkeys(_object(data, "savings"), FINITE), **every}, "savings")


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
