"""A network of Llama's names and a few hundred parameters in float64, and training it: a step takes a millisecond."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Adafactor

from grades_hf import GradES, GradESConfig

WIDTH = 6
STEPS = 10
ROWS = 8
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.5, relative_step=False, scale_parameter=False),
}


class Block(nn.Module):
    def __init__(self, order: Sequence[str]) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(WIDTH)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in order:
            self.get_submodule(name.split(".")[0]).add_module(name.split(".")[1], nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(torch.tanh(self.self_attn.q_proj(self.input_layernorm(x))))
        return x + self.mlp.down_proj(torch.relu(self.mlp.up_proj(x)))


class Toy(nn.Module):
    """Blocks and a head; `use` blocks take part in a batch. `order`: that in which a block registers its matrices."""

    def __init__(self, order: Sequence[str] = MATRICES, layers: int = 2) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(order) for _ in range(layers))
        self.head = nn.Linear(WIDTH, WIDTH)
        generator = torch.Generator().manual_seed(0)
        self.double()
        for _, parameter in sorted(self.named_parameters()):  # the same weights by name, whatever the order
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / WIDTH**0.5

    def forward(self, x: Tensor, labels: Tensor, use: int = 99, num_items_in_batch: Tensor | int = 1) -> Any:
        for block in self.model.layers[:use]:
            x = block(x)
        return SimpleNamespace(loss=(self.head(x) - labels).square().sum() / num_items_in_batch)


def build(kind: str, order: Sequence[str] = MATRICES, layers: int = 2) -> nn.Module:
    """ "full" or "lora" (B is not 0, so that all of its gradients count); the head is trained in both."""
    model: nn.Module = Toy(order, layers)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[name.split(".")[1] for name in MATRICES]))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
        model.base_model.model.head.requires_grad_(True)
    return model


def batches(seed: int, accumulation: int = 1, uses: Sequence[int] = ()) -> list[list[dict[str, Any]]]:
    """For each step the micro-batches of ROWS rows in all; the i-th batch uses `uses[i]` blocks."""
    generator = torch.Generator().manual_seed(seed)
    steps, number = [], 0
    for _ in range(STEPS):
        x, y = (torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
        micro = []
        for part_x, part_y in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            micro.append({"x": part_x, "labels": part_y, "use": uses[number % len(uses)] if uses else 99})
            number += 1
        steps.append(micro)
    return steps


def optimize(optimizer: str, model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])


def switch(model: nn.Module, how: str, at: str) -> None:
    """Do to the adapters what `how` says, if it says so for this moment of a step."""
    name, _, where = how.partition(" ")
    if where == at and name == "disable":
        with model.disable_adapter():
            pass
    elif where == at and name == "set":
        model.set_adapter("default")


@dataclass
class Run:
    """What a run did; `moved` holds frozen tensors that changed all the same (there must be none)."""

    engine: GradES
    model: nn.Module
    moved: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}


def train(
    kind: str,
    config: GradESConfig,
    steps: Sequence[Sequence[dict[str, Any]]],
    optimizer: str = "sgd",
    *,
    order: Sequence[str] = MATRICES,
    max_grad_norm: float | None = None,
    set_to_none: bool = True,
    resume_after: frozenset[int] = frozenset(),
    switches: Sequence[str] = ("",),
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    share: float = 1.0,
    held_out: Any = None,
) -> Run:
    """A plain loop with the engine; after the steps of `resume_after` everything is saved, built anew and loaded.

    Args:
        kind, order, optimizer: what is trained and how.
        steps: micro-batches of each step, the loss is the mean over all their labels.
        switches: "disable" or "set", then a moment (see below): what is done to the adapters in each step, in turn.
        wrap: around the model (DDP).
        share: the part of a step's rows that this process has.
        held_out: what the engine looks at where there is no tau.
    """
    model = build(kind, order)
    torch_optimizer = optimize(optimizer, model)
    engine = GradES(model, config, total_steps=STEPS, optimizer=torch_optimizer, held_out=held_out)
    wrapped = wrap(model)
    run = Run(engine, model)
    for t, micro in enumerate(steps, start=1):
        how = switches[t % len(switches)]
        items = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in micro) / share
        for number, batch in enumerate(micro, start=1):
            last = number == len(micro)
            with contextlib.nullcontext() if last or wrapped is model else wrapped.no_sync():
                switch(model, how, "before forward")
                loss = wrapped(**batch, num_items_in_batch=items).loss / share
                switch(model, how, "before backward")
                loss.backward()
        switch(model, how, "before clipping")
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        engine.step()
        before = run.weights
        switch(model, how, "before the update")
        torch_optimizer.step()
        torch_optimizer.zero_grad(set_to_none=set_to_none)
        still = {p for c in engine.components if c.frozen_at is not None for p in c.parameters}
        still_names = set(engine.extension("prefix").frozen) if engine.extension("prefix") is not None else set()
        for name, parameter in model.named_parameters():
            if (parameter in still or name in still_names) and not torch.equal(before[name], parameter):
                run.moved.append(f"{t}: {name}")
        if engine.done:
            break
        if t in resume_after:
            saved = io.BytesIO()
            state = engine.state_dict()
            tensors = {"model": model.state_dict(), "optimizer": torch_optimizer.state_dict()}
            torch.save({**tensors, "engine": state}, saved)
            engine.close()
            saved.seek(0)
            loaded = torch.load(saved, weights_only=True)
            model = run.model = build(kind, order)
            model.load_state_dict(loaded["model"])
            torch_optimizer = optimize(optimizer, model)
            torch_optimizer.load_state_dict(loaded["optimizer"])
            engine = run.engine = GradES(model, config, total_steps=STEPS, optimizer=torch_optimizer, held_out=held_out)
            engine.load_state_dict(loaded["engine"])
            wrapped = wrap(model)
    return run
