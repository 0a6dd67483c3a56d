"""The values of all checks, one row of float32 each: the newest in memory, the rest too, or in a file."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .stream import Batch, File, Floats

BLOCK = 256 * 1024  # bytes of a block of rows in memory
WINDOW = 8 * 2**20  # bytes of rows in memory that are written without being asked, and of the largest batch


class Rows:
    """All rows, in order. Rows in the file come first, those in memory after them.

    Attributes:
        width: Components known now; rows from before a component was known have NaN for it.
        count: The number of rows.
        file: Where rows are written, None if everything stays in memory.
        stale: Rows of the file that were cut off, and still count for who reads it.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.file: File | None = None
        self._last: Floats | None = None
        self._clear()

    def _clear(self) -> None:
        self.count = self.stale = 0
        self._first, self._number, self._width, self._offset = array("q"), array("q"), array("q"), array("q")
        self._filed = 0
        self._blocks: list[Floats] = []
        self._open: Floats | None = None  # the block that is being filled
        self._fill = 0

    @classmethod
    def of(cls, values: Floats) -> Rows:
        """Of (checks, components) values, in memory."""
        rows = cls(values.shape[1])
        rows._blocks, rows.count = ([values] if len(values) else []), len(values)
        return rows

    def append(self, row: Floats) -> None:
        """Add the row of one check, (width,)."""
        if self._open is None or self._fill == len(self._open):
            self._seal()
            self._open = np.empty((max(1, BLOCK // (4 * max(1, self.width))), self.width), dtype=np.float32)
        self._open[self._fill] = row
        self._fill += 1
        self.count += 1
        self._last = row

    def grow(self, more: int) -> None:
        """Make room for more components."""
        self._seal()
        self.width += more
        self._last = None

    def cut(self, count: int) -> None:
        """Forget all rows but the first `count`."""
        if count >= self.count:
            return
        self._seal()
        while self._filed > count:
            first, number = self._first[-1], self._number[-1]
            kept = max(0, count - first)
            self.stale += number - kept
            self._filed = first + kept
            if kept:
                self._number[-1] = kept
            else:
                for column in (self._first, self._number, self._width, self._offset):
                    column.pop()
        waiting = count - self._filed
        kept_blocks = []
        for block in self._blocks:
            if waiting > 0:
                kept_blocks.append(block[:waiting])
            waiting -= len(block)
        self._blocks, self.count, self._last = kept_blocks, count, None

    def filed(self, batch: Batch) -> None:
        """The next rows are in the file."""
        if batch.steps:
            for column, value in zip(
                (self._first, self._number, self._width, self._offset),
                (self._filed, len(batch.steps), batch.width, batch.offset),
                strict=True,
            ):
                column.append(value)
            self._filed += len(batch.steps)
            self.count = max(self.count, self._filed)

    @property
    def filed_count(self) -> int:
        """The number of rows that are in the file."""
        return self._filed

    @property
    def waiting(self) -> int:
        """Bytes of the rows that are in memory only."""
        return 4 * self.width * (self.count - self._filed)

    def write(self, file: File, steps: Sequence[int], note: str | None, *, durable: bool) -> None:
        """Append what is in memory only, and the note, to the file.

        Raises:
            OSError: it cannot be written; whatever was not, stays in memory.
        """
        self._seal()
        while self._blocks:
            first, rows = next(self._chunks(self._filed))
            batch = file.append(steps[first : first + len(rows)], rows, note, durable=durable)
            note = None
            self._forget(len(rows))
            self.filed(batch)
        if note is not None:
            file.append([], np.empty((0, 1), dtype=np.float32), note, durable=durable)

    def batches(self, steps: Sequence[int], note: str) -> Iterator[tuple[Sequence[int], Floats, str | None]]:
        """For `File.create`: all rows, and the note before them."""
        yield [], np.empty((0, 1), dtype=np.float32), note
        for first, rows in self._chunks(0):
            yield steps[first : first + len(rows)], rows, None

    def moved(self, file: File, batches: Iterable[Batch]) -> None:
        """All rows are in this file now."""
        self._clear()
        self.file = file
        for batch in batches:
            self.filed(batch)

    def read(self, start: int, stop: int, columns: slice = slice(None)) -> Floats:
        """Rows `start` to `stop`, (stop - start, columns)."""
        out = np.full((max(0, stop - start), len(range(*columns.indices(self.width)))), np.nan, dtype=np.float32)
        for first, rows in self._pieces(start, stop):
            part = rows[:, columns]
            out[first - start : first - start + len(part), : part.shape[1]] = part
        return out

    def row(self, index: int) -> Floats:
        """One row, (width,)."""
        if index == self.count - 1 and self._last is not None:
            return self._last
        row: Floats = self.read(index, index + 1)[0]
        if index == self.count - 1:
            self._last = row
        return row

    def in_order(self, order: Sequence[int]) -> Rows:
        """The same rows in memory with the columns in another order; -1: a component without values."""
        rows = Rows(len(order))
        places = np.array(order, dtype=np.int64)
        for _, chunk in self._chunks(0):
            wide = np.full((len(chunk), self.width + 1), np.nan, dtype=np.float32)
            wide[:, : chunk.shape[1]] = chunk
            rows._blocks.append(np.ascontiguousarray(wide[:, places]))
        rows.count = self.count
        return rows

    def whole_file(self) -> bool:
        """Whether reading a column means to read a file."""
        return self._filed > 0

    def _chunks(self, start: int) -> Iterator[tuple[int, Floats]]:
        """Rows from `start` on as arrays of at most `WINDOW` bytes, each of one width: (first row, rows)."""
        limit = max(1, WINDOW // (4 * max(1, self.width)))
        kept: list[Floats] = []
        at, number = start, 0
        for _, rows in self._pieces(start, self.count):
            for begin in range(0, len(rows), limit):
                part = rows[begin : begin + limit]
                if kept and (kept[0].shape[1] != part.shape[1] or number + len(part) > limit):
                    yield at, np.concatenate(kept)
                    at, number, kept = at + number, 0, []
                kept.append(part)
                number += len(part)
        if kept:
            yield at, kept[0] if len(kept) == 1 else np.concatenate(kept)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, Floats]]:
        """Rows as they lie in file and memory: (first row, rows of one width)."""
        at = max(0, start)
        if self.file is not None and at < self._filed:
            part = max(0, bisect_right(self._first, at) - 1)
            while part < len(self._first) and (first := self._first[part]) < stop:
                begin, end = max(at, first), min(stop, first + self._number[part])
                width = self._width[part]
                if end > begin:
                    values = self.file.read(self._offset[part] + 4 * width * (begin - first), width * (end - begin))
                    yield begin, values.reshape(-1, width)
                part += 1
        first = self._filed
        blocks = self._blocks if self._open is None else [*self._blocks, self._open[: self._fill]]
        for block in blocks:
            begin, end = max(at, first), min(stop, first + len(block))
            if end > begin:
                yield begin, block[begin - first : end - first]
            first += len(block)

    def _seal(self) -> None:
        """The block that is being filled is a block like the others."""
        if self._open is not None and self._fill:
            rows = self._open[: self._fill]
            self._blocks.append(rows if 2 * len(rows) > len(self._open) else rows.copy())
        self._open, self._fill = None, 0

    def _forget(self, number: int) -> None:
        """The first rows in memory are in the file now."""
        while number:
            block = self._blocks.pop(0)
            if len(block) > number:
                self._blocks.insert(0, block[number:])
                return
            number -= len(block)
