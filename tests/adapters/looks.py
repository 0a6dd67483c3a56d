"""What every trainer's looks are held to: they see the loss that is trained on, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from grades_hf import GradESCallback
from grades_hf.adapters.trainer.held_out import held_out_rows
from grades_hf.criteria import Rise

ALONE: Any = SimpleNamespace(rank=0, number=1, sharded=False, gather=lambda rows: rows)
NOTES = ("_metrics", "_total_train_tokens", "accum_loss_components", "_step", "notes", "count")
TIMES = ("_runtime", "_per_second")


class Randoms(TrainerCallback):
    """The state of torch's random numbers before each update, and what the trainer has noted by then."""

    trainer: Trainer

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        notes = {name: str(vars(self.trainer)[name]) for name in NOTES if name in vars(self.trainer)}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self.seen.append((torch.get_rng_state(), model.training, notes, state.num_input_tokens_seen, buffers))


def logs(trainer: Trainer) -> list[dict[str, Any]]:
    """The log without times and our own figures."""
    return [
        {k: v for k, v in log.items() if not k.endswith(TIMES) and not k.startswith("grades/")}
        for log in trainer.state.log_history
    ]


def always(rise: Rise, places: torch.Tensor, step: int, values: torch.Tensor) -> torch.Tensor:
    """Every component votes, so that a look is proposed at each step after the first epoch."""
    _update(rise, places, step, values)
    return torch.ones(len(places), dtype=torch.bool)


_update = Rise.update


def check(build: Callable[[Path, list[TrainerCallback]], Trainer], folder: Path, **options: Any) -> GradESCallback:
    """A run with looks equals one without, bit for bit."""
    runs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grades_hf.ending.ending.MARGIN", 1e9)  # no look ends a run
        for name, value in {"FIRST_STEP": 2, "EARLIEST": 0.0, "LATER": 1.0, "APART": 1.0}.items():
            patch.setattr(f"grades_hf.ending.ending.{name}", value)  # one is due at every step
        for name, most in (("none", 0), ("looks", 100)):
            patch.setattr("grades_hf.ending.ending.MOST", most)
            callback = GradESCallback(look_rows=16, **options)
            randoms = Randoms()
            trainer = randoms.trainer = build(folder / name, [callback, randoms])
            trainer.train()
            runs.append((callback, trainer, randoms))
    (without, b, unseen), (with_looks, a, seen) = runs
    assert with_looks.engine is not None
    assert without.engine is not None
    assert with_looks.engine.ending.looks, "a look was made"
    assert without.engine.ending.looks == []
    assert logs(a) == logs(b)
    for one, other in zip(seen.seen, unseen.seen, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:4] == other[1:4]
        assert all(torch.equal(buffer, other[4][name]) for name, buffer in one[4].items())
    weights = dict(b.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in a.model.named_parameters())
    return with_looks


def same_as_evaluation(trainer: Trainer, **tolerance: float) -> None:
    """The mean of a look's losses is the `eval_loss` that the trainer reports, row by row."""
    config = GradESCallback(look_rows=10**6).config
    rows = held_out_rows(config, trainer, trainer.model, None, None)
    trainer.model.eval()
    with torch.no_grad():
        parts = rows.parts(trainer.model, ALONE)
        losses = [loss for part in parts for loss in rows.losses(trainer.model, ALONE, part)]
    trainer.args.per_device_eval_batch_size = rows.size
    assert sum(losses) / len(losses) == pytest.approx(trainer.evaluate()["eval_loss"], **{"rel": 1e-5, **tolerance})
