"""The held-out rows of a trainer, and the loss that the trainer computes for them."""

from __future__ import annotations

import inspect
import logging
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import nested_detach

from ...config import GradESConfig
from ...ending import Rows
from ...ending.look import unseen
from ...ending.rows import FEWEST
from ..unnoted import silent, unnoted

logger = logging.getLogger(__name__)

WAYS_OUT = "Pass held_out (a function from the model to the losses of held-out rows is always possible), or pass a tau."


def held_out_rows(
    config: GradESConfig, trainer: Trainer | None, model: nn.Module, source: Any, metric: str | None
) -> Any:
    """What the engine gets as `held_out`: the user's rows, or else the trainer's, with the trainer's own loss.

    One row is tried, so that what cannot work is known before the first step. Where the loss compares the rows of a
    batch (contrastive losses), a look consists of small batches, otherwise of single rows.

    Args:
        config: The options.
        trainer: The trainer; None where it is unknown.
        model: What is trained.
        source: The user's `held_out`.
        metric: The user's `look_metric`.

    Raises:
        ValueError: the trainer makes its own rows, computes no loss for a held-out row, or has no `compute_metrics` for
            `metric`.
    """
    if config.tau is not None:
        if metric is not None:
            raise ValueError(
                f"look_metric={metric!r} is about looks at held-out rows, and with a tau there are none. Leave one of "
                "them out."
            )
        return source  # which the engine refuses
    if trainer is None or (callable(source) and not hasattr(source, "__getitem__")):
        return source
    if hasattr(trainer, "reward_funcs") or "generation_config" in vars(trainer):
        raise ValueError(
            f"GradES without a tau cannot work with {type(trainer).__name__}: it trains on what the model generates, "
            "so no held-out row has a loss to look at. Pass a tau, or held_out, a function from the model to the "
            "losses of held-out rows."
        )
    source = trainer.eval_dataset if source is None else source
    if source is None:
        return None
    if source is trainer.train_dataset:
        logger.warning(
            "GradES: the held-out rows are the training rows, so looks at them cannot see when a run overfits. Give "
            "the trainer an eval_dataset of other rows."
        )
    loss: _Loss = _TrainedLoss(trainer) if metric is None else _Metric(trainer, metric)
    parts = list(source.values()) if isinstance(source, dict) else [source]
    loaders = [part if isinstance(part, DataLoader) else trainer.get_eval_dataloader(part) for part in parts]
    number = -(-config.look_rows // len(loaders))

    try:
        found = Rows(loaders, number, loss, 1 if metric is not None else trainer.args.per_device_eval_batch_size)
    except (AttributeError, LookupError, TypeError) as error:  # as collators raise
        raise ValueError(
            f"The trainer's data_collator makes no batch of the held-out rows ({error}). Pass rows like those of "
            "train_dataset, or a DataLoader with a collate_fn of its own, or a tau."
        ) from error
    size = max(2, min(trainer.args.per_device_eval_batch_size, len(found) // FEWEST))
    if _compares_rows(trainer):
        found.unite(size)
    with unseen(model):
        if found.first(model) == 0 and metric is None and not _compares_rows(trainer):  # nothing to compare a row with?
            united = Rows(loaders, number, loss)
            united.unite(size)
            found = united if united.first(model) != 0 else found
    return found


def _compares_rows(trainer: Trainer) -> bool:
    """Whether the loss of a batch is more than the mean over its rows: sentence-transformers' losses, KTO's."""
    return type(getattr(trainer, "loss", None)).__module__.startswith("sentence_transformers.") or bool(
        getattr(trainer, "calculate_KL", False)
    )


class _Loss(ABC):
    """A number that a trainer computes for a batch of held-out rows; it keeps the trainer not alive.

    Whatever the trainer notes, counts or logs meanwhile is taken back.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.ref(trainer)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        trainer = self._trainer()
        assert trainer is not None
        noting = [item for item in (trainer, getattr(trainer, "loss", None)) if hasattr(item, "__dict__")]
        with unnoted(noting[:1], log=silent), unnoted(noting[1:]):
            return self.of(trainer, model, batch)

    @abstractmethod
    def of(self, trainer: Trainer, model: nn.Module, batch: Any) -> Tensor:
        """The number, in a tensor with one element."""


class _TrainedLoss(_Loss):
    """The loss that the trainer trains on, whoever computes it: the model, a loss function, a subclass."""

    def of(self, trainer: Trainer, model: nn.Module, batch: Any) -> Tensor:
        try:
            loss = _trained_loss(trainer, model, batch)
        except (AttributeError, LookupError, TypeError, ValueError) as error:  # as rows without labels raise
            raise _no_loss(trainer, str(error)[:300]) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise _no_loss(trainer, f"what comes out is {type(loss).__name__}, and not a tensor with one element")
        return loss


def _trained_loss(trainer: Trainer, model: nn.Module, batch: Any) -> Any:
    if _evaluates(trainer, batch):
        loss = trainer.prediction_step(model, batch, prediction_loss_only=True)[0]
        if loss is not None:
            return loss
    with trainer.compute_loss_context_manager():
        return trainer.compute_loss(model, trainer._prepare_inputs(batch))


def _evaluates(trainer: Trainer, batch: Any) -> bool:
    """Whether an evaluation computes the loss of a batch; it needs labels and a `compute_loss` that returns outputs."""
    takes = inspect.signature(trainer.compute_loss).parameters.values()
    if not any(each.name == "return_outputs" or each.kind is each.VAR_KEYWORD for each in takes):
        return False
    if getattr(trainer.prediction_step, "__func__", None) is not Trainer.prediction_step:
        return True
    if not isinstance(batch, Mapping):
        return False
    names = trainer.label_names
    return all(batch.get(name) is not None for name in names) if names else bool(trainer.can_return_loss)


def _no_loss(trainer: Trainer, why: str) -> ValueError:
    return ValueError(
        f"GradES without a tau looks at the loss of held-out rows, and {type(trainer).__name__} computes none for "
        f"the first of them: {why}. Do the rows of eval_dataset have labels? {WAYS_OUT}"
    )


class _Metric(_Loss):
    """A metric of the trainer's `compute_metrics`, turned so that less is better."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        super().__init__(trainer)
        if trainer.compute_metrics is None:
            raise ValueError(
                f"look_metric={name!r} needs a trainer with compute_metrics. Pass compute_metrics, or leave it out."
            )
        self._key = name.removeprefix("eval_")
        args = trainer.args
        known = (args.metric_for_best_model or "").removeprefix("eval_") == self._key
        greater = args.greater_is_better if known else None
        self._sign = -1.0 if greater or (greater is None and not self._key.endswith("loss")) else 1.0

    def of(self, trainer: Trainer, model: nn.Module, batch: Any) -> Tensor:
        found: Any = trainer.prediction_step(model, batch, prediction_loss_only=False)
        _, logits, labels = found
        if trainer.preprocess_logits_for_metrics is not None:
            logits = trainer.preprocess_logits_for_metrics(logits, labels)
        assert trainer.compute_metrics is not None
        found = trainer.compute_metrics(EvalPrediction(predictions=_arrays(logits), label_ids=_arrays(labels)))
        if self._key not in found:
            raise ValueError(
                f"look_metric={self._key!r} is not among what compute_metrics returns. Use one of "
                f"{', '.join(map(str, found))}."
            )
        return torch.tensor(self._sign * float(found[self._key]))


def _arrays(tensors: Any) -> Any:
    tensors = nested_detach(tensors)
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(_arrays(tensor) for tensor in tensors)
    return np.asarray(tensors.float().cpu() if tensors.is_floating_point() else tensors.cpu())
