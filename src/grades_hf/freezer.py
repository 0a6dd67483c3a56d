"""Freezing: no gradient, no update, no optimizer state, whatever else touches the model; and undoing it at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .components import Component


class Freezer:
    """Freezes components and keeps them frozen.

    A frozen parameter has `requires_grad=False`, no gradient and no optimizer state; its place in the optimizer's
    parameter groups stays, so that checkpoints fit. PEFT's `disable_adapter()` and `set_adapter()` switch
    `requires_grad` on again; `reassert` switches it off at every step, and a gradient that was computed in between is
    dropped the moment it is accumulated, before it can enter the norm that clipping divides by. `guard` does it for
    every forward pass and again before its backward pass: activation checkpointing computes a part of the forward pass
    a second time there, and fails if other tensors require a gradient then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        self._before: dict[Tensor, bool] = {}  # requires_grad before we froze it
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._guards: list[RemovableHandle] = []

    def freeze(self, component: Component) -> None:
        """Freeze all tensors of one component, before the optimizer's update of this step."""
        for parameter in component.parameters:
            if parameter in self._before:
                continue
            self._before[parameter] = parameter.requires_grad
            parameter.requires_grad_(True)  # a hook can only be put on a tensor that requires a gradient
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(_drop_gradient)
            parameter.requires_grad_(False)
            parameter.grad = None
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)

    def reassert(self) -> None:
        """Freeze again what something else has unfrozen since."""
        for parameter in self._before:
            if parameter.requires_grad:
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
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def release(self, *, keep_frozen: bool = False) -> None:
        """Give every parameter back as it was; with `keep_frozen` only the hooks go."""
        for handle in (*self._hooks.values(), *self._guards):
            handle.remove()
        self._guards.clear()
        if not keep_frozen:
            for parameter, before in self._before.items():
                parameter.requires_grad_(before)
        self._hooks.clear()
        self._before.clear()


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


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
