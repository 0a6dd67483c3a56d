"""Hooks on the user's model that keep nothing alive and do not travel with copies of it."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_DICTS = {"forward_pre": "_forward_pre_hooks", "forward": "_forward_hooks"}


class Hook:
    """A module hook that calls a method of an object as long as the object lives.

    `copy.deepcopy(model)` makes a model without it, and so does pickling (`torch.save(model)`): an engine would come
    along otherwise, with its optimizer. A pickled hook becomes a function that does nothing.

    Args:
        hooks: The module's dict of hooks that this one is in.
        method: A bound method with the signature that torch documents for the hook.
    """

    def __init__(self, hooks: OrderedDict[int, Any], method: Callable[..., Any]) -> None:
        self._hooks = weakref.ref(hooks)
        self._method = weakref.WeakMethod(method)

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        copied = memo.get(id(self._hooks()))
        if copied is not None:
            memo["grades", id(copied)] = _Sweeper(copied)  # it dies with `memo`, when the copy is complete
        return _nothing

    def __reduce__(self) -> Any:
        return _make_nothing, ()


class _Sweeper:
    """Takes what became of our hooks out of a copied dict of hooks, when it dies."""

    def __init__(self, hooks: OrderedDict[int, Any]) -> None:
        self._hooks = hooks

    def __del__(self) -> None:
        for key in [key for key, hook in self._hooks.items() if hook is _nothing]:
            del self._hooks[key]


def _nothing(*_: Any) -> None:
    """What a hook is in a pickled model."""


def _make_nothing() -> Any:
    return _nothing


def hook(module: nn.Module, kind: str, method: Callable[..., Any], **options: Any) -> Callable[[], None]:
    """Register a hook.

    Args:
        module: The module to hook.
        kind: `"forward_pre"` or `"forward"`.
        method: A bound method; its object is held weakly.
        **options: Of torch's `register_forward_pre_hook` or `register_forward_hook`.

    Returns:
        What takes the hook off again.
    """
    hooks = getattr(module, _DICTS[kind])
    register = getattr(module, f"register_{kind}_hook")
    removable = register(Hook(hooks, method), **options)
    return removable.remove  # type: ignore[no-any-return]
