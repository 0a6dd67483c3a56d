"""L1 norms of tensors and of differences of tensors, without temporaries of the size of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that are subtracted at once: on a CPU as many as stay in the cache, on an accelerator enough to fill it.
_CHUNK_CPU = 1 << 16
_CHUNK_ACCELERATOR = 1 << 24


def l1_norm(tensor: Tensor) -> Tensor:
    """`sum |tensor|` as a 0-d tensor on the same device, accumulated in float32 or better."""
    return torch.linalg.vector_norm(tensor, 1, dtype=_accumulator(tensor))


def l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """`sum |a - b|` as a 0-d tensor on `a`'s device; neither argument is changed.

    Both are read once, in chunks along the first dimension; the difference is formed in float32 or better, also for
    half-precision arguments (in bfloat16 it would lose most of its digits).
    """
    if a.ndim == 0:
        a, b = a[None], b[None]
    chunk = _CHUNK_CPU if a.device.type == "cpu" else _CHUNK_ACCELERATOR
    rows = max(1, chunk // max(1, a[0].numel()))
    scratch = torch.empty_like(a[:rows], dtype=_accumulator(a))
    norms = []
    for start in range(0, a.shape[0], rows):
        part = a[start : start + rows]
        difference = scratch[: part.shape[0]]
        difference.copy_(part).sub_(b[start : start + rows])
        norms.append(torch.linalg.vector_norm(difference, 1))
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
