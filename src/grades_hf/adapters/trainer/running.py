"""Which trainer runs a callback, and what of that trainer passes through GradES."""

from __future__ import annotations

import functools
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...config import GradESConfig

_NAME = "_grades_binding"  # of the attribute of a trainer that holds its binding
_PARTS = ("_evaluate", "_run_epoch", "_finalize_training")  # the methods that Trainer's loop consists of


def running_trainer() -> Trainer | None:
    """The trainer whose method is calling the callback; None where no `transformers.Trainer` does.

    Trainer gives its callbacks no reference to itself, and without one a callback can know neither the loss that is
    trained on nor the held-out rows before a first evaluation. The trainer is the `self` of a frame on the stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer):
            return candidate
        frame = frame.f_back
    return None


class BoundCallback(TrainerCallback, ABC):
    """What a binding needs of a callback.

    Attributes:
        config: The options.
    """

    config: GradESConfig

    @abstractmethod
    def leaves_out(self, part: str, *, at_start: bool) -> bool:
        """Whether a part of the loop has nothing to do.

        Args:
            part: The name of the method.
            at_start: Whether it is the evaluation before the first step.
        """

    @abstractmethod
    def metrics(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The scalars that belong to a log."""

    @abstractmethod
    def end(self) -> None:
        """End the current run, if there is one."""


class Binding:
    """Lets a trainer's loop, logs and start pass through GradES.

    However the loop ends, by its last step, an error or Ctrl-C, the run of GradES ends with it. Trackers get its
    options and figures: Trainer runs them before the callbacks of its user, so that what a callback adds to a log comes
    too late for them. A binding is part of its trainer; both can be copied and pickled.

    Args:
        trainer: The trainer.
        user: The callback that the user gave to it. Trainer may replace it by a copy.
    """

    def __init__(self, trainer: Trainer, user: BoundCallback) -> None:
        self.trainer, self.user = trainer, user
        own, handler = vars(trainer), vars(trainer.callback_handler)
        parts = {name: own.get(name) for name in ("_inner_training_loop", *_PARTS)}
        self._before = {**parts, **{name: handler.get(name) for name in ("on_train_begin", "on_log")}}
        own.update({name: functools.partial(self._guarded, name) for name in parts}, **{_NAME: self})
        handler.update(on_train_begin=self._on_train_begin, on_log=self._on_log)

    @classmethod
    def of(cls, trainer: Trainer, callback: BoundCallback) -> Binding:
        """The binding of `trainer`, which is made at the first call."""
        found = vars(trainer).get(_NAME)
        return found if isinstance(found, Binding) else cls(trainer, callback)

    @property
    def at_work(self) -> BoundCallback | None:
        """The trainer's GradESCallback; None once it has been removed."""
        return next((c for c in self.trainer.callback_handler.callbacks if isinstance(c, BoundCallback)), None)

    def put_back(self, copy: BoundCallback) -> BoundCallback:
        """The user's callback takes the place of a copy that Trainer has made of it."""
        callbacks = self.trainer.callback_handler.callbacks
        if self.user is copy or self.user in callbacks or copy not in callbacks:
            return copy
        callbacks[callbacks.index(copy)] = self.user
        return self.user

    def _original(self, owner: Any, name: str) -> Any:
        return self._before[name] or functools.partial(getattr(type(owner), name), owner)

    def _guarded(self, name: str, *args: Any, **kwargs: Any) -> Any:
        callback = self.at_work
        if callback is not None and callback.leaves_out(name, at_start="skip_scheduler" in kwargs):
            self.trainer.control.should_training_stop |= name == "_run_epoch"
            return {}
        over = True
        try:
            result = self._original(self.trainer, name)(*args, **kwargs)
            over = name == "_inner_training_loop"
            return result
        finally:
            if over:
                self._end()

    def _end(self) -> None:
        self.user.end()  # also where it has been removed in the course of the run
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, BoundCallback):
                callback.end()

    def _on_train_begin(self, args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        begin, callback = self._original(self.trainer.callback_handler, "on_train_begin"), self.at_work
        if callback is None:
            return begin(args, *rest, **kwargs)
        # Every tracker's integration asks for the options of a run in this way, when it begins.
        before, own = vars(args).get("to_dict"), {"grades": callback.config.resolved().to_dict()}
        vars(args)["to_dict"] = functools.partial(
            _with_options, before or functools.partial(type(args).to_dict, args), own
        )
        try:
            return begin(args, *rest, **kwargs)
        finally:
            del vars(args)["to_dict"]
            if before is not None:
                vars(args)["to_dict"] = before

    def _on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> Any:
        if (callback := self.at_work) is not None:
            logs.update(callback.metrics(logs))
        return self._original(self.trainer.callback_handler, "on_log")(args, state, control, logs, **kwargs)


def _with_options(to_dict: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {**to_dict(), **options}
