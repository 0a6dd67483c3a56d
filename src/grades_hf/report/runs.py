"""What directories hold of runs: GradES's record, what a recipe wrote, and the log of any Trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..record.history import History
from .charts import Point
from .summary import finite, last_step, losses, saved


@dataclass(frozen=True)
class Run:
    """What a directory holds of one run.

    Attributes:
        folder: The directory.
        label: Its name, short, and different from the other runs'.
        history: What GradES recorded; None for a run without GradES.
        results: `results.json` of a recipe; empty where there is none.
        log: The rows that Trainer logged (`trainer_state.json`), those with a step.
        planned: Optimizer steps that Trainer planned; 0 where it is not known.
    """

    folder: Path
    label: str
    history: History | None
    results: dict[str, Any]
    log: Sequence[Mapping[str, Any]] = ()
    planned: int = 0

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps that were run, and planned ones."""
        if "steps_run" in self.results:
            return int(self.results["steps_run"]), int(self.results["steps_planned"])
        if self.history is not None:
            return last_step(self.history), self.history.total_steps
        last = max((row["step"] for row in self.log), default=0)
        return last, max(last, self.planned)

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        run, planned = self.steps
        return "steps_run" in self.results or run >= planned or self.history is None or self.history.ended is not None

    @property
    def saved(self) -> tuple[float, str] | None:
        """The part of the FLOPs that was saved, and of which ones; None where they were not counted."""
        if self.history is not None and (found := saved(self.history)):
            return found
        part = _part(self.results, "compute").get("saved")
        return (part, "of the planned FLOPs, counted") if finite(part) else None

    @property
    def seconds(self) -> float | None:
        """Wall time of training."""
        logged = [row["seconds"] for row in self.history.logs[-1:]] if self.history else []
        told = [_part(self.results, "seconds").get("training"), *(row.get("train_runtime") for row in self.log[-1:])]
        return next(filter(finite, [*logged, *told]), None)

    @property
    def losses(self) -> list[Point]:
        """Step and training loss of each log."""
        return (losses(self.history) if self.history else []) or self._logged("loss")

    @property
    def held_out(self) -> list[Point]:
        """Step and loss of each evaluation that Trainer made."""
        return self._logged("eval_loss")

    @property
    def quality(self) -> str:
        """What a recipe measured after training."""
        after = _part(_part(self.results, "evaluation"), "after")
        forms = {"loss": "{:.4f} loss", "acc": "{:.1%} acc", "acc_norm": "{:.1%} acc_norm"}
        return ", ".join(form.format(after[name]) for name, form in forms.items() if finite(after.get(name)))

    @property
    def model(self) -> str | None:
        """What was trained, where a file says so."""
        named = self.results.get("model") or _part(self.results, "sources").get("model")
        if named:
            return str(named)
        for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
            if name := (read_json(self.folder / file) or {}).get(key):
                return str(name)
        return None

    def _logged(self, key: str) -> list[Point]:
        return [(row["step"], float(row[key])) for row in self.log if finite(row.get(key))]


def load_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """What the directories hold: each a run, or a grid of runs (`TASK/ARM/seed-N`, as `benchmarks/compare.py` makes).

    A run has a record of GradES, or beside others at least a log of Trainer or a results.json.

    Raises:
        ValueError: one of them holds no run, or a file is damaged; a single run has no history.
    """
    found: list[Run] = []
    for folder in map(Path, folders):
        cells = sorted(path.parent for path in folder.glob("*/*/seed-*/results.json"))
        run = _load(folder)
        if run.history is None and not run.results and cells:
            found += [run for run in map(_load, cells) if run.results or run.history]  # else a cell that has not ended
            continue
        if run.history is None and (len(folders) == 1 or not (run.results or run.log)):
            given = f"RUN_DIR={str(folder)!r} holds no record of GradES"
            raise ValueError(f"{given}: give the output directory of a run with GradES.")
        found.append(run)
    if not found:
        raise ValueError(f"RUN_DIR={' '.join(map(str, folders))!r} holds no run that has ended.")
    places = [run.folder.resolve() for run in found]
    if len(set(places)) < len(places):
        raise ValueError(f"RUN_DIR={' '.join(map(str, folders))!r} names a run twice.")
    common = Path(os.path.commonpath([place.parent for place in places]))
    return [replace(run, label=str(place.relative_to(common))) for run, place in zip(found, places, strict=True)]


def read_history(path: Path) -> History | None:
    """The record of GradES at `path`, a directory or a file; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return History.load(path)
    except FileNotFoundError:
        return None
    except (OSError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _load(path: Path) -> Run:
    history = read_history(path)
    folder = path.parent if path.is_file() else path
    results = read_json(folder / "results.json") or {}
    if not all(isinstance(results.get(key), int) for key in ("steps_run", "steps_planned")):
        results = {}  # of a run that has not ended, or of another program
    files = [*folder.glob("checkpoint-*/trainer_state.json"), folder / "trainer_state.json"]
    states = [read_json(file) or {} for file in files]
    state = max(states, key=lambda state: step if finite(step := state.get("global_step")) else 0)
    rows, planned = state.get("log_history"), state.get("max_steps")
    log = [row for row in rows if isinstance(row, dict) and finite(row.get("step"))] if isinstance(rows, list) else []
    return Run(folder, folder.name, history, results, log, planned if isinstance(planned, int) else 0)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file that holds an object; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    return content if isinstance(content, dict) else None


def _part(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}
