"""One check: from gradients to the values that are judged and recorded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contracts import IDLE, Check, Step
from .find.components import Component

if TYPE_CHECKING:
    from .engine import GradES


@torch.no_grad()
def measure(run: GradES, step: Step) -> Tensor:
    """The statistic of each live component, NaN where there is none.

    Returns:
        (len(live),) in float64 on the device of the first component. There is no transfer to the host.
    """
    live, device = run.live, run.components[0].parameters[0].device
    found: dict[Tensor, Tensor] = {}
    for name, statistic in run.statistics.items():
        if not step.skipped:
            found |= statistic.measure(p for c in live if c.monitor == name for p in c.measured)
    if run.ranks.sharded:
        among = [parameter for component in live for parameter in component.measured]
        found = dict(zip(found, run.ranks.add_shards(list(found.values()), list(found), among), strict=True))
    owners: list[int] = []
    norms: list[Tensor] = []
    elements, missing = [0] * len(live), [False] * len(live)
    for place, component in enumerate(live):
        before = len(norms)
        for parameter in component.measured:
            norm = found.get(parameter)
            if norm is not None:
                norms.append(norm)
                owners.append(place)
                elements[place] += parameter.numel()
            elif run.statistics[component.monitor].takes_part(parameter):
                missing[place] = True
        missing[place] |= len(norms) == before
    values = torch.zeros(len(live), dtype=torch.float64, device=device)
    if norms:
        values.index_add_(0, torch.tensor(owners, device=device), _stack(norms, device))
    if any(missing):
        values[torch.tensor(missing, device=device)] = math.nan
    if run.config.reduction == "mean":
        values /= torch.tensor([max(1, number) for number in elements], dtype=torch.float64, device=device)
    for extension in run.extensions:
        values = extension.correct(values, live, step)
    if not run.took_part.all():
        idle = [all(parameter.grad is None for parameter in component.parameters) for component in live]
        if any(idle):
            values = values.masked_fill(torch.tensor(idle, device=device) & ~(values.abs() > 0), IDLE)
    return values


def valid(run: GradES, check: Check) -> tuple[list[Component], Tensor]:
    """The live components of a check and their values, in which a 0 that is no value is NaN; they are recorded."""
    places = torch.tensor([run._place[name] for name in check.names], dtype=torch.long)
    values = check.values().clone()
    run.took_part[places] |= values != IDLE
    values[values == IDLE] = math.nan
    zero = values == 0
    if zero.any():
        nothing = bool((zero | values.isnan()).all())
        counts = zero & ~run.learned[places] & (not nothing)
        for i in (zero & ~counts).nonzero().flatten().tolist():
            counts[i] = _stays_the_same(run, run.components[int(places[i])], check.step)
        for i in zero.nonzero().flatten().tolist():
            if not run.statistics[run.components[int(places[i])].monitor].zero_is_a_value:
                counts[i] = False
        values[zero & ~counts] = math.nan
    run.learned[places] |= values.abs() > 0
    still = torch.tensor([name not in run.frozen for name in check.names], dtype=torch.bool)
    components, values = [run.components[p] for p in places[still].tolist()], values[still]
    for extension in run.extensions:
        extension.on_values(check.step, components, values)
    return components, values


def _stays_the_same(run: GradES, component: Component, step: int) -> bool:
    """Whether a change of 0 is that of a gradient which stays the same and is not 0.

    This asks the device, but hardly ever. Where the gradient is not whole or gone by now, the answer is no.
    """
    known = run.config.sample_size is None and not run.ranks.sharded and step == run.t
    return known and any(p.grad is not None and bool(p.grad.any()) for p in component.measured)


def _stack(norms: list[Tensor], device: torch.device) -> Tensor:
    """0-d tensors as one in float64 on `device`, in order; one copy from each other device."""
    for other in {norm.device for norm in norms} - {device}:
        indices = [index for index, norm in enumerate(norms) if norm.device == other]
        moved = torch.stack([norms[index] for index in indices]).to(device, non_blocking=True)
        for index, norm in zip(indices, moved.unbind(), strict=True):
            norms[index] = norm
    return torch.stack(norms).double()
