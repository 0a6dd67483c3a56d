"""The trained loss of each step: what `backward` is called on."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..contracts import Extension, Run, Step
from ..find.components import Component
from ..hooks import hook
from .watching import Watched

_running = threading.local()  # whether a backward pass runs in this thread: one inside of it is no step's loss

NONE_SEEN = (
    "GradES without a tau divides gradients by the trained loss of the step, and has seen none: since the last step no "
    "backward pass began at a loss of this model in training mode. In a loop of your own call model.train() first, or "
    "engine.step(loss=loss), or pass a tau."
)


class Loss(Extension):
    """Divides the statistic by the trained loss, and says what that is.

    What is trained on is what `backward` is called on, whoever computes it: the model, Trainer with label smoothing or
    a `compute_loss_func`, TRL's DPO, a loop. So while an engine wants to know, `torch.autograd.backward` is wrapped,
    in which `Tensor.backward`, accelerate and Lightning end. The losses of a step's micro-batches are added up. A
    backward pass belongs to a model if that has run in training mode since the last step. A loop that knows better
    hands it over: `engine.step(loss=loss)`.

    There is no value where the loss is not greater than 0.

    Args:
        scaler: The gradient scaler whose factor the loss carries, or None.
    """

    name = "loss"

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._scaler = scaler
        self._ran = False
        self._total: Tensor | None = None

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._ranks = run.ranks
        self._device = run.components[0].parameters[0].device
        undo.callback(hook(run.model, "forward_pre", self._before_forward))
        BACKWARD.watch(self, undo)

    def note(self, loss: Tensor) -> None:
        """A backward pass has begun at this tensor; there is no transfer to the host."""
        if self._ran and loss.numel() == 1:
            value = loss.detach().float().reshape(())
            if self._scaler is not None:
                value = value / self._scaler.get_scale()
            self._total = value if self._total is None else self._total + value.to(self._total)

    def before_check(self, step: Step) -> None:
        seen, self._total, self._ran = self._total, None, False
        loss = seen if step.loss is None else torch.as_tensor(step.loss).detach().float().reshape(())
        if loss is None:
            raise RuntimeError(NONE_SEEN)
        step.loss = self._ranks.mean(loss.to(self._device))

    def correct(self, values: Tensor, components: Sequence[Component], step: Step) -> Tensor:
        assert step.loss is not None
        loss = step.loss.to(values)
        return torch.where(loss > 0, values / loss, torch.nan)

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        self._ran |= module.training and torch.is_grad_enabled()


def _wrap(original: Callable[..., None], watching: WeakSet[Loss]) -> Callable[..., None]:
    @functools.wraps(original)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(_running, "backward", False) or torch._C._current_graph_task_id() != -1:
            return original(tensors, *args, **kwargs)
        _running.backward = True
        try:
            original(tensors, *args, **kwargs)
        finally:
            _running.backward = False
        for root in [tensors] if isinstance(tensors, Tensor) else tensors:
            for loss in list(watching):
                loss.note(root)
        return None

    return backward


BACKWARD = Watched([(torch.autograd, "backward")], _wrap)
