"""One rank of FSDP2 runs under torchrun, in a loop without Trainer: trains every case and writes what happened.

torchrun --nproc_per_node 2 -m tests.fsdp_worker cases.json output_dir
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import small

STEPS = 8
SAVED = 5
ROWS = 12  # a step's batch; 2 and 4 ranks, 1 and 3 micro-batches divide it
LENGTH = 10


@dataclasses.dataclass
class Case:
    """One run; `name` is its file name.

    Attributes:
        method: "full" or "lora" (of rank 1: on two ranks, half of the shards of `lora_A` are empty).
        grades: Options of GradES.
        mesh: None for one dimension over all ranks, or the sizes (replicas, shards) of HSDP.
        accumulation: Micro-batches a step.
        checkpointing: Activation checkpointing of every block.
        bf16: Compute in bfloat16, reduce in float32.
        optimizer: A class of `torch.optim`.
        resume: None, or how the state of step 5 is saved and loaded again: "full" or "sharded".
    """

    name: str
    grades: dict[str, Any]
    method: str = "full"
    mesh: tuple[int, int] | None = None
    accumulation: int = 1
    checkpointing: bool = False
    bf16: bool = False
    optimizer: str = "AdamW"
    resume: str | None = None

    def model(self) -> nn.Module:
        """Its MLPs have 25 rows: shards are uneven."""
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=25,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=64,
                max_position_embeddings=32,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        if self.method == "lora":
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
            for name, parameter in model.named_parameters():  # else only half of the gradients are not zero at first
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.02)
        return model.train()

    def sharded(self) -> nn.Module:
        model = self.model()
        if self.checkpointing:
            apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
        names = None if self.mesh is None else ("replicate", "shard")
        options: dict[str, Any] = {
            "mesh": init_device_mesh("cpu", self.mesh or (dist.get_world_size(),), mesh_dim_names=names)
        }
        if self.bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, **options)
        fully_shard(model, **options)
        return model

    def new_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        # Adam divides tiny gradients by tiny ones; with its usual eps rounding errors would grow from step to step.
        options = {"momentum": 0.9} if self.optimizer == "SGD" else {"eps": 1e-3}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return getattr(torch.optim, self.optimizer)(trained, lr=3e-3, weight_decay=0.1, **options)


def rows(step: int) -> torch.Tensor:
    """The token ids of optimizer step `step` (0-based), all ranks together."""
    return torch.randint(3, 64, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def update(case: Case, model: nn.Module, engine: GradES, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The part of a step from the batch to just before `engine.step()`; works on one process, too."""
    rank, number = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for index, micro in enumerate(rows(step).chunk(case.accumulation)):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(index == case.accumulation - 1)
        ids = micro.chunk(number)[rank]
        (model(input_ids=ids, labels=ids).loss / case.accumulation).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@contextlib.contextmanager
def counted(*names: str) -> Iterator[Counter[str]]:
    """How many times functions of torch.distributed are called, and with how many bytes of input."""
    counts: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str):
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            tensor = kwargs.get("input", args[1] if len(args) > 1 else None)
            counts[f"{name} bytes"] += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(case: Case, output: Path) -> dict[str, Any]:
    """Train one case, and say for each step what was measured, sent and computed."""
    model = case.sharded()
    optimizer = case.new_optimizer(model)
    engine = GradES(model, GradESConfig(**case.grades), total_steps=STEPS, optimizer=optimizer)
    report: dict[str, Any] = {"sent": [], "flops": [], "collectives": [], "literal": {}, "wrong": []}
    first = 0
    if case.resume is not None:
        load(case, model, optimizer, engine, output)
        first = SAVED
    before: dict[str, torch.Tensor] = {}
    shards: dict[torch.Tensor, torch.Tensor] = {}  # of what is frozen, as they were then
    for step in range(first, STEPS):
        flops = FlopCounterMode(display=False)
        with counted("reduce_scatter_single") as sent, flops:
            update(case, model, engine, optimizer, step)
        report["sent"].append(sent["reduce_scatter_single bytes"])
        report["flops"].append(flops.get_total_flops())
        gradients = {
            component.name: torch.cat([whole(parameter.grad).flatten().double() for parameter in component.measured])
            for component in engine.components
            if component.frozen_at is None
        }
        with counted("all_gather_single", "all_reduce", "broadcast", "all_gather") as calls:
            engine.step()
        report["collectives"].append({name: n for name, n in calls.items() if "bytes" not in name})
        for name, gradient in gradients.items():
            adapter = case.method == "lora"
            value = gradient if adapter else gradient - before[name] if name in before else torch.tensor([math.nan])
            report["literal"].setdefault(name, {})[step + 1] = value.abs().sum().item()
        before = gradients
        optimizer.step()
        optimizer.zero_grad()
        for component in engine.components:
            for parameter in component.parameters if component.frozen_at is not None else ():
                shard = parameter.detach().to_local()
                if not torch.equal(shards.setdefault(parameter, shard.clone()), shard):
                    report["wrong"].append(f"{component.name} moved in step {step + 1}")
                if parameter.grad is not None or parameter.requires_grad or parameter in optimizer.state:
                    report["wrong"].append(f"{component.name} is not frozen in step {step + 1}")
        if step + 1 == SAVED and case.resume is None:
            save(case, model, optimizer, engine, output)
            if any(parameter in optimizer.state for parameter in shards):
                report["wrong"].append("saving fills the optimizer's state")
    report |= {
        "frozen": engine.frozen,
        "values": {name: list(map(float, series)) for name, series in engine.history.values.items()},
        "weights": {name: whole(p) for name, p in plain_names(model)},
        "empty": sum(p.to_local().numel() == 0 for c in engine.components for p in c.measured),
    }
    engine.close()
    return report


def plain_names(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters()]


FULL = {"full_state_dict": True, "cpu_offload": True}


def save(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, engine: GradES, output: Path) -> None:
    """The state of all three, in both ways."""
    folder = output / case.name
    folder.mkdir(exist_ok=True)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "sharded")
    state = engine.state_dict()
    torch.save(state, folder / f"grades-{dist.get_rank()}.pt")
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(**FULL))
    previous = {n: [None if t is None else whole(t) for t in ts] for n, ts in state["previous"].items()}
    if dist.get_rank() == 0:
        torch.save(
            {"model": weights, "optimizer": moments, "grades": state | {"previous": previous}}, folder / "full.pt"
        )
    dist.barrier()


def load(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, engine: GradES, output: Path) -> None:
    """What `save` has saved, into a fresh model, optimizer and engine."""
    folder = output / case.name.removesuffix(f"-{case.resume}")
    if case.resume == "sharded":
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder / "sharded")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        engine.load_state_dict(torch.load(folder / f"grades-{dist.get_rank()}.pt", weights_only=False))
    else:
        state = torch.load(folder / "full.pt")
        mine = state if dist.get_rank() == 0 else {"model": {}, "optimizer": {}}
        options = StateDictOptions(**FULL, broadcast_from_rank0=True)
        set_model_state_dict(model, mine["model"], options=options)
        set_optimizer_state_dict(model, optimizer, mine["optimizer"], options=options)
        engine.load_state_dict(state["grades"])


# --- through Trainer -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class TrainerCase:
    """A run by Trainer with `fsdp_config={"version": 2}`; `state` is the state_dict_type of its checkpoints."""

    name: str
    grades: dict[str, Any]
    state: str = "SHARDED_STATE_DICT"
    method: str = "full"
    resume: bool = False


def let_accelerate_shard_on_cpus() -> None:
    """accelerate takes FSDP for granted on accelerators only; from here on also where all processes have a CPU."""
    original = AcceleratorState.__init__

    def __init__(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}

    AcceleratorState.__init__ = __init__


def run_trainer(case: TrainerCase, output: Path) -> dict[str, Any]:
    """Train, or go on from the checkpoint of step 5."""
    callback = GradESCallback(case.grades)
    folder = output / case.name.removesuffix("-resumed")
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": case.state}
    trainer = small.trainer(
        Case("", {}, case.method).model(),
        folder,
        [callback],
        per_device_train_batch_size=2,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVED,
        learning_rate=3e-3,
        adam_epsilon=1e-3,
        fsdp=True,
        fsdp_config=config,
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}") if case.resume else None)
    assert isinstance(trainer.model, FSDPModule)
    return {
        "frozen": callback.engine.frozen,
        "values": {name: list(map(float, series)) for name, series in callback.engine.history.values.items()},
        "weights": {name: whole(parameter) for name, parameter in plain_names(trainer.model)},
    }


def main(cases: Path, output: Path) -> None:
    dist.init_process_group("gloo")
    let_accelerate_shard_on_cpus()
    for fields in json.loads(cases.read_text()):
        through_trainer = "state" in fields
        case: Any = (TrainerCase if through_trainer else Case)(**fields)
        report = run_trainer(case, output) if through_trainer else run(case, output)
        torch.save(report, output / f"{case.name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
