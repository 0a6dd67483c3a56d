"""Which thresholds would have given a run a certain compute? Found by replaying Algorithm 1 on what it recorded.

The run must have frozen nothing (`recipes/finetune.py --observe`). One number is sought, the same for all: what each
group's own level is multiplied with. That level is the median of the group's values after the grace period.

The replay is exact for the values as they are recorded. A run that really freezes has other values from the first
freezing on: clipping hands a frozen matrix's part of the norm to the others, for example.

Compute, as a part of the run with nothing frozen (its steps cost 1 each): a step costs 1 less the weight gradients of
what was frozen at an earlier step (at its own step a matrix's gradient is still computed, since it is measured), and
with `freeze_prefix` also less the input gradients of the lowest blocks that are frozen as a whole. The steps after the
end of training cost nothing. Optimizer, norms and the measuring itself are left out. Shares come from the
`costs` in the run's results.json; without them every step is taken as three equal products for each tracked matrix
(forward, input gradient, weight gradient), which holds for full weights alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .config import DEFAULTS, is_count
from .criteria import Threshold, grace_steps
from .history import History
from .report.plots import grid_of
from .report.summary import group_label

BY = ("all", "group", "projection")


@dataclass(frozen=True)
class Costs:
    """Shares of a step with nothing frozen.

    Attributes:
        weight_gradient: Of each component, by name.
        input_gradient: Of each block from the lowest up; empty where that is not known.
    """

    weight_gradient: dict[str, float]
    input_gradient: tuple[float, ...] = ()


@dataclass(frozen=True)
class Suggestion:
    """Thresholds and what they would have done.

    Attributes:
        tau: Group -> threshold, as `GradESConfig(tau=...)` takes it; the only key of `by="all"` is `".*"`.
        compute: Part of the run's compute that was left.
        more: The next larger compute that any thresholds of this family give; 1.0 where that is freezing nothing.
        frozen: Component name -> the step that it would have frozen at.
        last_step: The last step of the run.
    """

    tau: dict[str, float]
    compute: float
    more: float
    frozen: dict[str, int]
    last_step: int


@dataclass(frozen=True)
class Rule:
    """The options of the replayed run, as in `GradESConfig`; `grace` is `ceil(alpha T)`."""

    grace: int
    patience: int
    max_frozen_fraction: float
    delay_transfer: bool
    freeze_prefix: bool


def suggest(
    history: History,
    target_compute: float,
    *,
    costs: Costs | None = None,
    by: str = "projection",
    alpha: float | None = None,
    patience: int | None = None,
    freeze_prefix: bool | None = None,
) -> Suggestion:
    """The smallest thresholds with which the recorded run would have used at most `target_compute`.

    Args:
        history: Of a run in which nothing froze.
        target_compute: Part of the run's compute, between 0 and 1.
        costs: Shares of a step; default: three equal products a matrix.
        by: What gets a threshold of its own: `"projection"` (q, k, up, ...), `"group"` (attention, mlp, ...), in models
            with several towers those of each tower, or `"all"`.
        alpha: As in `GradESConfig`; default: that of the run.
        patience: The same.
        freeze_prefix: The same.

    Raises:
        ValueError: an argument cannot be, the run froze something, or no threshold gives so little compute.
    """
    rule = _rule(history, alpha, patience, freeze_prefix)
    costs = costs or equal_costs(history)
    if not 0 < target_compute < 1:
        raise ValueError(f"target_compute={target_compute} must be a number between 0 and 1.")
    if by not in BY:
        raise ValueError(f"by={by!r} is unknown; use one of {', '.join(BY)}.")
    if history.events:
        raise ValueError(
            f"the run froze {len(history.events)} of {len(history.components)} components, so their values are missing "
            "from then on. Record a run that freezes nothing: recipes/finetune.py --observe."
        )
    if rule.freeze_prefix and not costs.input_gradient:
        raise ValueError("freeze_prefix=True needs the cost of each block, which the run's results.json does not hold.")
    groups = {component["name"]: group_key(component, by) for component in history.components}
    values: dict[str, list[float]] = {key: [] for key in groups.values()}
    for name, series in history.values.items():
        pairs = zip(history.steps, series, strict=True)
        values[groups[name]] += [v for step, v in pairs if step > rule.grace and math.isfinite(v)]
    empty = [key for key, found in values.items() if not found]
    if empty:
        raise ValueError(f"no value was recorded after step {rule.grace} for {empty[0]!r}; lower alpha.")
    levels = {key: median(found) for key, found in values.items()}
    # A threshold between two neighbouring values does the same as any other between them.
    ratios = sorted({value / levels[key] for key, found in values.items() for value in found})
    scales = [(low * high) ** 0.5 for low, high in itertools.pairwise(ratios)] + [2 * ratios[-1]]

    def replayed(scale: float) -> tuple[float, dict[str, int], int]:
        tau = {name: scale * levels[key] for name, key in groups.items()}
        frozen, last = replay(history, tau, rule)
        return compute(history, frozen, last, costs, rule), frozen, last

    least = replayed(scales[-1])[0]
    if least > target_compute:
        raise ValueError(
            f"target_compute={target_compute} is out of reach: with everything frozen as early as can be, the run uses "
            f"{least:.3f}. Lower alpha, or end the run earlier."
        )
    low, high = -1, len(scales) - 1  # the scale at `high` is enough, the one at `low` is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if replayed(scales[middle])[0] <= target_compute else (middle, high)
    used, frozen, last = replayed(scales[high])
    more = replayed(scales[low])[0] if low >= 0 else 1.0
    return Suggestion({key: scales[high] * level for key, level in levels.items()}, used, more, frozen, last)


def replay(history: History, tau: Mapping[str, float], rule: Rule) -> tuple[dict[str, int], int]:
    """Algorithm 1 on recorded values.

    Args:
        history: Of a run in which nothing froze.
        tau: Component name -> threshold.
        rule: The other options.

    Returns:
        Component name -> the step that it freezes at, in that order; and the last step of the run.
    """
    criterion = Threshold(tau.__getitem__, rule.patience)
    frozen: dict[str, int] = {}
    names = [component["name"] for component in history.components]
    for index, step in enumerate(history.steps):
        if step <= rule.grace:
            continue
        at = step + rule.delay_transfer
        if at > history.total_steps:
            break
        for name in names:
            if name not in frozen and criterion.update(name, step, history.values[name][index]):
                frozen[name] = at
        if len(frozen) / len(names) >= rule.max_frozen_fraction:
            return frozen, at
    return frozen, _length(history)


def compute(history: History, frozen: Mapping[str, int], last_step: int, costs: Costs, rule: Rule) -> float:
    """The part of T whole steps that a run costs, see the top of this file."""
    saved = sum(costs.weight_gradient[name] * (last_step - at) for name, at in frozen.items())
    if rule.freeze_prefix:
        ends: dict[int, int] = {}  # block -> the step that the last of its components freezes at
        for component in history.components:
            layer = component["layer"]
            if layer is not None:
                ends[layer] = max(ends.get(layer, 0), frozen.get(component["name"], last_step))
        end = 0
        for layer, share in enumerate(costs.input_gradient):
            end = max(end, ends.get(layer, last_step))
            saved += share * (last_step - end)
    return (last_step - saved) / _length(history)


def equal_costs(history: History) -> Costs:
    """Three equal products a matrix: forward, input gradient, weight gradient.

    Raises:
        ValueError: the run trained adapters, whose base is not in the history.
    """
    if any(component["adapter"] for component in history.components):
        raise ValueError(
            "the run trained adapters, and what share of a step their gradients are is only known with the run's "
            "results.json. Record it with recipes/finetune.py --observe."
        )
    whole = 3 * sum(component["numel"] for component in history.components)
    layers: dict[int, float] = {}
    for component in history.components:
        if component["layer"] is not None and component["tower"] is None:
            layers[component["layer"]] = layers.get(component["layer"], 0.0) + component["numel"] / whole
    shares = {component["name"]: component["numel"] / whole for component in history.components}
    return Costs(shares, tuple(layers[layer] for layer in sorted(layers)))


def load_costs(folder: Path) -> Costs | None:
    """The costs in a run's results.json; None where there are none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / "results.json"
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("costs")
        return Costs(dict(found["weight_gradient"]), tuple(found["input_gradient"])) if found else None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from error


def group_key(component: Mapping[str, Any], by: str) -> str:
    """The key of `GradESConfig.tau` that stands for a component's group."""
    if by == "all":
        return ".*"
    return ".".join(filter(None, (component["tower"], str(component[by]))))


def to_text(history: History, suggestion: Suggestion, by: str = "projection") -> str:
    """The suggestion as text: thresholds, compute, and a map of layers by matrices with the freezing steps."""
    taus = {key: float(f"{value:.9g}") for key, value in suggestion.tau.items()}
    frozen, total = suggestion.frozen, len(history.components)
    lines = [
        f"compute: {suggestion.compute:.3f} of the recorded run; {suggestion.more:.3f} with the next smaller tau",
        f"frozen: {len(frozen)} of {total} components; last step {suggestion.last_step} of {_length(history)}",
        "",
        f"tau: {next(iter(taus.values())) if by == 'all' else json.dumps(taus)}",
        "",
    ]
    columns, rows = grid_of(history)
    cells: dict[tuple[Any, str], list[int | None]] = {}
    for component in history.components:
        column = f"{component['tower']} {component['projection']}" if component["tower"] else component["projection"]
        cells.setdefault((component["layer"], column), []).append(frozen.get(component["name"]))
    table = [["layer", *columns]]
    for row in rows:
        table.append(["none" if row is None else str(row), *(_steps(cells.get((row, column))) for column in columns)])
    widths = [max(len(line[index]) for line in table) for index in range(len(table[0]))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    by_group: dict[str, list[str]] = {}
    for component in history.components:
        by_group.setdefault(group_label(component), []).append(component["name"])
    lines.append("")
    for label, names in by_group.items():
        steps = sorted(frozen[name] for name in names if name in frozen)
        span = f", steps {steps[0]} to {steps[-1]}" if steps else ""
        lines.append(f"{label}: {len(steps)} of {len(names)} frozen{span}")
    lines += [
        "",
        "The step at which each matrix would have frozen (. never; with several in one place the first, and + if not",
        "all froze). A run that freezes has other values from its first freezing on, so its compute will differ.",
    ]
    return "\n".join(lines) + "\n"


def _length(history: History) -> int:
    """The steps that were made: all that were planned, unless checks are missing at the end."""
    last, every = max(history.steps), history.config["check_every"]
    return history.total_steps if history.total_steps - last < every else last


def _steps(steps: Sequence[int | None] | None) -> str:
    if steps is None:
        return ""
    known = [step for step in steps if step is not None]
    return (f"{min(known)}" if known else ".") + ("+" if known and len(known) < len(steps) else "")


def _rule(history: History, alpha: float | None, patience: int | None, freeze_prefix: bool | None) -> Rule:
    config = DEFAULTS["threshold"] | {name: value for name, value in history.config.items() if value is not None}
    alpha = config["alpha"] if alpha is None else alpha
    patience = config["patience"] if patience is None else patience
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must be a number in [0, 1).")
    if not is_count(patience):
        raise ValueError(f"patience={patience} must be a whole number of checks, 1 or more.")
    if not history.steps:
        raise ValueError("the run recorded no values, so there is nothing to replay.")
    return Rule(
        grace=grace_steps(alpha, history.total_steps),
        patience=patience,
        max_frozen_fraction=config["max_frozen_fraction"],
        delay_transfer=config.get("delay_transfer", False),
        freeze_prefix=config.get("freeze_prefix", False) if freeze_prefix is None else freeze_prefix,
    )
