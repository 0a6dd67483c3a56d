"""The frozen prefix: where the lowest blocks are all frozen, what else is trained there freezes too, and backward ends.

A frozen matrix saves its own weight gradient, a third of its share of a step; the gradient of the activations still
flows through it to whatever is trained below. When nothing is, autograd leaves that out too, another third. What keeps
something alive down there are norms, biases and embeddings, and the hook that makes the embeddings' output require a
gradient (PEFT, gradient checkpointing).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..contracts import Extension, Run, Trait
from ..find.blocks import plain_path, sequential_blocks
from ..find.components import Component, matches, unwrap
from ..find.structure import Site
from ..hooks import hook

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Tower:
    """One sequence of blocks; the first `cut` of them are behind the point at which backward ends."""

    path: str
    blocks: list[nn.Module]
    cut: int = 0
    hooks: list[Callable[[], None]] = field(default_factory=list)

    @property
    def home(self) -> str:
        """Path of the module that the sequence belongs to, e.g. `model` for `model.layers`."""
        return self.path.rpartition(".")[0]


class Prefix(Extension):
    """Freezes what is left of the lowest blocks once all their components are frozen, and cuts backward off there.

    What freezes: everything trained in these blocks and everything that runs before them, embeddings included. A tied
    embedding is the LM head as well: both freeze. Nothing freezes that the user has taken out of GradES's hands
    (`exclude_modules`, matrices that `target_modules` leaves out): the prefix ends there. Where several towers run one
    after the other (vision, then language), a later one can be cut off only when the earlier ones are frozen.

    What runs before what is recorded in the first forward pass. The cut is exact: nothing that is trained lies below,
    so every tensor that enters these blocks may be detached.

    Args:
        left_out: Every place with parameters that is no component, and why, as `survey` gives it.

    Attributes:
        frozen: Name of each parameter that was frozen with the prefix -> step.

    Raises:
        ValueError: the model has no sequence of blocks, or activates gradient checkpointing outside of them.
    """

    name = "prefix"
    refuses = {
        Trait.SHARDED: "freeze_prefix=True does not work with sharded parameters (FSDP2). Leave it out, or train with "
        "DDP.",
    }

    def __init__(self, left_out: Iterable[tuple[Site, str]]) -> None:
        self._left_out = left_out

    def attach(self, run: Run, undo: ExitStack) -> None:
        self.root = unwrap(run.model)
        self._run = run
        self.components = run.components
        self.freezer = run.freezer
        self.frozen: dict[str, int] = {}
        self.towers = [Tower(path, blocks) for path, blocks in sequential_blocks(self.root)]
        if not self.towers:
            raise ValueError(
                "freeze_prefix=True needs a model whose blocks run one after the other, and this one has no such list. "
                "Leave freeze_prefix out."
            )
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.root.modules())
        if checkpointing and not all(hasattr(b, "gradient_checkpointing") for t in self.towers for b in t.blocks):
            raise ValueError(
                f"freeze_prefix=True does not work with the gradient checkpointing of {type(self.root).__name__}, "
                "which is not made of transformers' GradientCheckpointingLayer. Leave one of the two out."
            )
        self._unchecked: list[nn.Module] = []  # blocks whose checkpointing is switched off
        exclude = run.config.exclude_modules
        # What the user has left out, and not the rule of what a component is.
        self._kept = {
            tensor
            for site, reason in self._left_out
            if reason != "not trainable"
            and ((site.kind == "matrix" and site.block is not None) or (exclude and matches(site.name, exclude)))
            for tensor in (*site.weights, *site.biases)
        }
        self._left_out = ()
        self._hook = functools.partial(hook, traced=Trait.COMPILED in run.traits)
        self._first: dict[nn.Module, int] = {}  # module -> its place in the order of the first forward pass
        undo.callback(self._close)
        self._recorders = [self._hook(module, "forward_pre", self._record) for module in self.root.modules()]

    def on_freeze(self, components: Sequence[Component], values: Tensor) -> None:
        self.update(self._run.t)

    def update(self, step: int) -> None:
        """Freeze what now can be frozen; call after components were frozen at optimizer step `step`."""
        self._stop_recording()
        places = self._places()
        ran = {id(t): [self._first[block] for block in t.blocks if block in self._first] for t in self.towers}
        tracked = {p for component in self.components for p in component.parameters}
        stop = tracked | self._kept
        for tower in self.towers:
            if not ran[id(tower)]:
                continue
            done = next(
                (i for i, block in enumerate(tower.blocks) if self._live(block.parameters()) & stop), len(tower.blocks)
            )
            if done <= tower.cut or not tracked & {p for block in tower.blocks[:done] for p in block.parameters()}:
                continue
            above = [self._first[block] for block in tower.blocks[done:] if block in self._first]
            end = min(above, default=max(ran[id(tower)]))
            earlier = [t for t in self.towers if ran[id(t)] and min(ran[id(t)]) < min(ran[id(tower)])]
            below: set[Tensor] = {p for block in tower.blocks[:done] for p in block.parameters()}
            below |= {p for other in earlier for block in other.blocks for p in block.parameters()}
            below |= {p for p, (place, home) in places.items() if place < end and home in (None, tower, *earlier)}
            rest = self._live(below)
            if rest & stop:
                continue
            names = [name for name, p in self._named() if p in rest]
            self.freezer.freeze(rest)
            self.frozen |= dict.fromkeys(names, step)
            tower.cut = done
            logger.info(
                "GradES step %d: the lowest %d of %d blocks%s are frozen with all that they hold%s; backward ends "
                "above them.",
                step,
                done,
                len(tower.blocks),
                f" of {tower.path}" if len(self.towers) > 1 else "",
                f" ({len(names)} other tensors)" if names else "",
            )

    def on_grad_pattern(self) -> None:
        """Make backward end above the frozen blocks; what was frozen must not require a gradient any more."""
        for tower in self.towers:
            if not tower.cut:
                continue
            self._undo(tower)
            tower.hooks.append(self._hook(tower.blocks[0], "forward_pre", self._detach_inputs, with_kwargs=True))
            for block in tower.blocks[: tower.cut]:
                if getattr(block, "gradient_checkpointing", False):  # nothing is recomputed where nothing flows back
                    block.gradient_checkpointing = False  # type: ignore[assignment]
                    self._unchecked.append(block)
            if tower.cut < len(tower.blocks) and _reentrant(tower.blocks[tower.cut]):
                tower.hooks.append(self._hook(tower.blocks[tower.cut - 1], "forward", self._require_gradient))

    def state_dict(self) -> dict[str, Any]:
        """JSON types: what was frozen with the prefix, and how many blocks of each tower are cut off."""
        return {"frozen": dict(self.frozen), "cut": {tower.path: tower.cut for tower in self.towers if tower.cut}}

    def check(self, state: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
        frozen = {str(name): int(step) for name, step in state["frozen"].items()}
        cut = {str(path): int(blocks) for path, blocks in state["cut"].items()}
        towers = {tower.path: len(tower.blocks) for tower in self.towers}
        unknown = [*(frozen.keys() - dict(self._named()).keys()), *(cut.keys() - towers.keys())]
        if unknown:
            raise ValueError(f"the checkpoint's frozen prefix has {unknown[0]!r}, which the model does not have.")
        for path, blocks in cut.items():
            if not 1 <= blocks <= towers[path]:
                raise ValueError(f"the checkpoint cuts off {blocks} of the {towers[path]} blocks of {path}.")
        return frozen, cut

    def load(self, checked: tuple[dict[str, int], dict[str, int]]) -> None:
        self.frozen, cut = checked
        parameters = dict(self._named())
        self.freezer.freeze([parameters[name] for name in self.frozen])
        for tower in self.towers:
            tower.cut = cut.get(tower.path, 0)

    def _close(self) -> None:
        """The run is over: hooks go, checkpointing is as before."""
        self._stop_recording()
        for tower in self.towers:
            self._undo(tower)
            tower.blocks = []
        self.root, self._first, self._kept = nn.Module(), {}, set()

    # --- parts -----------------------------------------------------------------------------------------------------

    def _record(self, module: nn.Module, inputs: Any) -> None:
        self._first.setdefault(module, len(self._first))

    def _detach_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def _require_gradient(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Reentrant checkpointing of the next block finds its parameters only if an input requires a gradient."""
        if isinstance(output, Tensor):
            return output.detach().requires_grad_(True)
        return type(output)([output[0].detach().requires_grad_(True), *output[1:]])

    def _stop_recording(self) -> None:
        for remove in self._recorders:
            remove()
        self._recorders.clear()

    def _undo(self, tower: Tower) -> None:
        for remove in tower.hooks:
            remove()
        tower.hooks.clear()
        for block in tower.blocks:
            if block in self._unchecked:
                block.gradient_checkpointing = True  # type: ignore[assignment]
        self._unchecked = [block for block in self._unchecked if block not in tower.blocks]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return ((plain_path(name), p) for name, p in self.root.named_parameters())

    def _live(self, parameters: Iterable[Tensor]) -> set[Tensor]:
        return {p for p in parameters if p.requires_grad and p not in self.freezer}

    def _places(self) -> dict[Tensor, tuple[int, Tower | None]]:
        """Of each parameter outside the blocks: its place in the order of execution, and the tower it belongs to."""
        inside = {p for tower in self.towers for block in tower.blocks for p in block.parameters()}
        places: dict[Tensor, tuple[int, Tower | None]] = {}
        ran = {"": 0}  # a module that is never called runs with the one that holds it
        for name, module in self.root.named_modules(remove_duplicate=False):
            ran[name] = self._first.get(module, ran[name.rpartition(".")[0]])
            homes = [t for t in self.towers if f"{name}.".startswith(f"{t.home}." if t.home else "")]
            home = max(homes, key=lambda tower: len(tower.home), default=None)
            for p in module.parameters(recurse=False):
                if p not in inside and (p not in places or ran[name] < places[p][0]):
                    places[p] = ran[name], home
        return places


def _reentrant(block: nn.Module) -> bool:
    """Whether a block is recomputed by the reentrant kind of checkpointing."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    return bool(getattr(block, "gradient_checkpointing", False)) and getattr(function, "keywords", {}).get(
        "use_reentrant", True
    )
