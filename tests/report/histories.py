"""Made-up histories of any shape."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence

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
    return History({"reduction": "sum"}, planned, planned // 2, components, list(range(1, steps + 1)), values, events)
