"""Counts the FLOPs of everything that runs, in a forward pass and in the backward pass that follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves

from .formulas import matrix_flops


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs in its context.

    It is torch's `FlopCounterMode` without the breakdown by module and without the extra decompositions: those make a
    small model several times slower and change the last bits of its gradients. This one changes no bit. What
    torch.compile has compiled runs compiled, and is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, a frame that is first met while counting would never be compiled any more."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += matrix_flops(func, args, kwargs, out)
        return out


def enter(counter: FlopCounter) -> None:
    """Let `counter` count what runs in this thread, until `leave`."""
    _push_mode(counter)


def leave(counter: FlopCounter) -> None:
    """Take `counter` off this thread's stack of dispatch modes, wherever it is in it."""
    above = []
    while counter in _get_current_dispatch_mode_stack():
        mode = _pop_mode()
        if mode is not counter:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


# Nodes that multiply nothing, and save no tensor whose unpacking could recompute something under checkpointing.
_FREE = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Transpose", "T", "Permute", "Unsqueeze", "Expand", "Slice", "Cat", "Clone")
    + ("Add", "Sub", "Neg", "ToCopy")
)


def count_backward(output: Any, counter: FlopCounter) -> None:
    """Let `counter` be active while the nodes of `output`'s autograd graph run, each time they do."""

    def before(*_: Any) -> None:
        if counter not in _get_current_dispatch_mode_stack():
            _push_mode(counter)

    def after(*_: Any) -> None:
        leave(counter)

    pending = [leaf.grad_fn for leaf in _tensors(output) if leaf.grad_fn is not None]
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        if node.name() not in _FREE:
            counters = node.metadata.setdefault("grades_counters", [])
            if counter not in counters:  # else reached from an earlier pass of this step
                counters.append(counter)
                node.register_prehook(before)
                node.register_hook(after)
        for following, _ in node.next_functions:
            if following is not None and following not in seen and not hasattr(following, "variable"):
                seen.add(following)
                pending.append(following)


def _tensors(output: Any) -> Iterable[Tensor]:
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
