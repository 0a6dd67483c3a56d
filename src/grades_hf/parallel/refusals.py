"""Ways of training that GradES cannot get right, refused before the first step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..contracts import Trait

_PRIVATE = ("_get_active_ddp_module", "_remove_autograd_hooks", "__getstate__", "__setstate__")

DEEPSPEED = (
    "GradES cannot work under DeepSpeed: ZeRO updates flat partitions of all weights at once, so momentum and weight "
    "decay go on moving frozen ones. Train with FSDP2 (fsdp_version: 2) or DDP."
)
FSDP1 = (
    "GradES cannot work under FSDP1 (FullyShardedDataParallel): it flattens many matrices into one parameter, so "
    "freezing single ones saves nothing, and a rank whose shard of a matrix is empty would measure 0 and freeze it. "
    'Train with FSDP2: fully_shard, fsdp_config={"version": 2}, or fsdp_version: 2 in the configuration of accelerate.'
)

DATA_PARALLEL = (
    "GradES cannot work under DataParallel: its replicas do not see what is frozen. Start with `torchrun` or "
    "`accelerate launch`, or use one device."
)


def refuse_foreign(model: object) -> None:
    """Raise a ValueError for what is no module, such as the wrapper object of another library."""
    if not isinstance(model, nn.Module):
        parts = {name: getattr(model, name, None) for name in ("model_body", "model", "module")}
        inner = [f", here model.{name}" for name, part in parts.items() if isinstance(part, nn.Module)]
        raise ValueError(
            f"model={type(model).__name__} is no torch.nn.Module. Pass the module that is trained{''.join(inner[:1])}."
        )


def refuse(model: nn.Module, optimizer: object, traits: frozenset[Trait]) -> None:
    """Raise for a way of training that cannot be right.

    Args:
        model: The model as it is passed to the engine.
        optimizer: The optimizer as it is passed to the engine, wrapped or not.
        traits: What the run is like.

    Raises:
        RuntimeError: DataParallel, DeepSpeed, FSDP1, tensor parallelism, a compiled model in several processes, or a
            torch that cannot rebuild DDP's reducer.
    """
    if under_deepspeed() or any(
        "deepspeed" in cls.__module__.split(".") for part in (model, *_unwrap(optimizer)) for cls in type(part).__mro__
    ):
        raise RuntimeError(DEEPSPEED)
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise RuntimeError(DATA_PARALLEL)
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RuntimeError(FSDP1)
    if traits >= {Trait.PARALLEL, Trait.COMPILED}:
        raise RuntimeError(
            "GradES does not support a compiled model in several processes. Drop torch.compile, or train in one "
            "process."
        )
    if Trait.SHARDED in traits:
        _refuse_sharded(model)
    elif Trait.PARALLEL in traits:
        missing = [name for name in _PRIVATE if not hasattr(DistributedDataParallel, name)]
        if missing:
            raise RuntimeError(
                f"GradES cannot work under DDP with torch {torch.__version__}, which lacks "
                f"DistributedDataParallel.{missing[0]}. Use torch 2.13, or train in one process."
            )


def under_deepspeed() -> bool:
    """Whether accelerate trains with DeepSpeed in this process."""
    return bool(AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED)


def is_parallel() -> bool:
    """Whether this is one of several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _refuse_sharded(model: nn.Module) -> None:
    number = dist.get_world_size()
    managed = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        shards = sum(placement.is_shard() for placement in parameter.placements)
        if not managed or shards > 1 or (getattr(model, "tp_size", None) or 1) > 1:
            raise RuntimeError(
                f"GradES does not support tensor parallelism ({name} is {parameter.placements} on {number} processes). "
                "Train with FSDP2 or DDP alone."
            )
        if parameter.device_mesh.mesh.numel() != number:
            raise RuntimeError(
                f"GradES needs every parameter on all {number} processes, and {name} is on "
                f"{parameter.device_mesh.mesh.numel()} of them (pipeline parallelism, or replicas outside of FSDP2's "
                "mesh). For replicas pass fully_shard a mesh of two dimensions."
            )


def _unwrap(optimizer: object) -> Iterable[object]:
    """An optimizer, or each of several, with all that it wraps."""
    for part in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        while part is not None:
            yield part
            part = getattr(part, "optimizer", None)
