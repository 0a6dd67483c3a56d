"""What a run computes: FLOPs of real steps, counted, and what freezing has saved of them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..contracts import Extension, Run, Step, Trait
from ..find.blocks import sequential_blocks
from ..find.components import Component, unwrap
from ..hooks import hook
from .counter import FlopCounter, count_backward, enter, leave
from .savings import Savings
from .sizes import Sizes, first_tensor
from .tally import Tally, Vector, add, dot, each_of

COUNT_EVERY = 25  # steps for each counted one, on average at least
RECOUNT_AFTER = 100  # steps after which one is counted though nothing has changed
FORMAT = 2

_requires_grad = attrgetter("requires_grad")


class Meter(Extension):
    """Counts what some steps of a run compute, and derives the others from the sizes of their inputs.

    A step is counted first of all, and when what is trained has changed, but on average at most one in 25; besides,
    one after 100 steps without. Counting changes no bit. In it, FLOPs are told apart by what they grow with (`Sizes`):
    the input of a layer, or the inputs of the two layers that attention mixes. These sizes are read in every step, so
    steps of any length cost what the counted ones cost for each unit of each size.

    A step with nothing frozen would have cost the sizes times the figures of the counted steps with nothing frozen. A
    frozen matrix saves as much as its product in the forward pass, a merged adapter twice as much besides. What else is
    missing in a counted step is input gradients; where what is trained changes between two counted steps, the later
    one's figure holds from its last change on, and the mean of the two before.

    The FLOPs are counted by a dispatch mode. It is active in the model's forward pass, and from then on only while a
    node of that pass's autograd graph runs: never between them, so that no error leaves it behind.

    Attributes:
        reason: Why nothing can be told, or None.
    """

    name = "meter"

    def __init__(self) -> None:
        self.reason: str | None = None
        self._tally = Tally()
        self._taken = 0

    def attach(self, run: Run, undo: ExitStack) -> None:
        merging = run.extension("merging")
        self._merging: Callable[[], Collection[str]] = (lambda: merging.merged) if merging is not None else tuple
        self._parameters = list(run.model.parameters())
        self._components = run.components
        self._begun = self._inside = False  # this step's passes; inside of a backward pass
        self._now: Vector = {}  # sizes of this step
        # Of the components that are frozen, and merged, in this step: names, and forward FLOPs for each unit of a size.
        self._frozen: list[str] = []
        self._merged: list[str] = []
        self._off: tuple[Vector, Vector] = {}, {}
        self._cut: Vector = {}  # input gradients of blocks that backward does not reach
        self._changed = True  # whether all of these may be others by now
        self._reached: list[int] = []  # of each tower: the blocks below its lowest one that backward reaches
        self._looks: list[Callable[[], None]] = []
        self._counter: FlopCounter | None = None  # of this step, if it is counted
        self._spent: Counter[str] = Counter()  # FLOPs of its forward passes
        self._start: Counter[str] = Counter()  # FLOPs before the pass that runs
        self._sizes = Sizes(run.model)
        self._owners, self._home = _owners(run.model, run.components, self._sizes)
        towers = sequential_blocks(unwrap(run.model))
        self._lengths = [(f"{path}.*.", len(blocks)) for path, blocks in towers]
        self._places = {block: (n, i) for n, (_, blocks) in enumerate(towers) for i, block in enumerate(blocks)}
        undo.callback(self._close)
        if Trait.COMPILED in run.traits:
            self.reason = "the model is compiled (torch.compile), and what compiled code computes is not seen"
            return
        undo.callback(hook(run.model, "forward_pre", self._before_forward, with_kwargs=True))
        undo.callback(hook(run.model, "forward", self._after_forward, always_call=True))
        self._sizes.attach(undo)

    @property
    def measured(self) -> bool:
        """Whether `savings` can tell something."""
        return self.reason is None and bool(self._tally.flops)

    def on_grad_pattern(self) -> None:
        self._changed = True

    def on_step_end(self, step: Step) -> None:
        tally = self._tally
        tally.steps += 1
        if self._begun and self.reason is None:
            counter, self._counter = self._counter, None
            rate = None
            if counter is not None:
                counter.stop()
                rate = self._read(counter)
            if self.reason is None:
                self._add(rate)
        elif self.reason is None:
            self.reason = (
                f"at step {tally.steps} the model was not seen to run in training mode with gradients: it is compiled, "
                "not called as model(...), or it ran again inside of a backward pass"
            )
        self._begun, self._now = False, {}

    def savings(self, total_steps: int) -> Savings:
        """What is saved so far; `total_steps` are planned.

        Raises:
            RuntimeError: nothing can be told; the message says why.
        """
        if not self.measured:
            raise RuntimeError(f"savings are not measured: {self.reason or 'no optimizer step has been counted yet'}.")
        tally, full = self._tally, self._full(self._tally.sizes)
        inputs = tally.inputs + sum(dot(tally.rate, sizes) for sizes in (tally.waiting, tally.between))
        return Savings(
            steps=tally.steps,
            full=full,
            used=full - tally.weights - inputs - 2 * tally.merged + tally.looks,
            weight_gradient=tally.weights,
            input_gradient=inputs,
            adapter=2 * tally.merged,
            planned=full * total_steps / tally.steps,
            looks=tally.looks,
        )

    def shares(self) -> dict[str, float]:
        """Component name -> its weight gradient's part of a step with nothing frozen, at the mean of the steps so far;
        empty where nothing is measured."""
        if not self.measured:
            return {}
        sizes, full = self._tally.sizes, self._full(self._tally.sizes)
        return {name: each * sizes.get(key, 0.0) / full for name, (key, each) in self._weights().items()}

    @contextlib.contextmanager
    def look(self) -> Iterator[None]:
        """What runs inside belongs to a look."""
        if self.reason is not None:
            yield
            return
        with FlopCounter() as counter:
            yield
        self._tally.looks += counter.total

    def take(self) -> int | None:
        """The model's FLOPs since the last call, the running step included; None where they are not counted."""
        if self.reason is not None or not (self._tally.counted or self._begun):
            return None
        if self._tally.counted:
            running = self._full(self._now)
            running -= dot(self._off[0], self._now) + 2 * dot(self._off[1], self._now)
            running -= dot(self._tally.rate, self._now) + dot(self._cut, self._now)
            now = int(running + (self.savings(1).used if self._tally.steps else 0.0))
        else:
            now = self._counter.total if self._counter is not None else 0
        taken, self._taken = max(0, now - self._taken), max(now, self._taken)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "reason": self.reason, **self._tally.to_state()}

    def check(self, state: Mapping[str, Any]) -> tuple[Tally, str | None]:
        if state["format"] != FORMAT:
            return Tally(), "the counts of the session before are lost: an earlier version of grades-hf made them"
        reason = state["reason"]
        return Tally.from_state(state), None if reason is None else str(reason)

    def load(self, checked: tuple[Tally, str | None]) -> None:
        self._tally, reason = checked
        self.reason = self.reason or reason
        self._changed = True
        self._taken = int(self.savings(1).used) if self.measured and self._tally.steps else 0

    def _close(self) -> None:
        if self._counter is not None:
            self._counter.stop()
        self._counter = None
        for remove in self._looks:
            remove()
        self._parameters, self._components, self._owners, self._places = [], [], {}, {}
        self._merging = tuple
        del self._sizes

    # --- figures ---------------------------------------------------------------------------------------------------

    def _full(self, sizes: Vector) -> float:
        """FLOPs of passes of these sizes with nothing frozen."""
        return dot(each_of(self._tally.flops, self._tally.base), sizes)

    def _weights(self) -> dict[str, tuple[str, float]]:
        """Component name -> what its weight gradient grows with, and its FLOPs for each unit of that."""
        tally, found = self._tally, {}
        for name, flops in tally.components.items():
            key = self._home[name]
            key = tally.routed.get(key, key)
            found[name] = key, flops / tally.base[key] if tally.base.get(key) else 0.0
        return found

    def _block(self, start: str, blocks: int) -> Vector:
        """FLOPs of a block's backward pass but for the weight gradients, for each unit of a size; all blocks alike."""
        tally = self._tally
        rest = {key: flops - tally.forward.get(key, 0.0) for key, flops in tally.flops.items() if start in key}
        for key, each in self._weights().values():
            if key in rest:
                rest[key] -= each * tally.base[key]
        return {key: each / blocks for key, each in each_of(rest, tally.base).items()}

    def _take_off(self) -> None:
        """Find out what is saved in this step, after its first forward pass."""
        weights = self._weights()
        self._off, self._cut = ({}, {}), {}
        for off, names in zip(self._off, (self._frozen, self._merged), strict=True):
            for key, each in (weights[name] for name in names if name in weights):
                off[key] = off.get(key, 0.0) + each
        for (start, blocks), cut in zip(self._lengths, self._reached, strict=True):
            add(self._cut, {key: cut * each for key, each in self._block(start, blocks).items()} if cut else {})
        below = {c.name for c in self._components if c.layer is not None and c.layer < max(self._reached, default=0)}
        for key, each in (weights[name] for name in self._merged if name in weights and name in below):
            if key in self._cut:
                self._cut[key] -= each  # is in what merging saves

    # --- one step --------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """The first forward pass of a step: what is trained, and is it counted? False: nothing can be told."""
        tally = self._tally
        self._begun = True
        live = sum(map(_requires_grad, self._parameters))
        merged = list(self._merging())
        if not tally.trainable:
            tally.trainable = live
            if any(component.frozen_at is not None for component in self._components):
                self.reason = "the counts of the session before are lost: the checkpoint holds none"
                return False
        self._changed |= not tally.state or live != tally.state[0] or merged != self._merged
        if self._changed:
            self._merged = merged
            self._frozen = [c.name for c in self._components if not any(map(_requires_grad, c.parameters))]
            self._reached = [0] * len(self._lengths)
            self._looks = [hook(block, "forward_pre", self._look, with_kwargs=True) for block in self._places]
            state = [live, len(self._frozen), len(merged)]
            if state != tally.state:
                add(tally.between, tally.waiting)
                tally.waiting, tally.state = {}, state
        new = tally.state != tally.known or any(key not in tally.base for key in tally.sizes)
        due = not tally.counted or (new and tally.counted * COUNT_EVERY <= tally.steps)
        if due or tally.steps + 1 - tally.last >= RECOUNT_AFTER:
            self._counter, self._spent = FlopCounter(), Counter()
            self._counter.follow(self._sizes, self._owners)
        return True

    def _look(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block begins: does backward reach what lies below?"""
        inputs = first_tensor((args, kwargs))
        if self._sizes.running and inputs is not None and inputs.grad_fn is None:
            tower, index = self._places[block]
            whole = index + 1 == self._lengths[tower][1] and not any(map(_requires_grad, block.parameters()))
            self._reached[tower] = max(self._reached[tower], index + whole)

    def _add(self, rate: Vector | None) -> None:
        """The step is over; `rate` is what it says of input gradients if it was counted."""
        tally, now = self._tally, self._now
        add(tally.sizes, now)
        tally.weights += dot(self._off[0], now)
        tally.merged += dot(self._off[1], now)
        tally.inputs += dot(self._cut, now)
        if rate is not None:
            tally.inputs += dot(rate, now) + dot(rate, tally.waiting)
            tally.inputs += (dot(tally.rate, tally.between) + dot(rate, tally.between)) / 2
            tally.rate, tally.known, tally.waiting, tally.between = rate, tally.state, {}, {}
        elif tally.state == tally.known:
            tally.inputs += dot(tally.rate, now)
        else:
            add(tally.waiting, now)

    def _read(self, counter: FlopCounter) -> Vector | None:
        """What a counted step says; returns what it saves of input gradients for each unit of each size."""
        tally = self._tally
        if counter.total == sum(self._spent.values()):
            self.reason = "no backward pass of the model's outputs was seen"
            return None
        whole = [key for key, size in self._now.items() if size and counter.parts[key] and key not in counter.uneven]
        if not whole:
            self.reason = "no layer of the model was seen to run"
            return None
        for kind in {*counter.uneven, *(key.partition("|")[0] for key in counter.parts if not self._now.get(key))}:
            if kind not in tally.routed:
                near = functools.partial(_likeness, kind, counter.parts)
                tally.routed[kind] = max((key for key in whole if key != kind and "|" not in key), key=near)
        flops, forward = self._fold(counter.parts), self._fold(self._spent)
        tally.counted += 1
        tally.last = tally.steps
        unfrozen = tally.state == [tally.trainable, 0, 0]
        fresh = {key for key in (*flops, *self._now) if key not in tally.base}
        for total, found in ((tally.flops, flops), (tally.forward, forward), (tally.base, self._now)):
            add(total, {key: value for key, value in found.items() if unfrozen or key in fresh})
        add(tally.components, {k: v for k, v in counter.components.items() if unfrozen or k not in tally.components})
        self._take_off()
        for key in fresh:  # seen before, but not yet counted
            first, _, second = key.partition("|")
            if second and self._now.get(key):
                for sizes in (tally.sizes, tally.waiting, tally.between):
                    sizes[key] = sizes.get(first, 0.0) * self._now[key] / self._now[first]
            each = self._off[0].get(key, 0.0)
            tally.weights += each * (tally.waiting.get(key, 0.0) + tally.between.get(key, 0.0) / 2)
            if each:
                tally.flops[key] += each * self._now[key]
        if unfrozen:
            return {}
        rate = {}
        for key, full in each_of(tally.flops, tally.base).items():
            if self._now.get(key):
                frozen, merged, cut = (off.get(key, 0.0) for off in (*self._off, self._cut))
                saved = full - flops.get(key, 0.0) / self._now[key] - frozen - 2 * merged - cut
                rate[key] = saved if merged or cut or saved > 1e-9 * full else 0.0
        return {**tally.rate, **rate}

    def _fold(self, parts: Mapping[str, int]) -> Vector:
        """FLOPs by what they grow with, those of routed layers where they belong."""
        found: Vector = {}
        for key, flops in parts.items():
            kind = key.partition("|")[0]
            key = self._tally.routed.get(kind, key)
            found[key] = found.get(key, 0.0) + flops
        return found

    # --- the model's passes ----------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self.reason is not None:
            return
        inside = torch._C._current_graph_task_id() != -1
        if inside and self._begun and not self._inside:
            return  # a recomputation: the pass itself was seen. Under GradCache there is none but inside
        if self._counter is not None:
            leave(self._counter)  # an interrupt has left it
            if self._sizes.running:  # and what that pass has counted belongs to no whole pass
                self._counter.parts = self._start
        if not self._begun:
            self._inside = inside
            if not self._begin():
                return
        self._sizes.begin()
        if self._counter is not None:
            self._start = self._counter.parts.copy()
            enter(self._counter)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._sizes.running:
            return
        counter, keys = self._counter, {*self._tally.base}
        for remove in self._looks:
            remove()
        self._looks = []
        if counter is not None:
            leave(counter)
            spent = counter.parts - self._start
            self._spent += spent
            keys |= spent.keys()
            count_backward(output, counter)
        found = dict(self._sizes.end(keys))
        if output is not None:  # else it has failed
            add(self._now, found)
            if self._changed:
                self._take_off()
                self._changed = False


def _owners(
    model: nn.Module, components: Sequence[Component], sizes: Sizes
) -> tuple[dict[nn.Module, dict[str, int]], dict[str, str]]:
    """The modules that hold measured tensors -> component name -> elements; and the kind of layer of each component."""
    names = {parameter: component.name for component in components for parameter in component.measured}
    owners: dict[nn.Module, dict[str, int]] = {}
    home: dict[str, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in names:
                name, shares = names[parameter], owners.setdefault(module, {})
                shares[name] = shares.get(name, 0) + parameter.numel()
                home.setdefault(name, sizes.kinds.get(module, ""))
    return owners, home


def _likeness(kind: str, flops: Mapping[str, int], key: str) -> tuple[int, int]:
    """How near a layer is to others of `kind`: by its path, then by what it computes."""
    return len(os.path.commonprefix([kind, key])), flops[key]  # noqa: RUF071, any common beginning is meant
