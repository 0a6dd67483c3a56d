"""The structure of a model: every place in it that holds parameters.

Nothing here knows a model by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from .adapters import is_adapter_layer, is_saved_copy
from .blocks import BlockList, block_lists, is_linear, join_path, layer_kind, linear_shape
from .labels import ATTENTION, tower_labels

_ROUTER = re.compile("router", re.IGNORECASE)

Path = tuple[tuple[str, str], ...]
Block = tuple[int, int]


@dataclass(eq=False)
class Site:
    """A place in the model that holds parameters, before it is decided whether it is a component.

    Attributes:
        name: Module path in the unwrapped model without PEFT's prefix; for a bare parameter with its own name added.
        kind: `"matrix"`, or why it is none: `"embedding"`, `"norm"`, `"convolution"`, `"vector"`, `"router"`,
            `"parameter"` (a bare tensor that multiplies no hidden states), `"head"` (the output embedding).
        weights, biases: Its tensors.
        path: (attribute name, class name) of the modules from the block (exclusive) to the owner (inclusive).
        block: (number of its list of blocks, index in that list); None outside the repeated blocks.
        shape: (output features, input features); None where that is not what it has.
        linear: Whether it is a linear layer, or the adapter of one.
        adapter: Whether these are tensors that PEFT added to a layer.
        saved: Whether it lies in one of PEFT's `modules_to_save` copies.
        expert: Whether it is a mixture's expert, or all of them.
        tower: Label of the tower that its block lies in; None where the model has one only.
    """

    name: str
    kind: str
    weights: list[Tensor]
    biases: list[Tensor]
    path: Path
    block: Block | None
    shape: tuple[int, int] | None = None
    linear: bool = False
    adapter: bool = False
    saved: bool = False
    expert: bool = False
    tower: str | None = None

    @property
    def trainable(self) -> bool:
        return any(tensor.requires_grad for tensor in self.weights)

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases))


def find_sites(root: nn.Module) -> list[Site]:
    """Every place in the model with parameters, in the order of its modules."""
    lists = block_lists(root)
    walk = _Walk(root, lists)
    sites = list(walk.visit(root, "", (), None))
    towers = tower_labels([part.path for part in lists])
    by_block: dict[Block, list[Site]] = {}
    for site in sites:
        if site.block is not None:
            site.tower = towers[site.block[0]]
            by_block.setdefault(site.block, []).append(site)
    for members in by_block.values():
        _judge_bare_parameters(members)
        _mark_experts_and_routers(members, walk.lists)
    for site in sites:
        if site.kind == "bare":
            site.kind = "parameter"
        elif site.kind == "matrix" and site.shape is not None and 1 in site.shape:
            site.kind = "vector"
    return sites


# --- from modules to sites ---------------------------------------------------------------------------------------


class _Walk:
    """One pass over the module tree that turns parameters into sites, through PEFT's wrappers."""

    def __init__(self, root: nn.Module, lists: list[BlockList]) -> None:
        self.blocks = {
            id(block): (number, index) for number, part in enumerate(lists) for index, block in enumerate(part.blocks)
        }
        self.parallel = {id(block) for part in lists if part.parallel for block in part.blocks}
        output = getattr(root, "get_output_embeddings", lambda: None)()
        self.head = None if output is None else id(output)
        self.lists: dict[str, int] = {}  # path of a list of alike modules inside a block -> its length
        self.seen: set[int] = set()

    def visit(self, module: nn.Module, name: str, path: Path, block: Block | None) -> Iterator[Site]:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if id(module) in self.blocks:
            block = self.blocks[id(module)]
            path = (path[-1],) if id(module) in self.parallel else ()
        elif name:
            path = (*path, (name.rpartition(".")[2], type(module).__name__))

        if is_saved_copy(module):  # PEFT's modules_to_save: copies under the original's name
            copies = getattr(module, "modules_to_save", None)
            for copy in copies.values() if copies else module.children():
                for site in self.visit(copy, name, path[:-1], block):
                    site.saved = True
                    yield site
        elif is_adapter_layer(module):
            layer: Any = module
            while is_adapter_layer(layer):  # nested where several parameters of one module are adapted
                yield self._adapter(layer, name, path, block)
                layer = cast(Any, layer).base_layer
            yield from self.visit(layer, name, path[:-1], block)
        elif is_linear(module):
            yield self._linear(module, name, path, block)
        else:
            members = list(map(type, module.children())) if isinstance(module, (nn.ModuleList, nn.ModuleDict)) else []
            if block is not None and len(members) > 1 and len(set(members)) == 1:
                self.lists[name] = len(members)
            yield from self._own(module, name, path, block)
            for child_name, child in module.named_children():
                yield from self.visit(child, join_path(name, child_name), path, block)

    def _adapter(self, module: Any, name: str, path: Path, block: Block | None) -> Site:
        """All that one PEFT layer adds to its base layer."""
        base = module.get_base_layer()
        inside = {id(tensor) for tensor in module.base_layer.parameters()}
        tensors = [tensor for tensor in module.parameters() if id(tensor) not in inside]
        parameter = getattr(module, "parameter_name", None)  # LoRA on a bare parameter (target_parameters)
        linear = parameter is None and is_linear(base)
        shape = linear_shape(base) if linear else None
        if parameter is not None and (bare := getattr(base, parameter)).ndim == 2:
            shape = tuple(bare.shape)
        return Site(
            name=name if parameter is None or parameter == "weight" else join_path(name, parameter),
            kind="head" if id(base) == self.head else layer_kind(base) or "matrix",
            weights=tensors,
            biases=[],
            path=path,
            block=block,
            shape=shape,
            linear=linear,
            adapter=True,
        )

    def _linear(self, module: nn.Module, name: str, path: Path, block: Block | None) -> Site:
        own = dict(module.named_parameters())  # with those of a parametrization (weight norm)
        return Site(
            name=name,
            kind="head" if id(module) == self.head else "matrix",
            weights=[tensor for key, tensor in own.items() if not key.endswith("bias")],
            biases=[tensor for key, tensor in own.items() if key.endswith("bias")],
            path=path,
            block=block,
            shape=linear_shape(module),
            linear=True,
        )

    def _own(self, module: nn.Module, name: str, path: Path, block: Block | None) -> Iterator[Site]:
        """The parameters that `module` itself holds: a norm, an embedding, ..., or bare parameters one by one."""
        own = dict(module.named_parameters(recurse=False))
        kind = "head" if id(module) == self.head else layer_kind(module)
        if own and kind:
            yield Site(name, kind, list(own.values()), [], path, block)
            return
        biases = {key: tensor for key, tensor in own.items() if key.endswith("bias")}
        for key, tensor in own.items():
            if key.endswith("bias"):
                continue
            stem = key.removesuffix("weight").rstrip("_")
            bias = biases.pop(f"{stem}_bias" if stem else "bias", None)
            bare = "matrix" if isinstance(module, nn.MultiheadAttention) and key.endswith("proj_weight") else "bare"
            yield Site(
                name=name if key == "weight" else join_path(name, key),
                kind=bare if tensor.ndim in (2, 3) else "vector" if tensor.ndim < 2 else "parameter",
                weights=[tensor],
                biases=[] if bias is None else [bias],
                path=path if key == "weight" else (*path, (key, "Parameter")),
                block=block,
                shape=(tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else None,
            )
        for key, tensor in biases.items():
            yield Site(join_path(name, key), "vector", [tensor], [], path, block)


# --- what only the block as a whole tells ------------------------------------------------------------------------


def _judge_bare_parameters(members: list[Site]) -> None:
    """A bare parameter of a block is a matrix if it spans the block's width.

    With two dimensions: one is the width, the other at least as large (DBRX's experts; not a state-space model's
    `A_log`). With three: one is the width and the others together are as large (fused experts, XLNet's projections),
    or it is square and block-diagonal over the width (RecurrentGemma's gates).
    """
    inputs = Counter(site.shape[1] for site in members if site.linear and site.shape is not None)
    norms = [tensor.numel() for site in members if site.kind == "norm" for tensor in site.weights]
    main = {inputs.most_common(1)[0][0]} if inputs else set(norms[:1])
    for site in members:
        if site.kind != "bare":
            continue
        shape = site.weights[0].shape
        widths = {width for width in (main if len(shape) == 2 else main | set(norms)) if width > 1}
        spans = any(width in shape and shape.numel() >= width**2 for width in widths)
        diagonal = len(shape) == 3 and shape[1] == shape[2] and shape[0] * shape[1] in widths
        site.kind = "matrix" if spans or diagonal else "parameter"
        site.expert = spans and len(shape) == 3 and not _names(site, ATTENTION)


def _mark_experts_and_routers(members: list[Site], lists: dict[str, int]) -> None:
    """Experts are fused tensors `[E, ., .]` or a list of E alike modules; a router stands beside them with E rows.

    What is called a router is one in any case, and what lies in a module called `experts` is an expert.
    """
    holders: dict[str, tuple[int, bool]] = {}  # path of the module that holds experts -> E, whether that is certain
    for site in members:
        if site.expert:
            holder = site.name if site.path[-1][1] != "Parameter" else site.name.rpartition(".")[0]
            holders[holder] = site.weights[0].shape[0], True
        for path, number in lists.items():
            if site.name.startswith(path + "."):
                holders.setdefault(path, (number, "expert" in path.rpartition(".")[2].lower()))
    matrices = [site for site in members if site.kind in ("matrix", "parameter")]
    for holder, (number, certain) in holders.items():
        beside = holder.rpartition(".")[0] + "."
        branches: dict[str, dict[str, list[Site]]] = {}
        for site in matrices:
            if site.name.startswith(beside) and not f"{site.name}.".startswith(f"{holder}."):
                branch = site.name[len(beside) :].partition(".")[0]
                branches.setdefault(branch, {}).setdefault(site.name, []).append(site)
        # A shared expert may have E rows too, but it is never alone.
        alone = [next(iter(branch.values())) for branch in branches.values() if len(branch) == 1]
        routers = [site for sites in alone for site in sites if site.shape is not None and site.shape[0] == number]
        for site in routers:
            site.kind = "router"
        for site in members:
            if (routers or certain) and f"{site.name}.".startswith(f"{holder}."):
                site.expert = True
    for site in matrices:
        if site.kind == "matrix" and _names(site, _ROUTER):
            site.kind = "router"
        elif "experts" in (attribute for attribute, _ in site.path):
            site.expert = True


def _names(site: Site, words: re.Pattern[str]) -> bool:
    """Whether an attribute or class on the way from the block to the site is called by one of the words."""
    return any(words.search(part) for segment in site.path for part in segment)
