"""Which thresholds would have given a run a certain compute? Found by replaying Algorithm 1 on what it recorded.

The run must have frozen nothing: record one with a tau that nothing falls below, such as 1e-30. One number is sought,
the same for all: what each group's own level is multiplied with. That level is the median of the group's values after
the grace period.

Compute, as a part of the run with nothing frozen (its steps cost 1 each): a step costs 1 minus the weight gradients of
what was frozen at an earlier step (at its own step a matrix's gradient is still computed, since it is measured), and
with `freeze_prefix` also minus the input gradients of the lowest blocks that are frozen as a whole. The steps after the
end of training cost nothing. The measuring itself is left out. What share of a step each weight gradient is, the
history says (`History.shares`); without it every step is taken as three equal products for each tracked matrix
(forward, input gradient, weight gradient), which holds for full weights alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checks import is_count
from ..config import grace_steps
from ..record.history import History
from ..report.summary import CELLS, finite, step_tables, visible

BY = ("all", "group", "projection")
AT_ONCE = 0.05  # part of the run within which everything freezes "at once"
LARGEST = 1e300  # of a value; what is larger counts as none


@dataclass(frozen=True)
class Suggestion:
    """Thresholds and what they would have done."""

    tau: dict[str, float]  # group -> threshold, as `GradESConfig(tau=...)` takes it; of `by="all"` the only key is ".*"
    compute: float  # the part of the run's compute that was left
    more: float  # the next larger compute that any thresholds of this family give; 1.0 where that is freezing nothing
    frozen: dict[str, int]  # component name -> the step that it would have frozen at
    last_step: int  # of the run


@dataclass(frozen=True)
class Rule:
    """The options of the replayed run, as in `GradESConfig`; `grace` is `ceil(alpha T)`."""

    grace: int
    patience: int = 1
    max_frozen_fraction: float = 1.0
    delay_transfer: bool = False
    freeze_prefix: bool = False


# The steps at which a component reaches a new low over `patience` checks, and these lows: all that a replay needs.
Lows = tuple[NDArray[np.int64], NDArray[np.float64]]


def suggest(
    history: History,
    target_compute: float,
    *,
    shares: Mapping[str, float] | None = None,
    by: str = "projection",
    alpha: float | None = None,
    patience: int | None = None,
    freeze_prefix: bool | None = None,
) -> Suggestion:
    """The smallest thresholds with which the recorded run would have used at most `target_compute`.

    Args:
        history: Of a run in which nothing froze.
        target_compute: Part of the run's compute, between 0 and 1.
        shares: Component name -> the share of a step that its weight gradient is; default: the history's, or three
            equal products a matrix.
        by: What gets a threshold of its own: `"projection"` (q, k, up, ...), `"group"` (attention, mlp, ...), in models
            with several towers those of each tower, or `"all"`.
        alpha: As in `GradESConfig`; default: that of the run.
        patience: As in `GradESConfig`; default: that of the run.
        freeze_prefix: As in `GradESConfig`; default: that of the run.

    Raises:
        ValueError: an argument cannot be, the run froze something or says too little, or no threshold gives so little
            compute.
    """
    if not 0 < target_compute < 1:
        raise ValueError(f"target_compute={target_compute} must be a number between 0 and 1.")
    if by not in BY:
        raise ValueError(f"by={by!r} is unknown; use one of {', '.join(BY)}.")
    rule = _rule(history, alpha, patience, freeze_prefix)
    _refuse(history)
    shares = shares_of(history) if shares is None else shares
    blocks = _blocks(history, shares) if rule.freeze_prefix else []
    keys = {component["name"]: group_key(component, by) for component in history.components}
    levels = _levels(history, keys, rule)
    lows = {name: _lows(history, name, rule) for name in keys}
    # A threshold between two neighbouring lows does the same as any other between them.
    ratios = np.unique(np.concatenate([lows[name][1] / levels[key] for name, key in keys.items()]))
    ratios = ratios[(ratios > 0) & np.isfinite(ratios)]
    if not len(ratios):
        raise ValueError("no value greater than 0 was recorded often enough to replay; lower alpha or patience.")
    scales = [float(ratios[0]) / 2, *(float(low * high) ** 0.5 for low, high in itertools.pairwise(ratios))]
    scales.append(2 * float(ratios[-1]))

    def replayed(scale: float) -> tuple[float, dict[str, int], int]:
        frozen, last = replay(history, {name: scale * levels[key] for name, key in keys.items()}, rule, lows)
        return compute(history, frozen, last, shares, blocks), frozen, last

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


def replay(
    history: History, tau: Mapping[str, float], rule: Rule, lows: Mapping[str, Lows] | None = None
) -> tuple[dict[str, int], int]:
    """Algorithm 1 on recorded values, with these thresholds by component.

    Returns:
        Component name -> the step that it freezes at, in that order; and the last step of the run.
    """
    lows = lows or {name: _lows(history, name, rule) for name in tau}
    found: dict[str, int] = {}
    for name, (steps, values) in lows.items():
        place = int(np.searchsorted(-values, -tau[name], side="right"))  # the first low below tau
        if place < len(steps) and (at := int(steps[place]) + rule.delay_transfer) <= history.total_steps:
            found[name] = at
    taking_part = max(1, sum(len(values) > 0 for _, values in lows.values()))
    number, order = 0, sorted(found, key=found.__getitem__)
    for at, names in itertools.groupby(order, found.__getitem__):
        number += len(list(names))
        if number / taking_part >= rule.max_frozen_fraction:
            return {name: found[name] for name in order[:number]}, at
    return {name: found[name] for name in order}, _length(history)


def compute(
    history: History, frozen: Mapping[str, int], last_step: int, shares: Mapping[str, float], blocks: Sequence[float]
) -> float:
    """The part of T whole steps that a run costs, see the top of this file; `blocks`: shares of input gradients."""
    saved = sum(shares.get(name, 0.0) * (last_step - at) for name, at in frozen.items())
    ends: dict[int, int] = {}  # block -> the step that the last of its components freezes at
    for component in history.components:
        layer = -1 if component["layer"] is None else component["layer"]
        ends[layer] = max(ends.get(layer, 0), frozen.get(component["name"], last_step))
    end = 0
    for layer, share in enumerate(blocks):
        end = max(end, ends.get(layer, last_step))
        saved += share * (last_step - end)
    return (last_step - saved) / _length(history)


def shares_of(history: History) -> dict[str, float]:
    """Component name -> the share of a step that its weight gradient is.

    Raises:
        ValueError: the history does not say, and the run trained adapters, whose base is not in it.
    """
    counted = history.shares
    if counted and all(finite(share) and share >= 0 for share in counted.values()):
        return dict(counted)
    if any(component["adapter"] for component in history.components):
        raise ValueError(
            "the run trained adapters, and its history does not say what share of a step they are: FLOPs were not "
            "counted (a compiled model, or a record of grades-hf 0.1.0). Record the run anew."
        )
    whole = 3 * max(1, sum(component["numel"] for component in history.components))
    return {component["name"]: component["numel"] / whole for component in history.components}


def group_key(component: Mapping[str, Any], by: str) -> str:
    """The key of `GradESConfig.tau` that stands for a component's group."""
    return ".*" if by == "all" else ".".join(filter(None, (component["tower"], str(component[by]))))


def warning(history: History, suggestion: Suggestion) -> str | None:
    """What is to be said against these thresholds, in a sentence; None where nothing is."""
    steps, total = suggestion.frozen.values(), len(history.components)
    if len(steps) < total or total < 2 or max(steps) - min(steps) > AT_ONCE * history.total_steps:
        return None
    when = f"at step {min(steps)}" if min(steps) == max(steps) else f"between steps {min(steps)} and {max(steps)}"
    return (
        f"Warning: all {total} components would freeze at once, {when}: such a run is simply stopped there. Ask for "
        "more compute, raise patience, or train for fewer steps."
    )


def to_text(history: History, suggestion: Suggestion, by: str = "projection") -> str:
    """The suggestion as text: thresholds, compute, and a map of layers by matrices with the freezing steps."""
    taus = {key: float(f"{value:.9g}") for key, value in suggestion.tau.items()}
    frozen, total = suggestion.frozen, len(history.components)
    lines = [
        f"compute: {suggestion.compute:.3f} of the recorded run; {suggestion.more:.3f} with the next smaller tau",
        f"frozen: {len(frozen)} of {total} components; last step {suggestion.last_step} of {_length(history)}",
        "",
        f"tau: {next(iter(taus.values())) if by == 'all' else json.dumps(taus)}",
    ]
    if history.config.get("tau") is None:  # whose statistic is not the one that a tau has by default
        monitor = str(history.components[0]["monitor"])
        lines.append(f"These hold for monitor={monitor!r}, which the run has measured.")
    if warned := warning(history, suggestion):
        lines += ["", warned]
    for tower, table in step_tables(history, frozen):
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["", *([visible(tower)] if tower else [])]
        lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    lines += ["", CELLS, "A run that freezes has other values from its first freezing on, so its compute will differ."]
    return "\n".join(lines) + "\n"


def _refuse(history: History) -> None:
    """Raise a ValueError where the run cannot be replayed."""
    if history.events:
        raise ValueError(
            f"the run froze {len(history.events)} of {len(history.components)} components, so their values are missing "
            "from then on. Record a run that freezes nothing, with tau=1e-30."
        )
    if not len(history.steps) or not history.components:
        raise ValueError("the run recorded no values, so there is nothing to replay.")
    if history.config.get("tau") is None and any(component["adapter"] for component in history.components):
        raise ValueError(
            "a run without a tau measures only the second matrix of each LoRA pair, and with a tau both count, so its "
            "values say nothing about thresholds. Record a run that freezes nothing, with tau=1e-30."
        )


def _late(history: History, name: str, rule: Rule) -> Lows:
    """The steps after the grace period at which a component was measured, and its values."""
    series = np.asarray(history.values[name], dtype=np.float64)
    steps = np.asarray(history.steps, dtype=np.int64)[: len(series)]
    return steps[steps > rule.grace], series[: len(steps)][steps > rule.grace]


def _levels(history: History, keys: Mapping[str, str], rule: Rule) -> dict[str, float]:
    """Key -> the median of its values greater than 0 after the grace period; where there are none, of all."""
    values: dict[str, list[NDArray[np.float64]]] = {key: [] for key in keys.values()}
    for name, key in keys.items():
        found = _late(history, name, rule)[1]
        values[key].append(found[(found > 0) & (found < LARGEST)])
    together = {key: np.concatenate(parts) for key, parts in values.items()}
    everything = np.concatenate(list(together.values()))
    if not len(everything):
        raise ValueError(
            f"no value greater than 0 was recorded after step {rule.grace}, so no threshold can be told; lower alpha, "
            "or train longer."
        )
    return {key: float(np.median(part if len(part) else everything)) for key, part in together.items()}


def _lows(history: History, name: str, rule: Rule) -> Lows:
    steps, series = _late(history, name, rule)
    if len(series) < rule.patience:
        return steps[:0], series[:0]
    series = np.where(series < LARGEST, series, math.inf)  # what is no value is below no threshold
    lowest = np.minimum.accumulate(np.lib.stride_tricks.sliding_window_view(series, rule.patience).max(axis=1))
    new = lowest < np.concatenate([[math.inf], lowest[:-1]])
    return steps[rule.patience - 1 :][new], lowest[new]


def _blocks(history: History, shares: Mapping[str, float]) -> list[float]:
    """The share of the input gradients of each block, from the lowest up: as much as its weight gradients.

    Raises:
        ValueError: the history does not say what they cost.
    """
    if any(component["adapter"] or component["tower"] for component in history.components):
        raise ValueError(
            "freeze_prefix=True needs the cost of each block, which is known for full weights of a model with one "
            "sequence of blocks alone. Leave --freeze-prefix out."
        )
    layers: dict[int, float] = {}
    for component in history.components:
        if component["layer"] is not None:
            layers[component["layer"]] = layers.get(component["layer"], 0.0) + shares.get(component["name"], 0.0)
    return [layers[layer] for layer in sorted(layers)]


def _length(history: History) -> int:
    """The steps that were made: all that were planned, unless checks are missing at the end."""
    last, every = max(1, int(max(history.steps))), int(history.config.get("check_every") or 1)
    return history.total_steps if history.total_steps - last < every else last


def _rule(history: History, alpha: float | None, patience: int | None, freeze_prefix: bool | None) -> Rule:
    config = history.config
    if alpha is None:
        alpha = config.get("alpha") if config.get("tau") is not None else None
    alpha = 0.5 if alpha is None else alpha
    patience = patience if patience is not None else config.get("patience") or 1
    if not finite(alpha) or not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha} must be a number in [0, 1).")
    if not is_count(patience):
        raise ValueError(f"patience={patience} must be a whole number of checks, 1 or more.")
    return Rule(
        grace_steps(alpha, history.total_steps),
        patience,
        config.get("max_frozen_fraction") or 1.0,
        bool(config.get("delay_transfer")),
        bool(config.get("freeze_prefix")) if freeze_prefix is None else freeze_prefix,
    )
