"""One of two processes (gloo) of `test_ranks.py`: all cases, one after the other, and what came of them as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from grades_hf import GradES, GradESConfig
from tests import toy

STEPS = 10
FREEZING: dict[str, Any] = {"tau": {"q": 1e9, "up": 1e9, ".*": 1e-30}, "alpha": 0.3}


def rows(t: int, micro: int = 1) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step, of ROWS rows in all."""
    generator = torch.Generator().manual_seed(t)
    x, y = (torch.randn(toy.ROWS, toy.WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return list(zip(x.chunk(micro), y.chunk(micro), strict=True))


class Net(toy.Toy):
    """Its output is a dict: DDP finds no tensor in the toy's own, so that all would count as unused."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"loss": super().forward(*args, **kwargs).loss}


def train(
    config: dict[str, Any],
    *,
    share: slice = slice(None),
    world: int = 1,
    wrap: Any = None,
    micro: int = 1,
    use: int = 99,
    open_at: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """A plain loop; `share` are this process's rows of each micro-batch, whose gradients are averaged over `world`."""
    model = toy.build("full")
    model.__class__ = Net
    late = [p for name, p in model.named_parameters() if "layers.1" in name]
    everything = list(model.parameters())
    for parameter in late if open_at else ():
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(everything, lr=1e-2)
    engine = GradES(model, GradESConfig(**config), total_steps=STEPS, optimizer=optimizer)
    wrapped: Any = wrap(model) if wrap is not None else model
    for t in range(1, STEPS + 1):
        if t == open_at:
            for parameter in late:
                parameter.requires_grad_(True)
        batches = rows(t + 100 * seed, micro)
        for number, (x, y) in enumerate(batches, start=1):
            synced = number == len(batches) or t == 1 or wrap is None
            with contextlib.nullcontext() if synced else wrapped.no_sync():
                loss = wrapped(x[share], y[share], use=use)["loss"]
                (loss * world / toy.ROWS).backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            break
    found = {
        "frozen": engine.frozen,
        "t": engine.t,
        "components": len(engine.components),
        "weights": torch.cat([p.detach().flatten() for p in everything]).tolist(),
        "values": {n: [v if v == v else None for v in s] for n, s in engine.history.values.items()},
    }
    engine.close()
    return found


def half(rank: int) -> slice:
    return slice(rank, None, 2)


def main(output: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{output / 'meeting'}", rank=int(sys.argv[2]), world_size=2,
                            timeout=timedelta(seconds=60))  # fmt: skip
    rank = dist.get_rank()
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    shared = {"share": half(rank), "world": 2}

    def ddp(**options: Any) -> Any:
        return lambda model: DistributedDataParallel(model, **options)

    found: dict[str, Any] = {
        "static graph, accumulation": train(FREEZING, wrap=ddp(static_graph=True), micro=2, **shared),
        "accumulation": train(FREEZING, wrap=ddp(), micro=2, **shared),
        "unused": train(FREEZING, wrap=ddp(find_unused_parameters=True), use=2 if rank else 1, **shared),
        "never used": train({**FREEZING, "tau": 1e9}, wrap=ddp(find_unused_parameters=True), use=1, **shared),
        "opened": train(FREEZING, wrap=ddp(), open_at=4, **shared),
        "independent": train({"tau": 30.0 if rank else 1e9, "alpha": 0.3}, seed=rank),
        "subgroup": train({"tau": 30.0 if rank else 1e9, "alpha": 0.3}, wrap=ddp(process_group=alone), seed=rank),
    }
    different = {"tau": {**FREEZING, "tau": 1e9 + rank}, "check_every": {**FREEZING, "check_every": 1 + rank}}
    for name, config in different.items():
        try:
            train(config, wrap=ddp(), **shared)
        except ValueError as error:
            found[f"different {name}"] = str(error)
    (output / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
