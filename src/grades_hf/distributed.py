"""Several processes: one decision for all ranks, and a DDP reducer that fits what is still trained.

DistributedDataParallel builds its reducer once, over the parameters that require a gradient then. When some of them
are frozen later, a reducer without `find_unused_parameters` waits for gradients that never come: the next step runs
unsynchronized, silently. With it, the step is right but sends as many bytes as before. So after each freezing, before
the next forward pass, the reducer is built anew over what is still trained.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

_PRIVATE = ("_get_active_ddp_module", "_remove_autograd_hooks", "__getstate__", "__setstate__")


class Ranks:
    """The link between an engine and the other processes of its run; does nothing where there is one process.

    Args:
        model: The model that is trained, wrapped by DDP or not.

    Raises:
        RuntimeError: the model is sharded (FSDP), or this version of torch cannot rebuild a reducer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.number = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._stale = False
        self._wrapper: DistributedDataParallel | None = None
        self._hook: RemovableHandle | None = None
        if self.number == 1:
            return
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()) or any(
            type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()
        ):
            raise RuntimeError(
                "GradES does not support models that are sharded over processes (FSDP, tensor parallel) yet. Train "
                "with DDP (`accelerate launch --multi_gpu`), or in one process."
            )
        missing = [name for name in _PRIVATE if not hasattr(DistributedDataParallel, name)]
        if missing:
            raise RuntimeError(
                f"GradES cannot work under DDP with torch {torch.__version__}, which lacks "
                f"DistributedDataParallel.{missing[0]}. Use torch 2.13, or train in one process."
            )
        if isinstance(model, DistributedDataParallel):
            self._wrapper, model = model, model.module
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def agree(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Rank 0's values on every rank: gradients are equal after DDP's reduction, but a broadcast leaves no doubt."""
        if self.number == 1 or not values:
            return values
        shared = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return dict(zip(values, shared.tolist(), strict=True))

    def changed(self) -> None:
        """What requires a gradient has changed; the reducer must follow before the next step."""
        self._stale = self.number > 1

    def close(self) -> None:
        """The run is over and `requires_grad` is as before: leave a reducer that fits."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._stale and self._wrapper is not None:
            rebuild_reducer(self._wrapper)
        self._stale, self._wrapper = False, None

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()
        self._wrapper = active if active is not None and active.module is module else self._wrapper
        if self._stale and self._wrapper is not None:
            rebuild_reducer(self._wrapper)
            self._stale = False


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Build a DDP wrapper's reducer anew over the parameters that require a gradient now; no communication.

    Raises:
        RuntimeError: the wrapper does something that cannot be carried over (DDP's own mixed precision).
    """
    if wrapper.mixed_precision is not None:
        raise RuntimeError("GradES cannot work with DDP's mixed_precision; use autocast (bf16=True) instead.")
    if not any(parameter.requires_grad for parameter in wrapper.module.parameters()):
        return
    wrapper._remove_autograd_hooks()
    group, hooks = wrapper.process_group, list(wrapper._comm_hooks)
    # Unpickling builds a reducer, after it has taken over all attributes: the process group is one of them here.
    wrapper.__setstate__({**wrapper.__getstate__(), "process_group": group})
    wrapper._static_graph_delay_allreduce_enqueued = False  # a static graph is learned anew in the first iteration
    wrapper._comm_hooks.clear()
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
