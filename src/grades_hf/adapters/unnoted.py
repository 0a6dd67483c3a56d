"""What objects note of themselves while a look passes through them, and how it is taken back."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

LARGEST = 4096  # elements of a container or tensor that may be notes; larger ones are data
_DATA = ("train_dataset", "eval_dataset", "callback_handler", "_modules", "_parameters")


@contextlib.contextmanager
def unnoted(objects: Iterable[object], *, every_tensor: bool = False, **stand_ins: Any) -> Iterator[None]:
    """The attributes of some objects are afterwards as before.

    Trainers and modules count, sum up and append to lists while they compute a loss, for the next log. Restored are
    which objects the attributes are, the content of lists, dicts, sets and deques (also of those inside them), and
    that of small tensors.

    Args:
        objects: The objects.
        every_tensor: Whether large tensors are restored, too.
        **stand_ins: Attributes of all of them that have these values meanwhile.
    """
    saved = [(vars(item), dict(vars(item))) for item in objects]
    contents: list[tuple[Any, Any]] = []
    for _, before in saved:
        for name, value in before.items():
            if name not in _DATA:
                _collect(value, contents, 3, every_tensor)
    try:
        for own, _ in saved:
            own.update(stand_ins)
        yield
    finally:
        for content, copy in contents:
            _restore(content, copy)
        for own, before in saved:
            for name in own.keys() - before.keys():
                del own[name]
            own.update(before)


def silent(*_: Any, **__: Any) -> None:
    """Stands in for `log` meanwhile."""


def _collect(value: Any, contents: list[tuple[Any, Any]], depth: int, every_tensor: bool) -> None:
    if isinstance(value, Tensor):
        if (every_tensor or value.numel() <= LARGEST) and not value.requires_grad and type(value) is Tensor:
            contents.append((value, value.detach().clone()))
    elif isinstance(value, (list, dict, set, deque)) and len(value) <= LARGEST:
        contents.append((value, value.copy()))
        if depth and not isinstance(value, set):
            for item in value.values() if isinstance(value, dict) else value:
                _collect(item, contents, depth - 1, every_tensor)


def _restore(content: Any, copy: Any) -> None:
    if isinstance(content, Tensor):
        content.copy_(copy)
    elif isinstance(content, (dict, set)):
        content.clear()
        content.update(copy)
    else:
        content.clear()
        content.extend(copy)
