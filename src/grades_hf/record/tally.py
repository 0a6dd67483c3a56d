"""The counts of a run, as a checkpoint holds them, and sums over what FLOPs grow with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Vector = dict[str, float]  # by what the FLOPs grow with, see `Sizes.end`


@dataclass
class Tally:
    """All that a resumed run needs; JSON types only.

    Attributes:
        steps: Optimizer steps seen.
        counted: Of them counted ones.
        last: The number of the last counted one.
        trainable: Trainable tensors when nothing was frozen; 0 before the first step.
        sizes: Of all steps.
        flops: Of the counted steps with nothing frozen.
        forward: The forward passes' part of `flops`.
        base: Sizes of these steps.
        components: Name -> forward FLOPs in these steps.
        routed: Kinds of layers that get inputs of uneven sizes -> the kind whose size stands for theirs.
        weights: FLOPs of the weight gradients that were saved.
        merged: FLOPs that merging saved in forward passes.
        inputs: FLOPs of the rest of backward that were saved.
        looks: FLOPs of looks.
        rate: The last figure of `inputs`, for each unit of a size.
        state: The state of the model in the last step: trainable tensors, frozen and merged components.
        known: The state that `rate` is of.
        waiting: Sizes of the steps in `state`, which has not been counted yet.
        between: Sizes of the steps in states before it that never were.
    """

    steps: int = 0
    counted: int = 0
    last: int = 0
    trainable: int = 0
    sizes: Vector = field(default_factory=dict)
    flops: Vector = field(default_factory=dict)
    forward: Vector = field(default_factory=dict)
    base: Vector = field(default_factory=dict)
    components: Vector = field(default_factory=dict)
    routed: dict[str, str] = field(default_factory=dict)
    weights: float = 0.0
    merged: float = 0.0
    inputs: float = 0.0
    looks: float = 0.0
    rate: Vector = field(default_factory=dict)
    state: list[int] = field(default_factory=list)
    known: list[int] = field(default_factory=list)
    waiting: Vector = field(default_factory=dict)
    between: Vector = field(default_factory=dict)

    def to_state(self) -> dict[str, Any]:
        """JSON types."""
        return {name: value.copy() if isinstance(value, dict | list) else value for name, value in vars(self).items()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """The inverse of `to_state`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: `state` is no such state.
        """
        blank, parts = cls(), {}
        for part in dataclasses.fields(cls):
            kind = getattr(blank, part.name)
            value = state.get(part.name, 0.0) if part.name == "looks" else state[part.name]  # not in older states
            if isinstance(kind, dict):
                found: Any = {str(k): str(v) if part.name == "routed" else _number(v) for k, v in value.items()}
            elif isinstance(kind, list):
                found = [int(v) for v in value]
            else:
                found = int(value) if isinstance(kind, int) else _number(value)
            parts[part.name] = found
        return cls(**parts)


def add(total: Vector, more: Mapping[str, float]) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0.0) + value


def each_of(flops: Vector, sizes: Vector) -> Vector:
    return {key: value / sizes[key] for key, value in flops.items() if sizes.get(key)}


def dot(a: Vector, b: Vector) -> float:
    return sum(value * b[key] for key, value in a.items() if key in b)


def _number(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)
