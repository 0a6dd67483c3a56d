"""Made-up histories of any shape."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from typing import Any

from grades_hf import History

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


def history(
    layers: int = 3,
    projections: Sequence[str] = PROJECTIONS,
    towers: Sequence[str | None] = (None,),
    frozen: float = 0.5,
    steps: int = 20,
    planned: int = 24,
    experts: int = 1,
    outside: bool = False,
    tau: tuple[float, float] = (1.0, 2.0),
) -> History:
    """A run of `steps` steps with a grace period of a half, in which the part `frozen` of the components froze."""
    source = random.Random(0)
    components, values, events = [], {}, []
    for tower in towers:
        for layer in [*range(layers), *([None] if outside else [])]:
            for projection in projections:
                for expert in range(experts):
                    name = f"{tower}.{layer}.{projection}.{expert}"
                    group = "attention" if projection in "qkvo" else "mlp"
                    components.append(
                        {
                            "name": name, "group": group, "projection": projection, "layer": layer, "tower": tower,
                            "adapter": True, "numel": 10, "monitor": "gradient_norm", "tau": tau[group == "mlp"],
                        }
                    )  # fmt: skip
                    last = source.randint(planned // 2 + 1, steps) if source.random() < frozen else None
                    ends = last or steps
                    values[name] = array("d", [math.nan, *(4 / t + source.random() for t in range(2, ends + 1))])
                    if last:
                        events.append({"step": last, "name": name, "value": values[name][-1], "tau": 1.0})
    return make(
        config={"reduction": "sum"}, total_steps=planned, t_grace=planned // 2, components=components,
        steps=list(range(1, steps + 1)), values=values, events=events,
    )  # fmt: skip


def make(**fields: Any) -> History:
    """A history with these attributes, made the way that a file is read."""
    return History.from_dict(
        {
            "format": 1, "config": fields["config"], "total_steps": fields["total_steps"], "t_grace": fields["t_grace"],
            "components": fields["components"], "steps": fields["steps"], "events": fields["events"],
            "values": {
                name: [value if math.isfinite(value) else None for value in series]
                for name, series in fields["values"].items()
            },
        }
    )  # fmt: skip


def changed(run: History, **fields: Any) -> History:
    """The same record with other fields, as they stand in a file."""
    if "values" in fields:
        values = {name: [float(v) for v in series] for name, series in fields["values"].items()}
        fields["values"] = {name: [v if math.isfinite(v) else None for v in series] for name, series in values.items()}
    return History.from_dict({**run.to_dict(), **fields})


def look(step: int, loss: float, average: float, ended: bool, votes: int = 4, error: float = 0.01) -> dict[str, Any]:
    """A look at 128 rows, of 6 components."""
    return {
        "step": step, "votes": votes, "components": 6, "rise": 1.2, "rows": 128, "loss": loss, "average_loss": average,
        "difference": average - loss, "error": error, "ended": ended,
    }  # fmt: skip


def looked(ended: str | None = "look", steps: int = 20, planned: int = 40) -> History:
    """A run without a tau, of 6 matrices; its second look ended it, or it goes on (None), or nothing ended it."""
    run = history(layers=2, projections=("q", "k", "up"), frozen=0.0, steps=steps, planned=planned)
    run.config, run.t_grace, run.ended = {"tau": None, "rise": 0.2, "reduction": "sum"}, 0, ended
    for component in run.components:
        component |= {"tau": None, "monitor": "gradient_per_loss"}
    run.logs = [
        {"step": t, "seconds": t / 2, "frozen": 0, "loss": 3 - t / 20, "votes": min(1.0, t / 20)}
        for t in range(2, steps + 1, 2)
    ]
    run.savings = {
        "steps": steps, "full": 10.0 * steps, "used": 10.0 * steps, "weight_gradient": 0.0, "input_gradient": 0.0,
        "adapter": 0.0, "planned": 10.0 * planned,
    }  # fmt: skip
    if ended == "look":
        run.looks = [look(12, 2.5, 2.52, False), look(steps, 2.6, 2.4, True, votes=6) | {"since": -0.12}]
    return run
