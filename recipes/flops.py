"""FlopCounterCallback: the floating-point operations of a run's steps, against the same run with nothing frozen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


def _sdpa_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _sdpa_cpu_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


# torch.utils.flop_counter's formulas; it has none for attention's CPU kernel, whose work is the same.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_cpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_cpu_backward,
}


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs in its context, by torch.utils.flop_counter's formulas.

    It is torch's `FlopCounterMode` without the breakdown by module and without the extra decompositions: those make a
    small model several times slower and change the last bits of its gradients. This one changes no bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FORMULAS.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class FlopCounterCallback(TrainerCallback, ExportableState):
    """Counts what the steps of a run compute.

    What is counted: the multiplications and additions (2 per multiply-accumulate) of matrix products, convolutions
    and attention, in forward and backward of all micro-batches of a step on this process, while the step runs.
    Element-wise work (norms, activations, softmax, loss), the optimizer, GradES itself and evaluations are left out.

    Counting slows a step down (by some 5 to 10 % for a 135M model on two CPU cores), so not every step is counted:
    one is if the number of trainable tensors has changed since the last counted one, and besides every `every`-th. The
    steps between take the cost per input element (batch times padded length) of the last counted one.

    What it is compared with: the same run with nothing frozen and all planned steps. Forward work does not depend on
    what is frozen, so a step's full cost is its forward FLOPs times r, with r = (all FLOPs) / (forward FLOPs) of the
    steps before the first freezing. Planned steps that were not run are taken at the mean full cost of those
    that were.

    Args:
        every: Steps from one counted step to the next while nothing changes.

    Attributes:
        steps: Optimizer steps seen.
        total: FLOPs of these steps.
        forward: FLOPs of their forward passes.
        unfrozen_total: FLOPs of the steps before the first freezing.
        unfrozen_forward: FLOPs of their forward passes.
    """

    SAVED = ("steps", "total", "forward", "unfrozen_total", "unfrozen_forward", "trainable")

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.steps = 0
        self.total = self.forward = self.unfrozen_total = self.unfrozen_forward = 0.0
        self.trainable = 0  # trainable tensors when training began
        self._planned = 0
        self._elements = 0  # of this step's inputs
        self._step_forward = 0
        self._before_forward = 0
        self._counter: FlopCounter | None = None
        self._live = self._counted_live = self._since = 0
        self._rates = (0.0, 0.0)  # FLOPs and forward FLOPs per input element at the last counted step
        self._hooks: list[RemovableHandle] = []

    def summary(self) -> dict[str, float]:
        """`used` and `full`: FLOPs of the run as it was, and of the full run; `saved`: the part of `full` not used."""
        if not self.unfrozen_forward:
            return {}
        full = self.forward * self.unfrozen_total / self.unfrozen_forward * self._planned / self.steps
        return {"used": self.total, "full": full, "saved": 1 - self.total / full}

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, so that a resumed run goes on counting."""
        return {
            "args": {"every": self.every},
            "attributes": {name: getattr(self, name) for name in self.SAVED},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        fresh = {**dict.fromkeys(self.SAVED, 0), "trainable": _trainable(model)}
        callbacks: Any = state.stateful_callbacks  # a dict at this point, whatever its annotation says
        saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
        for name, value in (fresh | saved if state.global_step else fresh).items():
            setattr(self, name, value)
        callbacks[type(self).__name__] = self.state()
        self._planned, self._counted_live = state.max_steps, -1
        self._hooks = [
            model.register_forward_pre_hook(self._enter_forward, with_kwargs=True),
            model.register_forward_hook(self._leave_forward),
        ]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._elements = self._step_forward = 0
        self._live = _trainable(kwargs["model"])
        if self._live != self._counted_live or self._since >= self.every:
            self._counter = FlopCounter()
            self._counter.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            flops, forward = float(self._counter.total), float(self._step_forward)
            self._counter, self._since, self._counted_live = None, 0, self._live
            self._rates = (flops / self._elements, forward / self._elements)
        else:
            flops, forward = (rate * self._elements for rate in self._rates)
        self._since += 1
        self.steps += 1
        self.total += flops
        self.forward += forward
        if self._live == self.trainable:
            self.unfrozen_total += flops
            self.unfrozen_forward += forward

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self._elements += inputs.numel()
        self._before_forward = self._counter.total if self._counter is not None else 0

    def _leave_forward(self, *_: Any) -> None:
        if self._counter is not None:
            self._step_forward += self._counter.total - self._before_forward


def _trainable(model: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in model.parameters())
