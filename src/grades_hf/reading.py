"""One check: from gradients to the values that are judged and recorded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .contracts import IDLE, Check, Step
from .find.components import Component
from .statistics.norms import l1_norms

if TYPE_CHECKING:
    from .engine import GradES


class Plan:
    """What each check has to know of the live components; it holds until one of them freezes or more join.

    Without it a step would ask ten thousand components for the same again.

    Attributes:
        components: The live components, n of them.
        names: Their names.
        places: (n,) int64, their places among all components.
        device: Where their values are put together: the device of the first component.
        parameters: Statistic -> the tensors that it measures, m of them.
        owners: Statistic -> (m,) int64, for each of these the index of its component in `components`.
        sizes: Statistic -> (m,) float64, the elements of each of these.
        zero_counts: (n,) bool, whether a statistic of exactly 0 can be a value.
        compares: (n,) bool, whether it can be 0 though the gradient is not.
    """

    def __init__(self, run: GradES) -> None:
        self.components = live = run.live
        self.names = [component.name for component in live]
        self.places = torch.tensor([run._place[name] for name in self.names], dtype=torch.long)
        self.device = run.components[0].parameters[0].device
        self.parameters: dict[str, list[Tensor]] = {}
        self.owners: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        for name in run.statistics:
            pairs = [(p, i) for i, c in enumerate(live) if c.monitor == name for p in c.measured]
            self.parameters[name] = [parameter for parameter, _ in pairs]
            self.owners[name] = torch.tensor([owner for _, owner in pairs], dtype=torch.long, device=self.device)
            sizes = [parameter.numel() for parameter, _ in pairs]
            self.sizes[name] = torch.tensor(sizes, dtype=torch.float64, device=self.device)
        own = [run.statistics[component.monitor] for component in live]
        self.zero_counts = torch.tensor([statistic.zero_is_a_value for statistic in own], dtype=torch.bool)
        self.compares = self.zero_counts & torch.tensor([statistic.two_steps for statistic in own], dtype=torch.bool)


@torch.no_grad()
def measure(run: GradES, step: Step) -> Tensor:
    """The statistic of each live component, NaN where there is none.

    Returns:
        (len(live),) in float64 on the device of the first component. There is no transfer to the host.
    """
    plan = run.plan
    values = torch.zeros(len(plan.components), dtype=torch.float64, device=plan.device)
    elements, tensors = torch.zeros_like(values), torch.zeros_like(values)
    missing = []
    for name, statistic in run.statistics.items():
        parameters, owners, sizes = plan.parameters[name], plan.owners[name], plan.sizes[name]
        found, norms = ([], values.new_zeros(0)) if step.skipped else statistic.measure(parameters)
        if run.ranks.sharded:
            norms = run.ranks.add_shards(norms, [parameters[i] for i in found], parameters)
        if len(found) < len(parameters):
            there = set(found)
            others = [i for i, p in enumerate(parameters) if i not in there and statistic.takes_part(p)]
            missing.append(owners[torch.tensor(others, dtype=torch.long, device=plan.device)])
            index = torch.tensor(found, dtype=torch.long, device=plan.device)
            owners, sizes = owners[index], sizes[index]
        values.index_add_(0, owners, norms.to(plan.device))
        elements.index_add_(0, owners, sizes)
        tensors.index_add_(0, owners, torch.ones_like(sizes))
    values.masked_fill_(tensors == 0, math.nan)
    for owners in missing:
        values[owners] = math.nan
    if run.config.reduction == "mean":
        values /= elements.clamp(min=1)
    for extension in run.extensions:
        values = extension.correct(values, plan.components, step)
    if not run.took_part.all():
        values = values.masked_fill(_idle(run) & ~(values.abs() > 0), IDLE)
    return values


def _idle(run: GradES) -> Tensor:
    """Which live components had no gradient in this step, of those that have never had one: (len(live),) bool."""
    plan = run.plan
    never = (~run.took_part[plan.places]).nonzero().flatten().numpy()  # it is kept on the host
    idle = [i for i in never if all(parameter.grad is None for parameter in plan.components[i].parameters)]
    found = torch.zeros(len(plan.components), dtype=torch.bool)
    found[idle] = True
    return found.to(plan.device)


def valid(run: GradES, check: Check) -> tuple[list[Component], Tensor, Tensor]:
    """The live components of a check, and their values, in which a 0 that is no value is NaN; they are recorded.

    Returns:
        n components, their places among all, (n,) int64, and their values, (n,) float64.
    """
    plan = run.plan
    same = check.names is plan.names  # else it has waited for a step, in which some have frozen or joined
    places = plan.places if same else torch.tensor([run._place[name] for name in check.names], dtype=torch.long)
    values = check.values().clone()
    run.took_part[places] |= values != IDLE
    values[values == IDLE] = math.nan
    zero = values == 0
    if zero.any():
        nothing = bool((zero | values.isnan()).all())
        counts = zero & ~run.learned[places] & (not nothing)
        if same:
            counts |= _stays_the_same(run, zero & ~counts & plan.compares, check.step)
            counts &= plan.zero_counts
        else:
            own = [run.statistics[run.components[place].monitor] for place in places.tolist()]
            counts &= torch.tensor([statistic.zero_is_a_value for statistic in own], dtype=torch.bool)
        values[zero & ~counts] = math.nan
    run.learned[places] |= values.abs() > 0
    components = plan.components
    if not same:
        still = torch.tensor([name not in run.frozen for name in check.names], dtype=torch.bool)
        places, values = places[still], values[still]
        components = [run.components[place] for place in places.tolist()]
    for extension in run.extensions:
        extension.on_values(check.step, components, values)
    return components, places, values


def _stays_the_same(run: GradES, zero: Tensor, step: int) -> Tensor:
    """Where a change of 0 is that of a gradient which stays the same and is not 0, among the components of `zero`.

    This asks the device, but hardly ever. Where the gradient is not whole or gone by now, the answer is no.

    Args:
        zero: (len(live),) bool.
    """
    found = torch.zeros_like(zero)
    if run.config.sample_size is not None or run.ranks.sharded or step != run.t or not zero.any():
        return found
    places = zero.nonzero().flatten().tolist()
    live = run.live
    pairs = [(g, place) for place in places for p in live[place].measured if (g := p.grad) is not None]
    if pairs:
        owners = torch.tensor([place for _, place in pairs], dtype=torch.long)
        found[owners[(l1_norms([gradient for gradient, _ in pairs]) != 0).cpu()]] = True
    return found
