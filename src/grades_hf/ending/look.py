"""A look: the losses of a few held-out rows, forward passes only, as if nobody had looked."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..parallel.ranks import Ranks
from ..parallel.sharded import reshard

RowLosses = Callable[[nn.Module], Tensor]
HeldOut = RowLosses | Dataset[Any] | DataLoader[Any] | Sequence[Any]


class Rows:
    """The same few held-out rows for every look of a run, each in a batch of its own.

    One row a batch is what works with any model, collator and loss: what comes out is the loss of that row. They are
    collated once, from fixed random states, so that masked or augmented rows are the same at each look, too.

    Args:
        source: The rows: a Dataset (or any sequence) or a DataLoader, whose dataset and collator are used.
        number: How many of them, at most. They are drawn at random, but the same for the same source.
        loss: From the model and a batch to its loss, a tensor with one element; by default the model takes the batch as
            keyword arguments and returns its `loss`.
        collate: From a list of rows to a batch; default: the DataLoader's, or torch's.
        size: Rows a batch, where the loss compares rows. An incomplete batch is left out if it is not the only one.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        source: Any,
        number: int,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        size: int = 1,
    ) -> None:
        self._loss, self.size = loss or model_loss, size
        loader = source if isinstance(source, DataLoader) or hasattr(source, "collate_fn") else None
        dataset = source if loader is None else loader.dataset
        collate = collate or (default_collate if loader is None else loader.collate_fn) or default_collate
        with same_random_states(collate):
            if isinstance(dataset, IterableDataset) or not (
                hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
            ):
                rows = list(itertools.islice(iter(dataset), number))
            else:
                length = len(dataset)
                chosen = sorted(random.Random(0).sample(range(length), min(number, length)))
                rows = [dataset[index] for index in chosen]
            if not rows:
                raise ValueError("held_out has no rows. Pass at least some rows that are not trained on.")
            whole = max(size, len(rows) - len(rows) % size)
            self._batches = [collate(rows[i : i + size]) for i in range(0, min(whole, len(rows)), size)]

    def __len__(self) -> int:
        return len(self._batches)

    @classmethod
    def joined(cls, several: Sequence[Rows]) -> Rows:
        """The rows of several sources, each with its own collator and the first one's loss."""
        first = several[0]
        first._batches = [batch for rows in several for batch in rows._batches]
        return first

    def losses(self, model: nn.Module, ranks: Ranks) -> list[float]:
        """The loss of each row that falls to this rank."""
        own = self._batches[ranks.rank :: ranks.number]
        # All ranks make as many passes: sharded parameters are gathered together, and some trainers gather figures.
        passes = -(-len(self._batches) // ranks.number)
        losses = [self._of(model, own[i] if i < len(own) else self._batches[0]) for i in range(passes)]
        return torch.stack(losses[: len(own)]).tolist() if own else []

    def first(self, model: nn.Module) -> float:
        """The loss of the first row: to try whether it can be computed."""
        return self._of(model, self._batches[0]).item()

    def _of(self, model: nn.Module, batch: Any) -> Tensor:
        batch = _to(batch, next(model.parameters()).device)
        return self._loss(model, batch).detach().double().reshape(-1).mean().cpu()


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """What the model says its loss is."""
    output = model(**batch) if isinstance(batch, Mapping) else model(*batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if (
        loss is None
        and isinstance(output, tuple)
        and output
        and isinstance(output[0], Tensor)
        and output[0].numel() == 1
    ):
        loss = output[0]
    if loss is None:
        raise ValueError(
            "held_out: the model returns no loss for a held-out row. Give the rows labels, or pass a function from the "
            "model to the losses of the rows."
        )
    return loss  # type: ignore[no-any-return]


@contextlib.contextmanager
def unseen(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode meanwhile; afterwards modes, buffers and random states are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with same_random_states(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for buffer, before in buffers:
            buffer.copy_(before)
        reshard(model)


@contextlib.contextmanager
def same_random_states(collate: Any = None) -> Iterator[None]:
    """Random numbers begin at the same place at each call; afterwards all random states are as before.

    Args:
        collate: A collator whose own generators are put back, too.
    """
    python, array = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    generators = list(_generators(collate, 3))
    try:
        with torch.random.fork_rng(devices):
            seed()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        for put_back in generators:
            put_back()


def seed() -> None:
    """All random numbers begin at the same place."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _generators(owner: Any, depth: int) -> Iterator[Callable[[], Any]]:
    """What puts the random generators among the attributes of an object, and of the objects in it, back."""
    own = getattr(owner, "__dict__", None)
    if not isinstance(own, dict) or isinstance(owner, (nn.Module, type)) or not depth:
        return
    for name, value in list(own.items()):
        if isinstance(value, torch.Generator):
            yield functools.partial(value.set_state, value.get_state())
        elif isinstance(value, random.Random):
            yield functools.partial(value.setstate, value.getstate())
        elif isinstance(value, np.random.Generator):
            yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
        elif value is None and "generator" in name:  # made when it is first asked for
            yield functools.partial(own.__setitem__, name, None)
        else:
            yield from _generators(value, depth - 1)


def _to(batch: Any, device: torch.device) -> Any:
    """A copy of the batch on the device, that whoever computes the loss may change."""
    if isinstance(batch, Tensor):
        return batch.to(device, copy=True)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to(value, device) for value in batch)
    return batch
