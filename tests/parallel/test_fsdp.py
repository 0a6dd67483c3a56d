"""FSDP2 with real processes (gloo): statistics, freezing, weights and resumed runs are those of one process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.adapters.trainer.refusals import refuse
from grades_hf.parallel.sharded import placed_like
from tests import fsdp_worker, small
from tests.fsdp_worker import LENGTH, ROWS, SAVED, STEPS, Case, TrainerCase

EARLY = {"q": 1e9, "down": 1e9, ".*": 1e-30}  # these freeze at step 3, no other


@lru_cache
def one_process(method: str, accumulation: int, tau: str | None = None) -> dict[str, Any]:
    """The same run without sharding."""
    case = Case("", {"tau": json.loads(tau or json.dumps(EARLY)), "alpha": 0.25}, method, accumulation=accumulation)
    model = case.model()
    optimizer = case.new_optimizer(model)
    engine = GradES(model, GradESConfig(**case.grades), total_steps=STEPS, optimizer=optimizer)
    for step in range(STEPS):
        fsdp_worker.update(case, model, engine, optimizer, step)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    report = {
        "frozen": engine.frozen,
        "values": engine.history.values,
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
    }
    engine.close()
    return report


@lru_cache
def late(method: str) -> str:
    """Thresholds at which some matrices freeze at step 3 and two more after the checkpoint, as JSON."""
    tau = dict(EARLY)
    for name, series in one_process(method, 1)["values"].items():
        if len(series) == STEPS and len(tau) < len(EARLY) + 2:
            best = min(range(2, STEPS), key=series.__getitem__)
            if best >= SAVED and min(series[2:best]) > 1.02 * series[best]:
                tau[name] = 1.01 * series[best]
    assert len(tau) > len(EARLY), "else nothing freezes after the checkpoint"
    return json.dumps(tau)


def cases() -> list[Case]:
    early = {"tau": EARLY, "alpha": 0.25}
    resumable = {m: {"tau": json.loads(late(m)), "alpha": 0.25} for m in ("full", "lora")}
    made = [
        *(Case(method, resumable[method], method) for method in ("full", "lora")),
        Case("accumulation", early, accumulation=3),
        Case("checkpointing", early, checkpointing=True),
        Case("bf16", early, bf16=True),
        Case("sgd", early, optimizer="SGD"),
        Case("replicas-2x1", early, mesh=(2, 1)),
        Case("replicas-1x2", early, mesh=(1, 2)),
    ]
    resumed = [
        dataclasses.replace(case, name=f"{case.name}-{way}", resume=way)
        for case in made
        if case.name in ("full", "lora", "checkpointing", "sgd")
        for way in ("full", "sharded")
    ]
    return made + resumed


# Names only: what freezes is chosen when the tests run.
NAMES = ["full", "lora", "accumulation", "checkpointing", "bf16", "sgd", "replicas-2x1", "replicas-1x2"]
RESUMED = [f"{name}-{way}" for name in ("full", "lora", "checkpointing", "sgd") for way in ("full", "sharded")]
TRAINER = [
    TrainerCase("trainer-sharded", {"tau": EARLY, "alpha": 0.25}),
    TrainerCase("trainer-full", {"tau": EARLY, "alpha": 0.25}, "FULL_STATE_DICT"),
    TrainerCase("trainer-lora", {"tau": EARLY, "alpha": 0.25}, method="lora"),
]


def launch(made: list[Any], number: int, output: Any) -> Any:
    (output / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in made]))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", "--standalone"]
    command += ["-m", "tests.fsdp_worker", str(output / "cases.json"), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda name, rank=0: torch.load(output / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """From the name of a case and a rank to what it reports; all cases run in one pair of processes."""
    through_trainer = [*TRAINER, *(dataclasses.replace(c, name=f"{c.name}-resumed", resume=True) for c in TRAINER)]
    return launch([*cases(), *through_trainer], 2, tmp_path_factory.mktemp("fsdp"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    early = {"tau": EARLY, "alpha": 0.25}
    made = [Case("replicas-2x2", early, mesh=(2, 2)), Case("lora-4", early, "lora")]
    return launch(made, 4, tmp_path_factory.mktemp("fsdp4"))


def literal(report: dict[str, Any]) -> dict[str, list[float]]:
    """The values that a sum over the gathered gradients gives."""
    return {
        name: [values.get(step + 1, math.nan) for step in range(len(report["values"][name]))]
        for name, values in report["literal"].items()
    }


def assert_values(values: dict[str, Any], expected: dict[str, Any], rel: float) -> None:
    assert values.keys() == expected.keys()
    for name, series in values.items():
        assert list(series) == pytest.approx(list(expected[name]), rel=rel, abs=0, nan_ok=True), name


def assert_right(report: dict[str, Any], expected: dict[str, Any], other: dict[str, Any]) -> None:
    """As on one process, on every rank, and each value the literal sum over the whole gradient."""
    assert report["wrong"] == []
    assert report["frozen"] == expected["frozen"]
    assert list(report["frozen"]) == list(expected["frozen"])
    assert_values(report["values"], other["values"], 0)
    assert_values(report["values"], expected["values"], 1e-5)
    assert_values(report["values"], literal(report), 1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(report["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "full",
            marks=pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), full weights, uneven shards", "works"),
        ),
        pytest.param(
            "lora", marks=pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), LoRA, empty shards", "works")
        ),
        pytest.param(
            "accumulation",
            marks=pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), gradient accumulation", "works"),
        ),
        pytest.param(
            "checkpointing",
            marks=pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), checkpointing", "works"),
        ),
        pytest.param(
            "replicas-2x1", marks=pytest.mark.compatibility("Distributed", "FSDP2, HSDP with 2 replicas", "works")
        ),
        pytest.param(
            "replicas-1x2", marks=pytest.mark.compatibility("Distributed", "FSDP2, HSDP with one replica", "works")
        ),
    ],
)
def test_two_ranks_equal_one_process(name, two):
    method = "lora" if name == "lora" else "full"
    tau = late(method) if name in ("full", "lora") else None
    expected = one_process(method, 3 if name == "accumulation" else 1, tau)
    assert 0 < len(expected["frozen"]) < len(expected["values"])
    for rank in range(2):
        assert_right(two(name, rank), expected, two(name))
    assert two("lora", 0)["empty"] == 0 < two("lora", 1)["empty"]


@pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), bfloat16 with float32 reduction", "works")
@pytest.mark.slow
def test_mixed_precision_measures_the_reduced_gradients(two):
    report = two("bf16")
    assert report["wrong"] == []
    assert report["frozen"] == one_process("full", 1)["frozen"] == two("bf16", 1)["frozen"]
    assert_values(report["values"], literal(report), 1e-5)


@pytest.mark.compatibility("Distributed", "FSDP2, HSDP with 2 replicas of 2 shards", "works")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("replicas-2x2", "full"), ("lora-4", "lora")])
def test_four_ranks_equal_one_process(name, method, four):
    expected = one_process(method, 1)
    for rank in range(4):
        assert_right(four(name, rank), expected, four(name))
    if method == "lora":  # its matrices of one row: three of four shards are empty
        assert all(four(name, rank)["empty"] > 0 for rank in (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "accumulation", "checkpointing", "replicas-1x2"])
def test_less_is_computed_and_sent(name, two):
    """A frozen matrix costs no multiplication for its gradient, and no element of the reduce-scatter."""
    report = two(name)
    frozen = [component for component, step in report["frozen"].items() if step == 3]
    sizes = {c: report["weights"][f"{c}.weight"].numel() for c in frozen}
    # Shards are padded to the size of the first one: 25 rows count as 26.
    padded = sum(
        math.ceil(report["weights"][f"{c}.weight"].shape[0] / 2) * 2 * report["weights"][f"{c}.weight"].shape[1]
        for c in frozen
    )
    assert report["sent"][2] - report["sent"][3] == 4 * padded
    assert report["flops"][2] - report["flops"][3] == 2 * (ROWS // 2) * LENGTH * sum(sizes.values())


@pytest.mark.slow
def test_one_collective_adds_up_all_norms(two):
    """And one broadcast makes the decision rank 0's."""
    for name in NAMES:
        assert two(name)["collectives"] == [{"all_reduce": 1, "broadcast": 1}] * STEPS


@pytest.mark.compatibility("Distributed", "FSDP2 (fully_shard), resumed from full and sharded state dicts", "works")
@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_equals_uninterrupted(name, two):
    for rank in range(2):
        whole, resumed = two(name.rsplit("-", 1)[0], rank), two(name, rank)
        assert resumed["wrong"] == []
        assert resumed["frozen"] == whole["frozen"]
        assert_values(resumed["values"], whole["values"], 0)
        assert all(torch.equal(resumed["weights"][n], weight) for n, weight in whole["weights"].items())
        assert resumed["sent"] == whole["sent"][SAVED:]
        assert resumed["flops"] == whole["flops"][SAVED:]


@pytest.mark.compatibility(
    "Distributed", "FSDP2 through Trainer (accelerate's own code, on CPUs), with resume", "works"
)
@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINER, ids=lambda case: case.name)
def test_trainer_shards_freezes_and_resumes(case, two, tmp_path):
    callback = GradESCallback(case.grades)
    single = small.trainer(
        Case("", {}, case.method).model(),
        tmp_path,
        [callback],
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=3e-3,
        adam_epsilon=1e-3,
    )
    single.train()
    for rank in range(2):
        whole, resumed = two(case.name, rank), two(f"{case.name}-resumed", rank)
        assert whole["frozen"] == callback.engine.frozen
        assert 0 < len(whole["frozen"]) < len(callback.engine.components)
        assert_values(whole["values"], callback.engine.history.values, 1e-4)
        for name, parameter in single.model.named_parameters():
            torch.testing.assert_close(whole["weights"][name], parameter.detach(), rtol=0, atol=1e-5)
        assert resumed["frozen"] == whole["frozen"]
        assert all(torch.equal(resumed["weights"][n], weight) for n, weight in whole["weights"].items())
        assert_values(resumed["values"], whole["values"], 0)


# --- refusals, in one process ---------------------------------------------------------------------------------------


@pytest.fixture
def world():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded() -> nn.Module:
    model = small.llama()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.compatibility("Distributed", "FSDP1", "refused")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_fsdp1_is_refused(world):
    wrapped = FullyShardedDataParallel(small.llama(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(RuntimeError, match="FSDP1.*saves nothing.*fsdp_version: 2"):
        GradES(wrapped, GradESConfig(tau=1.0), total_steps=1)


def test_fsdp1_is_refused_before_training(tmp_path):
    arguments = small.arguments(tmp_path)
    arguments.fsdp_plugin_args = {"fsdp_version": 1}
    with pytest.raises(ValueError, match="FSDP1"):
        refuse(GradESConfig(tau=1.0), arguments, small.Trainer(small.llama(), small.arguments(tmp_path)).state)


@pytest.mark.compatibility("Distributed", "tensor parallelism", "refused")
def test_tensor_parallelism_is_refused(world):
    model = small.llama()
    parallelize_module(model.model.layers[0].self_attn, world, {"q_proj": ColwiseParallel()})
    with pytest.raises(RuntimeError, match=r"tensor parallelism \(.*q_proj"):
        GradES(model, GradESConfig(tau=1.0), total_steps=1)


@pytest.mark.compatibility("Distributed", "FSDP2 with sample_size, freeze_prefix or merge_frozen_adapters", "refused")
@pytest.mark.parametrize("option", [{"sample_size": 10}, {"freeze_prefix": True}, {"merge_frozen_adapters": True}])
def test_options_that_do_not_go_with_shards_are_refused_by_name(option, world):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.*sharded"):
        GradES(sharded(), GradESConfig(tau=1.0, **option), total_steps=1)


@pytest.mark.compatibility("Distributed", "FSDP2 with a gradient scaler (fp16)", "refused")
def test_a_gradient_scaler_with_shards_is_refused(world):
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="gradient scaler.*bfloat16"):
        GradES(sharded(), GradESConfig(tau=1.0), total_steps=1, scaler=scaler)


@pytest.mark.compatibility("Distributed", "FSDP2 through Trainer, LoRA with FULL_STATE_DICT", "refused")
def test_full_state_dicts_of_adapters_are_refused(world, tmp_path, monkeypatch):
    class Plugin:
        state_dict_type = "StateDictType.FULL_STATE_DICT"

    model = fully_shard(small.lora())
    state = small.Trainer(small.llama(), small.arguments(tmp_path)).state
    state.max_steps = 4
    for strategy in ("steps", "epoch"):
        arguments = small.arguments(tmp_path, save_strategy=strategy)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", Plugin())
        with pytest.raises(ValueError, match="frozen adapters.*SHARDED_STATE_DICT"):
            GradESCallback(tau=1.0).on_train_begin(arguments, state, None, model=model, optimizer=None)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's own: a module around the model."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self) -> None:
        super().__init__()
        self.module = small.llama()


@pytest.mark.compatibility("Distributed", "DeepSpeed", "refused")
@pytest.mark.parametrize("route", ["arguments", "accelerate's plugin", "accelerate's state"])
def test_deepspeed_is_refused_before_training(route, tmp_path, monkeypatch):
    arguments = small.arguments(tmp_path)
    state = small.Trainer(small.llama(), small.arguments(tmp_path)).state
    if route == "arguments":
        arguments.deepspeed = {"zero_optimization": {"stage": 2}}
    elif route == "accelerate's plugin":
        arguments.deepspeed_plugin = object()  # as TrainingArguments makes it of ACCELERATE_USE_DEEPSPEED
    else:
        monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
        with pytest.raises(RuntimeError, match="DeepSpeed"):
            GradES(small.llama(), GradESConfig(tau=1.0), total_steps=1)
    with pytest.raises(ValueError, match="DeepSpeed: ZeRO updates flat partitions.*FSDP2"):
        refuse(GradESConfig(tau=1.0), arguments, state)


def test_deepspeeds_engine_and_optimizer_are_refused():
    with pytest.raises(RuntimeError, match="DeepSpeed"):
        GradES(DeepSpeedEngine(), GradESConfig(tau=1.0), total_steps=1)
    model = small.llama()
    inner = torch.optim.AdamW(model.parameters())
    wrapper = type("ZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero", "optimizer": inner})()
    for optimizer in (wrapper, [inner, wrapper]):
        with pytest.raises(RuntimeError, match="DeepSpeed"):
            GradES(model, GradESConfig(tau=1.0), total_steps=1, optimizer=optimizer)


def test_tensors_of_another_shape_do_not_fit(world):
    parameter = distribute_tensor(torch.zeros(4, 3), world, [Shard(0)])
    whole = torch.arange(12.0).view(4, 3)
    assert torch.equal(placed_like(whole, parameter).to_local(), whole)
    with pytest.raises(ValueError, match="does not fit"):
        placed_like(torch.zeros(3, 4), parameter)
