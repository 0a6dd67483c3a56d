"""Freezing: no gradient, no update, no optimizer state, whatever else touches the model; and undoing it at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..contracts import Extension, Run, Trait
from ..hooks import hook
from ..parallel.sharded import Placeholders
from .optimizers import LeaveOut, can_leave_out


class Freezer(Extension):
    """Freezes parameters and keeps them frozen.

    A frozen parameter has `requires_grad=False`, no gradient and no optimizer state; its place in the optimizer's
    parameter groups stays, so that checkpoints fit. PEFT's `disable_adapter()` and `set_adapter()` switch
    `requires_grad` on again; `reassert` switches it off at every step, and a gradient that was computed in between is
    dropped the moment it is accumulated, before it can enter the norm that clipping divides by. Hooks do it for
    every forward pass and again before its backward pass: activation checkpointing computes a part of the forward pass
    a second time there, and fails if other tensors require a gradient then.

    Where a new pattern of `requires_grad` is dear (`torch.compile` compiles again), it can wait: until `settle`, the
    gradient of what was frozen is still computed, and dropped.

    Some optimizers also move parameters that have no gradient (Muon's reference implementation decays them), so while
    an optimizer steps, what is frozen is not in its parameter groups (`LeaveOut`).

    A batch may involve nothing but what is frozen (one language of two, the other adapter). So that its backward pass
    is not an error, the model's outputs require a gradient then. It is as if the batch had taught nothing.

    Args:
        optimizers: The optimizers whose state for frozen parameters is dropped.
        due: From the part (0 to 1) of what has to freeze that is frozen now to whether `requires_grad` should follow.
            None (default): it always does.
        placeholders: Zeros in place of dropped state in `state_dict()`, where parameters are sharded; else None.
    """

    name = "freezer"

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        due: Callable[[float], bool] | None = None,
        placeholders: Placeholders | None = None,
    ) -> None:
        self.optimizers = optimizers
        self.due = due
        self.placeholders = placeholders
        self._before: dict[Tensor, bool] = {}  # requires_grad before we froze it
        self._pending: set[Tensor] = set()  # frozen, but for requires_grad
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._undo = ExitStack()
        self._leaving: list[LeaveOut] = []

    def attach(self, run: Run, undo: ExitStack) -> None:
        undo.callback(lambda: self.release(keep_frozen=run.config.keep_frozen))
        self._ended: Callable[[], bool] = lambda: run.ended is not None
        if Trait.COMPILED not in run.traits or any(component.adapter for component in run.components):
            self._undo.callback(hook(run.model, "forward_pre", self._before_forward))
            self._undo.callback(hook(run.model, "forward", self._after_forward))
        for optimizer in filter(can_leave_out, self.optimizers):
            leaving = LeaveOut(optimizer, self)
            leaving.attach(optimizer, self._undo)
            self._leaving.append(leaving)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._before

    def __len__(self) -> int:
        return len(self._before)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._before)

    def freeze(self, parameters: Iterable[Tensor]) -> None:
        """Freeze these, before the optimizer's update of this step."""
        for parameter in parameters:
            if parameter in self._before:
                continue
            self._before[parameter] = parameter.requires_grad
            parameter.requires_grad_(True)  # a hook can only be put on a tensor that requires a gradient
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(_drop_gradient)
            if self.due is not None:
                self._pending.add(parameter)
            else:
                parameter.requires_grad_(False)
            parameter.grad = None
            for optimizer in self.optimizers:
                dropped = optimizer.state.pop(parameter, {})
                if self.placeholders is not None:
                    self.placeholders.note(parameter, dropped)
        for leaving in self._leaving:
            leaving.refresh()

    def settle(self) -> None:
        """What is frozen requires no gradient from now on, and none is computed."""
        self._pending.clear()
        self.reassert()

    def reassert(self) -> None:
        """Freeze again what something else has unfrozen since."""
        for parameter in self._before:
            if parameter.requires_grad and parameter not in self._pending:
                parameter.requires_grad_(False)
            if parameter.grad is not None:
                parameter.grad = None

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        self.reassert()

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not self._before or not torch.is_grad_enabled():
            return
        tensors = _tensors(output)
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        for tensor in trained:
            tensor.register_hook(self._before_backward)
        if not trained and module.training and not self._ended():
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.is_leaf:
                    tensor.requires_grad_(True)

    def _before_backward(self, gradient: Tensor) -> None:
        for parameter in self._before:
            if parameter.requires_grad and parameter not in self._pending:
                parameter.requires_grad_(False)

    def release(self, *, keep_frozen: bool = False) -> None:
        """Give every parameter back as it was; with `keep_frozen` only the hooks go."""
        self._undo.close()
        for handle in self._hooks.values():
            handle.remove()
        if not keep_frozen:
            for parameter, before in self._before.items():
                parameter.requires_grad_(before)
        else:
            self.settle()
        self._pending.clear()
        self._hooks.clear()
        self._before.clear()
        self._leaving.clear()
        self.optimizers = ()
        self._ended = bool


def unwrap_optimizers(optimizer: object) -> list[torch.optim.Optimizer]:
    """The torch optimizers in a list or tuple of them, in a single one, or in None."""
    several = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    return [inner for inner in map(unwrap_optimizer, several) if inner is not None]


def unwrap_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """The torch optimizer inside accelerate's (or another library's) wrapper; None for None."""
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ValueError(
                f"optimizer={type(optimizer).__name__} is no torch.optim.Optimizer and wraps none. Pass the optimizer "
                "that updates the model's parameters."
            )
        optimizer = inner
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # it is a torch.optim.Optimizer by inheritance
        return unwrap_optimizer(optimizer.optimizer)  # type: ignore[union-attr]
    return optimizer


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output, also in that of a dataclass or namespace."""
    if isinstance(output, Mapping):
        output = dict(output)
    elif hasattr(output, "__dict__") and not isinstance(output, (Tensor, list, tuple, nn.Module)):
        output = vars(output)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
