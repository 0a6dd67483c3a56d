"""The held-out rows of a trainer, and the loss that the trainer computes for them."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import nested_detach

from ...config import GradESConfig
from ...ending import Rows

_BOOKS = re.compile(r"_(metrics|logs)$")  # what TRL's trainers note while they compute a loss


def held_out_rows(config: GradESConfig, trainer: Trainer | None, source: Any, metric: str | None) -> Any:
    """What the engine gets as `held_out`: the user's rows, or else the trainer's, with the trainer's own loss.

    Args:
        config: The options.
        trainer: The trainer; None where it is unknown.
        source: The user's `held_out`.
        metric: The user's `look_metric`.

    Raises:
        ValueError: the trainer makes its own rows, or has no `compute_metrics` for `metric`.
    """
    if config.tau is not None:
        if source is not None or metric is not None:
            raise ValueError(
                f"{'held_out' if source is not None else 'look_metric'} is about looks at held-out rows, and with a tau "
                "there are none. Leave it or the tau out."
            )
        return None
    if trainer is None or (callable(source) and not hasattr(source, "__getitem__")):
        return source
    if hasattr(trainer, "reward_funcs") or hasattr(trainer, "reward_processing_classes"):
        raise ValueError(
            f"GradES without a tau cannot work with {type(trainer).__name__}: it trains on what the model generates, so "
            "no held-out row has a loss to look at. Pass a tau."
        )
    source = trainer.eval_dataset if source is None else source
    if source is None:
        return None
    loss = _loss(trainer) if metric is None else _metric(trainer, metric)
    parts = list(source.values()) if isinstance(source, dict) else [source]
    rows = [_rows(trainer, part, -(-config.look_rows // len(parts)), loss) for part in parts]
    return Rows.joined(rows)


def _rows(trainer: Trainer, source: Any, number: int, loss: Callable[[nn.Module, Any], Tensor]) -> Rows:
    loader = source if isinstance(source, DataLoader) else trainer.get_eval_dataloader(source)
    return Rows(loader, number, loss)


def _loss(trainer: Trainer) -> Callable[[nn.Module, Any], Tensor]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with _unnoted(trainer):
            value, _, _ = trainer.prediction_step(model, batch, prediction_loss_only=True)
        if value is None:
            raise ValueError(
                f"{type(trainer).__name__} computes no loss for a held-out row, so there is nothing to look at. Give "
                "the rows of eval_dataset labels, pass held_out, or pass a tau."
            )
        return value

    return loss


def _metric(trainer: Trainer, name: str) -> Callable[[nn.Module, Any], Tensor]:
    compute = trainer.compute_metrics
    if compute is None:
        raise ValueError(f"look_metric={name!r} needs a trainer with compute_metrics, and this one has none.")
    key = name.removeprefix("eval_")
    best = trainer.args.greater_is_better
    sign = 1.0 if best is False or (best is None and key.endswith("loss")) else -1.0

    def metric(model: nn.Module, batch: Any) -> Tensor:
        with _unnoted(trainer):
            _, logits, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
        found = compute(EvalPrediction(predictions=_arrays(logits), label_ids=_arrays(labels)))
        if key not in found:
            raise ValueError(f"look_metric={name!r} is none of what compute_metrics returns: {', '.join(found)}.")
        return torch.tensor(sign * float(found[key]))

    return metric


def _arrays(tensors: Any) -> Any:
    tensors = nested_detach(tensors)
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(_arrays(tensor) for tensor in tensors)
    return np.asarray(tensors.float().cpu() if tensors.is_floating_point() else tensors.cpu())


@contextlib.contextmanager
def _unnoted(trainer: Trainer) -> Iterator[None]:
    """What a trainer notes of its losses for the next log is afterwards as before."""
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _BOOKS.search(name)}
    try:
        yield
    finally:
        vars(trainer).update(before)
