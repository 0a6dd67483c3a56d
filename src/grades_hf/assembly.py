"""From a model, options and an optimizer to the parts of an engine; everything that can be refused is, here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .checks import short
from .config import GradESConfig
from .contracts import Criterion, Extension, Trait
from .criteria import Rise, Threshold, assign_thresholds, grace_steps, smoothing
from .ending import Average, Ending, HeldOut
from .find.changes import Changes
from .find.components import Component, measure_last_factors, survey
from .freezing.compilation import Batches, is_compiled
from .freezing.freezer import Freezer, unwrap_optimizers
from .freezing.optimizers import refuse_optimizers, with_inner
from .freezing.prefix import Prefix
from .inputs.calls import Calls
from .inputs.clipping import Clipping
from .inputs.loss import Loss
from .inputs.scaler import Scaler, find_scaler
from .inputs.warm_up import WarmUp
from .parallel.ranks import Ranks
from .parallel.refusals import is_parallel, refuse
from .parallel.sharded import Placeholders, is_sharded
from .record.history import History
from .record.meter import Meter
from .record.recorder import Recorder
from .statistics import Sampler, Statistic, make_statistic


@dataclass
class Parts:
    """What an engine is made of."""

    config: GradESConfig
    t_grace: int
    traits: frozenset[Trait]
    components: list[Component]
    statistics: dict[str, Statistic]
    criterion: Criterion
    optimizers: list[torch.optim.Optimizer]
    freezer: Freezer
    ranks: Ranks
    history: History
    ending: Ending | None
    meter: Meter
    extensions: list[Extension]


def assemble(
    model: nn.Module,
    config: GradESConfig,
    total_steps: int,
    optimizer: Any,
    scaler: torch.amp.GradScaler | None,
    held_out: HeldOut | None,
) -> Parts:
    """The parts of an engine; nothing is attached yet. Arguments and errors are those of `GradES`."""
    if held_out is not None and config.tau is not None:
        raise ValueError(
            f"held_out is about looks at held-out rows, and with tau={short(config.tau)} there are none. Leave one of "
            "them out."
        )
    scaler = find_scaler(optimizer) if scaler is None else scaler if scaler.is_enabled() else None
    compiled = is_compiled(model)
    holds = {Trait.SHARDED: is_sharded(model), Trait.COMPILED: compiled, Trait.PARALLEL: is_parallel()}
    traits = frozenset(trait for trait in holds if holds[trait])
    refuse(model, optimizer, traits)
    components, left_out = survey(model, config)
    assign_thresholds(components, config.tau)
    t_grace = grace_steps(config.alpha or 0.0, total_steps)
    assign_monitors(components, config)
    criterion: Criterion
    if config.tau is None:
        measure_last_factors(model, components)
        criterion = Rise(len(components), 1 + config.rise, smoothing(total_steps, config.check_every))
    else:
        criterion = Threshold([component.tau or 0.0 for component in components], config.patience, t_grace)
    sampler = None
    if config.sample_size is not None:
        if Trait.SHARDED in traits:
            raise ValueError(
                f"sample_size={config.sample_size} does not work with sharded parameters (FSDP2). Leave it out, or "
                "train with DDP."
            )
        places = {p: f"{c.name}/{place}" for c in components for place, p in enumerate(c.measured)}
        sampler = Sampler(config.sample_size, places)
    names = dict.fromkeys(component.monitor for component in components)
    optimizers = with_inner(unwrap_optimizers(optimizer))
    refuse_optimizers(optimizers, (p for component in components for p in component.parameters))
    ranks = Ranks(model)
    batches = Batches(config.max_recompilations) if compiled else None
    freezer = Freezer(
        optimizers,
        due=None if batches is None else batches.due,
        placeholders=Placeholders() if ranks.sharded else None,
    )
    history = History.start(components, config.to_dict(), total_steps=total_steps, t_grace=t_grace)
    ending = Ending(held_out) if config.tau is None else None
    merging: Extension | None = None
    if config.merge_frozen_adapters:
        from .freezing.merging import Merger  # which imports PEFT

        merging = Merger()
    meter = Meter()
    # The order in which they attach and are called; closing runs backwards.
    extensions: Sequence[Extension | None] = (
        Changes(),  # first: what is trainable now, before anything looks at it
        Calls(accelerated=_in_accelerates_wrapper(optimizer)),
        ranks,  # builds DDP's reducer anew at the end, after the freezer has given everything back
        freezer,
        freezer.placeholders,
        Scaler(scaler) if scaler is not None else None,  # first: everything else looks at unscaled gradients
        Loss(scaler) if config.needs_loss else None,
        Clipping() if config.tau is None else None,
        WarmUp() if config.tau is None else None,
        Recorder(),
        Prefix(left_out) if config.freeze_prefix else None,  # freezes more before `requires_grad` changes
        merging,
        batches,
        Average(max(10.0, total_steps / 10), config.average_device) if ending is not None else None,
        ending,
        meter,  # last: it counts the step as the others have left it
    )
    chosen = [extension for extension in extensions if extension is not None]
    refuse_conflicts(chosen, traits)
    return Parts(
        config, t_grace, traits, components, {name: make_statistic(name, sampler) for name in names}, criterion,
        optimizers, freezer, ranks, history, ending, meter, chosen,
    )  # fmt: skip


def assign_monitors(components: Iterable[Component], config: GradESConfig) -> None:
    """Set `monitor` of every component: the name of its statistic."""
    for component in components:
        paper = "gradient_norm" if component.adapter else "gradient_change"
        automatic = "gradient_per_loss" if config.tau is None else paper
        component.monitor = automatic if config.monitor == "auto" else config.monitor


def refuse_conflicts(extensions: Sequence[Extension], traits: frozenset[Trait]) -> None:
    """Raise the error of the first extension that a trait of the run rules out."""
    for extension in extensions:
        reasons = [reason for trait, reason in extension.refuses.items() if trait in traits]
        if reasons:
            raise extension.error(reasons[0])


def _in_accelerates_wrapper(optimizer: object) -> bool:
    """Whether an optimizer, or one of several, came in accelerate's wrapper."""
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return any(type(one).__name__ == "AcceleratedOptimizer" for one in several)
