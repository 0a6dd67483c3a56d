"""The values of a record as readers see them: one series for each component, read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from .storage import Rows
from .stream import Floats

GROUP = 256 * 2**20  # bytes of the columns that are read from a file at a time and kept


class Columns:
    """Reads rows by column, and keeps what it has read of a file.

    Attributes:
        rows: What is read; checks may be added, but none taken away.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._kept: tuple[int, Floats] | None = None  # first column, (checks, columns)

    def column(self, place: int, start: int, stop: int) -> Floats:
        """The values of one component at some checks."""
        rows, one = self.rows, slice(place, place + 1)
        if stop - start <= 8 or not rows.whole_file():
            return rows.read(start, stop, one)[:, 0]
        if self._kept is None or not 0 <= place - self._kept[0] < self._kept[1].shape[1]:
            across = max(1, min(rows.width, GROUP // (4 * max(1, rows.count))))
            first = place // across * across
            self._kept = first, rows.read(0, rows.count, slice(first, first + across))
        first, kept = self._kept
        known = kept[start : min(stop, len(kept)), place - first]
        return known if stop <= len(kept) else np.concatenate([known, rows.read(len(kept), stop, one)[:, 0]])


class Series(Sequence[float]):
    """The statistic of one component at each check, up to the one that froze it."""

    def __init__(self, columns: Columns, place: int, end: int) -> None:
        self._columns, self._place, self._end = columns, place, end

    def __len__(self) -> int:
        return self._end

    @overload
    def __getitem__(self, index: int) -> float: ...
    @overload
    def __getitem__(self, index: slice) -> list[float]: ...
    def __getitem__(self, index: int | slice) -> float | list[float]:
        if isinstance(index, slice):
            start, stop, stride = index.indices(self._end)
            low, high = (start, stop) if stride > 0 else (stop + 1, start + 1)
            if high <= low:
                return []
            part = self._columns.column(self._place, low, high)
            found: list[float] = (part[::stride] if stride > 0 else part[::-1][::-stride]).tolist()
            return found
        place = range(self._end)[index]
        return float(self._columns.rows.row(place)[self._place])

    def __iter__(self) -> Iterator[float]:
        return iter(self[:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self._columns.column(self._place, 0, self._end), dtype=dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        more = ", ..." if self._end > 4 else ""
        return f"[{', '.join(f'{value:.6g}' for value in self[:4])}{more}] ({self._end} checks)"


class Values(Mapping[str, Series]):
    """Component name -> its series."""

    def __init__(self, columns: Columns, places: Mapping[str, int], ends: Mapping[str, int], count: int) -> None:
        self._columns, self._places, self._ends, self._count = columns, places, ends, count

    def __getitem__(self, name: str) -> Series:
        return Series(self._columns, self._places[name], min(self._count, self._ends.get(name, self._count)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<values of {len(self)} components at {self._count} checks>"


class Sampled(NamedTuple):
    """Some of the checks of a record."""

    steps: list[int]
    values: Values


def sample(rows: Rows, steps: Sequence[int], places: Mapping[str, int], ends: Mapping[str, int], most: int) -> Sampled:
    """At most `most` checks, evenly spaced, the first and the last among them."""
    number = min(len(steps), rows.count)
    if number <= most:
        checks = np.arange(number)
    else:
        checks = (
            np.unique(np.linspace(0, number - 1, max(1, most)).round().astype(np.int64))
            if most > 1
            else np.array([number - 1])
        )
    if len(checks) * 8 > number:
        kept = rows.read(0, number)[checks] if number * rows.width <= GROUP // 4 else _some(rows, checks)
    else:
        kept = _some(rows, checks)
    before = {name: int(np.searchsorted(checks, end)) for name, end in ends.items()}
    return Sampled(
        [steps[check] for check in checks.tolist()], Values(Columns(Rows.of(kept)), places, before, len(checks))
    )


def _some(rows: Rows, checks: Any) -> Floats:
    found = np.empty((len(checks), rows.width), dtype=np.float32)
    for place, check in enumerate(checks.tolist()):
        found[place] = rows.row(check)
    return found
