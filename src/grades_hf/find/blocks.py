"""The repeated blocks of a model, and what single modules are.

A *block* is a member of a list of modules that holds matrices together with attention or a norm. Where such a list
holds stages (Swin), their blocks count; where one list among siblings holds attention, the others (Qwen3-VL's mergers)
are no blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters import is_adapter_layer
from .labels import ATTENTION

# Path segments that wrappers put between a module and the path that its user knows.
_WRAPPER_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")
_BARE_ATTENTION = re.compile(r"(attn|attention)$", re.IGNORECASE)  # the end of a class's name
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def sequential_blocks(root: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Path and members of each list of blocks that run one after the other."""
    return [(part.path, part.blocks) for part in block_lists(root) if not part.parallel]


def plain_path(path: str) -> str:
    """`path` without the segments that wrappers put between a module and the path that its user knows."""
    return _WRAPPER_SEGMENTS.sub("", path).rstrip(".")


@dataclass(frozen=True)
class BlockList:
    """A list of repeated blocks; `parallel` where each of several lists holds one part of them (XLM)."""

    path: str
    blocks: list[nn.Module]
    parallel: bool = False


def block_lists(root: nn.Module) -> list[BlockList]:
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
            yield BlockList(join_path(path, name), [peel(member) for member in child.children()], parallel=True)
        else:
            yield from _search(child, join_path(path, name))


def _blocks_of(container: nn.Module) -> list[nn.Module]:
    """The blocks in a list of modules; none where it is no such list."""
    if not isinstance(container, _CONTAINERS):
        return []
    blocks = [block for block in map(peel, container.children()) if _is_block(block)]
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
        return _blocks_of(stage) if all(_is_block(peel(member)) for member in stage.children()) else []
    found = [
        block
        for part in _search(stage, "")
        if len(set(map(type, part.blocks))) == 1 and not part.parallel
        for block in part.blocks
    ]
    covered = {id(module) for block in found for module in block.modules()}
    outside = ((name, module) for name, module in stage.named_modules() if id(module) not in covered and name)
    return [] if any(is_attention(name, module) for name, module in outside) else found


def _is_block(module: nn.Module) -> bool:
    """A block holds matrices, and attention or a norm: heads and experts made of linear layers only do not."""
    if is_linear(module) or is_adapter_layer(module):
        return False
    norm = any(_is_norm_like(part) for part in module.modules() if part is not module)
    return _has_matrix(module) and (norm or _has_attention(module))


def _has_matrix(module: nn.Module) -> bool:
    return any(is_linear(part) or is_adapter_layer(part) or is_bare(part) for part in module.modules())


def _has_attention(module: nn.Module) -> bool:
    return any(is_attention(name, inner) for name, inner in module.named_modules())


def is_attention(path: str, module: nn.Module) -> bool:
    return bool(ATTENTION.search(type(module).__name__) or ATTENTION.search(path.rpartition(".")[2]))


def _is_norm_like(module: nn.Module) -> bool:
    """A norm, also one of unknown class: a leaf with vectors only."""
    own = list(module.parameters(recurse=False))
    only_vectors = bool(own) and all(tensor.ndim == 1 for tensor in own) and not list(module.children())
    return layer_kind(module) == "norm" or only_vectors


def is_bare(module: nn.Module) -> bool:
    own = module.parameters(recurse=False)
    return layer_kind(module) is None and any(tensor.ndim in (2, 3) for tensor in own)


def peel(module: nn.Module) -> nn.Module:
    """The module inside a per-block wrapper (regional compile, activation checkpointing)."""
    while (inner := getattr(module, "_orig_mod", getattr(module, "_checkpoint_wrapped_module", None))) is not None:
        module = inner
    return module


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


def layer_kind(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return None


def join_path(path: str, name: str) -> str:
    return plain_path(f"{path}.{name}" if path else name)
