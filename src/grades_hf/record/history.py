"""History: what was measured at every check and when each component froze.

The record lives in `grades_history.arrow` in the output directory, which is appended to (see `storage.py`).
"""

from __future__ import annotations

import json
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import exports, schema
from .description import described, versions_of_run
from .journal import FILE_NAME, Journal, read
from .series import Columns, Sampled, Values, sample
from .storage import WINDOW, Rows
from .stream import Floats

if TYPE_CHECKING:
    from ..find.components import Component

__all__ = ["FILE_NAME", "JSON_NAME", "History"]

JSON_NAME = "grades_history.json"  # of versions up to 0.1, and of exports
_CONTINUATION = b"\xff\xff\xff\xff"  # how an Arrow stream begins


class History:
    """The record of one run.

    Attributes:
        config: The options, as `GradESConfig.to_dict()` gives them.
        total_steps: Planned number of optimizer steps, T.
        t_grace: Last step at which nothing may freeze, ceil(alpha * T).
        components: One dict per component: name, group, projection, layer, tower, adapter, numel, monitor, tau.
        steps: Optimizer steps (1-based) at which a check was made.
        values: Component name -> its statistic at each of `steps`, from the first on, in float32; a series ends with
            the check that froze the component. NaN stands for "no finite value was measured" (null in JSON).
        events: One dict per component that is frozen now: step, name, value, tau.
        logs: One dict per training log, in the order of steps: step (optimizer steps so far), seconds (wall time of
            training so far, that of resumed sessions added; what a killed one lost is not in it), frozen (components),
            and where they are known loss and compute_saved (the part of the FLOPs so far, 0 to 1).
        looks: One dict per look at held-out rows: step, votes, components, rise, rows, loss, average_loss, difference,
            error, ended.
        savings: FLOPs up to the last log or the end, as the fields of `Savings`; None where they are not counted.
        ended: `"converged"` (max_frozen_fraction reached), `"look"` (a look said so), `"completed"` (all planned
            steps) or `"stopped"` (earlier, by something else); None while the run goes on, and for one that was killed.
        shares: Component name -> the part of a full step's FLOPs that freezing it saves; None where it is not known.
        versions: Package -> version, of what the run used.
        earlier_seconds: Wall time of training in the sessions before this one.
    """

    def __init__(
        self,
        config: dict[str, Any],
        total_steps: int,
        t_grace: int,
        components: list[dict[str, Any]],
        steps: Iterable[int] = (),
        values: Mapping[str, Sequence[float]] | None = None,
        events: Iterable[dict[str, Any]] = (),
        logs: Iterable[dict[str, float]] = (),
        savings: dict[str, float] | None = None,
        ended: str | None = None,
        looks: Iterable[dict[str, Any]] = (),
        versions: dict[str, str] | None = None,
        shares: dict[str, float] | None = None,
    ) -> None:
        self.config, self.total_steps, self.t_grace, self.components = config, total_steps, t_grace, components
        self.steps, self.events, self.logs, self.looks = list(steps), list(events), list(logs), list(looks)
        self.savings, self.ended, self.shares, self.versions = savings, ended, shares, dict(versions or {})
        self.earlier_seconds = 0.0
        self._ends: dict[str, int] = {}  # length of a series that is shorter than the record
        self._named: list[str] | None = None  # the components of the last check, and where they are in a row
        self._live: Any = slice(None)
        self._label: list[tuple[str, str]] | None = None
        self._final = np.empty(0, dtype=np.float32)  # the last value of each series
        self._exact: Mapping[str, Sequence[float | None]] | None = None  # as an older version has compared them
        self._journal, self._window = Journal(), WINDOW
        self._places = self._index()
        matrix = np.full((len(self.steps), len(components)), np.nan, dtype=np.float32)
        for name, series in (values or {}).items():
            matrix[: len(series), self._places[name]] = schema.narrow(np.asarray(series, dtype=np.float64))
            if len(series) < len(self.steps):
                self._ends[name] = len(series)
        self._take(Rows.of(matrix))

    @classmethod
    def start(
        cls, components: Iterable[Component], config: dict[str, Any], *, total_steps: int, t_grace: int
    ) -> History:
        """An empty history of these components."""
        return cls(config, total_steps, t_grace, [described(c) for c in components], versions=versions_of_run())

    # --- recording -----------------------------------------------------------------------------------------------

    def record(self, step: int, names: list[str], values: Any) -> None:
        """Add one check.

        Args:
            step: The optimizer step, not before that of the last check.
            names: Every component that was not frozen before it.
            values: (len(names),) their statistic, a tensor on the host or an array; NaN where there is none.
        """
        if names != self._named:
            self._named = list(names)
            places = [self._places[name] for name in names]
            self._live = slice(None) if places == list(range(self._rows.width)) else np.array(places, dtype=np.int64)
            known = set(names)
            for name in self._places:  # a series ends where its component is not measured any more
                if name not in known:
                    self._ends.setdefault(name, len(self.steps))
                elif name in self._ends:
                    del self._ends[name]
        row = np.full(self._rows.width, np.nan, dtype=np.float32)
        row[self._live] = schema.narrow(values.numpy() if hasattr(values, "numpy") else values)
        self.steps.append(int(step))
        self._rows.append(row)
        self._final[self._live] = row[self._live]
        self._exact = None
        if self._journal.file is not None and self._rows.waiting >= self._window:
            written = self.flush()
            self._window = WINDOW if written else self._rows.waiting + WINDOW

    def record_freeze(self, step: int, component: Component, value: float) -> None:
        """Add one freezing; `value` is what fell below the threshold."""
        self.events.append({"step": step, "name": component.name, "value": value, "tau": component.tau})
        self._ends[component.name] = len(self.steps)

    def record_log(self, row: dict[str, float]) -> None:
        """Add one log; a second one at the same step adds only what the first does not say."""
        if self.logs and self.logs[-1]["step"] == row["step"]:
            self.logs[-1] = {**row, **self.logs[-1]}
        else:
            self.logs.append(row)

    def add_components(self, components: Iterable[Component]) -> None:
        """Components that are tracked from now on; for the checks so far they have no value."""
        more = [described(component) for component in components]
        self.components = [*self.components, *more]
        self._rows.grow(len(more))
        self._places, self._named = self._index(), None
        self._final = np.concatenate([self._final, np.full(len(more), np.nan, dtype=np.float32)])

    def adopt(self, earlier: History) -> None:
        """Go on from the record of the sessions before, which has been cut to where this one begins.

        The earlier history is used up. Its file, if it has one, is continued by `open`.
        """
        rows = earlier._rows
        names, before = list(self._places), list(earlier._places)
        if names != before:
            rows = rows.in_order([earlier._places.get(name, -1) for name in names])
        self.steps, self.logs, self.shares = earlier.steps, earlier.logs, earlier.shares
        self._ends = {name: end for name, end in earlier._ends.items() if name in self._places}
        self._journal.written = earlier._journal.written if names == before else {}
        self._take(rows)
        self.earlier_seconds = max((row["seconds"] for row in self.logs), default=0.0)

    def truncate(self, step: int, check: int | None = None) -> None:
        """Forget everything after `step`, and checks after `check` if given (a resumed run measures them again)."""
        checks = bisect_right(self.steps, step if check is None else check)
        del self.steps[checks:]
        self.events = [event for event in self.events if event["step"] <= step]
        self.looks = [look for look in self.looks if look["step"] <= step]
        self.logs = [row for row in self.logs if row["step"] <= step]
        self.savings = self.ended = None
        frozen = self.frozen
        self._ends = {name: min(end, checks) for name, end in self._ends.items() if name in frozen or end < checks}
        self._rows.cut(checks)
        self._take(self._rows)

    # --- the file ------------------------------------------------------------------------------------------------

    def open(self, path: str | os.PathLike[str]) -> None:
        """Keep the record in a file from now on: in `grades_history.arrow` of a directory, or the `.arrow` file `path`.

        The file of the record that was adopted is continued, without what was written after the checkpoint. Any other
        file there is replaced.

        Raises:
            OSError: the file cannot be written.
        """
        self._journal.open(self, _arrow(Path(path)))

    def flush(self, *, urgent: bool = True) -> bool:
        """Append to the file what has come since the last time; without a file nothing happens.

        A disk that cannot be written is told once, and training goes on: what is missing is appended when it can be.

        Args:
            urgent: At a checkpoint and at the end. A log is not: for one the file is written every five seconds at
                most, so that its messages do not become tiny.

        Returns:
            Whether the file is as the record is, or was written less than five seconds ago.
        """
        return self._journal.flush(self, urgent=urgent)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a copy to `path` atomically, in the format that its name asks for.

        `.arrow` or a directory (`grades_history.arrow` in it); `.parquet`, one row per value; `.csv`, one row per
        check; any other name JSON. A reader sees the old file or the new one, never half of one; a full disk leaves the
        old one. The file that `open` was called with is only appended to.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".arrow" and not path.is_dir():
            exports.write(self, path)
        elif (file := self._journal.file) is not None and file.is_at(_arrow(path)):
            self._journal.append(self)
        else:
            self._journal.create(self, _arrow(path), keep=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `open` or `save` wrote; a directory stands for the record in it, also that of an older version.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another format.
        """
        path = Path(path)
        if path.is_dir():
            found = path / FILE_NAME
            path = found if found.is_file() or not (path / JSON_NAME).is_file() else path / JSON_NAME
        with open(path, "rb") as file:
            start = file.read(4)
        try:
            if start == _CONTINUATION or path.suffix == ".arrow":
                frame, steps, rows, ends = read(path)
                history = cls(**frame)
                history.steps, history._ends = steps, ends
                history._take(rows)
                history._journal.remember(history)
                return history
            if start == b"PAR1" or path.suffix == ".parquet":
                return cls.from_dict(exports.read_parquet(path))
            return cls.from_dict(schema.parse(path.read_bytes()))
        except (ValueError, RecursionError) as error:  # JSON of a damaged file, and all that the schema finds
            raise ValueError(f"{path}: {schema.visible(str(error))}") from error

    # --- reading -------------------------------------------------------------------------------------------------

    @property
    def values(self) -> Values:
        """Component name -> its statistic at each of `steps`; read from the file when it is asked for."""
        return Values(self._columns, self._places, self._ends, len(self.steps))

    @property
    def frozen(self) -> dict[str, int]:
        """Component name -> the step that it froze at, in the order of freezing."""
        return {event["name"]: event["step"] for event in self.events}

    def latest(self) -> dict[str, float]:
        """The finite values of the last check, by component."""
        if not self.steps:
            return {}
        row = self._rows.row(len(self.steps) - 1).tolist()
        return {name: value for name, value in zip(self._places, row, strict=True) if math.isfinite(value)}

    def sampled(self, most: int) -> Sampled:
        """The steps and values at `most` checks at most, evenly spaced, the first and last among them."""
        return sample(self._rows, self.steps, self._places, self._ends, most)

    def to_numpy(self, start: int = 0, stop: int | None = None) -> Floats:
        """The values of all components, (checks, components) in float32, of all checks or of some; NaN: no value."""
        return self._rows.read(start, len(self.steps) if stop is None else stop)

    def to_pandas(self) -> Any:
        """A DataFrame with a row for each check (index: its step) and a column for each component."""
        return exports.to_pandas(self)

    def checksum(self) -> int:
        """Differs between runs: over the last check and the last value of every component."""
        number = len(self.steps)
        if self._exact is not None:
            last = {
                name: schema.plain(list(series[: self._ends.get(name, number)][-1:]))
                for name, series in self._exact.items()
            }
            text = json.dumps([self.steps[-1:], last], sort_keys=True)
        else:  # the same text, without ten thousand lists on the way
            finals, ends = self._final.tolist(), self._ends
            series = []
            for name, label in self._labels():
                value = finals[self._places[name]]
                known = "" if not ends.get(name, number) else repr(value) if value == value else "null"
                series.append(f"{label}: [{known}]")
            text = f"[{self.steps[-1:]}, {{{', '.join(series)}}}]"
        return zlib.crc32(text.encode())

    def to_dict(self, *, values: bool = True) -> dict[str, Any]:
        """Everything as plain JSON types; numbers that are not finite become None. `values=False`: all but those."""
        result: dict[str, Any] = {"format": schema.FORMAT, **schema.plain(self._raw_frame())}
        result["savings"] = schema.sound(self.savings)
        if values:
            result["values"] = {
                name: [value if value == value else None for value in series] for name, series in self.values.items()
            }
        return {**result, "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, data: Any) -> History:
        """The inverse of `to_dict`.

        Raises:
            ValueError: `data` is not a history, or one of a format that this version does not know.
        """
        found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
        if not isinstance(data, Mapping) or found != schema.FORMAT or isinstance(found, bool):
            raise ValueError(f"this is no GradES history of format {schema.FORMAT} (format: {str(found)[:20]!r}).")
        if "rows" in data:
            return cls._from_rows(data)
        missing = [key for key in ("steps", "values") if key not in data]
        if missing:
            raise ValueError(f"this GradES history is incomplete: it has no {missing[0]!r}.")
        frame, steps = schema.frame(data), schema.checks(data["steps"])
        exact, matrix, ends = schema.series(data["values"], frame["components"], len(steps))
        history = cls(steps=steps, **frame)
        history._ends, history._exact = ends, exact
        history._take(Rows.of(matrix))
        return history

    def state_dict(self) -> dict[str, Any]:
        """The same for checkpoints that hold tensors: `rows`, (checks, components) in float32, instead of `values`."""
        import torch

        rows = torch.from_numpy(self.to_numpy())
        return {**self.to_dict(values=False), "rows": rows, "ends": dict(self._ends)}

    @classmethod
    def _from_rows(cls, data: Mapping[str, Any]) -> History:
        frame, steps = schema.frame(data), schema.checks(data.get("steps"))
        rows = np.asarray(data["rows"])
        if rows.dtype != np.float32 or rows.shape != (len(steps), len(frame["components"])):
            raise ValueError("this GradES history is damaged: its rows are not a value for each check and component.")
        history = cls(steps=steps, **frame)
        history._ends = schema.ends(data.get("ends"), history._places.keys(), len(steps))
        history._take(Rows.of(schema.narrow(rows)))
        return history

    def __repr__(self) -> str:
        last = f", the last at step {self.steps[-1]}" if self.steps else ""
        return f"<History of {len(self.components)} components: {len(self.steps)} checks{last}>"

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds its values in memory, and leaves the file alone."""
        kept = ("steps", "earlier_seconds", "_ends", "_exact")
        return {**self._raw_frame(), "rows": self.to_numpy(), **{key: getattr(self, key) for key in kept}}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update({key: list(v) if isinstance(v, list) else v for key, v in state.items() if key != "rows"})
        self._journal, self._window, self._label = Journal(), WINDOW, None
        self._places = self._index()
        self._take(Rows.of(state["rows"]))

    # --- parts ---------------------------------------------------------------------------------------------------

    def _index(self) -> dict[str, int]:
        return {component["name"]: place for place, component in enumerate(self.components)}

    def _labels(self) -> list[tuple[str, str]]:
        """The names in alphabetical order, each with its text in JSON."""
        if self._label is None or len(self._label) != len(self._places):
            self._label = [(name, json.dumps(name)) for name in sorted(self._places)]
        return self._label

    def _take(self, rows: Rows) -> None:
        """These are the rows now."""
        self._rows, self._columns, self._named = rows, Columns(rows), None
        count, ends = len(self.steps), self._ends
        last = np.array([min(count, ends.get(name, count)) - 1 for name in self._places], dtype=np.int64)
        self._final = np.full(len(self._places), np.nan, dtype=np.float32)
        for check in np.unique(last[last >= 0]).tolist():
            places = last == check
            self._final[places] = rows.row(check)[places]

    def _raw_frame(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in (*schema.SINGLE, *schema.LISTS)}


def _arrow(path: Path) -> Path:
    """The Arrow file that a path stands for, wherever the process may go."""
    return (path if path.suffix == ".arrow" and not path.is_dir() else path / FILE_NAME).absolute()
