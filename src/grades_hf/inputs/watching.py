"""Functions of torch's that are wrapped as long as an engine watches their calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any


class Watched:
    """A function that torch has no hook on; it is as torch made it while nobody watches.

    Args:
        places: Where the function is found: pairs of a module and a name in it.
        wrap: From the function and the set of those who watch to the function that takes its place.
    """

    def __init__(
        self,
        places: Sequence[tuple[Any, str]],
        wrap: Callable[[Callable[..., None], weakref.WeakSet[Any]], Callable[..., None]],
    ) -> None:
        self._places, self._wrap = places, wrap
        self._watching: weakref.WeakSet[Any] = weakref.WeakSet()
        self._original: Callable[..., None] | None = None

    def watch(self, watcher: object, undo: ExitStack) -> None:
        """From now on `watcher` sees the calls, until `undo` is closed or the watcher dies.

        Raises:
            LookupError: the function is not where it was in torch 2.13.
        """
        undo.callback(self._forget, watcher)
        self._watching.add(watcher)  # first: whatever is collected meanwhile must not take the wrapper off
        weakref.finalize(watcher, self._restore)
        if self._original is None:
            found = [getattr(module, name, None) for module, name in self._places]
            if found[0] is None or any(function is not found[0] for function in found):
                raise LookupError
            self._original = found[0]
            self._put(self._wrap(found[0], self._watching))

    def _forget(self, watcher: object) -> None:
        self._watching.discard(watcher)
        self._restore()

    def _restore(self) -> None:
        """An engine that was never closed calls this when it dies."""
        if not list(self._watching) and self._original is not None:  # its length counts what is dying just now
            original, self._original = self._original, None
            self._put(original)

    def _put(self, function: Callable[..., None]) -> None:
        for module, name in self._places:
            setattr(module, name, function)
