"""FlopCounterCallback: the floating-point operations of a run's real steps, against the same run with nothing frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


def _sdpa_cpu(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_cpu_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch's counter has formulas for attention's GPU kernels only.
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_cpu_backward,
}


class FlopCounterCallback(TrainerCallback, ExportableState):
    """Counts what the steps of a run compute.

    What is counted: the multiplications and additions (2 per multiply-accumulate) of matrix products, convolutions
    and attention in forward and backward of every micro-batch of every optimizer step on this process, as
    `torch.utils.flop_counter` sees them while they run. Element-wise work (norms, activations, softmax, loss), the
    optimizer and GradES itself are not in it, nor are evaluations. Steps that are not run count nothing.

    What it is compared with: the same run with nothing frozen and all planned steps. Backward work depends on what is
    frozen and forward work does not, so a step's full cost is its own forward FLOPs times r, where r is
    (all FLOPs) / (forward FLOPs) over the steps before the first freezing. Steps that were planned but not run are
    taken at the mean full cost of those that were.

    Args:
        frozen: Returns the number of components that are frozen now; called at each step's beginning.

    Attributes:
        steps: Optimizer steps counted.
        total: FLOPs of these steps.
        forward: FLOPs of their forward passes.
        unfrozen_total: FLOPs of the steps that began with nothing frozen.
        unfrozen_forward: FLOPs of their forward passes.
    """

    def __init__(self, frozen: Callable[[], int] = lambda: 0) -> None:
        self.frozen = frozen
        self.steps = self.total = self.forward = self.unfrozen_total = self.unfrozen_forward = 0
        self._planned = 0
        self._counter: FlopCounterMode | None = None
        self._before_forward = 0
        self._forward_of_step = 0
        self._hooks: list[RemovableHandle] = []

    def summary(self) -> dict[str, float]:
        """`used` and `full` (FLOPs of the run as it was, and of the full run), `saved` (the part of `full` not used)."""
        if not self.unfrozen_forward:
            return {}
        ratio = self.unfrozen_total / self.unfrozen_forward
        full = self.forward * ratio * self._planned / self.steps
        return {"used": float(self.total), "full": full, "saved": 1 - self.total / full}

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, so that a resumed run goes on counting."""
        names = ("steps", "total", "forward", "unfrozen_total", "unfrozen_forward")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._planned = state.max_steps
        saved = (state.stateful_callbacks or {}).get(type(self).__name__, {}).get("attributes", {})
        for name, value in (saved if state.global_step else {}).items():
            setattr(self, name, value)
        model: nn.Module = kwargs["model"]
        self._hooks = [
            model.register_forward_pre_hook(self._enter_forward),
            model.register_forward_hook(self._leave_forward),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forward_of_step = 0
        self._frozen_at_begin = self.frozen()
        self._counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self._counter.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._counter is None:
            return
        self._counter.__exit__(None, None, None)
        flops = self._counter.get_total_flops()
        self._counter = None
        self.steps += 1
        self.total += flops
        self.forward += self._forward_of_step
        if not self._frozen_at_begin:
            self.unfrozen_total += flops
            self.unfrozen_forward += self._forward_of_step

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_forward(self, *_: Any) -> None:
        if self._counter is not None:
            self._before_forward = self._counter.get_total_flops()

    def _leave_forward(self, *_: Any) -> None:
        if self._counter is not None:
            self._forward_of_step += self._counter.get_total_flops() - self._before_forward
