"""Counts the FLOPs of everything that runs, in a forward pass and in the backward pass that follows from it."""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    _pop_mode,
    _push_mode,
)
from torch.utils._pytree import tree_leaves

from .formulas import is_batched, matrix_flops
from .sizes import Sizes


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A module that is running.

    Attributes:
        module: The module; None outside of the model.
        outer: The place around it.
        seen: `Sizes.seen` of the pass.
        first: The kind of the first layer that has run in it, or that it is itself.
        second: The kind of the next one.
    """

    module: nn.Module | None = None
    outer: Place | None = None
    seen: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    first: str = ""
    second: str = ""

    def key(self, func: Any, tensors: Iterable[Any], sizes: Sizes | None) -> str:
        """What the cost of an operator that runs here grows with: a kind, or two (`"a|b"`) if it is attention."""
        place = self
        while not place.first and place.outer is not None:
            place = place.outer
        known = place.seen.get(place.second or place.first)
        mixes = place.module not in sizes.layers or isinstance(place.module, nn.MultiheadAttention) if sizes else False
        if known is not None and mixes and is_batched(func):
            shapes = [tensor.shape for tensor in tensors if isinstance(tensor, Tensor)]
            if any(len(shape) > 2 and known[2] in shape[-2:] for shape in shapes):
                return f"{place.first}|{place.second or place.first}"
        return place.first


class FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of everything that runs in its context.

    It is torch's `FlopCounterMode` without the breakdown by module and without the extra decompositions: those make a
    small model several times slower and change the last bits of its gradients. This one changes no bit. What
    torch.compile has compiled runs compiled, and is not seen.

    Attributes:
        total: All FLOPs.
        parts: The same by what they grow with; all are in `""` without `follow`.
        components: Component name -> FLOPs of its modules in the forward pass.
        uneven: Kinds of layers that did not get inputs of one size in all blocks (experts with tokens of their own).
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.parts: Counter[str] = Counter()
        self.components: Counter[str] = Counter()
        self.uneven: set[str] = set()
        self.place = Place()
        self._entered: list[tuple[bool, Place, Place]] = []  # of the running nodes: active already, place before, own
        self._started: list[tuple[nn.Module, int]] = []
        self._marks: dict[int, tuple[list[int], list[Place]]] = {}  # thread -> sequence numbers, and what ran from then
        self._handles: list[Any] = []
        self._sizes: Sizes | None = None

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this, a frame that is first met while counting would never be compiled any more."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flops = matrix_flops(func, args, kwargs, out)
        if flops:
            self.total += flops
            self.parts[self.place.key(func, args, self._sizes)] += flops
        return out

    # --- which layer runs ------------------------------------------------------------------------------------------

    def follow(self, sizes: Sizes, owners: Mapping[nn.Module, Mapping[str, int]]) -> None:
        """Tell apart what grows with what, until `stop`.

        Args:
            sizes: What is read of the model's layers.
            owners: Module -> component name -> elements of the component's tensors in it.
        """
        self._sizes, self._owners = sizes, owners
        handles = (
            register_module_forward_pre_hook(_weakly(self._enter_module)),
            register_module_forward_hook(_weakly(self._leave_module), always_call=True),
        )
        self._handles = [weakref.finalize(self, handle.remove) for handle in handles]  # torch's hooks outlive nothing

    def stop(self) -> None:
        """End it, also in the midst of a pass."""
        leave(self)
        for remove in self._handles:
            remove()
        self._handles = []

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        sizes = self._sizes
        if sizes is None or self not in _get_current_dispatch_mode_stack():
            return
        if sizes.running and module in self._owners:
            self._started.append((module, self.total))
        kind = sizes.kinds.get(module)
        if kind is not None and module not in sizes.layers:
            return  # a part of a layer
        outer = self.place
        if kind is not None and not self._is_even(module, kind, args):
            self.uneven.add(kind)
        elif kind is not None and not outer.second and not self._recomputes(outer):
            outer = dataclasses.replace(outer, first=outer.first or kind, second=kind if outer.first else "")
        self._go(Place(module, outer, sizes.seen, kind or ""))

    def _is_even(self, module: nn.Module, kind: str, args: tuple[Any, ...]) -> bool:
        assert self._sizes is not None
        known = self._sizes.seen.get(kind)
        if known is None or module is self._sizes.first[kind] or not (args and isinstance(args[0], Tensor)):
            return True
        return not self._sizes.running or args[0].numel() == known[1]

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._started and self._started[-1][0] is module:
            spent, shares = self.total - self._started.pop()[1], self._owners[module]
            for name, share in shares.items():  # fused experts: two components of one module
                self.components[name] += spent * share // sum(shares.values())
        place: Place | None = self.place
        while place is not None and place.module is not module:
            place = place.outer
        if place is None or place.outer is None or self._sizes is None:
            return
        self._go(place.outer)
        if self._recomputes(place.outer) and torch.is_grad_enabled() and output is not None:
            count_backward(output, self)  # with reentrant checkpointing its backward pass follows

    def _recomputes(self, place: Place) -> bool:
        """Whether a module that is called at `place` is called by an autograd node."""
        return bool(self._entered) and self._entered[-1][2] is place

    def _go(self, place: Place) -> None:
        self.place = place
        numbers, places = self._marks.setdefault(threading.get_ident(), ([], []))
        numbers.append(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]
        places.append(place)

    def place_of(self, node: Any) -> Place:
        """Where in the forward pass an autograd node was made."""
        numbers, places = self._marks.get(threading.get_ident(), ([], []))
        index = bisect_right(numbers, node._sequence_nr())
        return places[index - 1] if index else Place()

    # --- nodes -----------------------------------------------------------------------------------------------------

    def before_node(self, place: Place, *_: Any) -> None:
        active = self in _get_current_dispatch_mode_stack()
        self._entered.append((active, self.place, place))
        self.place = place
        if not active:
            _push_mode(self)

    def after_node(self, *inputs: Any) -> None:
        active, self.place, _ = self._entered.pop() if self._entered else (False, Place(), Place())
        if not active:
            leave(self)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """A function that calls a bound method as long as its object lives."""
    held = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (found := held()) is not None:
            found(*args)

    return call


def enter(counter: FlopCounter) -> None:
    """Let `counter` count a forward pass in this thread, until `leave`."""
    counter.place = Place()
    counter._entered, counter._started = [], []
    counter._go(counter.place)
    _push_mode(counter)


def leave(counter: FlopCounter) -> None:
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


def count_backward(output: Any, counter: FlopCounter) -> None:
    """Let `counter` be active while the nodes of `output`'s autograd graph run, each time they do."""
    pending = [leaf.grad_fn for leaf in _tensors(output) if leaf.grad_fn is not None]
    seen = set(pending)
    while pending:
        node: Any = pending.pop()
        if node.name() not in _FREE:
            counters = node.metadata.setdefault("grades_counters", [])
            if counter not in counters:  # else reached from an earlier pass of this step
                counters.append(counter)
                node.register_prehook(functools.partial(counter.before_node, counter.place_of(node)))
                node.register_hook(counter.after_node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen and not hasattr(following, "variable"):
                seen.add(following)
                pending.append(following)


def _tensors(output: Any) -> Iterable[Tensor]:
    if dataclasses.is_dataclass(output) and not isinstance(output, Mapping):
        output = vars(output)
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
