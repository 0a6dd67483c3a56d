"""Several processes: one decision for all ranks, DDP's reducer, and parameters that are sharded (FSDP2).

DistributedDataParallel builds its reducer once, over the parameters that require a gradient then. When some of them
are frozen later, a reducer without `find_unused_parameters` waits for gradients that never come: the next step runs
unsynchronized, silently. With it, the step is right but sends as many bytes as before. So after each freezing, before
the next forward pass, the reducer is built anew over what is still trained.

Under FSDP2 (`torch.distributed.fsdp.fully_shard`) every rank holds a shard of each matrix, possibly an empty one. A
statistic is a sum over elements, so each rank measures its shards and one collective adds all of them up. What does not
require a gradient is neither computed nor reduce-scattered; nothing has to be rebuilt.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .config import GradESConfig

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


class Ranks:
    """The link between an engine and the other processes of its run; does nothing where there is one process.

    Args:
        model: The model that is trained, wrapped by DDP or sharded by FSDP2 or neither; see `refuse`.

    Attributes:
        number: Number of processes.
        sharded: Whether parameters are sharded over them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.number = _world_size()
        self.sharded = is_sharded(model)
        self._stale = False
        self._wrapper: DistributedDataParallel | None = None
        self._hook: RemovableHandle | None = None
        if self.number == 1 or self.sharded:
            return
        if isinstance(model, DistributedDataParallel):
            self._wrapper, model = model, model.module
        self._hook = model.register_forward_pre_hook(self._before_forward)

    def agree(self, values: Tensor) -> Tensor:
        """Rank 0's values on every rank: gradients are equal after their reduction, but a broadcast leaves no doubt."""
        if self.number > 1 and values.numel() > 0:
            dist.broadcast(values, src=0)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """Of a 0-d tensor over all ranks, as gradients are averaged."""
        if self.number > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.number
        return value

    def add_shards(self, norms: Sequence[Tensor], of: Sequence[Tensor], among: Sequence[Tensor]) -> list[Tensor]:
        """Sums over whole tensors from sums over shards; one collective for all, made also where there is none.

        Args:
            norms: 0-d tensors, what this rank has measured on its shards.
            of: The parameters that they belong to.
            among: All parameters that any rank may have measured, in the same order on every rank.

        Returns:
            For each of `norms` the sum over the ranks that hold different shards of its parameter (so not over the
            replicas of HSDP); NaN where one of them has measured nothing.
        """
        if not self.sharded or not among:
            return list(norms)
        device = among[0].device_mesh.device_type if isinstance(among[0], DTensor) else among[0].device
        place = {parameter: index for index, parameter in enumerate(among)}
        indices = [place[parameter] for parameter in of]
        every = torch.zeros(self.number, len(among), dtype=torch.float64, device=device)  # one row a rank
        own = every[dist.get_rank()].fill_(math.nan)
        if indices:
            own[indices] = torch.stack([norm.double() for norm in norms]).to(own.device)
        dist.all_reduce(every)
        return [every[_holders(among[index]), index].sum() for index in indices]

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


def refuse(model: nn.Module, config: GradESConfig, optimizer: object, *, compiled: bool, scaled: bool) -> None:
    """Raise for a way of training in several processes that cannot be right.

    Args:
        model: The model as it is passed to the engine.
        config: The options.
        optimizer: The optimizer as it is passed to the engine, wrapped or not.
        compiled: Whether the model is compiled.
        scaled: Whether a gradient scaler (float16) is at work.

    Raises:
        RuntimeError: DataParallel, DeepSpeed, FSDP1, tensor parallelism, a compiled model in several processes, a
            gradient scaler with sharded parameters, or a torch that cannot rebuild DDP's reducer.
        ValueError: an option that does not go together with sharded parameters.
    """
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED or any(
        "deepspeed" in cls.__module__.split(".") for part in (model, *_unwrap(optimizer)) for cls in type(part).__mro__
    ):
        raise RuntimeError(DEEPSPEED)
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise RuntimeError(
            "GradES cannot work under DataParallel: its replicas do not see what is frozen. Start with `torchrun` or "
            "`accelerate launch`, or use one device."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RuntimeError(FSDP1)
    number = _world_size()
    if number > 1 and compiled:
        raise RuntimeError(
            "GradES does not support a compiled model in several processes; drop torch.compile, or train in one "
            "process."
        )
    if is_sharded(model):
        _refuse_sharded(model, config, number, scaled=scaled)
    elif number > 1:
        missing = [name for name in _PRIVATE if not hasattr(DistributedDataParallel, name)]
        if missing:
            raise RuntimeError(
                f"GradES cannot work under DDP with torch {torch.__version__}, which lacks "
                f"DistributedDataParallel.{missing[0]}. Use torch 2.13, or train in one process."
            )


def _refuse_sharded(model: nn.Module, config: GradESConfig, number: int, *, scaled: bool) -> None:
    for name in ("merge_frozen_adapters", "freeze_prefix", "sample_size"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} does not work with sharded parameters (FSDP2); leave it out, or "
                "train with DDP."
            )
    if scaled:
        raise RuntimeError(
            "GradES does not support a gradient scaler (fp16) with sharded parameters (FSDP2): ranks may disagree on "
            "which step is skipped. Train in bfloat16 (bf16=True)."
        )
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


# --- sharded parameters --------------------------------------------------------------------------------------------


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of `model` is sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which its ranks exchange; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `tensor` on the device of `parameter`, and sharded as it is; no communication.

    Args:
        tensor: A tensor of the shape of `parameter`: a whole one, or one that is sharded in the same way.

    Raises:
        ValueError: its shape is another one.
    """
    if tensor.shape != parameter.shape or local(tensor).shape not in (parameter.shape, local(parameter).shape):
        raise ValueError(
            f"a tensor of shape {tuple(local(tensor).shape)} of {tuple(tensor.shape)} does not fit a parameter of "
            f"shape {tuple(local(parameter).shape)} of {tuple(parameter.shape)}."
        )
    if not isinstance(parameter, DTensor):
        return local(tensor).to(device=parameter.device, copy=True)
    mesh, placements = parameter.device_mesh, parameter.placements
    if isinstance(tensor, DTensor):
        return DTensor.from_local(
            tensor.to_local().to(device=parameter.device, copy=True),
            mesh,
            placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return distribute_tensor(tensor.to(device=parameter.device, copy=True), mesh, placements, src_data_rank=None)


def from_rank_0(whole: Mapping[Tensor, Tensor], parameters: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Whole tensors that rank 0 has for some of `parameters`, sharded as those are; all ranks must call it."""
    held: list[list[bool]] = [[parameter in whole for parameter in parameters]]
    dist.broadcast_object_list(held, src=0)
    shards = {}
    for parameter in itertools.compress(parameters, held[0]):
        tensor = whole[parameter] if dist.get_rank() == 0 else torch.empty(parameter.shape, dtype=parameter.dtype)
        if isinstance(parameter, DTensor):
            tensor = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
        shards[parameter] = tensor
    return shards


def from_folder(folder: Path, keys: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
    """What `torch.distributed.checkpoint` has saved in `folder` under some of `keys`; all ranks must call it."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {key: torch.empty_like(parameter) for parameter, key in keys.items() if key in saved}
    if tensors:
        load(tensors, checkpoint_id=folder)
    return {parameter: tensors[key] for parameter, key in keys.items() if key in tensors}


class Placeholders:
    """Zeros instead of dropped optimizer state, in the `state_dict()` of a sharded model's optimizer only.

    `torch.distributed.checkpoint` loads a checkpoint into an optimizer of which all parameters are trained still, and
    fails where some have no state in it.

    Args:
        optimizers: The optimizers whose state for frozen parameters is dropped.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._hooks = [optimizer.register_state_dict_post_hook(self._fill) for optimizer in optimizers]
        self._outlines: dict[Tensor, dict[str, Any]] = {}

    def note(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """`state` of `parameter` is being dropped; empty where it had none."""
        if state or parameter not in self._outlines:
            self._outlines[parameter] = _outline(parameter, state)

    def close(self) -> None:
        """Leave the optimizers as they were."""
        for hook in self._hooks:
            hook.remove()
        self._outlines.clear()

    def _fill(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            if parameter not in self._outlines or index in state_dict["state"]:
                continue
            outline = self._outlines[parameter]
            if not outline:  # it froze before its first update; that of its like is the same
                alike = (p for p in parameters if p.ndim == parameter.ndim and optimizer.state.get(p))
                peer = next(alike, None)
                outline = {} if peer is None else _outline(peer, optimizer.state[peer])
            if outline:
                state_dict["state"][index] = {
                    key: torch.zeros_like(parameter, dtype=value) if isinstance(value, torch.dtype) else value
                    for key, value in outline.items()
                }


def _outline(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """`state` with a dtype in the place of each tensor of the parameter's shape."""
    return {
        key: value.dtype if isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape else value
        for key, value in state.items()
    }


def _holders(parameter: Tensor) -> list[int]:
    """The ranks that hold the shards of `parameter`, of one replica."""
    if not isinstance(parameter, DTensor):
        return [0]
    ranks = parameter.device_mesh.mesh
    sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    first = ranks.movedim(sharded[0], 0).flatten(1)[:, 0] if sharded and ranks.ndim > 1 else ranks.flatten()
    return [int(rank) for rank in (first if sharded else first[:1])]


def _unwrap(optimizer: object) -> Iterable[object]:
    """An optimizer, or each of several, with all that it wraps."""
    for part in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        while part is not None:
            yield part
            part = getattr(part, "optimizer", None)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --- DDP -----------------------------------------------------------------------------------------------------------


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
