"""Gradient clipping, undone in what is measured: by which factor it has scaled down the gradients of this step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import utils
from torch.nn.utils import clip_grad

from ..contracts import Extension, Run, Step
from ..find.components import Component
from ..parallel.sharded import full
from .watching import Watched


class Clipping(Extension):
    """Divides the statistic by what clipping by the norm has multiplied the gradients of the step with.

    A clipped gradient has the same length at every step, whatever happens to the model: only what clipping has taken
    away tells that gradients grow. torch has no hook on it. So while an engine wants to know, the function is wrapped
    in which `clip_grad_norm_` of torch, accelerate, Trainer and Lightning ends, `torch.nn.utils.clip_grads_with_norm_`.
    Clipping by value, or by a loop's own code, is not seen; such a loop calls `engine.step()` before it.

    Raises:
        RuntimeError: this version of torch clips in another way.
    """

    name = "clipping"

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._parameters = {parameter for component in run.components for parameter in component.measured}
        self._factors: dict[Tensor, Tensor] = {}
        undo.callback(self._close)
        try:
            CLIPPING.watch(self, undo)
        except LookupError:
            raise RuntimeError(
                f"torch {torch.__version__} clips gradients in another way than torch 2.13, so clipping cannot be "
                "undone, which GradES without a tau needs. Pass a tau, or use torch 2.13."
            ) from None

    def _close(self) -> None:
        self._parameters, self._factors = set(), {}

    def note(self, parameters: Iterable[Tensor], factor: Tensor) -> None:
        """These have been clipped; twice in a step, where a loop does so."""
        for parameter in parameters:
            if parameter in self._parameters:
                before = self._factors.get(parameter)
                self._factors[parameter] = factor if before is None else before * factor

    def correct(self, values: Tensor, components: Sequence[Component], step: Step) -> Tensor:
        if not self._factors:
            return values
        factors = [self._factors.get(component.measured[0]) for component in components]
        first = next((factor for factor in factors if factor is not None), None)
        if first is None:
            return values
        if all(factor is first for factor in factors):  # one call has clipped all of them
            return values / first.to(values)
        one = first.new_ones(())
        return values / torch.stack([one if factor is None else factor.to(one) for factor in factors]).to(values)

    def on_join(self, components: Sequence[Component], parameters: Sequence[Tensor]) -> None:
        self._parameters.update(parameter for component in components for parameter in component.measured)

    def on_step_end(self, step: Step) -> None:
        self._factors = {}


def _wrap(original: Callable[..., None], watching: WeakSet[Clipping]) -> Callable[..., None]:
    @functools.wraps(original)
    def clip(parameters: Any, max_norm: float, total_norm: Tensor, *args: Any, **kwargs: Any) -> None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        original(parameters, max_norm, total_norm, *args, **kwargs)
        factor = torch.clamp(float(max_norm) / (full(total_norm.detach()) + 1e-6), max=1.0).float()
        for clipping in list(watching):
            clipping.note(parameters, factor)

    return clip


CLIPPING = Watched([(clip_grad, "_clip_grads_with_norm_"), (utils, "clip_grads_with_norm_")], _wrap)
