"""Whether a loop calls `engine.step()` when it should: once before each update, with the gradients of the step."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

from accelerate.state import GradientState

from ..contracts import Extension, Run, Step

logger = logging.getLogger(__name__)

EMPTY = 3  # checks without any value at the start of a run, after which one line says so
ACCUMULATES = (
    "engine.step() was called at a micro-batch of accelerate's accumulate(), at which the optimizer makes no update. "
    "Call it where it does: `if accelerator.sync_gradients: engine.step()`."
)


class Calls(Extension):
    """Says in one line, as soon as it can be known, that the loop and the engine do not keep step.

    Args:
        accelerated: Whether the optimizer came in accelerate's wrapper, so that accelerate knows when it will step.

    Raises:
        RuntimeError: a call at a micro-batch at which accelerate's optimizer does not step.
    """

    name = "calls"

    def __init__(self, accelerated: bool = False) -> None:
        self._accelerated = accelerated

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._run: Any = run
        self._updates = 0
        self._seen: int | None = None  # updates at the last call
        self._told = False
        undo.callback(self._close)
        # A scaler leaves updates out.
        self._counts = bool(run.optimizers) and run.extension("scaler") is None
        for optimizer in run.optimizers if self._counts else ():
            if hasattr(optimizer, "_optimizer_step_post_hooks"):
                undo.callback(optimizer.register_step_post_hook(self._after_update).remove)
            else:
                self._counts = False

    def before_check(self, step: Step) -> None:
        if GradientState._shared_state and not GradientState().sync_gradients:
            if self._accelerated:
                raise RuntimeError(ACCUMULATES)
            self._tell(ACCUMULATES)
        before, self._seen = self._seen, self._updates
        if step.t == self._run.total_steps + 1:
            self._tell(
                f"engine.step() is called more often than the {self._run.total_steps} times that were planned "
                "(total_steps). It belongs before each update of the optimizer, not at each micro-batch, and "
                "total_steps counts updates."
            )
        if before is None:
            if self._counts and self._updates:
                self._tell(
                    "the optimizer has made an update before the first engine.step(). Call engine.step() between "
                    "backward() and optimizer.step(): after it, what freezes has been updated already."
                )
            elif not any(parameter.grad is not None for parameter in self._run.model.parameters()):
                self._tell(
                    f"no parameter has a gradient at step {step.t}. Call engine.step() after backward() and before "
                    "zero_grad(); an optimizer that updates during the backward pass leaves nothing to look at."
                )
        elif self._counts and before == self._updates:
            self._tell(
                f"engine.step() was called at steps {step.t - 1} and {step.t} without an update of its optimizer in "
                "between. Call it once for each optimizer.step(), not at each micro-batch, and pass the optimizer that "
                "the loop uses."
            )

    def on_step_end(self, step: Step) -> None:
        run = self._run
        if not self._told and len(run.history.steps) == EMPTY and not run.learned.any():
            self._tell(
                f"none of the {len(run.components)} components has had a value other than 0 at the first {EMPTY} "
                "checks. Call engine.step() after backward() and before zero_grad(), and see that the loss depends on "
                "what is trained."
            )

    def _tell(self, what: str) -> None:
        if not self._told:
            logger.warning("GradES: %s", what)
        self._told = True

    def _after_update(self, *_: Any) -> None:
        self._updates += 1

    def _close(self) -> None:
        self._run = None
