"""Parameters that are sharded over processes (FSDP2).

Under `torch.distributed.fsdp.fully_shard` every rank holds a shard of each matrix, possibly an empty one. A statistic
is a sum over elements, so each rank measures its shards and one collective adds all of them up. What does not require a
gradient is neither computed nor reduce-scattered; nothing has to be rebuilt.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..contracts import Extension, Run


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of `model` is sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Drop the gathered weights that FSDP2 keeps after a forward pass without a backward pass: they get stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def locals_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each; ten thousand of them are not asked one by one where none is sharded."""
    return [local(tensor) for tensor in tensors] if DTensor in set(map(type, tensors)) else list(tensors)


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


class Placeholders(Extension):
    """Zeros instead of dropped optimizer state, in the `state_dict()` of a sharded model's optimizer only.

    `torch.distributed.checkpoint` loads a checkpoint into an optimizer of which all parameters are trained still, and
    fails where some have no state in it.
    """

    name = "placeholders"

    def __init__(self) -> None:
        self._outlines: dict[Tensor, dict[str, Any]] = {}

    def attach(self, run: Run, undo: ExitStack) -> None:
        undo.callback(self._outlines.clear)
        for optimizer in run.optimizers:
            undo.callback(optimizer.register_state_dict_post_hook(self._fill).remove)

    def note(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """`state` of `parameter` is being dropped; empty where it had none."""
        if state or parameter not in self._outlines:
            self._outlines[parameter] = _outline(parameter, state)

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


def holders(parameter: Tensor) -> list[int]:
    """The ranks that hold the shards of `parameter`, of one replica."""
    if not isinstance(parameter, DTensor):
        return [0]
    ranks = parameter.device_mesh.mesh
    sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    first = ranks.movedim(sharded[0], 0).flatten(1)[:, 0] if sharded and ranks.ndim > 1 else ranks.flatten()
    return [int(rank) for rank in (first if sharded else first[:1])]
