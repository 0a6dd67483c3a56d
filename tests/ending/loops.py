"""A small fine-tune that overfits, in a plain loop without a tau; alone or as one of two ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grades_hf import GradES, GradESConfig
from grades_hf.ending import Part, Rows
from grades_hf.parallel.ranks import Ranks
from tests import small

STEPS = 60
BATCH = 8
ROWS = 24
HELD = 40


def rows(number: int, seed: int) -> Tensor:
    """Token rows that have something in common: each token follows from the one before, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (number, 1), generator=generator)
    for _ in range(11):
        noise = torch.randint(3, 64, (number, 1), generator=generator)
        follows = (ids[:, -1:] * 7 + 1) % 61 + 3
        ids = torch.cat([ids, torch.where(torch.rand(number, 1, generator=generator) < 0.6, follows, noise)], 1)
    return ids


TRAIN, HELD_OUT = rows(ROWS, 0), rows(HELD, 1)


def make(kind: str, dropout: float = 0.0) -> nn.Module:
    model: Any = small.llama()
    model.config.attention_dropout = dropout
    if kind == "lora":
        model = small.lora(model, lora_dropout=dropout)
    return model.train()


def dataset(held: Tensor = HELD_OUT) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in held]


def batch(step: int, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    chosen = [(step * BATCH + i) % ROWS for i in range(BATCH)][rank::ranks]
    return {"input_ids": TRAIN[chosen], "labels": TRAIN[chosen]}


class Whole(Rows):
    """Rows that a look takes all at once."""

    def parts(self, model: nn.Module, ranks: Ranks) -> list[Part]:
        parts = super().parts(model, ranks)
        return [Part([b for part in parts for b in part.batches], [b for part in parts for b in part.alone])]


def all_losses(held: Rows, model: nn.Module) -> list[float]:
    """Those of all parts of a look, one after the other."""
    ranks = Ranks(model)
    return [loss for part in held.parts(model, ranks) for loss in held.losses(model, ranks, part)]


@dataclass
class Run:
    """What a loop has done."""

    model: nn.Module
    engine: GradES | None
    steps: int
    randoms: list[float] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def train(
    kind: str,
    config: GradESConfig | None,
    *,
    held_out: Any = None,
    epochs: bool = False,
    dropout: float = 0.0,
    resume_after: Sequence[int] = (),
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    rank: int = 0,
    ranks: int = 1,
    steps: int = STEPS,
    learning_rate: float = 1e-2,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Train; after the steps of `resume_after` everything is saved, built anew and loaded."""
    torch.manual_seed(0)

    def build() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, GradES | None]:
        state = torch.get_rng_state()
        model = make(kind, dropout).to(dtype)
        torch.set_rng_state(state)
        wrapped = wrap(model)
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        engine = None
        if config is not None:
            rows = dataset() if held_out is None else held_out
            engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer, held_out=rows)
        return model, wrapped, optimizer, engine

    model, wrapped, optimizer, engine = build()
    run = Run(model, engine, 0)
    for step in range(steps):
        wrapped(**batch(step, rank, ranks)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if engine is not None:
            engine.step(epoch=step * BATCH / ROWS if epochs else None)
        optimizer.step()
        optimizer.zero_grad()
        run.steps = step + 1
        run.randoms.append(float(torch.rand(())))
        if engine is not None and engine.done:
            break
        if step + 1 in resume_after:
            assert engine is not None
            held = engine.state_dict()
            tensors = {key: held.pop(key) for key in ("history", "previous", "tensors")}
            file = io.BytesIO()
            torch.save((model.state_dict(), optimizer.state_dict(), tensors, torch.get_rng_state()), file)
            text = json.dumps(held, sort_keys=True)
            engine.close()
            file.seek(0)
            model, wrapped, optimizer, engine = build()
            weights, moments, tensors, state = torch.load(file, weights_only=True)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            engine.load_state_dict({**json.loads(text), **tensors})
            torch.set_rng_state(state)
            run.model, run.engine = model, engine
    return run
