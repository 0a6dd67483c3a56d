"""Hooks on the user's model that keep nothing alive and do not travel with copies of it."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Of each kind of hook: where a module keeps them, and where it notes what their options are.
_DICTS = {
    "forward_pre": ("_forward_pre_hooks", {"with_kwargs": "_forward_pre_hooks_with_kwargs"}),
    "forward": (
        "_forward_hooks",
        {"with_kwargs": "_forward_hooks_with_kwargs", "always_call": "_forward_hooks_always_called"},
    ),
    "state_dict_pre": ("_state_dict_pre_hooks", {}),
}


class Hook:
    """A module hook that calls a method of an object as long as the object lives.

    `copy.deepcopy(model)` makes a model without it. In a pickled model (`torch.save(model)`) a function of Python's own
    is in its place that does nothing, so that loading does not need this package. An engine would come along otherwise,
    with its optimizer.

    Args:
        hooks: The module's dict of hooks that this one is in.
        method: A bound method with the signature that torch documents for the hook.
        keep: What lives as long as the hook; the method's object is held weakly.
    """

    def __init__(self, hooks: OrderedDict[int, Any], method: Callable[..., Any], keep: object = None) -> None:
        self._hooks = weakref.ref(hooks)
        self._method = weakref.WeakMethod(method)
        self._keep = keep

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        method = self._method()
        return None if method is None else method(*args)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return _swept(self._hooks(), memo)

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")  # takes anything, returns None


class Note:
    """What torch notes about one of our hooks; it looks only whether there is one. It travels no further than the hook.

    Args:
        notes: The module's dict that it is in.
    """

    def __init__(self, notes: dict[int, Any]) -> None:
        self._notes = notes

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return _swept(self._notes, memo)

    def __reduce__(self) -> Any:
        return bool, (True,)


class _Sweeper:
    """Takes what became of ours out of a copied dict, when it dies."""

    def __init__(self, copied: dict[int, Any]) -> None:
        self._copied = copied

    def __del__(self) -> None:
        for key in [key for key, value in self._copied.items() if value is _nothing]:
            del self._copied[key]


def _swept(own: Any, memo: dict[Any, Any]) -> Any:
    """What stands in for ours in the copy of the dict `own`, until the copy is complete and swept."""
    copied = memo.get(id(own))
    if copied is not None:
        memo["grades", id(copied)] = _Sweeper(copied)  # it dies with `memo`, when the copy is complete
    return _nothing


def _nothing(*_: Any) -> None:
    """What a hook is in a copied model, until the copy is complete."""


def hook(
    module: nn.Module,
    kind: str,
    method: Callable[..., Any],
    *,
    keep: object = None,
    traced: bool = False,
    **options: bool,
) -> Callable[[], None]:
    """Register a hook.

    torch numbers hooks from 0 on. What it notes about a number stays in copied and pickled modules, where the number
    may be given away again, to a hook of the user's. So ours have negative numbers.

    Args:
        module: The module to hook.
        kind: `"forward_pre"`, `"forward"` or `"state_dict_pre"`.
        method: A bound method; its object is held weakly.
        keep: What lives as long as the hook is there.
        traced: Whether torch.compile has to see into the method, which then is held strongly and copied: else the hook
            would cut the graph in two.
        **options: `with_kwargs` or `always_call`, as torch documents them.

    Returns:
        What takes the hook off again.
    """
    if traced:
        register: Any = getattr(module, f"register_{kind}_hook")
        remove: Callable[[], None] = register(method, **options).remove
        return remove
    name, places = _DICTS[kind]
    hooks: OrderedDict[int, Any] = getattr(module, name)
    notes: list[dict[int, Any]] = [getattr(module, places[option]) for option, on in options.items() if on]
    taken = [hooks, *(getattr(module, place) for place in places.values())]
    number = next(n for n in itertools.count(-1, -1) if not any(n in known for known in taken))
    hooks[number] = Hook(hooks, method, keep)
    for note in notes:
        note[number] = Note(note)

    def take_off() -> None:
        for known in (hooks, *notes):
            known.pop(number, None)

    return take_off
