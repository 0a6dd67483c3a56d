"""Freezing under `torch.compile`: each new pattern of `requires_grad` recompiles the model, so it comes in batches.

A matrix still stops being updated at its own step: until its batch comes, its gradient is computed and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn


class Batches:
    """When `requires_grad` may follow what is frozen: always, or at few moments where the model is compiled.

    With `limit` recompilations the moments are those at which 1/(limit + 1), 2/(limit + 1), ... of what has to freeze
    before training ends is frozen. Each of them raises torch's own recompilation limit (beyond which torch.compile
    silently goes on without compiling) by one, so that freezing takes nothing away from it; `close` lowers it again.

    Args:
        model: The model that is trained, wrapped or not.
        limit: How many times freezing may recompile the model in this run.

    Attributes:
        compiled: Whether the model is compiled, as a whole or in parts, by `torch.compile` or by accelerate.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.compiled = is_compiled(model)
        self.limit = limit
        self._passed = 0
        self._raised = 0

    def allow(self, more: int) -> None:
        """Let the run compile `more` times besides, for what is no batch."""
        if self.compiled:
            self._raised += more
            _dynamo().recompile_limit += more

    def due(self, frozen: float) -> bool:
        """Whether `requires_grad` should follow now that the part `frozen` (0 to 1) of what can freeze is frozen."""
        if not self.compiled:
            return True
        passed = min(int(frozen * (self.limit + 1) + 1e-9), self.limit)
        due = passed > self._passed
        if due:
            self._passed = passed
            self.allow(1)
        return due

    def close(self) -> None:
        """The run is over: torch's limit is as before."""
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
