"""Made-up components and runs: what an engine tells a history, without an engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grades_hf import History

FROZEN = {1: 4, 3: 12}  # place -> step


@dataclass(eq=False)
class Made:
    """What a history asks a component for."""

    name: str
    layer: int
    group: str = "attention"
    projection: str = "q"
    tower: str | None = None
    adapter: bool = False
    numel: int = 2
    monitor: str = "gradient_norm"
    tau: float | None = 0.5


def components(number: int = 5, first: int = 0) -> list[Any]:
    """Components of no model."""
    return [Made(f"layers.{layer}.q_proj", layer) for layer in range(first, first + number)]


def empty(found: Iterable[Any] | None = None, total_steps: int = 30) -> History:
    """A history to record into."""
    found = components() if found is None else found
    config = {"alpha": 0.5, "reduction": "sum", "check_every": 1}
    return History.start(found, config, total_steps=total_steps, t_grace=2)


def value(step: int, place: int) -> float:
    """The statistic; no float32, and none at the first step."""
    return math.nan if step == 1 else 1 / (step + place / 10)


def go_on(
    history: History,
    steps: range,
    frozen: Mapping[int, int] = FROZEN,
    flush_every: int = 5,
    found: list[Any] | None = None,
) -> History:
    """Record these steps, with a log at each, and flush now and then."""
    found = components() if found is None else found
    for step in steps:
        live = [place for place, component in enumerate(found) if component.name not in history.frozen]
        values = np.array([value(step, place) for place in live])
        history.record(step, [found[place].name for place in live], values)
        for place in live:
            if frozen.get(place) == step:
                history.record_freeze(step, found[place], value(step, place))
        loss = math.nan if step == 3 else 2 / step
        history.record_log({"step": step, "seconds": step / 4, "frozen": len(history.events), "loss": loss})
        if step % flush_every == 0:
            assert history.flush()
    return history


def resumed(folder: Path, step: int, check: int | None = None) -> History:
    """What an engine does with the record of a run that goes on after `step`."""
    earlier = History.load(folder)
    earlier.truncate(step, check)
    history = empty()
    history.events = [dict(event) for event in earlier.events]
    history.looks = list(earlier.looks)
    history.adopt(earlier)
    history.open(folder)
    return history


def same(one: History, other: History) -> bool:
    """Whether two records say the same; also their checksums."""
    return one.to_dict() == other.to_dict() and one.checksum() == other.checksum()
