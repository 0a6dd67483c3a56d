"""Hostile and damaged files: one ValueError of one sentence, or what is whole; never another exception."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grades_hf import History
from grades_hf.record import schema
from grades_hf.record.history import FILE_NAME
from tests.record import made


def valid() -> dict[str, Any]:
    """A history that has everything, as JSON types."""
    history = made.go_on(made.empty(), range(1, 15))
    history.savings = {"steps": 14, "full": 10.0, "used": 9.0, "planned": 20.0}
    history.shares, history.ended = {"layers.0.q_proj": 0.25}, "look"
    numbers = {"rise": 1.25, "loss": 2.0, "average_loss": 1.5, "difference": -0.5, "error": 0.1}
    history.looks = [{"step": 9, "votes": 3, "components": 5, "rows": 8, **numbers, "ended": False}]
    return json.loads(json.dumps(history.to_dict()))


VALID = valid()


def load(data: Any, folder: Any) -> History:
    (folder / "h.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return History.load(folder / "h.json")


def read_all(history: History) -> None:
    """What reports do with a history."""
    history.latest(), history.frozen, history.checksum(), history.sampled(5), history.to_numpy()
    assert [len(list(series)) for series in history.values.values()]
    text = json.dumps(history.to_dict(), allow_nan=False)
    assert History.from_dict(json.loads(text)).to_dict() == history.to_dict()
    text.encode()
    assert all(schema.visible(found) == found for found in strings(history.to_dict()))


def one_sentence(error: ValueError) -> None:
    """Nothing but a ValueError, and nothing that writes to a terminal."""
    assert type(error) is ValueError
    assert str(error).isprintable()


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*map(str, value), *(text for item in value.values() for text in strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"format": 99}', '{"format": 1}', '{"format": 1, "config": 3}', "\xff", "[" * 100_000]
)
def test_damage_is_named(text, tmp_path):
    (tmp_path / "h.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"h\.json"):
        History.load(tmp_path / "h.json")


@pytest.mark.parametrize("start", [b"PAR1 nothing", b"\xff\xff\xff\xff nothing", b"\xff\xff\xff\xff\x10\x00\x00\x00"])
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "json"])
def test_files_of_another_kind_are_named(start, suffix, tmp_path):
    (tmp_path / f"h.{suffix}").write_bytes(start)
    with pytest.raises(ValueError, match=rf"h\.{suffix}"):
        History.load(tmp_path / f"h.{suffix}")


DAMAGE = {
    "a number beyond all": (("total_steps",), 10**400),
    "a step beyond all": (("steps", 13), 2**70),
    "a step that is a text": (("steps", 3), "4"),
    "steps that go back": (("steps", 3), 1),
    "a value that is a text": (("values", "layers.0.q_proj", 3), "0.5"),
    "a value that is true": (("values", "layers.0.q_proj", 3), True),
    "a value of too many digits": (("values", "layers.0.q_proj", 3), 10**400),
    "a value that is a list": (("values", "layers.0.q_proj", 3), [1]),
    "a series that is a number": (("values", "layers.0.q_proj"), 3),
    "a series that is a text": (("values", "layers.0.q_proj"), "123"),
    "a series that is too long": (("values", "layers.0.q_proj"), [1.0] * 15),
    "values of another component": (("values", "x"), [1.0]),
    "components that are an object": (("components",), {}),
    "a component that is a text": (("components", 0), "q"),
    "a name that is a number": (("components", 0, "name"), 7),
    "a name twice": (("components", 0, "name"), "layers.1.q_proj"),
    "a layer that is a text": (("components", 0, "layer"), "0"),
    "no elements": (("components", 0, "numel"), 0),
    "a tau of 0": (("components", 0, "tau"), 0),
    "a tau that is a text": (("components", 0, "tau"), "0.5"),
    "a group that is none": (("components", 0, "group"), None),
    "an adapter that is a text": (("components", 0, "adapter"), "no"),
    "an event of no component": (("events", 0, "name"), "x"),
    "an event of a list": (("events", 0, "name"), ["layers.0.q_proj"]),
    "an event that is a list": (("events", 0), []),
    "an event at no step": (("events", 0, "step"), 0.5),
    "frozen twice": (("events", 1, "name"), "layers.1.q_proj"),
    "a log without seconds": (("logs", 0, "seconds"), None),
    "a log of a text": (("logs", 0, "loss"), "low"),
    "logs that go back": (("logs", 3, "step"), 1),
    "a log that is a text": (("logs", 0), "step"),
    "a look without votes": (("looks", 0, "votes"), None),
    "a look that ended maybe": (("looks", 0, "ended"), 1),
    "savings of nothing": (("savings", "full"), 0),
    "savings of a text": (("savings", "used"), "9"),
    "savings without a plan": (("savings", "planned"), None),
    "an unknown end": (("ended",), "exploded"),
    "shares of a text": (("shares", "layers.0.q_proj"), "much"),
    "shares of another": (("shares", "x"), 0.5),
    "versions of numbers": (("versions", "torch"), 2.13),
    "an alpha that is a text": (("config", "alpha"), "0.5"),
    "an alpha of 1": (("config", "alpha"), 1),
    "a tau of 0 in the options": (("config", "tau"), 0),
    "a tau of 0 in a mapping": (("config", "tau"), {"mlp": 0.5, "attention": 0}),
    "a fraction of 0": (("config", "max_frozen_fraction"), 0),
    "a patience of 0": (("config", "patience"), 0),
    "a config that is a list": (("config",), []),
    "no check at all": (("config", "check_every"), 0),
    "a tau of texts": (("config", "tau"), {"mlp": "1"}),
    "nested deeply": (("config", "x"), json.loads("[" * 400 + "]" * 400)),
    "no steps planned": (("total_steps",), 0),
    "a grace that is true": (("t_grace",), True),
}


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    data = copy.deepcopy(data)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_sentence_says_what_is_wrong(damage, tmp_path):
    with pytest.raises(ValueError, match=r"h\.json: this GradES history") as error:
        load(put(VALID, *DAMAGE[damage]), tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("key", ["config", "total_steps", "t_grace", "components", "steps", "values", "events"])
def test_what_is_missing_is_named(key, tmp_path):
    with pytest.raises(ValueError, match=f"it has no '{key}'"):
        load({name: value for name, value in VALID.items() if name != key}, tmp_path)


def test_older_files_have_less(tmp_path):
    old = {k: v for k, v in VALID.items() if k not in ("logs", "savings", "ended", "versions", "looks", "shares")}
    loaded = load(old, tmp_path)
    assert (loaded.logs, loaded.savings, loaded.ended, loaded.versions, loaded.looks) == ([], None, None, {}, [])
    assert loaded.shares is None


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize(
    "where", [("total_steps",), ("values", "layers.0.q_proj", 3), ("logs", 0, "loss"), ("config", "x")]
)
def test_numbers_that_are_none(number, where, tmp_path):
    text = json.dumps(put(VALID, where, "HERE")).replace('"HERE"', number)
    with pytest.raises(ValueError, match=r"h\.json"):
        load(text, tmp_path)


def test_control_characters_are_shown_as_text(tmp_path):
    bad = "q\x1b[31m\x07\u202e\ud800\x9b\n"
    shown = "q\\x1b[31m\\x07\\u202e\\ud800\\x9b\\n"
    data = json.dumps(VALID).replace("layers.0.q_proj", json.dumps(bad)[1:-1])
    data = put(json.loads(data), ("config", "monitor"), bad)
    data["versions"] = {bad: bad}
    for key in ("projection", "group", "tower", "monitor"):
        data["components"][0][key] = bad
    history = load(data, tmp_path)
    assert {history.components[0][key] for key in ("name", "projection", "group", "tower", "monitor")} == {shown}
    assert shown in history.values
    assert history.config["monitor"] == history.versions[shown] == shown
    assert history.shares == {shown: 0.25}
    history.save(tmp_path)
    assert History.load(tmp_path).to_dict() == history.to_dict()
    read_all(history)
    with pytest.raises(ValueError, match=r"ended is .*x1b") as error:
        load(put(VALID, ("ended",), bad), tmp_path)
    assert str(error.value).isprintable()


def test_a_history_of_zeros_is_read(tmp_path):
    data = copy.deepcopy(VALID)
    data["values"] = {name: [0] * len(series) for name, series in data["values"].items()}
    read_all(load(data, tmp_path))


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    history = made.go_on(made.empty(), range(1, 4))
    history.savings = {"steps": 0, "full": 0.0, "used": math.nan, "planned": 0.0}
    history.logs[-1]["grades/odd"] = math.inf
    history.save(tmp_path)
    assert History.load(tmp_path).savings is None
    history.save(tmp_path / "h.json")
    assert math.isnan(History.load(tmp_path / "h.json").logs[-1]["grades/odd"])


# --- fuzzing ---------------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 10**400, 2**63, 1e308, -1e-320, "1e999", "", "\x1b[2J", "NaN", "layers.0.q_proj"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, item in items for found in [(*path, key), *paths(item, (*path, key))]]


# Numbers of series are many and alike: two of them stand for all.
PATHS = [
    path
    for path in paths(VALID)
    if path[0] not in ("values", "steps") or (len(path) < 3 and path[-1] in (*path[:1], 0, 1, "layers.0.q_proj"))
]
LENIENT = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@LENIENT
@given(changes=st.lists(st.tuples(st.sampled_from(PATHS), JUNK), min_size=1, max_size=2))
def test_fuzzed_json(changes, tmp_path):
    data = VALID
    for path, value in changes:
        try:
            data = put(data, path, value)
        except (KeyError, IndexError, TypeError):
            continue
    try:
        history = load(data, tmp_path)
    except ValueError as error:
        one_sentence(error)
    else:
        read_all(history)


def binary(folder: Any) -> bytes:
    history = made.empty()
    history.open(folder)
    made.go_on(history, range(1, 9), flush_every=3)
    history.flush()
    return (folder / FILE_NAME).read_bytes()


@LENIENT
@given(data=st.data())
def test_fuzzed_bytes(data, tmp_path):
    raw = bytearray(binary(tmp_path))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, raw[place] ^ 1, raw[place] ^ 0x80]))
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(raw)))
        del raw[start : start + data.draw(st.integers(0, 64))]
    (tmp_path / "h.arrow").write_bytes(raw)
    try:
        history = History.load(tmp_path / "h.arrow")
    except ValueError as error:
        one_sentence(error)
    else:
        read_all(history)


@LENIENT
@given(
    changes=st.dictionaries(
        st.sampled_from(["cut", "events", "logs", "components", "ends", "ended", "format", "x"]), JUNK
    )
)
def test_fuzzed_notes(changes, tmp_path):
    history = made.empty()
    history.open(tmp_path)
    made.go_on(history, range(1, 9), flush_every=3)
    history._rows.write(history._journal.file, history.steps, json.dumps(changes), durable=False)
    try:
        found = History.load(tmp_path)
    except ValueError as error:
        one_sentence(error)
    else:
        read_all(found)


@LENIENT
@given(place=st.integers(0, 5000), value=st.sampled_from([0, 0x7F, 0x80, 0xFF]), number=st.integers(1, 8))
def test_fuzzed_parquet(place, value, number, tmp_path):
    path = tmp_path / "h.parquet"
    if not path.exists():
        made.go_on(made.empty(), range(1, 9)).save(path)
        (tmp_path / "raw").write_bytes(path.read_bytes())
    raw = bytearray((tmp_path / "raw").read_bytes())
    raw[place % len(raw) : place % len(raw) + number] = bytes([value] * number)
    path.write_bytes(raw)
    try:
        history = History.load(path)
    except ValueError as error:
        one_sentence(error)
    else:
        read_all(history)
