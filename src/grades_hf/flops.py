"""What a run computes: FLOPs of real steps, counted, and what freezing has saved of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from .components import Component

COUNT_EVERY = 25  # steps for each counted one, on average at least
RECOUNT_AFTER = 100  # steps after which one is counted though nothing has changed


@dataclass(frozen=True)
class Savings:
    """What the optimizer steps so far have cost, against the same steps with nothing frozen. All figures are FLOPs.

    Counted are the multiplications and additions (2 per multiply-accumulate) of matrix products, convolutions and
    attention, as `torch.utils.flop_counter` counts them, in the model's own forward passes in training mode and in
    their backward passes (recomputation under gradient checkpointing included), on this process; and the element-wise
    arithmetic of the optimizer. Left out: element-wise work of the model (norms, activations, softmax), work outside
    of it (a loss that the trainer computes), passes without gradients (evaluation, generation, a reference model),
    kernels that torch has no formula for (`torch.utils.flop_counter.register_flop_formula` adds one), and GradES.

    Attributes:
        steps: The optimizer steps that the figures are about.
        full: What they would have cost with nothing frozen.
        used: What they have cost.
        weight_gradient: Saved: gradients of frozen components' matrices. A matrix's gradient costs as much as its
            product in the forward pass.
        input_gradient: Saved: the rest of backward, which ends where nothing below is trained (and then recomputes
            less under checkpointing), and the weight gradients of what freezes besides components.
        optimizer: Saved: updates of frozen tensors. 0 if the engine got no optimizer, or did not see it step
            (accelerate's fp16 scaler hides it).
        adapter: Saved: merged adapters' own products in the forward pass, and as much for their input gradients.
        planned: What all planned steps would have cost with nothing frozen, at the mean of those so far.
    """

    steps: int
    full: float
    used: float
    weight_gradient: float
    input_gradient: float
    optimizer: float
    adapter: float
    planned: float

    @property
    def saved(self) -> float:
        """`full` minus `used`: the sum of the four parts."""
        return self.weight_gradient + self.input_gradient + self.optimizer + self.adapter

    @property
    def fraction(self) -> float:
        """The part of `full` that is saved."""
        return self.saved / self.full

    @property
    def fraction_of_planned(self) -> float:
        """The part of `planned` that is not used: for a run that has ended, early or not, what it saved in all."""
        return 1 - self.used / self.planned


# --- counting ------------------------------------------------------------------------------------------------------


def _sdpa_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _sdpa_cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """(S, K) x (G, K, N) and (G, M, K) x (K, S): each row or column meets one group; (K, S) x (S, N): all of S."""
    if a.dim() == b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_mm_fallback_backward(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped_mm(a, b)  # Transformers' operator always computes both gradients


# What torch.utils.flop_counter has no formula for, and the most frequent ones, for which its own are slow.
FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_cpu_backward,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "transformers::grouped_mm_fallback_backward": _grouped_mm_fallback_backward,
}


def matrix_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of matrix products, convolutions and attention; 0 for every other operator."""
    packet = getattr(func, "overloadpacket", func)
    formula = FORMULAS.get(getattr(packet, "_qualified_op_name", "")) or flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


# FLOPs for each element, counted by the arithmetic that is written: lerp is a + w * (b - a).
ELEMENTWISE = {
    **dict.fromkeys(("add", "sub", "mul", "div", "neg", "abs", "sqrt", "rsqrt", "pow", "reciprocal"), 1),
    **dict.fromkeys(("maximum", "minimum", "clamp", "clamp_min", "clamp_max", "sum", "mean", "norm"), 1),
    **dict.fromkeys(("lerp", "addcmul", "addcdiv"), 3),
}


def elementwise_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of element-wise arithmetic on floating-point tensors with dimensions, and of matrix products (Muon).

    Operators over lists of tensors (`_foreach_...`) count like the single ones, fused optimizers like the same
    algorithm written with them.
    """
    name = func._schema.name.removeprefix("aten::").rstrip("_")
    tensors = [
        tensor
        for tensor in (args[0] if args and isinstance(args[0], (list, tuple)) else (*args[:1], out))
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dim()
    ]
    if not tensors:
        return 0
    sizes = [tensor.numel() for tensor in tensors]
    numel = sum(sizes) if isinstance(args[0], (list, tuple)) else max(sizes)
    if name.startswith("_fused_"):
        return numel * _fused_flops(name, kwargs)
    each = ELEMENTWISE.get(name.removeprefix("_foreach_"), 0)
    if each == 1 and kwargs.get("alpha", 1) != 1:
        each = 2
    return numel * each + matrix_flops(func, args, kwargs, out)


def _fused_flops(name: str, options: Mapping[str, Any]) -> int:
    decay = 1 if options.get("weight_decay") else 0
    if name in ("_fused_adam", "_fused_adamw"):
        # the mean 3, the mean of squares 1 + 3, the denominator 3, the update 3
        return 13 + decay * (1 if name == "_fused_adamw" else 2) + bool(options.get("amsgrad"))
    if name == "_fused_sgd":
        momentum = 2 if options.get("momentum") and not options.get("is_first_step") else 0
        return 2 + 2 * decay + momentum + 2 * bool(options.get("nesterov"))
    if name == "_fused_adagrad":
        return 8 + 2 * decay
    return 0


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs in its context.

    It is torch's `FlopCounterMode` without the breakdown by module and without the extra decompositions: those make a
    small model several times slower and change the last bits of its gradients. This one changes no bit. What
    torch.compile has compiled runs compiled, and is not seen.

    Args:
        flops: What one operator counts, from the operator, its arguments and its result.
    """

    supports_higher_order_operators = True

    def __init__(self, flops: Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], int] = matrix_flops) -> None:
        super().__init__()
        self.flops = flops
        self.total = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, a frame that is first met while counting would never be compiled any more."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.total += self.flops(func, args, kwargs, out)
        return out


# --- metering a run ------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """All that a resumed run needs; JSON types only.

    Attributes:
        steps: Optimizer steps seen.
        counted: Of them counted ones.
        trainable: Trainable tensors when nothing was frozen; 0 before the first step.
        numel: Their elements.
        used: FLOPs of all steps.
        before: FLOPs of the steps with nothing frozen.
        forward: FLOPs that the forward passes of the other steps would have cost with nothing merged.
        merged: FLOPs that merging saved in these forward passes.
        weights: FLOPs of the weight gradients that were saved.
        unfrozen: FLOPs and forward FLOPs of the counted steps with nothing frozen.
        base: Input elements of the first counted step.
        components: Name -> forward FLOPs in the first counted step.
        last: FLOPs, forward FLOPs and input elements of the last counted step.
        last_set: The state of the model in it: trainable tensors, and FLOPs (of `components`) frozen and merged.
        last_step: Its number.
        updates: Elements that the optimizer has updated, summed over the steps.
        optimizer: FLOPs and elements of the last counted optimizer step.
    """

    steps: int = 0
    counted: int = 0
    trainable: int = 0
    numel: int = 0
    used: float = 0.0
    before: float = 0.0
    forward: float = 0.0
    merged: float = 0.0
    weights: float = 0.0
    unfrozen: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    base: int = 0
    components: dict[str, int] = dataclasses.field(default_factory=dict)
    last: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    last_set: list[int] = dataclasses.field(default_factory=lambda: [0, 0, 0])
    last_step: int = 0
    updates: int = 0
    optimizer: list[int] = dataclasses.field(default_factory=lambda: [0, 0])


class ComputeMeter:
    """Counts what some steps of a run compute, and derives the others from them.

    A step is counted first of all, and when what is trained has changed, but on average at most one in 25; besides,
    one after 100 steps without. Counting changes no bit. A step between costs, for each input element (batch times
    padded length), what the last counted one cost, less the weight gradients of what has frozen since, as they are counted.

    The FLOPs are counted by a dispatch mode. It is active in the model's forward pass, and from then on only while a
    node of that pass's autograd graph runs: never between them, so that no error leaves it behind.

    What a step would have cost with nothing frozen: forward work does not depend on what is frozen, so it is the
    step's forward FLOPs (with what merging saved of them) times r, with r = (all FLOPs) / (forward FLOPs) of the
    counted steps with nothing frozen.

    Args:
        model: What the loop calls.
        components: Whose savings are told apart.
        optimizers: Whose updates are counted, too.
        merged: Tells the names of the components whose adapters are merged at the moment.
        frozen: Holds what the optimizer leaves out though it may require a gradient.
        compiled: Whether the model is compiled; then nothing is counted.

    Attributes:
        reason: Why nothing can be told, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        components: Sequence[Component] = (),
        optimizers: Sequence[torch.optim.Optimizer] = (),
        *,
        merged: Callable[[], Collection[str]] = tuple,
        frozen: Container[Tensor] = (),
        compiled: bool = False,
    ) -> None:
        self.reason: str | None = None
        self._merged = merged
        self._frozen = frozen
        self._parameters = list(model.parameters())
        self._components = components
        self._optimizers = optimizers
        self._tally = _Tally()
        self._begun = False  # whether this step's first forward pass has begun
        self._alone = False  # whether this step stands for no other one
        self._set = [-1, 0, 0]  # of this step, see `_Tally.last_set`
        self._passes = 0  # input elements of this step
        self._pass: int | None = None  # of the forward pass that is running
        self._counter: FlopCounter | None = None  # of this step, if it is counted
        self._start = self._forward = 0  # FLOPs
        self._taken = 0
        self._owners = _owners(model, components)
        self._inner: list[RemovableHandle] = []
        self._wrapped: list[tuple[torch.optim.Optimizer, Any, Any]] = []  # what `step` was, and what it is
        self._hooks: list[RemovableHandle] = []
        if compiled:
            self.reason = "the model is compiled (torch.compile), and what compiled code computes is not seen"
            return
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    @property
    def measured(self) -> bool:
        """Whether `savings` can tell something."""
        return self.reason is None and self._tally.unfrozen[1] > 0

    def step(self) -> None:
        """End an optimizer step; call before the optimizer's update, once frozen is what does not take part in it."""
        tally = self._tally
        tally.steps += 1
        if self._begun and self.reason is None:
            flops, forward = self._cost()
            tally.used += flops
            frozen, merged = (part * self._passes / tally.base if part else 0.0 for part in self._set[1:])
            if self._set[0] == tally.trainable and not merged:
                tally.before += flops
                if self._counter is not None:
                    tally.unfrozen = [tally.unfrozen[0] + self._counter.total, tally.unfrozen[1] + self._forward]
            else:
                tally.forward += forward + merged
                tally.merged += merged
                tally.weights += frozen
            if self._counter is not None:
                self._end_counted(self._counter)
        elif self.reason is None:
            self.reason = (
                f"no forward pass of the model was seen at step {tally.steps}: it is compiled, or not called as "
                "model(...) in training mode"
            )
        tally.updates += self._live()
        self._begun, self._passes = False, 0

    def savings(self, total_steps: int) -> Savings:
        """What is saved so far; `total_steps` are planned.

        Raises:
            RuntimeError: nothing can be told; the message says why.
        """
        tally = self._tally
        if not self.measured:
            raise RuntimeError(f"savings are not measured: {self.reason or 'no optimizer step has been counted yet'}.")
        flops, elements = tally.optimizer
        rate = flops / elements if elements else 0.0
        updates = rate * (tally.numel * tally.steps - tally.updates)
        full = tally.before + tally.forward * tally.unfrozen[0] / tally.unfrozen[1]
        rest = full - tally.used - tally.weights - 2 * tally.merged
        full += rate * tally.numel * tally.steps
        return Savings(
            steps=tally.steps,
            full=full,
            used=tally.used + rate * tally.updates,
            weight_gradient=tally.weights,
            input_gradient=rest,
            optimizer=updates,
            adapter=2 * tally.merged,
            planned=full * total_steps / tally.steps,
        )

    def take(self) -> int | None:
        """The model's FLOPs since the last call, the running step included; None where they are not counted."""
        if self.reason is not None or not (self._tally.counted or self._begun):
            return None
        now = int(self._tally.used + (self._cost()[0] if self._begun else 0.0))
        taken, self._taken = now - self._taken, now
        return taken

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON types only."""
        return {**dataclasses.asdict(self._tally), "reason": self.reason}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there.

        Raises:
            ValueError: this is no state of a meter; nothing has been changed then.
        """
        try:
            self._tally = _Tally(**{field.name: state[field.name] for field in dataclasses.fields(_Tally)})
            self.reason = self.reason or state["reason"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no state of FLOP counts: {error!r} is missing or malformed.") from error
        self._taken = int(self._tally.used)

    def close(self) -> None:
        """End the run; what was counted stays readable."""
        if self._counter is not None:
            _leave(self._counter)
        for handle in (*self._hooks, *self._inner):
            handle.remove()
        self._unwrap_optimizers()
        self._parameters, self._owners = [], []

    # --- one step ------------------------------------------------------------------------------------------------

    def _live(self) -> int:
        """Trained elements."""
        return sum(p.numel() for p in self._parameters if p.requires_grad and p not in self._frozen)

    def _ends_early(self) -> bool:
        """Whether the last counted step has spared input gradients: more than a thousandth of its cost."""
        tally = self._tally
        total, forward, elements = tally.last
        if not tally.counted or not tally.unfrozen[1]:
            return False
        full = forward * tally.unfrozen[0] / tally.unfrozen[1]
        return full - total - tally.last_set[1] * elements / tally.base > 1e-3 * full

    def _state(self) -> list[int]:
        """The state of the model now, see `_Tally.last_set`."""
        flops, live = self._tally.components, sum(parameter.requires_grad for parameter in self._parameters)
        frozen = (c for c in self._components if not any(p.requires_grad for p in c.parameters))
        return [
            live,
            sum(flops.get(c.name, 0) for c in frozen) if live != self._tally.trainable else 0,
            sum(flops.get(name, 0) for name in self._merged()),
        ]

    def _begin(self) -> None:
        """The first forward pass of a step: what is trained, and is it counted?"""
        tally = self._tally
        self._begun = True
        if not tally.trainable:
            tally.trainable = sum(parameter.requires_grad for parameter in self._parameters)
            tally.numel = self._live()
        self._set = self._state()
        changed = self._set != tally.last_set and tally.counted * COUNT_EVERY <= tally.steps
        self._counter, self._forward = None, 0
        self._alone = any(p.requires_grad and p in self._frozen for p in self._parameters)
        due = not tally.counted or changed or tally.steps + 1 - tally.last_step >= RECOUNT_AFTER
        if self.reason is None and (due or (self._alone and self._ends_early())):
            self._counter = FlopCounter()
            if not tally.counted:
                self._hook_components(self._counter)

    def _cost(self) -> tuple[float, float]:
        """FLOPs and forward FLOPs of this step so far."""
        if self._counter is not None:
            return float(self._counter.total), float(self._forward)
        tally = self._tally
        if not tally.counted:
            return 0.0, 0.0
        (total, forward, elements), (_, frozen, merged) = tally.last, tally.last_set
        newly_frozen, newly_merged = self._set[1] - frozen, self._set[2] - merged
        flops, forward_flops = total * self._passes / elements, forward * self._passes / elements
        if newly_frozen or newly_merged:
            flops -= (newly_frozen + 2 * newly_merged) * self._passes / tally.base  # forward and input gradients
            forward_flops -= newly_merged * self._passes / tally.base
        return flops, forward_flops

    def _end_counted(self, counter: FlopCounter) -> None:
        tally = self._tally
        _leave(counter)
        self._counter = None
        for handle in self._inner:
            handle.remove()
        self._inner.clear()
        if not self._passes or counter.total == self._forward:
            self.reason = "no backward pass of the model's outputs was seen"
            return
        if self._alone and tally.counted:
            return
        tally.counted += 1
        tally.base = tally.base or self._passes
        tally.last = [counter.total, self._forward, self._passes]
        tally.last_set, tally.last_step = self._set, tally.steps
        self._wrap_optimizers()

    # --- the model's passes ----------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        if not model.training or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # the last: a recomputation, in a backward pass
        if self._counter is not None:
            _leave(self._counter)  # an interrupt has left it
        if not self._begun:
            self._begin()
        self._pass = _elements(args, kwargs)
        if self._counter is not None:
            self._start = self._counter.total
            _push_mode(self._counter)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or self._pass is None or torch._C._current_graph_task_id() != -1:
            return
        if output is not None:  # else it has failed
            self._passes += self._pass
        self._pass = None
        if self._counter is not None:
            _leave(self._counter)
            self._forward += self._counter.total - self._start
            _count_backward(output, self._counter)

    def _hook_components(self, counter: FlopCounter) -> None:
        """For this step: what each component's modules compute in the forward pass."""
        flops = self._tally.components = dict.fromkeys((component.name for component in self._components), 0)
        started: dict[nn.Module, int] = {}

        def before(module: nn.Module, args: Any) -> None:
            started[module] = counter.total

        def after(shares: dict[str, int], module: nn.Module, args: Any, output: Any) -> None:
            if self._pass is None:
                return  # a recomputation
            spent, numel = counter.total - started[module], sum(shares.values())
            for name, share in shares.items():  # fused experts: two components of one module
                flops[name] += spent * share // numel

        for module, shares in self._owners:
            self._inner.append(module.register_forward_pre_hook(before))
            self._inner.append(module.register_forward_hook(functools.partial(after, shares)))

    # --- the optimizer's update ------------------------------------------------------------------------------------

    def _wrap_optimizers(self) -> None:
        """Count the next update. torch's own hooks around `step` would leave the mode behind when it fails."""
        self._unwrap_optimizers()
        tally, elements, counts = self._tally, self._live(), dict.fromkeys(self._optimizers, 0)
        waiting = set(self._optimizers)

        def wrap(optimizer: torch.optim.Optimizer) -> Any:
            step = optimizer.step

            @functools.wraps(step)
            def counted(*args: Any, **kwargs: Any) -> Any:
                if optimizer not in waiting:  # something has kept this function
                    return step(*args, **kwargs)
                waiting.remove(optimizer)
                self._unwrap_optimizers(optimizer)
                with FlopCounter(elementwise_flops) as counter:
                    result = step(*args, **kwargs)
                counts[optimizer] = counter.total
                if not waiting:
                    tally.optimizer = [sum(counts.values()), elements]
                return result

            return counted

        for optimizer in self._optimizers:
            before, counted = optimizer.__dict__.get("step"), wrap(optimizer)
            self._wrapped.append((optimizer, before, counted))
            optimizer.step = counted  # type: ignore[method-assign]

    def _unwrap_optimizers(self, only: torch.optim.Optimizer | None = None) -> None:
        for entry in list(self._wrapped):
            optimizer, before, counted = entry
            if only is not None and optimizer is not only:
                continue
            self._wrapped.remove(entry)
            if optimizer.__dict__.get("step") is not counted:
                continue  # something else has replaced it
            if before is None:
                del optimizer.__dict__["step"]
            else:
                optimizer.step = before  # type: ignore[method-assign]


def _owners(model: nn.Module, components: Sequence[Component]) -> list[tuple[nn.Module, dict[str, int]]]:
    """The modules that hold measured tensors: component name -> elements."""
    names = {parameter: component.name for component in components for parameter in component.measured}
    owners = []
    for module in model.modules():
        shares: dict[str, int] = {}
        for parameter in module.parameters(recurse=False):
            if parameter in names:
                shares[names[parameter]] = shares.get(names[parameter], 0) + parameter.numel()
        if shares:
            owners.append((module, shares))
    return owners


def _leave(counter: FlopCounter) -> None:
    """Take `counter` off this thread's stack of dispatch modes, wherever it is in it."""
    above = []
    while counter in _get_current_dispatch_mode_stack():
        mode = _pop_mode()
        if mode is not counter:
            above.append(mode)
    for mode in reversed(above):
        _push_mode(mode)


# Nodes that multiply nothing, and save no tensor whose unpacking could recompute something under checkpointing.
_FREE = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Transpose", "T", "Permute", "Unsqueeze", "Expand", "Slice", "Cat", "Clone")
    + ("Add", "Sub", "Neg", "ToCopy")
)


def _count_backward(output: Any, counter: FlopCounter) -> None:
    """Let `counter` be active while the nodes of `output`'s autograd graph run, each time they do."""

    def before(*_: Any) -> None:
        if counter not in _get_current_dispatch_mode_stack():
            _push_mode(counter)

    def after(*_: Any) -> None:
        _leave(counter)

    pending = [leaf.grad_fn for leaf in _tensors(output) if leaf.grad_fn is not None]
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        if node.name() not in _FREE:
            counters = node.metadata.setdefault("grades_counters", [])
            if counter not in counters:  # else reached from an earlier pass of this step
                counters.append(counter)
                node.register_prehook(before)
                node.register_hook(after)
        for following, _ in node.next_functions:
            if following is not None and following not in seen and not hasattr(following, "variable"):
                seen.add(following)
                pending.append(following)


def _tensors(output: Any) -> Iterable[Tensor]:
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _elements(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Elements of the inputs: of `input_ids`, or else of the first tensor; 1 where there is none."""
    inputs = kwargs.get("input_ids")
    if not isinstance(inputs, Tensor):
        tensors = (leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor) and leaf.numel())
        inputs = next(tensors, None)
    return 1 if inputs is None else inputs.numel()
