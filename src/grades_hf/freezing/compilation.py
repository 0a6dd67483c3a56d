"""Freezing under `torch.compile`: each new pattern of `requires_grad` recompiles the model, so it comes in batches.

A matrix still stops being updated at its own step: until its batch comes, its gradient is computed and dropped.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn

from ..contracts import Extension, Run


class Batches(Extension):
    """When `requires_grad` may follow what is frozen, where the model is compiled.

    With `limit` recompilations the moments are those at which 1/(limit + 1), 2/(limit + 1), ... of what has to freeze
    before training ends is frozen. Each of them raises torch's own recompilation limit (beyond which torch.compile
    silently goes on without compiling) by one, so that freezing takes nothing away from it.

    Args:
        limit: How many times freezing may recompile the model in this run.
    """

    name = "compilation"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._passed = 0
        self._raised = 0

    def attach(self, run: Run, undo: ExitStack) -> None:
        undo.callback(self._lower)
        if run.extension("prefix") is not None:
            self._raise(2)  # the order in which modules run is recorded by hooks, which come and go

    def due(self, progress: float) -> bool:
        """Whether `requires_grad` should follow now that the part `progress` of what has to freeze is frozen."""
        passed = min(int(progress * (self.limit + 1) + 1e-9), self.limit)
        due = passed > self._passed
        if due:
            self._passed = passed
            self._raise(1)
        return due

    def _raise(self, more: int) -> None:
        self._raised += more
        _dynamo().recompile_limit += more

    def _lower(self) -> None:
        _dynamo().recompile_limit -= self._raised
        self._raised = 0


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or accelerate compiles `model` or a part of it."""
    plugin = AcceleratorState._shared_state.get("dynamo_plugin")
    if plugin is not None and plugin.backend != DynamoBackend.NO:
        return True
    return any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _dynamo() -> Any:
    return torch._dynamo.config
