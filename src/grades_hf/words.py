"""What a run says: what is tracked, what came of it, and what its user must know."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

from .criteria import deciding_checks
from .find.components import kinds

if TYPE_CHECKING:
    from .engine import GradES

logger = logging.getLogger(__name__)

OBSERVING = 1e9  # times tau: such a tau only observes, and what is nearest to it says nothing


def describe(run: GradES) -> str:
    """What is tracked and how, in one line."""
    groups = Counter(f"{c.tower} {c.group}" if c.tower else c.group for c in run.components)
    taus = sorted({component.tau for component in run.components if component.tau is not None})
    rule = "looks at held-out rows decide when to end"
    if taus:
        several = f"{len(taus)} values of tau from {taus[0]:g} to {taus[-1]:g}"
        rule = f"tau {taus[0]:g}" if len(taus) == 1 else several
        rule += f"; freezing from step {run.t_grace + 1} of {run.total_steps} on"
    return (
        f"GradES tracks {len(run.components)} components ("
        + ", ".join(f"{number} {group}" for group, number in groups.items())
        + f") with {sum(component.numel for component in run.components):,} parameters; "
        + f"statistic {', '.join(run.statistics)} ({run.config.reduction}), {rule}."
    )


def conclude(run: GradES) -> str:
    """What came of it, in one line."""
    line = f"{len(run.frozen)} of {counted(run)} are frozen after step {run.t}"
    if run.frozen:
        line += f", between steps {min(run.frozen.values())} and {max(run.frozen.values())}"
    live = {c.name: c.tau for c in run.live if c.tau is not None}
    nearest = min(((value / live[n], n) for n, value in run.history.latest().items() if n in live), default=None)
    if nearest is not None and nearest[0] < OBSERVING:
        line += f"; of those still trained {nearest[1]} is nearest to its tau, at {nearest[0]:.3g} x tau"
    return line + "."


def tell_whole(run: GradES) -> None:
    """Say what came of it where all planned steps were made: whoever waits for an early end sees why there was none."""
    if run.ended is None and run.t >= run.total_steps and run.ranks.rank == 0:
        logger.warning("GradES: %s", run.conclude())


def counted(run: GradES) -> str:
    """How many components there are, in words: those that have never had a gradient do not count."""
    idle = len(run.components) - int(run.took_part.sum())
    if not idle or idle == len(run.components):
        return f"{len(run.components)} components"
    return f"{len(run.components) - idle} components that take part ({idle} have never had a gradient)"


def tell_idle(run: GradES) -> None:
    """Say once, when freezing may begin, which components have never had a gradient."""
    if run._told_idle or run._open is not None or run.t < max(run.t_grace, run.total_steps / 10):
        return
    run._told_idle = True
    if run.took_part.all():
        return
    idle = [c for c, took_part in zip(run.components, run.took_part.tolist(), strict=True) if not took_part]
    if 0 < len(idle) < len(run.components) and run.ranks.rank == 0:
        logger.warning(
            "GradES: %d of %d components have had no gradient in %d steps, since no batch has involved them, and "
            "do not count: %s (%s%s).",
            len(idle), len(run.components), run.t, kinds(idle), ", ".join(c.name for c in idle[:3]),
            ", ..." if len(idle) > 3 else "",
        )  # fmt: skip


def warn_if_nothing_can_happen(run: GradES) -> None:
    """Say at the start where no check is left after the grace period that could freeze, or propose, anything."""
    first = all(run.statistics[component.monitor].two_steps for component in run.components)
    checks = deciding_checks(
        run.total_steps, run.t_grace, run.config.check_every, first=not first, late=run.config.delay_transfer
    )
    if checks < run.config.patience:
        what = "nothing can freeze" if run.ending is None else "no look can be made"
        patience = f", patience={run.config.patience}" if run.ending is None else ""
        logger.warning(
            "GradES: %s in this run: the first %d of %d steps are the grace period (alpha=%g), and after it "
            "there are %d checks that can decide (check_every=%d%s). Lower these, or train for more steps.",
            what, run.t_grace, run.total_steps, run.config.alpha, checks, run.config.check_every, patience,
        )  # fmt: skip


def warn_after_resume(run: GradES) -> None:
    """Say once that the first check after a resume has nothing to compare with, where that is so."""
    resumed, run._resumed = run._resumed, False
    waiting = resumed and any(run.statistics[component.monitor].two_steps for component in run.live)
    if waiting and run.t % run.config.check_every == 0 and not run.tensors().get("previous"):
        logger.warning(
            "GradES: the checkpoint does not hold the tensors of the step before (it was saved without the "
            "optimizer, or without GradES), so the check at step %d yields no value.",
            run.t,
        )
