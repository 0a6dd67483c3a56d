"""What becomes trainable during a run: components that join it, and how the parts of the engine learn of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .assembly import assign_monitors
from .criteria import Threshold, assign_thresholds
from .find.components import Component, kinds, measure_last_factors, survey
from .statistics import make_statistic

if TYPE_CHECKING:
    from .engine import GradES

logger = logging.getLogger(__name__)


def join(engine: GradES, parameters: Sequence[Tensor]) -> None:
    """Track from now on what of `parameters`, which were not trained before, makes a component or belongs to one.

    What belongs to a live component (its bias, a second adapter on its layer) becomes a part of it. What belongs to a
    frozen one, or has no threshold, is trained without being tracked, and one line says so.
    """
    new = set(parameters)
    by_name = {component.name: component for component in engine.components}
    fresh, late = [], []
    for found in survey(engine.model, engine.config, require=False)[0]:
        own = tuple(parameter for parameter in found.parameters if parameter in new)
        measured = tuple(parameter for parameter in found.measured if parameter in new)
        component = by_name.get(found.name)
        if not own:
            continue
        if component is None:
            found.parameters, found.measured = own, measured or own
            fresh.append(found)
        elif component.frozen_at is None:
            component.parameters = (*component.parameters, *own)
            component.measured = (*component.measured, *measured)
        else:
            late.append(found)
    fresh, without = _with_thresholds(engine, fresh)
    if fresh:
        _add(engine, fresh)
        logger.info(
            "GradES step %d: %d more components are trained (%s) and tracked from now on.",
            engine.t, len(fresh), kinds(fresh),
        )  # fmt: skip
    engine._live = None
    for left, why in ((late, "their components are frozen already"), (without, "tau has no key for them")):
        if left:
            logger.warning(
                "GradES: step %d: %d matrices that are trained from now on (%s) are not tracked, since %s: %s%s.",
                engine.t, len(left), kinds(left), why, ", ".join(c.name for c in left[:3]),
                ", ..." if len(left) > 3 else "",
            )  # fmt: skip
    for extension in engine.extensions:
        extension.on_join(fresh, parameters)
        extension.on_grad_pattern()
    _restore(engine, fresh)


def _with_thresholds(engine: GradES, fresh: list[Component]) -> tuple[list[Component], list[Component]]:
    """Those that have a threshold, set; and those that no key of `tau` matches."""
    tau = engine.config.tau
    if not isinstance(tau, Mapping):
        assign_thresholds(fresh, tau)
        return fresh, []
    before = [component.tau for component in engine.components]
    having, without = [], []
    for component in fresh:
        try:
            assign_thresholds([*engine.components, component], tau)
            having.append(component)
        except ValueError:
            without.append(component)
    for component, own in zip(engine.components, before, strict=True):
        component.tau = own
    return having, without


def _add(engine: GradES, fresh: list[Component]) -> None:
    assign_monitors(fresh, engine.config)
    if engine.config.tau is None:
        measure_last_factors(engine.model, fresh)
    sampler = next(iter(engine.statistics.values())).sampler
    if sampler is not None:
        sampler.add({p: f"{c.name}/{place}" for c in fresh for place, p in enumerate(c.measured)})
    for component in fresh:
        if component.monitor not in engine.statistics:
            engine.statistics[component.monitor] = make_statistic(component.monitor, sampler)
    engine._place |= {c.name: place for place, c in enumerate(fresh, start=len(engine.components))}
    engine.components.extend(fresh)
    engine.joined += [component.name for component in fresh]
    nobody = torch.zeros(len(fresh), dtype=torch.bool)
    engine.learned, engine.took_part = torch.cat([engine.learned, nobody]), torch.cat([engine.took_part, nobody])
    engine.criterion.grow(len(fresh))
    if isinstance(engine.criterion, Threshold):
        engine.criterion.tau = torch.tensor([c.tau or 0.0 for c in engine.components], dtype=torch.float64)
    engine.history.add_components(fresh)


# --- a resumed run, in which they have not joined yet ----------------------------------------------------------------


def set_aside(state: Mapping[str, Any], names: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state without the components of these names, and what it says of them: name -> its part."""
    parts: dict[str, Any] = {name: {} for name in names}
    rest = dict(state)
    for key in ("learned", "took_part"):
        rest[key] = [name for name in state[key] if name not in names]
        for name in names.intersection(state[key]):
            parts[name][key] = True
    rest["frozen"] = [item for item in state["frozen"] if item["name"] not in names]
    for item in state["frozen"]:
        if item["name"] in names:
            parts[item["name"]]["frozen"] = dict(item)
    rest["criterion"] = {name: row for name, row in state["criterion"].items() if name not in names}
    for name in names & state["criterion"].keys():
        parts[name]["criterion"] = list(state["criterion"][name])
    if "previous" in state:
        rest["previous"] = {name: kept for name, kept in state["previous"].items() if name not in names}
    if isinstance(opened := state.get("open"), Mapping):
        values = {name: value for name, value in opened["values"].items() if name not in names}
        rest["open"] = {**opened, "values": values}
    return rest, parts


def _restore(engine: GradES, fresh: Sequence[Component]) -> None:
    """What a checkpoint knows of components that have joined again."""
    frozen: list[Component] = []
    for component in fresh:
        part = engine._absent.pop(component.name, None)
        if part is None:
            continue
        place = engine._place[component.name]
        engine.learned[place], engine.took_part[place] = "learned" in part, "took_part" in part
        row = part.get("criterion", ())
        if len(row) == engine.criterion.width:
            engine.criterion.memory[place] = torch.tensor(row, dtype=torch.float64)
        if (item := part.get("frozen")) is not None:
            frozen.append(component)
            engine._mark({component.name: int(item["step"])})
            engine.history.events.append({**item, "tau": component.tau})
            engine.freezer.freeze(component.parameters)
    if frozen:
        engine._settle()
