"""A history in other formats: JSON, parquet (one row for each value), CSV (one row for each check) and pandas."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import schema

if TYPE_CHECKING:
    from .history import History

CHUNK = 4096  # checks


def write(history: History, path: Path) -> None:
    """Write to `path` atomically, by its suffix; see `History.save`."""
    writers: dict[str, Callable[[History, Any], None]] = {".parquet": _parquet, ".csv": _csv}
    temporary = path.with_name(f".{path.name}.tmp")  # what a killed process has left is overwritten
    try:
        with open(temporary, "wb") as file:
            writers.get(path.suffix, _json)(history, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _json(history: History, file: Any) -> None:
    file.write(json.dumps(history.to_dict(), allow_nan=False).encode())


def _csv(history: History, file: Any) -> None:
    import csv
    import io

    def line(cells: list[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()

    file.write(line(["step", *(component["name"] for component in history.components)]))
    for start in range(0, len(history.steps), CHUNK):
        steps = history.steps[start : start + CHUNK]
        for step, row in zip(steps, history.to_numpy(start, start + len(steps)), strict=True):
            file.write(line([step, *("" if value == "nan" else value for value in row.astype(str).tolist())]))


def _parquet(history: History, file: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    frame = history.to_dict(values=False) | {"values": {component["name"]: [] for component in history.components}}
    fields = [("name", pa.dictionary(pa.int32(), pa.utf8())), ("step", pa.int64()), ("value", pa.float32())]
    table = pa.schema(fields, metadata={"grades_hf": json.dumps(frame, allow_nan=False)})
    names = pa.array([component["name"] for component in history.components], pa.utf8())
    with pq.ParquetWriter(file, table) as writer:
        for place, series in enumerate(history.values.values()):
            values = np.asarray(series, dtype=np.float32)
            columns = [
                pa.DictionaryArray.from_arrays(pa.array(np.full(len(values), place, dtype=np.int32)), names),
                pa.array(history.steps[: len(values)], pa.int64()),
                pa.array(values),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=table))


def read_parquet(path: Path) -> dict[str, Any]:
    """The dict that `History.from_dict` takes.

    Raises:
        ValueError: it is damaged, or no history.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path).read()
        found = (table.schema.metadata or {}).get(b"grades_hf")
        numbers = found is not None and pa.types.is_floating(table["value"].type)
        columns = {name: table[name].to_pylist() for name in ("name", "value")} if numbers else {}
    except (pa.ArrowException, OSError, MemoryError, KeyError, ValueError, OverflowError, TypeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError("the file is damaged: it is no parquet file that can be read.") from error
    if found is None or not columns:
        raise ValueError("this is a parquet file, but no GradES history.")
    data = schema.parse(found)
    if not isinstance(data, dict) or not isinstance(data.get("values"), dict):
        raise ValueError("this is a parquet file, but no GradES history.")
    values: dict[str, list[Any]] = {name: [] for name in data["values"]}
    for name, value in zip(columns["name"], columns["value"], strict=True):
        if name not in values:
            raise ValueError("this GradES history contradicts itself: it has values of other components than it names.")
        values[name].append(value if value is not None and math.isfinite(value) else None)
    return {**data, "values": values}


def to_pandas(history: History) -> Any:
    """A row for each check, a column for each component."""
    import pandas as pd

    names = [component["name"] for component in history.components]
    return pd.DataFrame(history.to_numpy(), index=pd.Index(history.steps, name="step"), columns=names)
