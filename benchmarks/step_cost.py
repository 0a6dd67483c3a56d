"""What a training step costs once some matrices are frozen: counted FLOPs and time, against the step of nothing frozen.

    python -m benchmarks.step_cost
    python -m benchmarks.step_cost --device cuda --shape qwen3-0.6b --batch 8 --length 1024 --compile

A step is forward, backward, AdamW's update and zero_grad. The frozen sets are scripted: all matrices, the lower half of
the blocks, all blocks but the top one; with `freeze_prefix` ("cut") and `merge_frozen_adapters` ("merged") and without;
full weights and LoRA; no checkpointing, non-reentrant and reentrant. The steps of one table run side by side on one
model. Writes benchmarks/results/step_cost.json.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from benchmarks import common
from grades_hf import GradES, GradESConfig
from grades_hf.record.counter import FlopCounter

CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}

# name -> (part of the blocks that is frozen, from below; options)
CUT, MERGED = {"freeze_prefix": True}, {"merge_frozen_adapters": True}
FULL: dict[str, tuple[str, dict[str, bool]]] = {
    "all matrices": ("all", {}),
    "lower half": ("half", {}),
    "lower half, cut": ("half", CUT),
    "all but the top block": ("but_one", {}),
    "all but the top block, cut": ("but_one", CUT),
}
LORA: dict[str, tuple[str, dict[str, bool]]] = {
    "lower half": ("half", {}),
    "lower half, merged": ("half", MERGED),
    "lower half, cut": ("half", CUT),
    "lower half, cut and merged": ("half", CUT | MERGED),
    "all but the top block": ("but_one", {}),
    "all but the top block, cut": ("but_one", CUT),
    "all but the top block, cut and merged": ("but_one", CUT | MERGED),
}
WITH_CHECKPOINTING = ("lower half, cut", "all but the top block, cut", "all but the top block, cut and merged")


class Bench:
    """One model, trained with different sets of frozen matrices."""

    def __init__(self, options: argparse.Namespace, method: str, checkpointing: str, compiled: bool) -> None:
        config = common.shape(options.shape)
        self.device = options.device
        self.blocks = config.num_hidden_layers
        self.model = common.model(
            config,
            device=options.device,
            dtype=common.dtype(options),
            rank=options.rank if method == "lora" else None,
        )
        reentrant = CHECKPOINTING[checkpointing]
        if reentrant is not None:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            self.model.enable_input_require_grads()
        self.trained: Any = self.model
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # every frozen set of the table is compiled once
            self.trained = torch.compile(self.model)
        self.batch = common.batch(config, options.batch, options.length, device=options.device)
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-6, fused=True)

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.trained(**self.batch)
        self.model.train()

    def backward(self) -> None:
        self.trained(**self.batch).loss.backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def flops(self, function: Callable[[], None]) -> int:
        with FlopCounter() as counter:
            function()
        self.optimizer.zero_grad()
        return counter.total

    @contextmanager
    def frozen(self, part: str | None, options: dict[str, bool]) -> Iterator[None]:
        """Freeze the scripted set by the engine, as in a run."""
        if part is None:
            yield
            return
        count = {"all": self.blocks, "half": self.blocks // 2, "but_one": self.blocks - 1}[part]
        low = "|".join(map(str, range(count)))
        tau = {rf".*layers\.({low})\..*": 1e30} | ({".*": 1e-30} if part != "all" else {})
        config = GradESConfig(tau=tau, alpha=0, monitor="gradient_norm", **options)
        engine = GradES(self.trained, config, total_steps=1_000, optimizer=self.optimizer)
        self.backward()
        engine.step()
        self.optimizer.zero_grad()
        try:
            yield
        finally:
            engine.close()


def measure(options: argparse.Namespace, method: str, checkpointing: str, compiled: bool) -> dict[str, Any]:
    """One table: FLOPs and seconds of each variant, and both as parts of the step with nothing frozen."""
    bench = Bench(options, method, checkpointing, compiled)
    variants: dict[str, tuple[str | None, dict[str, bool]]] = {"nothing": (None, {})}
    variants |= FULL if method == "full" else LORA
    if checkpointing != "none" or compiled:
        variants = {name: value for name, value in variants.items() if name in ("nothing", *WITH_CHECKPOINTING)}

    flops = {}
    if not compiled:  # counting would not go through compiled code
        for name, (part, freezing) in variants.items():
            with bench.frozen(part, freezing):
                flops[name] = bench.flops(bench.backward)
        forward = bench.flops(bench.forward)

    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, options.rounds):
        order = list(variants.items())
        for name, (part, freezing) in order if number % 2 == 0 else reversed(order):
            with bench.frozen(part, freezing):
                bench.step()  # warm-up: the optimizer's state, compilation, caches
                taken = common.seconds(bench.step, options.device)
            if number >= 0:
                times[name].append(taken)

    table: dict[str, Any] = {
        name: {
            "flops": flops.get(name),
            "flops_ratio": flops[name] / flops["nothing"] if flops else None,
            "seconds": common.spread(times[name]),
            "time_ratio": common.ratio(times[name], times["nothing"]),
        }
        for name in variants
    }
    if flops:
        table["forward pass alone"] = {"flops": forward, "flops_ratio": forward / flops["nothing"]}
    return table


def report(title: str, table: dict[str, Any]) -> None:
    common.say(f"\n{title}\n{'frozen':40} {'FLOPs':>8} {'time':>8}   (parts of the step with nothing frozen)")
    for name, row in table.items():
        flops = f"{row['flops_ratio']:8.3f}" if row["flops_ratio"] is not None else f"{'-':>8}"
        time = row.get("time_ratio")
        seconds = f"{time['median']:8.3f}   {time['min']:.3f} to {time['max']:.3f}" if time else f"{'-':>8}"
        common.say(f"{name:40} {flops} {seconds}")


def main(argv: list[str] | None = None) -> common.Path:
    parser = common.parser(__doc__.splitlines()[0], rounds=5)
    parser.set_defaults(batch=1)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--methods", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--checkpointing", nargs="+", choices=tuple(CHECKPOINTING), default=list(CHECKPOINTING))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    logging.getLogger("grades_hf").setLevel(logging.ERROR)

    results: dict[str, Any] = {}
    runs = [(m, c, False) for m in options.methods for c in options.checkpointing]
    runs += [(m, "none", True) for m in options.methods if options.compile]
    for method, checkpointing, compiled in runs:
        title = f"{method}, checkpointing {checkpointing}{', compiled' if compiled else ''}"
        results[title] = measure(options, method, checkpointing, compiled)
        report(title, results[title])
    path = common.write("step_cost", results, options)
    common.say(f"\nWritten: {path}")
    return path


if __name__ == "__main__":
    main()
