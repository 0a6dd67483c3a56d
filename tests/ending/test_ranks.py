"""Two real processes (gloo) under DDP and FSDP2 look, decide and return as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from grades_hf import GradESConfig
from tests.ending import loops

pytestmark = pytest.mark.slow


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def function(model: nn.Module) -> torch.Tensor:
    """A user's own function that returns the same rows on every rank, one of them without a finite loss."""
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in loops.HELD_OUT]
    losses[3] = losses[3] * torch.nan
    return torch.stack(losses)


TWO_PARTS = 2 * loops.dataset()  # 80 rows


WAYS: dict[str, tuple[Any, Any]] = {
    "ddp": (DistributedDataParallel, None),
    "ddp, two parts": (DistributedDataParallel, TWO_PARTS),
    "ddp, a function": (DistributedDataParallel, function),
    "fsdp2": (shard, None),
    "fsdp2, two parts": (shard, TWO_PARTS),
}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, (wrap, held_out) in WAYS.items():
        run = loops.train("full", GradESConfig(), wrap=wrap, held_out=held_out, rank=rank, ranks=2)
        run.engine.close()
        weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in run.weights.items()}
        found = {"looks": run.engine.ending.looks, "before": run.engine.ending._before, "weights": weights}
        torch.save(found, Path(folder) / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in WAYS}


@pytest.mark.compatibility("Distributed", "DDP and FSDP2 without a tau (looks)", "works")
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_end_as_one_process_does(way: str, reports: dict[str, list[dict[str, Any]]]) -> None:
    alone = loops.train("full", GradESConfig(), held_out=WAYS[way][1])
    assert alone.engine is not None
    assert alone.engine.ending.looks[-1]["ended"]
    first, second = reports[way]
    assert first["looks"] == second["looks"]
    keys = ("step", "reason", "components", "rows", "ended")  # a vote can hang on the last digit of a sum
    assert [[look[key] for key in keys] for look in first["looks"]] == [
        [look[key] for key in keys] for look in alone.engine.ending.looks
    ]
    # In the order of the rows, so that a run can go on with another number of ranks.
    assert first["before"] == pytest.approx(alone.engine.ending._before, abs=1e-3, nan_ok=True)
    for name, weight in alone.weights.items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], weight, rtol=0, atol=2e-3)
