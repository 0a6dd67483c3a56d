"""The held-out rows of a run, and the loss of each of them."""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..parallel.ranks import Ranks
from .look import same_random_states, seed

RowLosses = Callable[[nn.Module], Tensor]
HeldOut = RowLosses | Dataset[Any] | DataLoader[Any] | Sequence[Any]
Batches = list[tuple[int, Any]]  # each with the number of its rows
_Drawn = list[tuple[list[Any], Callable[[list[Any]], Any]]]  # of each source the rows, and what collates them

AT_ONCE = 8  # rows in a batch, where nothing else is said
TRIED = 4  # rows of the first batch that pass through the model alone, too
PART = 4  # every such row belongs to the first part of a look
FEWEST = 16  # losses that say something


@dataclass(frozen=True)
class Part:
    """Rows that a look takes before it decides whether it needs others.

    Attributes:
        batches: The rows, as many in a batch as may pass through the model at once.
        alone: The same rows in the same order, each a batch of its own.
    """

    batches: Batches
    alone: Batches


class Rows:
    """The same few held-out rows for every look of a run, and the loss of each.

    What counts is the loss of a row in a batch of its own, which any model, collator and loss can say. Several rows
    pass through the model at once where their losses can be told apart (`ByRow`) and are those of single rows. That is
    tried on the first batch, at the first look. Rows are collated once, from fixed random states, so that masked or
    augmented rows are the same at each look, too.

    Args:
        sources: Where the rows are: a Dataset (or any sequence) or a DataLoader, whose dataset and collator are used.
        number: How many of each, at most. They are drawn at random, but the same for the same source.
        loss: From the model and a batch to its loss, a tensor with one element; by default the model takes the batch as
            keyword arguments and returns its `loss`.
        at_once: How many rows may pass through the model at once. Default: as many as the DataLoader has in a batch,
            else 8.

    Attributes:
        size: Of how many rows one loss is the mean.
        together: Whether several rows pass through the model at once; None before it was tried.

    Raises:
        ValueError: there are no rows.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        number: int,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        at_once: int | None = None,
    ) -> None:
        self._loss, self.size = loss or model_loss, 1
        self.together: bool | None = None
        self._drawn = [_drawn(source, number) for source in sources]
        loaders = [source.batch_size for source in sources if isinstance(source, DataLoader) and source.batch_size]
        self._at_once = at_once or min(loaders, default=AT_ONCE)
        quarter: _Drawn = [(rows[::PART], collate) for rows, collate in self._drawn]
        rest: _Drawn = [([row for i, row in enumerate(rows) if i % PART], collate) for rows, collate in self._drawn]
        says_something = sum(len(rows) for rows, _ in quarter) >= FEWEST
        self._split = [quarter, rest] if says_something else [self._drawn]
        alone = [_collated(drawn, 1) for drawn in self._split]
        self._parts = [Part(batches, batches) for batches in alone]

    def __len__(self) -> int:
        """How many losses there are."""
        return sum(len(part.alone) for part in self._parts)

    def unite(self, size: int) -> None:
        """The mean loss of `size` rows counts as one from now on; fewer are left out, if they are not the only ones."""
        united: Batches = [(1, batch) for _, batch in _collated(self._drawn, size, whole=True)]
        self._parts, self.size, self.together = [Part(united, united)], size, False

    def parts(self, model: nn.Module, ranks: Ranks) -> list[Part]:
        """What a look takes one after the other, as far as it needs: a quarter of each source's rows, and the rest.

        All rows are one part where a quarter of them is fewer than 16. The order of the rows depends on nothing else.
        """
        if self.together is None:
            together = self._try(model)
            if ranks.number > 1:  # all ranks make as many passes
                together = all(ranks.gather([float(together)]))
            self.put_together(together)
        return self._parts

    def losses(self, model: nn.Module, ranks: Ranks, part: Part) -> list[float]:
        """The loss of each row of a part, in their order; the ranks share them out.

        A batch that has no finite loss says nothing of its rows, so each of them has a pass of its own.
        """
        found = self._shared(model, ranks, part.batches)
        losses = [loss for batch in found for loss in batch]
        silent = (len(batch) > 1 and not any(map(math.isfinite, batch)) for batch in found)
        again = (lost for batch, lost in zip(found, silent, strict=True) for _ in batch)
        if rows := [row for row, lost in enumerate(again) if lost]:
            alone = self._shared(model, ranks, [part.alone[row] for row in rows])
            for row, (loss,) in zip(rows, alone, strict=True):
                losses[row] = loss
        return losses

    def first(self, model: nn.Module) -> float:
        """The loss of the first row: to try whether it can be computed."""
        return float(self._of(model, *self._parts[0].alone[0]).mean())

    def put_together(self, together: bool) -> None:
        """Whether several rows pass through the model at once from now on."""
        self.together = together
        if together:
            batches = [_collated(drawn, self._at_once) for drawn in self._split]
            self._parts = [Part(many, part.alone) for many, part in zip(batches, self._parts, strict=True)]

    def _try(self, model: nn.Module) -> bool:
        """Whether the rows of the first batch say what each says alone."""
        number, first = _collated(self._split[0], self._at_once)[0]
        if number == 1 or len(together := self._of(model, number, first)) < number:
            return False
        alone = torch.cat([self._of(model, *each) for each in self._parts[0].alone[: min(number, TRIED)]])
        seed()
        finite = alone[alone.isfinite()]
        if len(finite) < 2:
            return False
        # In low precision a sum depends on the size of the batch, but by much less than rows differ.
        noise = 0.1 * finite.std() + 1e-5 * alone.abs()
        together = together[: len(alone)]
        return bool((((together - alone).abs() <= noise) | (together.isnan() & alone.isnan())).all())

    def _shared(self, model: nn.Module, ranks: Ranks, batches: Batches) -> list[list[float]]:
        """The losses of each batch's rows; the ranks share the batches out."""
        own = range(len(batches))[ranks.rank :: ranks.number]
        # All ranks make as many passes: sharded parameters are gathered together, and some trainers gather figures.
        passes = -(-len(batches) // ranks.number)
        found = [self._of(model, *batches[own[i] if i < len(own) else 0]) for i in range(passes)]
        told = ranks.gather([(i, losses.tolist()) for i, losses in zip(own, found, strict=False)])
        return [losses for _, losses in sorted(told, key=operator.itemgetter(0))]

    def _of(self, model: nn.Module, number: int, batch: Any) -> Tensor:
        """The losses of the rows of a batch, (number,) float64 on the host; (1,), their mean, if they are not told."""
        batch = _to(batch, next(model.parameters()).device)
        with ByRow(number) as rows:
            loss = self._loss(model, batch).detach().reshape(-1).mean()
        found = rows.of(loss)
        if found is None:  # a mean that is no number is that of no row, and equals none
            found = loss.reshape(1) if loss.isfinite() else torch.full((number,), torch.nan)
        losses: Tensor = found.double().cpu()
        return losses


class Function:
    """The held-out rows as a function from the model to the loss of each; a look takes all of them.

    Raises:
        ValueError: it returns fewer than two losses, at the first look.
    """

    together = None

    def __init__(self, function: RowLosses) -> None:
        self._function = function

    def parts(self, model: nn.Module, ranks: Ranks) -> list[Part]:
        return [Part([], [])]

    def losses(self, model: nn.Module, ranks: Ranks, part: Part) -> list[float]:
        found: list[float] = torch.as_tensor(self._function(model)).detach().double().flatten().tolist()
        found = ranks.gather(found)
        if len(found) < 2:
            raise ValueError(
                f"held_out returns {len(found)} loss(es), and a look needs at least two rows. The function must return "
                "the loss of each row, a tensor of shape (rows,)."
            )
        return found


class ByRow(TorchFunctionMode):
    """Tells the losses of a batch's rows apart, where the batch's loss is one mean over them or over their tokens.

    Such a mean is that of `cross_entropy`, `mse_loss` or `binary_cross_entropy_with_logits`, with no weights and no
    label smoothing, also where only the sum is theirs, and the caller divides it by the number of its elements; the
    mean of a tensor that has the rows as its first dimension; or the quotient of the sums of two such tensors, as of
    the tokens' losses and of a mask. What is computed is computed row by row, too, and which of it
    is the batch's loss is seen by its value.

    Args:
        number: The rows of the batch.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self._means: list[tuple[Tensor, Tensor]] = []  # a mean, and the mean of each row
        self._sums: list[tuple[Tensor, Tensor]] = []

    def of(self, loss: Tensor) -> Tensor | None:
        """The loss of each row, (number,); None where they cannot be told apart.

        Args:
            loss: That of the batch, a 0-d tensor.
        """
        quotients = (
            (a / b, rows_a / rows_b.where(rows_b != 0, 1))
            for (a, rows_a), (b, rows_b) in itertools.permutations(self._sums, 2)
        )
        for mean, rows in itertools.chain(self._means, quotients):
            if mean.abs() == loss.abs():
                return rows if mean == loss else -rows
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._number == 1:
            return func(*args, **kwargs)
        if func in _LOSSES and kwargs.get("reduction") in ("mean", "sum"):
            return self._element_by_element(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _MEANS + _SUMS and result.dim() == 0 and args[0].shape[:1] == (self._number,):
            rows = args[0].reshape(self._number, -1)
            if func in _MEANS:
                self._means.append((result.clone(), rows.mean(1)))  # something may be added to the result in place
            else:
                self._sums.append((result.clone(), rows.sum(1)))
        return result

    def _element_by_element(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weighted = any(kwargs.get(name) is not None for name in ("weight", "pos_weight"))
        soft = func is F.cross_entropy and (kwargs["label_smoothing"] or args[1].is_floating_point())
        each = None if weighted or soft else func(*args, **kwargs | {"reduction": "none"})
        if each is None or each.numel() % self._number:
            return func(*args, **kwargs)
        each = each.reshape(self._number, -1)
        counts = torch.ones_like(each)
        if func is F.cross_entropy:
            counts = (args[1] != kwargs["ignore_index"]).reshape(self._number, -1).to(each)
        total = each.sum()
        mean = total / counts.sum()
        self._means.append((mean.clone(), each.sum(1) / counts.sum(1)))  # an ignored element is 0
        return mean if kwargs["reduction"] == "mean" else total


_LOSSES = (F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits)
_MEANS, _SUMS = (Tensor.mean, torch.mean), (Tensor.sum, torch.sum)


def _collated(drawn: _Drawn, size: int, *, whole: bool = False) -> Batches:
    """Batches of `size` rows, with the number of their rows; `whole`: no smaller ones, if there are others."""
    found: Batches = []
    for rows, collate in drawn:
        end = max(size, len(rows) - len(rows) % size) if whole else len(rows)
        with same_random_states(collate):
            batches = [rows[i : i + size] for i in range(0, min(end, len(rows)), size)]
            found += [(len(batch), collate(batch)) for batch in batches]
    return found


def _drawn(source: Any, number: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """At most `number` rows of a source, and its collator."""
    loader = source if isinstance(source, DataLoader) or hasattr(source, "collate_fn") else None
    dataset = source if loader is None else loader.dataset
    collate = (None if loader is None else loader.collate_fn) or default_collate
    with same_random_states(collate):
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            rows = list(itertools.islice(iter(dataset), number))
        else:
            chosen = sorted(random.Random(0).sample(range(len(dataset)), min(number, len(dataset))))
            rows = [dataset[index] for index in chosen]
    if not rows:
        raise ValueError("held_out has no rows. Pass at least some rows that are not trained on.")
    return rows, collate


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
