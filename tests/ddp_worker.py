"""One rank of a DDP run under torchrun: trains every case that it is given and writes what happened.

torchrun --nproc_per_node 2 -m tests.ddp_worker cases.json output_dir
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import resumable, small


@dataclasses.dataclass
class Case:
    """One run; `name` is its file name."""

    name: str
    method: str = "full"
    grades: dict[str, Any] | None = None
    accumulation: int = 1
    checkpointing: bool = False
    find_unused: bool = True
    static_graph: bool = False
    resume: bool = False
    reentrant: bool = False
    save_steps: int = 5
    kill: tuple[str, int, int | None] | None = None  # where, at which step, and which rank; None: all
    checkpoint: str = "checkpoint-5"

    def trainer(self, output: Path, batch_size: int, callbacks: list[TrainerCallback]) -> Trainer:
        options: dict[str, Any] = {
            "ddp_find_unused_parameters": self.find_unused,
            "ddp_static_graph": self.static_graph,
            **(small.checkpointing_arguments(self.reentrant) if self.checkpointing else {}),
        }
        return small.trainer(
            small.llama() if self.method == "full" else small.lora(),
            output,
            callbacks,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=self.accumulation,
            max_steps=8,
            save_strategy="steps",
            save_steps=self.save_steps,
            save_total_limit=3,
            learning_rate=3e-3,
            **options,
        )


class Watch(TrainerCallback):
    """Counts the bytes that DDP reduces in each step, and compares the gradients of the ranks before each update."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.apart: list[float] = []
        self._sent = 0
        self._installed: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._installed = model.register_forward_pre_hook(self._install)

    def _install(self, module, inputs):
        wrapper = DistributedDataParallel._get_active_ddp_module()
        self._installed.remove()
        wrapper.register_comm_hook(None, self._count)

    def _count(self, state, bucket):  # DDP refuses annotations that are strings
        self._sent += bucket.buffer().nbytes
        buffer = bucket.buffer().div_(dist.get_world_size())
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        own = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        other = own.clone()
        dist.broadcast(other, src=0)
        self.apart.append((own - other).abs().max().item())
        self.bytes.append(self._sent)
        self._sent = 0


def plain_loop(grades: dict[str, Any], output: Path | None = None, wrapped: bool = True) -> dict[str, Any]:
    """A loop without Trainer, in which the last step freezes something, and one step more after the engine's end.

    Args:
        grades: Options of GradES.
        output: Where a state is saved after step 5, and loaded into a new engine; None: no interruption.
        wrapped: Whether the engine gets DDP's wrapper or the model in it.
    """
    rank, number = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = small.llama()
    outer = DistributedDataParallel(model) if number > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)

    def new_engine() -> GradES:
        return GradES(outer if wrapped else model, GradESConfig(**grades), total_steps=8, optimizer=optimizer)

    engine, apart = new_engine(), 0.0
    for step in range(9):
        ids = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step)).chunk(number)[rank]
        outer(input_ids=ids, labels=ids).loss.backward()
        if step < 8:
            engine.step()
        if number > 1:
            own = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            other = own.clone()
            dist.broadcast(other, src=0)
            apart = max(apart, (own - other).abs().max().item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 4 and output is not None:
            torch.save(engine.state_dict(), output / f"plain-state-{rank}.pt")
            engine.close()
            engine = new_engine()
            engine.load_state_dict(torch.load(output / f"plain-state-{rank}.pt"))
        if step == 7:
            engine.close()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"frozen": engine.frozen, "apart": apart, "weights": weights}


def main(cases: Path, output: Path) -> None:
    for fields in json.loads(cases.read_text()):
        if "loop" in fields:
            report = plain_loop(fields["loop"], output if fields["interrupt"] else None, fields["wrapped"])
            torch.save(report, output / f"{fields['name']}-{dist.get_rank()}.pt")
            continue
        case = Case(**fields)
        watch = Watch()
        grades = GradESCallback(case.grades)
        trainer = case.trainer(output / case.name, 2, [grades, watch])
        rank = dist.get_rank()
        if case.kill is not None and case.kill[2] in (None, rank):
            resumable.arm(trainer, *case.kill[:2])
        trainer.train(resume_from_checkpoint=str(output / case.name / case.checkpoint) if case.resume else None)
        torch.save(
            {
                "frozen": grades.engine.frozen,
                "bytes": watch.bytes,
                "apart": watch.apart,
                "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters()},
                "trainable": [n for n, p in trainer.model.named_parameters() if p.requires_grad],
            },
            output / f"{case.name}-{'resumed-' if case.resume else ''}{rank}.pt",
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
