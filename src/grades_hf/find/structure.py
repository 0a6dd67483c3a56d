"""The structure of a model: its repeated blocks, and every place in it that holds parameters.

Nothing here knows a model by name. A *block* is a member of a list of modules that holds matrices together with
attention or a norm. Where such a list holds stages (Swin), their blocks count; where one list among siblings holds
attention, the others (Qwen3-VL's mergers) are no blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adapters import is_adapter_layer, is_saved_copy
from .labels import ATTENTION, tower_labels

# Path segments that wrappers put between a module and the path that its user knows.
_WRAPPER_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")
_ROUTER = re.compile("router", re.IGNORECASE)
_BARE_ATTENTION = re.compile(r"(attn|attention)$", re.IGNORECASE)  # the end of a class's name
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

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
    block_lists = _block_lists(root)
    walk = _Walk(root, block_lists)
    sites = list(walk.visit(root, "", (), None))
    towers = tower_labels([part.path for part in block_lists])
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


def sequential_blocks(root: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Path and members of each list of blocks that run one after the other."""
    return [(part.path, part.blocks) for part in _block_lists(root) if not part.parallel]


def plain_path(path: str) -> str:
    """`path` without the segments that wrappers put between a module and the path that its user knows."""
    return _WRAPPER_SEGMENTS.sub("", path).rstrip(".")


# --- blocks ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockList:
    """A list of repeated blocks; `parallel` where each of several lists holds one part of them (XLM)."""

    path: str
    blocks: list[nn.Module]
    parallel: bool = False


def _block_lists(root: nn.Module) -> list[BlockList]:
    found = list(_search(root, ""))
    with_attention = [part for part in found if any(map(_has_attention, part.blocks))]
    parents = {part.path.rpartition(".")[0] for part in with_attention}
    return [
        part for part in found if part in with_attention or part.parallel or part.path.rpartition(".")[0] not in parents
    ]


def _search(module: nn.Module, path: str) -> Iterator[BlockList]:
    blocks = _blocks_of(module)
    if blocks:
        yield BlockList(path, blocks)
        return
    lists = {name: child for name, child in module.named_children() if isinstance(child, nn.ModuleList)}
    # XLM keeps `attentions` and `ffns` apart: what lies beside a list of bare attention, and is as long, is part of
    # the same blocks.
    lengths = {len(part) for part in lists.values() if any(_BARE_ATTENTION.search(type(m).__name__) for m in part)}
    for name, child in module.named_children():
        if name in lists and len(lists[name]) in lengths and all(map(_has_matrix, child.children())):
            yield BlockList(_join(path, name), [_peel(member) for member in child.children()], parallel=True)
        else:
            yield from _search(child, _join(path, name))


def _blocks_of(container: nn.Module) -> list[nn.Module]:
    """The blocks in a list of modules; none where it is no such list."""
    if not isinstance(container, _CONTAINERS):
        return []
    blocks = [block for block in map(_peel, container.children()) if _is_block(block)]
    if not isinstance(container, nn.ModuleList):  # a dict or a sequence of unlike modules is no repetition
        repeats = Counter(map(type, blocks))
        blocks = [block for block in blocks if repeats[type(block)] > 1 or _has_attention(block)]
    stages = [_inner_blocks(block) for block in blocks]
    inner = [block for stage in stages for block in stage]
    if all(stages) and (len(inner) > len(stages) or all(map(_has_attention, inner))):
        return [] if isinstance(container, nn.ModuleDict) else inner  # a dict holds parts, not stages
    return blocks


def _inner_blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage (Swin's); none where the module is a block itself, with attention outside such lists."""
    if isinstance(stage, _CONTAINERS):
        return _blocks_of(stage) if all(_is_block(_peel(member)) for member in stage.children()) else []
    found = [
        block
        for part in _search(stage, "")
        if len(set(map(type, part.blocks))) == 1 and not part.parallel
        for block in part.blocks
    ]
    covered = {id(module) for block in found for module in block.modules()}
    outside = ((name, module) for name, module in stage.named_modules() if id(module) not in covered and name)
    return [] if any(_is_attention(name, module) for name, module in outside) else found


def _is_block(module: nn.Module) -> bool:
    """A block holds matrices, and attention or a norm: heads and experts made of linear layers only do not."""
    if is_linear(module) or is_adapter_layer(module):
        return False
    norm = any(_is_norm_like(part) for part in module.modules() if part is not module)
    return _has_matrix(module) and (norm or _has_attention(module))


def _has_matrix(module: nn.Module) -> bool:
    return any(is_linear(part) or is_adapter_layer(part) or _bare(part) for part in module.modules())


def _has_attention(module: nn.Module) -> bool:
    return any(_is_attention(name, inner) for name, inner in module.named_modules())


def _is_attention(path: str, module: nn.Module) -> bool:
    return bool(ATTENTION.search(type(module).__name__) or ATTENTION.search(path.rpartition(".")[2]))


def _is_norm_like(module: nn.Module) -> bool:
    """A norm, also one of unknown class: a leaf with vectors only."""
    own = list(module.parameters(recurse=False))
    only_vectors = bool(own) and all(tensor.ndim == 1 for tensor in own) and not list(module.children())
    return _layer_kind(module) == "norm" or only_vectors


def _bare(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return _layer_kind(module) is None and any(tensor.ndim in (2, 3) for tensor in own)


def _peel(module: nn.Module) -> nn.Module:
    """The module inside a per-block wrapper (regional compile, activation checkpointing)."""
    while (inner := getattr(module, "_orig_mod", getattr(module, "_checkpoint_wrapped_module", None))) is not None:
        module = inner
    return module


# --- from modules to sites ---------------------------------------------------------------------------------------


class _Walk:
    """One pass over the module tree that turns parameters into sites, through PEFT's wrappers."""

    def __init__(self, root: nn.Module, block_lists: list[BlockList]) -> None:
        self.blocks = {
            id(block): (number, index)
            for number, part in enumerate(block_lists)
            for index, block in enumerate(part.blocks)
        }
        self.parallel = {id(block) for part in block_lists if part.parallel for block in part.blocks}
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
                yield from self.visit(child, _join(name, child_name), path, block)

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
            name=name if parameter is None or parameter == "weight" else _join(name, parameter),
            kind="head" if id(base) == self.head else _layer_kind(base) or "matrix",
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
        kind = "head" if id(module) == self.head else _layer_kind(module)
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
                name=name if key == "weight" else _join(name, key),
                kind=bare if tensor.ndim in (2, 3) else "vector" if tensor.ndim < 2 else "parameter",
                weights=[tensor],
                biases=[] if bias is None else [bias],
                path=path if key == "weight" else (*path, (key, "Parameter")),
                block=block,
                shape=(tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else None,
            )
        for key, tensor in biases.items():
            yield Site(_join(name, key), "vector", [tensor], [], path, block)


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies hidden states by one 2-d weight: `nn.Linear` and its kin, quantized ones too."""
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    return "Linear" in type(module).__name__ and hasattr(module, "in_features") and hasattr(module, "out_features")


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(output features, input features) of a linear layer."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _layer_kind(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return None


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


def _join(path: str, name: str) -> str:
    return plain_path(f"{path}.{name}" if path else name)
