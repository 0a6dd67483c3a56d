"""Several processes: one decision for all ranks, and DDP's reducer. Only this room communicates.

DistributedDataParallel builds its reducer once, over the parameters that require a gradient then. When some of them
are frozen later, a reducer without `find_unused_parameters` waits for gradients that never come: the next step runs
unsynchronized, silently. With it, the step is right but sends as many bytes as before. So after each freezing, before
the next forward pass, the reducer is built anew over what is still trained.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..contracts import Extension, Run, Step
from ..hooks import hook
from .sharded import holders, is_sharded


class Ranks(Extension):
    """The link between an engine and the other processes of its run.

    The ranks of a run are those that share its gradients: the process group of the DDP wrapper that runs the model, or
    all processes where parameters are sharded. A model that no DDP wrapper runs is one rank's own, however many
    processes there are.

    Attributes:
        sharded: Whether parameters are sharded over the ranks.
    """

    name = "ranks"

    def __init__(self, model: nn.Module) -> None:
        self.sharded = is_sharded(model)
        self._model = model
        self._stale = False
        self._agreed = False  # whether it is known that all ranks have the same options
        self._wrapper: DistributedDataParallel | None = None
        if isinstance(model, DistributedDataParallel):
            self._wrapper, self._model = model, model.module

    @property
    def number(self) -> int:
        """How many ranks share the run's gradients; known from the first forward pass on."""
        if self.sharded:
            return dist.get_world_size()
        return 1 if self._wrapper is None else dist.get_world_size(self._wrapper.process_group)

    @property
    def rank(self) -> int:
        """The place of this process among them, from 0 on."""
        return 0 if self.number == 1 else dist.get_rank(self._group)

    @property
    def _group(self) -> Any:
        return None if self._wrapper is None else self._wrapper.process_group

    def attach(self, run: Run, undo: ExitStack) -> None:
        known = run.config.to_dict(), run.total_steps, [component.name for component in run.components]
        self._options = zlib.crc32(repr(known).encode())
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not self.sharded:
            undo.callback(hook(self._model, "forward_pre", self._before_forward))
        undo.callback(self._close)

    def before_check(self, step: Step) -> None:
        """Ranks that have different options would wait for each other for ever, so this is asked first of all.

        Raises:
            ValueError: they have; on all of them.
        """
        if self._agreed or self.number == 1:
            return
        options: list[int] = [0] * self.number
        dist.all_gather_object(options, self._options, group=self._group)
        if len(set(options)) > 1:
            raise ValueError(
                f"the options of GradES, or what it tracks, differ between ranks (this is rank {self.rank} of "
                f"{self.number}), which would freeze different matrices on each. Pass the same GradESConfig, "
                "total_steps and model on every rank."
            )
        self._agreed = True

    def agree(self, values: Tensor) -> Tensor:
        """Rank 0's values on every rank: gradients are equal after their reduction, but a broadcast leaves no doubt."""
        if self.number == 1 or values.numel() == 0:
            return values
        dist.broadcast(values, group=self._group, group_src=0)
        return values

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, as gradients are averaged."""
        if self.number > 1:
            value = value.clone()
            dist.all_reduce(value, group=self._group)
            value /= self.number
        return value

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of all ranks, one after the other; those of one rank where all ranks have the same ones."""
        if self.number == 1:
            return rows
        parts: list[Any] = [None] * self.number
        dist.all_gather_object(parts, rows, group=self._group)
        same = all(repr(part) == repr(parts[0]) for part in parts)  # NaN does not equal itself
        return rows if same else [row for part in parts for row in part]

    def add_shards(self, norms: Tensor, of: Sequence[Tensor], among: Sequence[Tensor]) -> Tensor:
        """Sums over whole tensors from sums over shards; one collective for all, made also where there is none.

        Args:
            norms: (n,) float64, what this rank has measured on its shards.
            of: The n parameters that they belong to.
            among: All parameters that any rank may have measured, in the same order on every rank.

        Returns:
            (n,) float64, for each of `norms` the sum over the ranks that hold different shards of its parameter (so not
            over the replicas of HSDP); NaN where one of them has measured nothing.
        """
        if not self.sharded or not among:
            return norms
        device = among[0].device_mesh.device_type if isinstance(among[0], DTensor) else among[0].device
        place = {parameter: index for index, parameter in enumerate(among)}
        indices = [place[parameter] for parameter in of]
        every = torch.zeros(self.number, len(among), dtype=torch.float64, device=device)  # one row a rank
        own = every[dist.get_rank()].fill_(math.nan)
        if indices:
            own[indices] = norms.to(own.device)
        dist.all_reduce(every)
        sums = [every[holders(among[index]), index].sum() for index in indices]
        return torch.stack(sums) if sums else norms

    def on_grad_pattern(self) -> None:
        self._stale = True

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        active = DistributedDataParallel._get_active_ddp_module()
        if active is not None and active.module is module and active is not self._wrapper:
            self._wrapper = active
            _refuse_mixed_precision(active)
        if not self._stale or self._wrapper is None:
            return
        if self._wrapper.static_graph and not self._wrapper.require_backward_grad_sync:
            return  # torch fails when a static graph begins in a pass that does not synchronize
        rebuild_reducer(self._wrapper)
        self._stale = False

    def _close(self) -> None:
        """`requires_grad` is as before: leave a reducer that fits."""
        if self._stale and self._wrapper is not None:
            rebuild_reducer(self._wrapper)
        self._stale, self._wrapper, self._model = False, None, nn.Module()


def rebuild_reducer(wrapper: DistributedDataParallel) -> None:
    """Build a DDP wrapper's reducer anew over the parameters that require a gradient now. It does not communicate.

    Raises:
        RuntimeError: the wrapper does something that cannot be carried over (DDP's own mixed precision).
    """
    _refuse_mixed_precision(wrapper)
    if not any(parameter.requires_grad for parameter in wrapper.module.parameters()):
        return
    wrapper._remove_autograd_hooks()
    hooks = list(wrapper._comm_hooks)
    # Unpickling builds a reducer, after it has taken over all attributes. The process group, which cannot be pickled
    # and is the default one there, is one of them here.
    wrapper.__setstate__({name: value for name, value in vars(wrapper).items() if name not in ("reducer", "logger")})
    wrapper._static_graph_delay_allreduce_enqueued = False  # a static graph is learned anew in the first iteration
    wrapper._comm_hooks.clear()
    for comm_hook, state in hooks:
        wrapper.register_comm_hook(state, comm_hook)


def _refuse_mixed_precision(wrapper: DistributedDataParallel) -> None:
    if wrapper.mixed_precision is not None:
        raise RuntimeError("GradES cannot work with DDP's mixed_precision; use autocast (bf16=True) instead.")
