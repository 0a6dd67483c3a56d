"""The rule that ends a run without a tau."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ..contracts import Extension, Run, Step
from ..criteria import Rise
from .average import Average
from .look import seed, unseen
from .rows import FEWEST, Function, HeldOut, Part, Rows

logger = logging.getLogger(__name__)

# Settled by the trials that docs/criteria.md reports.
QUORUM = 0.5  # the part of the components that take part whose votes propose a look
RAISE = 1.5  # how much higher the statistic must have risen before the gradients propose again
EARLIEST = 0.1  # the part of the run after which the first look is due in any case
LATER = 1.35  # how much later than the last look the next one is due in any case
APART = 1.25  # how much later than the last look the next one may come at the earliest
MARGIN = 3.0  # standard errors by which a difference counts
OF_A_QUARTER = 2.0  # those by which a quarter of the rows says that the run learns; they are twice as large
FIRST_STEP = 10
MOST = 12  # looks in a run

_Checked = tuple[list[dict[str, Any]], float, bool | None, list[float], int, bool]
_NUMBERS = ("step", "votes", "components", "rise", "rows")
_COMPUTED_OR_NOT = ("average_loss", "loss", "difference", "error", "since", "since_error")

NO_ROWS = (
    "GradES without a tau decides by looks at held-out rows, and has none. Pass held_out= (a Dataset, a DataLoader, or "
    "a function from the model to the losses of held-out rows), give the trainer an eval_dataset, or pass a tau."
)


class Ending(Extension):
    r"""Ends the run once the weights have got worse than an average of earlier ones.

    **Propose.** A component votes while its smoothed statistic has risen to r times its own minimum (`Rise`; r = 1.2 at
    first). When half of the components that take part vote, a look is proposed, and r is multiplied by 1.5. Rising
    gradients mean memorizing *or* learning fast, so they decide nothing: they only bring a look forward. In any case a
    look is due after a tenth of the run, and then 1.35 times as late as the last one. No look is made while every row
    has been seen at most once (a first epoch cannot overfit), before 1.25 times the step of the last look, or after
    twelve looks.

    **Look.** For at most `look_rows` held-out rows, the same ones each time, the loss of each row is computed with the
    moving average of the weights. Where the average has become better since the last look by three standard errors of
    the paired difference, the run still learns and goes on. Else the losses are computed with the weights as they are,
    too. The run ends if these are worse than those of the average by three standard errors, and worse than those of the
    last look's average in the mean. Otherwise it goes on, to the bit as if nobody had looked.

    A look begins with a quarter of the rows. The first look is over then: it only notes the losses. So is one whose
    quarter says that the run still learns (by two of its standard errors, which are twice as large), or that the
    weights are no worse in the mean. Only the other looks take the rest of the rows, and only they can end the run.
    Where fewer than 16 rows of the quarter have a finite loss, a look takes the rest in any case.

    **Return.** The model holds the average as soon as the run has ended (`return_weights="last"`: what it held), and
    the update of that step does not touch it any more.

    Args:
        held_out: The held-out rows, or a function from the model to the losses of the rows.

    Attributes:
        looks: One dict for each look: `step`; `reason` ("gradients" or "schedule"); `votes` of how many `components`;
            `rise`, the r of the votes; `rows`; `average_loss`, and where they were computed `loss` (of the weights as
            they are), `difference` (average minus present) with its standard `error`; `since` and `since_error`
            (average minus that of the last look); `ended`. What was not computed is None.
        share: The part of the components that take part which votes, at the last check.

    Raises:
        ValueError: there are no held-out rows.
    """

    name = "ending"

    def __init__(self, held_out: HeldOut | None) -> None:
        self._held_out: Any = held_out
        self.looks: list[dict[str, Any]] = []
        self.share = 0.0
        self._before: list[float] = []  # losses of the rows with the average of the last look
        self._number = 0  # of the rows that look could have taken; of other rows, nothing is compared
        self._together: bool | None = None  # what the rows say of it; None before the first look
        self._told = False  # that rows are left out

    def attach(self, run: Run, undo: ExitStack) -> None:
        if self._held_out is None:
            raise ValueError(NO_ROWS)
        self._run: Any = run
        self._rows: Any = self._held_out
        if callable(self._held_out) and not hasattr(self._held_out, "__getitem__"):
            self._rows = Function(self._held_out)
        elif not isinstance(self._held_out, Rows):
            self._rows = Rows([self._held_out], run.config.look_rows)
        if isinstance(self._rows, Rows) and len(self._rows) < 2:
            raise ValueError(
                "held_out gives only one loss, and a look needs at least two rows. Pass more held-out rows."
            )
        if isinstance(self._rows, Rows):
            self._tell_few(len(self._rows))
        self._epoch: float | None = None
        undo.callback(self._close)

    def before_check(self, step: Step) -> None:
        self._epoch = step.epoch

    def consider(self, votes: int) -> None:
        """So many components vote now: look if that is enough, or if a look is due."""
        run, average = self._run, self._run.extension("average")
        taking_part = int(run.learned.sum())  # who never had a gradient other than 0 can never vote
        self.share = votes / taking_part if taking_part else 0.0
        last = self.looks[-1]["step"] if self.looks else 0
        first_epoch = self._epoch is not None and self._epoch < 1
        early = run.t < max(FIRST_STEP, APART * last)
        if first_epoch or early or len(self.looks) >= MOST or run.t >= run.total_steps or not average.ready:
            return
        proposed = self.share >= QUORUM
        if not proposed and run.t < (LATER * last if self.looks else EARLIEST * run.total_steps):
            return
        criterion: Rise = run.criterion
        look = {
            "step": run.t,
            "reason": "gradients" if proposed else "schedule",
            "votes": votes,
            "components": taking_part,
            "rise": criterion.level,
            **self._look(average),
        }
        if proposed:
            criterion.level *= RAISE
        self.looks.append(look)
        run.history.looks = list(self.looks)
        if not look["ended"]:
            logger.info("GradES step %d: a look at held-out rows says to go on (%s).", run.t, _losses(look))
            return
        if run.config.return_weights == "average":
            average.install()
        run.freezer.freeze(parameter for parameter in run.model.parameters() if parameter.requires_grad)
        run.freezer.settle()
        run.end(self.conclude())

    def _look(self, average: Average) -> dict[str, Any]:
        run, before = self._run, self._before
        now: list[float] = []
        present: list[float] = []
        with unseen(run.model), run.extension("meter").look():
            parts = self._rows.parts(run.model, run.ranks)
            self._together = self._rows.together
            due: list[Part] = []  # parts that the weights as they are have not passed yet
            for part in parts:
                with average.installed():
                    now += self._losses(part)
                due.append(part)
                whole = part is parts[-1]
                if not whole and len(_finite(now)) < FEWEST:
                    continue
                number = len(self._rows) if isinstance(self._rows, Rows) else len(now)
                if before and number != self._number:
                    before = self._other_rows(number, self._number)
                since, since_error = _paired(now, before)
                ended = False
                if since is None or since + (MARGIN if whole else OF_A_QUARTER) * since_error < 0:
                    present = []
                    break
                present += [loss for each in due for loss in self._losses(each)]
                due.clear()
                if len(present) != len(now):
                    present = self._other_rows(len(present), len(now))
                    break
                (difference, error), (worse, _) = _paired(now, present), _paired(present, before)
                loses = difference is not None and difference + (MARGIN if whole else 0.0) * error < 0
                ended = loses and worse is not None and worse > 0
                if not ended:
                    break
        if not self.looks and not isinstance(self._rows, Rows):
            self._tell_few(len(_finite(now)))
        self._tell_left_out(now)
        difference, error = _paired(now, present)
        self._before, self._number = now, number
        return {
            "rows": len(_finite(now)),
            "average_loss": _mean(now) if _finite(now) else None,
            "loss": _mean(present) if present else None,
            "difference": difference,
            "error": error if difference is not None else None,
            "since": since,
            "since_error": since_error if since is not None else None,
            "ended": ended,
        }

    def _losses(self, part: Part) -> list[float]:
        seed()  # the same random numbers for both
        losses: list[float] = self._rows.losses(self._run.model, self._run.ranks, part)
        return losses

    def _other_rows(self, number: int, before: int) -> list[float]:
        """No losses, since those there are cannot be compared."""
        logger.warning(
            "GradES step %d: held_out gives %d losses now and gave %d before. Only losses of the same rows can be "
            "compared, so this look ends nothing. A function must return the losses of the same rows each time.",
            *(self._run.t, number, before),
        )
        return []

    def _tell_few(self, number: int) -> None:
        if number < FEWEST and self._run.ranks.rank == 0:
            logger.warning(
                "GradES: a look has only %d held-out losses to go by, so chance may end this run, or keep it from "
                "ending. Pass more held-out rows; 32 to 128 were tried.",
                number,
            )

    def _tell_left_out(self, losses: list[float]) -> None:
        finite = len(_finite(losses))
        if finite < len(losses) and not self._told:
            self._told = True
            what = "They are left out of every look" if finite > 1 else "So no look can end this run"
            logger.warning(
                "GradES: %d of %d held-out rows that were looked at have no finite loss. A row has none where all of "
                "its labels are masked: perhaps max_length cut the completion off. %s.",
                *(len(losses) - finite, len(losses), what),
            )

    def conclude(self) -> str:
        """What came of it, in one line."""
        look, steps = self.looks[-1] if self.looks else None, f"{self._run.t} of {self._run.total_steps} steps"
        if look is None:
            return f"no look at held-out rows was due in {steps}."
        if not look["ended"]:
            times = "one look" if len(self.looks) == 1 else f"{len(self.looks)} looks"
            return f"{times} at held-out rows in {steps} said to go on ({_losses(look)} at step {look['step']})."
        returned = "the average is" if self._run.config.return_weights == "average" else "the last weights are"
        reason = (
            f"the gradients of {look['votes']} of {look['components']} components had risen to {look['rise']:.3g} x"
        )
        why = f"{reason} their minimum" if look["reason"] == "gradients" else "it was due"
        return (
            f"the run ends at step {look['step']} of {self._run.total_steps}, because held-out rows say that the "
            f"weights have got worse than their moving average ({_losses(look)}); {returned} returned. It was look "
            f"{len(self.looks)} at {look['rows']} rows, made because {why}."
        )

    def state_dict(self) -> dict[str, Any]:
        level = self._run.criterion.level
        noted = {"before": self._before, "number": self._number, "told": self._told}
        return {"looks": self.looks, "level": level, "together": self._together, **noted}

    def check(self, state: Mapping[str, Any]) -> _Checked:
        looks, level = [dict(look) for look in state["looks"]], float(state["level"])
        for look in looks:
            numbers = [*(look[name] for name in _NUMBERS), *(look[name] or 0.0 for name in _COMPUTED_OR_NOT)]
            if not isinstance(look["ended"], bool) or not all(type(number) in (int, float) for number in numbers):
                raise ValueError("the looks of a checkpoint hold what is no number.")
            _losses(look)
            look["step"] = int(look["step"])
        number, told = int(state.get("number", 0)), bool(state.get("told", False))
        # Older states have no number, and the rows in another order: the next look only notes.
        before = [float(loss) for loss in state["before"]] if number else []
        if not math.isfinite(level) or level <= 0:
            raise ValueError("the checkpoint's looks hold numbers that cannot be.")
        together = state.get("together")  # not in older states
        if together is not None and not isinstance(together, bool):
            raise ValueError("the checkpoint's looks do not say whether held-out rows go together.")
        return looks, level, together, before, number, told

    def load(self, checked: _Checked) -> None:
        self.looks, self._run.criterion.level, self._together, self._before, self._number, self._told = checked
        if self._together is not None and isinstance(self._rows, Rows) and self._rows.size == 1:
            self._rows.put_together(self._together)
        self._run.history.looks = list(self.looks)

    def _close(self) -> None:
        self._held_out = None
        del self._rows


def _paired(a: list[float], b: list[float]) -> tuple[float | None, float]:
    """Mean of a - b over the rows that have both, and its standard error; None where there is nothing to compare.

    A look that is over sooner has the first rows of one that takes all.
    """
    found = _finite([x - y for x, y in zip(a, b, strict=False)])
    if len(found) < 2:
        return None, 0.0
    difference = torch.tensor(found, dtype=torch.float64)
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(found))


def _mean(losses: list[float]) -> float:
    found = _finite(losses)
    return sum(found) / len(found) if found else math.nan


def _finite(losses: list[float]) -> list[float]:
    return [loss for loss in losses if math.isfinite(loss)]


def _losses(look: Mapping[str, Any]) -> str:
    if look["average_loss"] is None:
        return "no row has a finite loss"
    if look["difference"] is None:
        return f"loss {look['average_loss']:.4g} with the average"
    return (
        f"loss {look['average_loss']:.4g} with the average, {look['loss']:.4g} without, difference "
        f"{look['difference']:+.3g} +- {look['error']:.2g}"
    )
