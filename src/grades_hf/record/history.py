"""History: what was measured at every check and when each component froze, in memory and as JSON or parquet."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..find.components import Component

FORMAT = 1
FILE_NAME = "grades_history.json"


@dataclass
class History:
    """The record of one run.

    Attributes:
        config: The options, as `GradESConfig.to_dict()` gives them.
        total_steps: Planned number of optimizer steps, T.
        t_grace: Last step at which nothing may freeze, ceil(alpha * T).
        components: One dict per component: name, group, projection, layer, tower, adapter, numel, monitor, tau.
        steps: Optimizer steps (1-based) at which a check was made.
        values: Component name -> its statistic at each of `steps`, from the first on; a series ends with the check
            that froze the component. NaN stands for "no finite
            value was measured" (null in JSON).
        events: One dict per component that is frozen now: step, name, value, tau.
        logs: One dict per training log, in the order of steps: step (optimizer steps so far), seconds (wall time of
            training so far, that of resumed sessions added; what a killed one lost is not in it), frozen (components),
            and where they are known loss and compute_saved (the part of the FLOPs so far, 0 to 1).
        savings: FLOPs up to the last log or the end, as the fields of `Savings`; None where they are not counted.
        ended: `"converged"` (max_frozen_fraction reached), `"completed"` (all planned steps) or `"stopped"` (earlier,
            by something else); None while the run is going on, and for one that was killed.
        versions: Package -> version, of what the run used.
    """

    config: dict[str, Any]
    total_steps: int
    t_grace: int
    components: list[dict[str, Any]]
    steps: list[int] = field(default_factory=list)
    values: dict[str, array[float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    savings: dict[str, float] | None = None
    ended: str | None = None
    looks: list[dict[str, Any]] = field(default_factory=list)
    earlier_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(
        cls, components: Iterable[Component], config: dict[str, Any], *, total_steps: int, t_grace: int
    ) -> History:
        """An empty history of these components."""
        described: list[dict[str, Any]] = [
            {
                "name": c.name, "group": c.group, "projection": c.projection, "layer": c.layer, "tower": c.tower,
                "adapter": c.adapter, "numel": c.numel, "monitor": c.monitor, "tau": c.tau,
            }
            for c in components
        ]  # fmt: skip
        values = {item["name"]: array("d") for item in described}
        return cls(config, total_steps, t_grace, described, values=values, versions=_versions())

    def record(self, step: int, names: list[str], values: Tensor) -> None:
        """Add one check: the statistic (NaN: no value) of every component that was not frozen before it."""
        self.steps.append(step)
        for name, value in zip(names, values.tolist(), strict=True):
            self.values[name].append(value)

    def add_components(self, components: Iterable[Component]) -> None:
        """Components that are tracked from now on; for the checks so far they have no value."""
        more = History.start(components, {}, total_steps=0, t_grace=0)
        self.components = [*self.components, *more.components]
        self.values |= {name: array("d", [math.nan] * len(self.steps)) for name in more.values}

    def record_freeze(self, step: int, component: Component, value: float) -> None:
        """Add one freezing; `value` is what fell below the threshold."""
        self.events.append({"step": step, "name": component.name, "value": value, "tau": component.tau})

    def record_log(self, row: dict[str, float]) -> None:
        """Add one log; a second one at the same step adds only what the first does not say."""
        if self.logs and self.logs[-1]["step"] == row["step"]:
            self.logs[-1] = {**row, **self.logs[-1]}
        else:
            self.logs.append(row)

    def adopt(self, earlier: History) -> None:
        """Go on from the record of the sessions before, which has been cut to where this one begins."""
        self.steps, self.values, self.logs = earlier.steps, earlier.values, earlier.logs
        self.earlier_seconds = max((row["seconds"] for row in self.logs), default=0.0)

    @property
    def frozen(self) -> dict[str, int]:
        """Component name -> the step that it froze at, in the order of freezing."""
        return {event["name"]: event["step"] for event in self.events}

    def latest(self) -> dict[str, float]:
        """The finite values of the last check, by component."""
        last = len(self.steps)
        return {
            name: series[-1]
            for name, series in self.values.items()
            if last and len(series) == last and math.isfinite(series[-1])
        }

    def checksum(self) -> int:
        """Differs between runs: over the last check and the last value of every component."""
        last = {name: [v if math.isfinite(v) else None for v in series[-1:]] for name, series in self.values.items()}
        return zlib.crc32(json.dumps([self.steps[-1:], last], sort_keys=True).encode())

    def truncate(self, step: int, check: int | None = None) -> None:
        """Forget everything after `step`, and checks after `check` if given (a resumed run measures them again)."""
        checks = sum(1 for item in self.steps if item <= (step if check is None else check))
        del self.steps[checks:]
        for series in self.values.values():
            del series[checks:]
        self.events = [event for event in self.events if event["step"] <= step]
        self.logs = [row for row in self.logs if row["step"] <= step]
        self.savings = self.ended = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; numbers that are not finite become None."""
        return {
            "format": FORMAT,
            "config": self.config,
            "total_steps": self.total_steps,
            "t_grace": self.t_grace,
            "components": self.components,
            "steps": self.steps,
            "values": {
                name: [value if math.isfinite(value) else None for value in series]
                for name, series in self.values.items()
            },
            "events": self.events,
            "logs": [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in self.logs],
            "savings": self.savings,
            "ended": self.ended,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> History:
        """The inverse of `to_dict`.

        Raises:
            ValueError: `data` is not a history, or one of a format that this version does not know.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise ValueError(f"this is no GradES history of format {FORMAT} (format: {found!r}).")
        try:
            history = cls(
                config=dict(data["config"]),
                total_steps=int(data["total_steps"]),
                t_grace=int(data["t_grace"]),
                components=list(data["components"]),
                steps=[int(step) for step in data["steps"]],
                values={
                    name: array("d", (math.nan if value is None else float(value) for value in series))
                    for name, series in data["values"].items()
                },
                events=check_events(data["events"]),
                logs=[_log(row) for row in data.get("logs", ())],  # older files have none
                savings=data.get("savings"),
                ended=data.get("ended"),
                versions=dict(data.get("versions", {})),
            )
            described = {component["name"]: component["monitor"] for component in history.components}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this GradES history is incomplete: {error!r}.") from error
        if described.keys() != history.values.keys():
            raise ValueError("this GradES history contradicts itself: it has values of other components than it names.")
        return history

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to `path` atomically; a name that ends in `.parquet` gives one row per value, any other name JSON.

        A reader sees the old file or the new one, never half of one; a full disk leaves the old one.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")  # what a killed process has left is overwritten
        try:
            with open(temporary, "wb") as file:
                if path.suffix == ".parquet":
                    self._write_parquet(file)
                else:
                    file.write(json.dumps(self.to_dict(), allow_nan=False).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote; a directory stands for the `grades_history.json` in it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or of another format.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        if path.suffix == ".parquet":
            return cls._read_parquet(path)
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _write_parquet(self, file: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = [name for name, series in self.values.items() for _ in series]
        steps = [step for series in self.values.values() for step in self.steps[: len(series)]]
        values = [value for series in self.values.values() for value in series]
        frame = self.to_dict() | {"values": {name: [] for name in self.values}}
        table = pa.table({"name": names, "step": pa.array(steps, pa.int64()), "value": pa.array(values, pa.float64())})
        pq.write_table(table.replace_schema_metadata({"grades_hf": json.dumps(frame, allow_nan=False)}), file)

    @classmethod
    def _read_parquet(cls, path: Path) -> History:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
        frame = (table.schema.metadata or {}).get(b"grades_hf")
        if frame is None:
            raise ValueError(f"{path} is a parquet file, but no GradES history.")
        history = cls.from_dict(json.loads(frame))
        for name, value in zip(table["name"].to_pylist(), table["value"].to_pylist(), strict=True):
            history.values[name].append(value)
        return history


def _versions() -> dict[str, str]:
    """Of Python, of this package, and of those of its field that have been imported."""
    from .. import __version__

    names = ("torch", "transformers", "peft", "accelerate", "trl", "lightning", "bitsandbytes")
    loaded = {name: str(sys.modules[name].__version__) for name in names if name in sys.modules}
    return {"python": platform.python_version(), "grades_hf": __version__, **loaded}


def _log(row: Mapping[str, Any]) -> dict[str, float]:
    counts = {key: int(row[key]) for key in ("step", "frozen")}
    return {key: math.nan if value is None else value for key, value in row.items()} | counts


def check_events(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Freezings that were read from a file, checked.

    Raises:
        KeyError, TypeError, ValueError: they are incomplete, or a component is frozen twice.
    """
    read = [{**event, "step": int(event["step"]), "name": event["name"]} for event in events]
    for event in read:
        if not {"value", "tau"} <= event.keys():
            raise KeyError(f"an event has {', '.join(event)} only")
    if len({event["name"] for event in read}) != len(read):
        raise ValueError("a component is frozen twice.")
    return read
