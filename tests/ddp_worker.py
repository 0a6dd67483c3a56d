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

from grades_hf import GradESCallback
from tests import small


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

    def trainer(self, output: Path, batch_size: int, callbacks: list[TrainerCallback]) -> Trainer:
        options: dict[str, Any] = {
            "ddp_find_unused_parameters": self.find_unused,
            "ddp_static_graph": self.static_graph,
            "activation_checkpointing": self.checkpointing,
        }
        return small.trainer(
            small.llama() if self.method == "full" else small.lora(),
            output,
            callbacks,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=self.accumulation,
            max_steps=8,
            save_strategy="steps",
            save_steps=5,
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


def main(cases: Path, output: Path) -> None:
    for fields in json.loads(cases.read_text()):
        case = Case(**fields)
        watch = Watch()
        grades = GradESCallback(case.grades)
        trainer = case.trainer(output / case.name, 2, [grades, watch])
        trainer.train(resume_from_checkpoint=str(output / case.name / "checkpoint-5") if case.resume else None)
        rank = dist.get_rank()
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
