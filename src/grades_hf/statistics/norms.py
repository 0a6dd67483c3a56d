"""Norms of tensors and of differences of tensors: exact to float32, without temporaries of the size of a matrix.

Of a sharded tensor each is that of this rank's shard; the engine adds them up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..parallel.sharded import locals_of

# Elements that are worked on at once: on a CPU as many as stay in the cache, on an accelerator enough to fill it.
_CHUNK_CPU = 1 << 17
_CHUNK_ACCELERATOR = 1 << 23
_SMALL = 1 << 15  # elements up to which tensors are worked on together on a CPU


def l1_norms(tensors: Sequence[Tensor]) -> Tensor:
    """`sum |tensor|` of each, added up in float32 or better: (n,) in float64 on the first one's device."""
    return _sums(locals_of(tensors), None)


def l1_distances(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`sum |a[i] - b[i]|` for each `i`: (n,) in float64 on the device of `a[0]`; no argument is changed.

    Both are read once, in pieces along the first dimension; the difference is formed and added up in float32 or better,
    also for half-precision arguments (in bfloat16 it would lose most of its digits).
    """
    return _sums(locals_of(a), locals_of(b))


def _sums(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    devices = {tensor.device for tensor in a}
    if len(devices) > 1:
        return _from_devices(a, b)
    if not devices:
        return torch.zeros(0, dtype=torch.float64)
    if a[0].device.type == "cpu":
        return _on_cpu(a, b)
    return torch.stack(_grouped(a, b, _CHUNK_ACCELERATOR)).double()


def _from_devices(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    """One copy from each device to the first one's."""
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(a):
        places.setdefault(tensor.device, []).append(place)
    sums = torch.zeros(len(a), dtype=torch.float64, device=a[0].device)
    for own in places.values():
        part = _sums([a[i] for i in own], None if b is None else [b[i] for i in own])
        sums[torch.tensor(own, device=sums.device)] = part.to(sums.device, non_blocking=True)
    return sums


def _on_cpu(a: list[Tensor], b: list[Tensor] | None) -> Tensor:
    """Small tensors of one shape together: a matrix of 4 x 4 elements costs as much to call for as 16 x 576 to add."""
    alike: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(a):
        alike.setdefault(tensor.shape, []).append(place)
    order: list[int] = []
    sums: list[Tensor] = []
    for shape, places in alike.items():
        order += places
        number = shape.numel()
        if number > _SMALL:
            sums += [_one(a[i], None if b is None else b[i]).double().reshape(1) for i in places]
            continue
        across = max(1, _CHUNK_CPU // max(1, number))
        for start in range(0, len(places), across):
            own = places[start : start + across]
            group = torch.stack([a[i] for i in own])
            group = group if _is_full(group) else group.float()
            if b is not None:
                group.sub_(torch.stack([b[i] for i in own]))
            sums.append(group.abs_().reshape(len(own), number).sum(1).double())
    found = torch.empty(len(a), dtype=torch.float64)
    found[torch.tensor(order, dtype=torch.long)] = torch.cat(sums)
    return found


def _one(a: Tensor, b: Tensor | None) -> Tensor:
    """Piece by piece, which stays in the cache between the difference and the sum.

    Not `torch.linalg.vector_norm`: on a CPU that adds up in a few float32 lanes, which is 2 % off for 4096 x 4096
    elements, and it takes several times as long.
    """
    if a.numel() <= _CHUNK_CPU:
        return _absolute(a, b).sum()
    rows = max(1, _CHUNK_CPU // a[0].numel())
    others = (None,) * a.shape[0] if b is None else b.split(rows)
    pieces = zip(a.split(rows), others, strict=b is not None)
    return torch.stack([_absolute(x, y).sum() for x, y in pieces]).sum()


def _absolute(a: Tensor, b: Tensor | None) -> Tensor:
    if b is None and _is_full(a):
        return a.abs()
    return (a.float() if b is None else _difference(a, b)).abs_()


def _grouped(a: list[Tensor], b: list[Tensor] | None, chunk: int) -> list[Tensor]:
    """A few kernels for many small tensors and for each piece of a large one; no transfer to the host.

    `_foreach_norm` adds up in a tree there, in float32 or better.
    """
    parts: list[list[Tensor]] = [[] for _ in a]
    for group in _groups(a, b, chunk):
        work = [piece if other is None else _difference(piece, other) for _, piece, other in group]
        dtype = torch.promote_types(work[0].dtype, torch.float32)
        for (index, _, _), part in zip(group, torch._foreach_norm(work, 1, dtype), strict=True):
            parts[index].append(part)
    return [part[0] if len(part) == 1 else torch.stack(part).sum() for part in parts]


def _groups(a: list[Tensor], b: list[Tensor] | None, chunk: int) -> Iterator[list[tuple[int, Tensor, Tensor | None]]]:
    """(index, piece of a, piece of b), in groups of one device and dtype with at most about `chunk` elements."""
    group: list[tuple[int, Tensor, Tensor | None]] = []
    kind, size = None, 0
    for index, tensor in enumerate(a):
        rows = max(1, chunk // max(1, tensor[0].numel())) if tensor.numel() > chunk else None
        pieces = [tensor] if rows is None else tensor.split(rows)
        others = [None] * len(pieces) if b is None else [b[index]] if rows is None else b[index].split(rows)
        for piece, other in zip(pieces, others, strict=True):
            if group and (kind != (piece.device, piece.dtype) or size + piece.numel() > chunk):
                yield group
                group, size = [], 0
            group.append((index, piece, other))
            kind, size = (piece.device, piece.dtype), size + piece.numel()
    if group:
        yield group


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.sub(a, b) if _is_full(a) else a.float().sub_(b)


def _is_full(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)
