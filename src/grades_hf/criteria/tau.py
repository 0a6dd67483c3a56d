"""Which threshold holds for which component: the mapping in `GradESConfig.tau`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..find.components import Component, matches


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
