"""Which host transfers an engine makes, on a CPU: where it reads a check's values, and that it reads nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grades_hf import GradES
from grades_hf.contracts import Check
from grades_hf.reading import measure


class Queue(TorchDispatchMode):
    """Work that a GPU's queue takes without waiting: no value of a tensor is read, but for those kept on the host."""

    def __init__(self, *host: torch.Tensor) -> None:
        super().__init__()
        self.host = list(host)  # they are kept, so that no other tensor gets their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            assert self._kept(args[0]), "a host transfer of a single value"
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if isinstance(result, torch.Tensor) and tensors and all(map(self._kept, tensors)):
            self.host.append(result)
        return result

    def _kept(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {kept.untyped_storage().data_ptr() for kept in self.host}


def watch(patch: pytest.MonkeyPatch, engine: GradES) -> list[int]:
    """The steps at which the values of a check are read, from now on; `measure` and `_remember` may read nothing."""
    reads: list[int] = []
    values = Check.values

    def reading(check: Check) -> torch.Tensor:
        reads.append(engine.t)
        return values(check)

    patch.setattr(Check, "values", reading)
    patch.setattr("grades_hf.engine.measure", queued(engine, measure))
    patch.setattr(engine, "_remember", queued(engine, engine._remember))
    return reads


def queued(engine: GradES, method: Any) -> Any:
    def work(*args: Any) -> Any:
        with Queue(engine.took_part), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a host transfer"))
            return method(*args)

    return work
