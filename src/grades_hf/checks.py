"""Checks of single values that users pass: a ValueError names the argument, its value and what it must be."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

LARGEST = 2**53  # whole numbers are compared with floats and tensors


def is_count(value: object) -> bool:
    """Whether `value` is a whole number from 1 to 2^53, beyond which floats cannot count (a bool is none)."""
    return not isinstance(value, bool) and isinstance(value, Integral) and 1 <= int(value) <= LARGEST


def is_real(value: object) -> bool:
    """Whether `value` is a number that a float can hold (a bool is none)."""
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value))
    except OverflowError:
        return False


def checked_total_steps(value: object) -> int:
    """The planned number of optimizer steps, or a ValueError."""
    if not is_count(value):
        raise ValueError(
            f"total_steps={short(value)} must be the planned number of optimizer steps, a whole number of 1 or more."
        )
    return int(value)  # type: ignore[call-overload, no-any-return]


def checked_scalar(name: str, value: Any) -> Any:
    """A float or a tensor with one real element, finite or not, or None; else a ValueError."""
    if value is None:
        return None
    if not isinstance(value, bool) and isinstance(value, Real):
        with contextlib.suppress(OverflowError):
            return float(value)
    if getattr(value, "numel", lambda: 0)() == 1 and not value.is_complex():
        return value.detach().reshape(())
    raise ValueError(f"{name}={short(value)} must be a number, or a tensor with one element.")


def number(fits: Callable[[float], bool], what: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> float:
        if not is_real(value) or not fits(value):
            raise ValueError(f"{name}={short(value)} must be {what}.")
        return float(value)

    return check


def count(unit: str) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> int:
        if not is_count(value):
            raise ValueError(f"{name}={short(value)} must be a whole number of {unit}, 1 or more.")
        return int(value)

    return check


def one_of(*allowed: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if not any(value is item or (isinstance(item, str) and value == item) for item in allowed):
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}={short(value)} is unknown; use one of {known}.")
        return value

    return check


def names(name: str, value: Any) -> Any:
    if isinstance(value, (list, tuple, set, frozenset)):
        value = list(value)
    valid = isinstance(value, (str, list)) and len(value) > 0
    if not valid or (isinstance(value, list) and not all(isinstance(item, str) and item for item in value)):
        raise ValueError(
            f"{name}={short(value)} must be a list of module names or name endings, or a regular expression as one "
            "string. Leave it out for the default."
        )
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}={short(value)} is no valid regular expression: {error}.") from error
    return value


def taus(name: str, value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value):
        value = dict(value)  # as `state_dict` writes it
    if not isinstance(value, Mapping):
        return _tau(name, value)
    if not value:
        raise ValueError("tau={} holds no threshold. Pass a number, or a mapping such as {'attention': 0.1}.")
    for key in value:
        if not isinstance(key, str) or not key:
            raise ValueError(f"tau has the key {key!r}. Keys are labels, module names or patterns, as strings.")
    return {key: _tau(f"tau[{key!r}]", number) for key, number in value.items()}


_tau = number(
    lambda value: value > 0,
    "a finite number greater than 0: a matrix freezes when its gradient statistic falls below it. Record a run "
    "without freezing to see which values occur",
)


def short(value: object) -> str:
    """`repr`, cut to a length that a line of text can hold (`10**5000` has no repr at all)."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"<a whole number of {value.bit_length()} bits>"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
