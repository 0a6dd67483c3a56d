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
from .look import HeldOut, Rows, seed, unseen

logger = logging.getLogger(__name__)

QUORUM = 0.5  # the part of the components that take part whose votes propose a look
AGAIN = 1.5  # how much higher the statistic must have risen for the next look
MARGIN = 3.0  # standard errors by which the average must be better
MOST = 12  # looks in a run

_OF_A_LOOK = ("loss", "average_loss", "difference", "error")

NO_ROWS = (
    "GradES without a tau decides by looks at held-out rows, and has none. Pass held_out= (a Dataset, a DataLoader, or "
    "a function from the model to the losses of held-out rows), give the trainer an eval_dataset, or pass a tau."
)


class Ending(Extension):
    r"""Ends the run where the moving average of the weights is better than the weights themselves.

    **Propose.** A component votes while its smoothed statistic has risen to r times its own minimum (`Rise`). When half
    of the components that take part vote, a look is due. No look is proposed while every row has been seen at most
    once: a first epoch cannot overfit. Rising gradients mean memorizing *or* learning fast, so they decide nothing.

    **Look.** For at most `look_rows` held-out rows, the same ones each time, the loss of each row is computed with the
    weights as they are and with their average. With d the difference (average minus present) and s its standard error
    over the rows, the run ends if $\bar d + 3 s < 0$: then it wanders around, or away from, what it had found. Else it
    goes on, to the bit as if nobody had looked, and the next look takes a rise 1.5 times as high. There are at most
    twelve.

    **Return.** The model holds the average as soon as the run has ended (`return_weights="last"`: what it held), and
    the update of that step does not touch it any more.

    Args:
        held_out: The held-out rows, or a function from the model to the losses of the rows.

    Attributes:
        looks: One dict for each look: see `History.looks`.
        share: The part of the components that take part which votes, at the last check.

    Raises:
        ValueError: there are no held-out rows.
    """

    name = "ending"

    def __init__(self, held_out: HeldOut | None) -> None:
        self._held_out: Any = held_out
        self.looks: list[dict[str, Any]] = []
        self.share = 0.0

    def attach(self, run: Run, undo: ExitStack) -> None:
        if self._held_out is None:
            raise ValueError(NO_ROWS)
        self._run: Any = run
        self._rows: Any = self._held_out
        function = callable(self._held_out) and not hasattr(self._held_out, "__getitem__")
        if not function and not isinstance(self._held_out, Rows):
            self._rows = Rows(self._held_out, run.config.look_rows)
        self._epoch: float | None = None
        undo.callback(self._close)

    def before_check(self, step: Step) -> None:
        self._epoch = step.epoch

    def propose(self, votes: int) -> None:
        """So many components vote now: look if that is enough."""
        run = self._run
        taking_part = int(run.took_part.sum())
        self.share = votes / taking_part
        average: Average = run.extension("average")
        first_epoch = self._epoch is not None and self._epoch < 1
        if self.share < QUORUM or first_epoch or len(self.looks) >= MOST or not average.number:
            return
        criterion: Rise = run.criterion
        look = {"step": run.t, "votes": votes, "components": taking_part, "rise": criterion.level, **self._look(average)}
        look["ended"] = look["difference"] + MARGIN * look["error"] < 0
        self.looks.append(look)
        run.history.looks = list(self.looks)
        criterion.level *= AGAIN
        if look["ended"]:
            if run.config.return_weights == "average":
                average.install()
            run.freezer.freeze(parameter for parameter in run.model.parameters() if parameter.requires_grad)
            run.freezer.settle()
            run.end(self.conclude())
        else:
            logger.info("GradES step %d: a look says to go on (%s).", run.t, _losses(look))

    def _look(self, average: Average) -> dict[str, float]:
        with unseen(self._run.model):
            present = self._losses()
            with average.installed():
                averaged = self._losses()
        pairs = torch.tensor(self._run.ranks.gather(list(zip(present, averaged, strict=True))), dtype=torch.float64)
        difference = pairs[:, 1] - pairs[:, 0]
        error = difference.std().item() / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
        return {
            "rows": len(pairs),
            "loss": pairs[:, 0].mean().item(),
            "average_loss": pairs[:, 1].mean().item(),
            "difference": difference.mean().item(),
            "error": error,
        }

    def _losses(self) -> list[float]:
        model = self._run.model
        seed()  # the same random numbers for both
        if isinstance(self._rows, Rows):
            return self._rows.losses(model, self._run.ranks)
        losses = torch.as_tensor(self._rows(model)).detach().double().flatten().tolist()
        if len(losses) < 2:
            raise ValueError(
                f"held_out returned {len(losses)} losses. It must return the loss of each held-out row, a tensor of "
                "shape (rows,) with at least two elements."
            )
        return losses

    def conclude(self) -> str:
        """What came of it, in one line."""
        look = self.looks[-1] if self.looks else None
        if look is None:
            return f"no look was proposed in {self._run.t} steps, so nothing ended the run early."
        if not look["ended"]:
            return f"{len(self.looks)} look(s) in {self._run.t} steps, and each said to go on ({_losses(look)} at the last)."
        returned = "their moving average is" if self._run.config.return_weights == "average" else "the last ones are"
        return (
            f"the run ends at step {look['step']} of {self._run.total_steps}: the gradients of {look['votes']} of "
            f"{look['components']} components rose to {look['rise']:.3g} times their minimum, and held-out rows say that "
            f"the weights have got worse than their moving average ({_losses(look)}). Of the weights, {returned} returned."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "level": self._run.criterion.level}

    def check(self, state: Mapping[str, Any]) -> tuple[list[dict[str, Any]], float]:
        looks, level = [dict(look) for look in state["looks"]], float(state["level"])
        for look in looks:
            numbers = {name: look[name] for name in ("step", "votes", "components", "rise", "rows", *_OF_A_LOOK)}
            if not isinstance(look["ended"], bool) or not all(type(n) in (int, float) for n in numbers.values()):
                raise ValueError("the looks of a checkpoint hold what is no number.")
            _losses(look)
        if not math.isfinite(level) or level <= 0:
            raise ValueError(f"the rise that proposes a look cannot be {level}.")
        return looks, level

    def load(self, checked: tuple[list[dict[str, Any]], float]) -> None:
        self.looks, self._run.criterion.level = checked
        self._run.history.looks = list(self.looks)

    def _close(self) -> None:
        self._rows = self._held_out = None


def _losses(look: Mapping[str, Any]) -> str:
    return (
        f"loss {look['average_loss']:.4g} with the average, {look['loss']:.4g} without, difference "
        f"{look['difference']:+.3g} +- {look['error']:.2g}"
    )
