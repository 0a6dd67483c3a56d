"""Freezing: no gradient, no update, no optimizer state, whatever else touches the model; and undoing it at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .distributed import Placeholders


class Freezer:
    """Freezes parameters and keeps them frozen.

    A frozen parameter has `requires_grad=False`, no gradient and no optimizer state; its place in the optimizer's
    parameter groups stays, so that checkpoints fit. PEFT's `disable_adapter()` and `set_adapter()` switch
    `requires_grad` on again; `reassert` switches it off at every step, and a gradient that was computed in between is
    dropped the moment it is accumulated, before it can enter the norm that clipping divides by. `guard` does it for
    every forward pass and again before its backward pass: activation checkpointing computes a part of the forward pass
    a second time there, and fails if other tensors require a gradient then.

    Where a new pattern of `requires_grad` is dear (`torch.compile` compiles again), it can wait: until `settle`, the
    gradient of what was frozen is still computed, and dropped.

    Some optimizers also move parameters that have no gradient (Muon's reference implementation decays them), so while
    an optimizer steps, what is frozen is not in its parameter groups.

    Args:
        optimizers: Whose state for frozen parameters is dropped.
        patient: Whether `requires_grad` waits for `settle`.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, patient: bool = False) -> None:
        self.optimizers = optimizers
        self.patient = patient
        self.placeholders: Placeholders | None = None  # for what is dropped, where the model is sharded
        self._before: dict[Tensor, bool] = {}  # requires_grad before we froze it
        self._pending: set[Tensor] = set()  # frozen, but for requires_grad
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._guards: list[RemovableHandle] = []
        self._steps: list[RemovableHandle] = []
        self._groups: list[tuple[dict[str, Any], list[Tensor]]] = []  # parameter groups as they are between steps

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._before

    def freeze(self, parameters: Iterable[Tensor]) -> None:
        """Freeze these, before the optimizer's update of this step."""
        for parameter in parameters:
            if parameter in self._before:
                continue
            self._before[parameter] = parameter.requires_grad
            self._drop_gradients(parameter)
            if self.patient:
                self._pending.add(parameter)
            else:
                parameter.requires_grad_(False)
            parameter.grad = None
            for optimizer in self.optimizers:
                dropped = optimizer.state.pop(parameter, {})
                if self.placeholders is not None:
                    self.placeholders.note(parameter, dropped)
        if self._before and not self._steps:
            for optimizer in filter(_can_do_without, self.optimizers):
                self._steps.append(optimizer.register_step_pre_hook(self._before_step))
                self._steps.append(optimizer.register_step_post_hook(self._after_step))

    def _drop_gradients(self, parameter: Tensor) -> None:
        parameter.requires_grad_(True)  # a hook can only be put on a tensor that requires a gradient
        self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(_drop_gradient)

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

    def guard(self, model: nn.Module) -> None:
        """Reassert before every forward pass of `model` and before the backward pass of its outputs."""

        @torch.compiler.disable
        def before_forward(module: nn.Module, inputs: Any) -> None:
            self.reassert()

        @torch.compiler.disable
        def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            if not self._before or not torch.is_grad_enabled():
                return
            for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(self._before_backward)

        self._guards = [model.register_forward_pre_hook(before_forward), model.register_forward_hook(after_forward)]

    def _before_backward(self, gradient: Tensor) -> None:
        for parameter in self._before:
            if parameter.requires_grad and parameter not in self._pending:
                parameter.requires_grad_(False)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._after_step()
        for group in optimizer.param_groups:
            self._groups.append((group, group["params"]))
            group["params"] = [parameter for parameter in group["params"] if parameter not in self._before]

    def _after_step(self, *_: Any) -> None:
        for group, parameters in self._groups:
            group["params"] = parameters
        self._groups.clear()

    def release(self, *, keep_frozen: bool = False) -> None:
        """Give every parameter back as it was; with `keep_frozen` only the hooks go."""
        self._after_step()  # a step that has failed did not do it
        for handle in (*self._hooks.values(), *self._guards, *self._steps):
            handle.remove()
        self._guards.clear()
        self._steps.clear()
        if not keep_frozen:
            for parameter, before in self._before.items():
                parameter.requires_grad_(before)
        else:
            self.settle()
        self._pending.clear()
        self._hooks.clear()
        self._before.clear()


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
                f"optimizer={type(optimizer).__name__} is no torch.optim.Optimizer and wraps none; pass the optimizer "
                "that updates the model's parameters."
            )
        optimizer = inner
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # it is a torch.optim.Optimizer by inheritance
        return unwrap_optimizer(optimizer.optimizer)  # type: ignore[union-attr]
    return optimizer


def parameter_indices(optimizer: torch.optim.Optimizer) -> dict[Tensor, int]:
    """The number under which `optimizer.state_dict()["state"]` holds each parameter."""
    parameters: Iterable[Tensor] = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {parameter: index for index, parameter in enumerate(parameters)}


def _can_do_without(optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters may leave the groups for a step: bitsandbytes' options go by a parameter's place there."""
    return not hasattr(optimizer, "get_config")


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
