"""The paper's criterion: which threshold holds for a component, and whether it has been below it for long enough."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from ..components import Component, matches
from .base import Criterion


class Threshold(Criterion):
    r"""Algorithm 1's test: $t > t_{grace}$ and $G_W(t) < \tau_W$, for `patience` checks in a row.

    A check without a value, or with one that is not finite, is not below any threshold and starts the count anew.

    Args:
        tau: From a component's name to its threshold.
        patience: Checks in a row, 1 or more, counted after the grace period.
        grace: $t_{grace}$.
    """

    name = "threshold"
    sizes = range(1, 2)  # checks below tau, in a row

    def __init__(self, tau: Callable[[str], float], patience: int = 1, grace: int = 0) -> None:
        super().__init__()
        self.tau = tau
        self.patience = patience
        self.grace = grace

    def update(self, name: str, step: int, value: float) -> bool:
        if step <= self.grace:
            return False
        (count,) = self.memory.get(name, (0,))
        count = count + 1 if math.isfinite(value) and value < self.tau(name) else 0
        self.memory[name] = [count]
        return count >= self.patience


def assign_thresholds(components: Sequence[Component], tau: float | Mapping[str, float] | None) -> None:
    """Set `tau` of every component by the rule in `GradESConfig`'s docstring; None for none.

    Raises:
        ValueError: a key that matches no component, or a component that no key matches.
    """
    if not isinstance(tau, Mapping):
        for component in components:
            component.tau = None if tau is None else float(tau)
        return
    weights: dict[str, dict[str, int]] = {}  # key -> component name -> how specific the match is
    labels = {label for component in components for label in _labels(component)}
    for order, key in enumerate(tau):
        weights[key] = {
            component.name: weight
            for component in components
            if (weight := _specificity(key, component, labels, order)) is not None
        }
        if not weights[key]:
            known = ", ".join(sorted(labels))
            raise ValueError(
                f"tau has the key {key!r}, which matches no component. Use a label ({known}), a module name or its "
                "ending, or a regular expression that matches the full name, such as '.*mlp.*'."
            )
    missing = []
    for component in components:
        keys = [key for key in tau if component.name in weights[key]]
        if not keys:
            missing.append(component.name)
            continue
        component.tau = float(tau[max(keys, key=lambda key: weights[key][component.name])])
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"tau={dict(tau)!r} leaves {len(missing)} of {len(components)} components without a threshold ({some}). "
            "Add a key that matches them ('.*' stands for all others), or leave them out with exclude_modules."
        )


EVERYTHING = ".*"
# A projection says more than group and tower together, a group more than a tower; a name or pattern more than labels.
_TOWER, _EXPERTS_AS_MLP, _GROUP, _PROJECTION, _PATTERN, _NAME = 2, 3, 4, 8, 1 << 20, 1 << 30


def _labels(component: Component) -> dict[str, int]:
    labels = {component.projection: _PROJECTION}
    if component.group == "experts":
        labels["mlp"] = _EXPERTS_AS_MLP
    labels[component.group] = _GROUP
    if component.tower is not None:
        labels[component.tower] = _TOWER
    return labels


def _specificity(key: str, component: Component, labels: set[str], order: int) -> int | None:
    """How specific `key` is for `component`; None where it does not match."""
    if key == component.name:
        return _NAME
    if key == EVERYTHING:
        return 0
    parts = key.split(".")
    if all(part in labels for part in parts):
        own = _labels(component)
        return sum(own[part] for part in parts) if all(part in own for part in parts) else None
    try:
        found = matches(component.name, [key]) or matches(component.name, key)
    except re.error as error:
        raise ValueError(f"tau has the key {key!r}, which is no valid regular expression: {error}.") from error
    return _PATTERN - order if found else None
