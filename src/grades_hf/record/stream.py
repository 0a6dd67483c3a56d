"""The file of a record.

It is an Arrow IPC stream, which any Arrow reader opens, and which is only appended to. A row with a `step` is a
check: `values` has one number for each component known by then, NaN where there was none. A row with a `note` holds
what else has happened since the note before, as JSON (see `schema.merge`); the first note has the components and
options. One append is one message, a note before its checks, so that a torn one leaves nothing half.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MARK = b"grades_hf"


class Batch(NamedTuple):
    """What one message of the file holds."""

    steps: list[int]
    width: int
    offset: int  # of the values in the file, in bytes
    notes: list[str]


def _schema() -> Any:
    import pyarrow as pa

    fields = [("step", pa.int64()), ("values", pa.list_(pa.float32())), ("note", pa.utf8())]
    return pa.schema(fields, metadata={MARK: b"2"})


def _array(kind: Any, length: int, buffers: list[Any], **more: Any) -> Any:
    """An Arrow array of these buffers; `pyarrow.array` would import pandas."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, length, [None if b is None else pa.py_buffer(b) for b in buffers], **more)


class File:
    """An open Arrow stream. It stays readable when something else deletes or replaces it.

    Attributes:
        path: Where it was.
        size: Bytes up to the end of the last whole message; what follows is cut at the next append.
    """

    def __init__(self, path: Path, descriptor: int, size: int = 0) -> None:
        self.path, self.size = path, size
        self._use(descriptor)

    def _use(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(
        cls, path: Path, batches: Iterable[tuple[Sequence[int], Floats, str | None]]
    ) -> tuple[File, list[Batch]]:
        """Write a whole file: a reader sees the old one or the new one, and a full disk leaves the old one."""
        temporary = path.with_name(f".{path.name}.tmp")
        file = cls(path, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
        try:
            file._write(_schema().serialize())
            written = [file._append(*batch) for batch in batches]
            os.fsync(file._descriptor)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # where it has not taken its place
        return file, written

    @classmethod
    def open(cls, path: Path) -> File:
        """To read; see `writable`."""
        return cls(path, os.open(path, os.O_RDONLY))

    def writable(self) -> None:
        """Open it anew to append."""
        file = os.open(self.path, os.O_RDWR)
        if not os.path.samestat(os.fstat(file), os.fstat(self._descriptor)):
            os.close(file)
            raise FileNotFoundError(errno.ENOENT, "it was replaced by another one", str(self.path))
        self._close()
        self._use(file)

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._descriptor))
        except OSError:
            return False

    def append(self, steps: Sequence[int], rows: Floats, note: str | None, *, durable: bool) -> Batch:
        """Add rows of values and a note.

        Raises:
            OSError: it cannot be written; the file is as it was before.
        """
        if not self.is_at(self.path):
            raise FileNotFoundError(errno.ENOENT, "it was moved, deleted or replaced", str(self.path))
        batch = self._append(steps, rows, note)
        if durable:
            os.fsync(self._descriptor)
        return batch

    def _append(self, steps: Sequence[int], rows: Floats, note: str | None) -> Batch:
        import pyarrow as pa

        number, width = rows.shape
        text = b"" if note is None else note.encode()
        before = int(note is not None)
        is_check = np.packbits(np.arange(before + number) >= before, bitorder="little")
        is_note = np.packbits(np.arange(before + number) < before, bitorder="little")
        places = np.arange(before + number + 1) - before
        numbers = _array(pa.float32(), number * width, [None, np.ascontiguousarray(rows)])
        columns = [
            _array(pa.int64(), before + number, [is_check, np.array([0] * before + list(steps), dtype=np.int64)]),
            _array(
                pa.list_(pa.float32()),
                before + number,
                [None, (np.maximum(places, 0) * width).astype(np.int32)],
                children=[numbers],
            ),
            _array(
                pa.utf8(), before + number, [is_note, np.where(places > -before, len(text), 0).astype(np.int32), text]
            ),
        ]
        schema = _schema()
        message = pa.record_batch(columns, schema=schema).serialize()
        start = self.size
        self._write(message)
        offset = 0
        if number:
            written = pa.ipc.read_record_batch(message, schema).column(1).values.buffers()[1]
            offset = start + written.address - message.address
        return Batch(list(steps), width, offset, [] if note is None else [note])

    def _write(self, data: Any) -> None:
        if os.fstat(self._descriptor).st_size != self.size:
            os.ftruncate(self._descriptor, self.size)  # what a killed or failed write has left
        rest, at = memoryview(data).cast("B"), self.size
        try:
            while rest:
                number = os.pwrite(self._descriptor, rest, at)
                rest, at = rest[number:], at + number
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size = at

    def read(self, offset: int, number: int) -> Floats:
        """So many values; NaN where the file ends before, or holds no finite one."""
        data = b""
        while len(data) < 4 * number and (
            more := os.pread(self._descriptor, 4 * number - len(data), offset + len(data))
        ):
            data += more
        values = np.full(number, np.nan, dtype=np.float32)
        whole = np.frombuffer(data, dtype=np.float32, count=len(data) // 4)
        values[: len(whole)] = whole
        values[~np.isfinite(values)] = np.nan
        return values

    def batches(self) -> Iterator[Batch]:
        """All that was written, up to the first message that is torn.

        Raises:
            ValueError: it is no history, or damaged elsewhere than at its end.
        """
        import pyarrow as pa

        failures = (pa.ArrowException, OSError, MemoryError, ValueError, TypeError, OverflowError)
        size = os.fstat(self._descriptor).st_size
        with open(os.dup(self._descriptor), "rb") as stream, pa.PythonFile(stream, mode="r") as source:
            source.seek(0)
            try:
                schema = pa.ipc.read_schema(source)
                expected = _schema()
                known = schema.equals(expected) and (schema.metadata or {}).get(MARK) == expected.metadata[MARK]
            except (EOFError, *failures) as error:
                raise ValueError("the file is damaged: it does not begin as an Arrow stream.") from error
            if not known:
                raise ValueError("this is an Arrow stream, but no GradES history of a format that is known here.")
            self.size = source.tell()
            while self.size < size:
                try:
                    message = pa.ipc.read_message(source)
                    end = source.tell()
                    batch = pa.ipc.read_record_batch(message, schema)
                    batch.validate(full=True)
                except EOFError:
                    return
                except failures as error:
                    if source.tell() >= size:
                        return  # torn: it was the last one, and the process was killed while it was written
                    raise ValueError(
                        f"the file is damaged: what follows its byte {self.size} is no message."
                    ) from error
                yield _batch(batch, message.body, end)
                self.size = end


def _batch(batch: Any, body: Any, end: int) -> Batch:
    steps, values, notes = (batch.column(index) for index in range(3))
    if not len(steps):
        return Batch([], 0, 0, [])
    before, number = steps.null_count, len(steps) - steps.null_count
    limits = values.offsets  # not to_numpy(), which imports pandas
    offsets = np.frombuffer(limits.buffers()[1], dtype=np.int32)[limits.offset : limits.offset + len(limits)]
    lengths = np.diff(offsets)
    width = int(lengths[-1]) if number else 0
    buffer = values.values.buffers()[1] if number and width else None
    first = 0
    if buffer is not None:
        first = int(buffer.address) - int(body.address) + 4 * (values.values.offset + int(offsets[before]))
    fits = (
        steps.slice(before).null_count == values.null_count == values.values.null_count == 0
        and bool((lengths[before:] == width).all())
        and (number == 0 or width > 0)
        and 0 <= first <= len(body) - 4 * number * width
    )
    if not fits:
        raise ValueError("this GradES history is damaged: its rows are not of one length.")
    found = [note for note in notes.slice(0, before).to_pylist() if note is not None]
    return Batch(steps.slice(before).to_pylist(), width, end - len(body) + first, found)
