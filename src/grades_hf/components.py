"""find_components: every attention and feed-forward matrix of a model, found by structure.

The rule: inside the model's repeated blocks, every weight that multiplies hidden states is a component. That is every
linear layer (`nn.Linear`, GPT-2's `Conv1D`, a quantized linear through its adapter), the packed projection of
`nn.MultiheadAttention`, every layer that PEFT adapted, and every bare parameter of 2 or 3 dimensions of which one is
the block's width and the rest are at least as large (fused experts). Left out are norms, embeddings, convolutions,
routers (weights with one row per expert), weights with a single row or column, and all that lies outside the blocks:
LM and classification heads, poolers, projectors between towers.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peft import PeftMixedModel, PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .config import GradESConfig
from .labels import ATTENTION, group_of, projection_of, refine_projections, tower_labels

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
# Path segments that wrappers put between a module and the path that its user knows.
_WRAPPER_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?:\.|$)")


@dataclass(eq=False)
class Component:
    """What freezes as one: a weight matrix with its bias, or the trainable tensors of one adapted layer.

    Attributes:
        name: Module path in the unwrapped model without PEFT's prefix, e.g. `model.layers.0.self_attn.q_proj`; for a
            bare parameter the path of its module and its own name, e.g. `model.layers.0.mlp.experts.gate_up_proj`.
        group: `"attention"`, `"mlp"`, `"experts"`, `"mixer"` (other token mixers) or `"other"` (outside the blocks).
        projection: `"q"`, `"k"`, `"v"`, `"o"`, `"qkv"`, `"gate"`, `"up"`, `"gate_up"`, `"down"`, or the module's name.
        layer: Index of the block that it lies in; None outside the blocks.
        tower: `"vision"`, `"language"`, `"audio"`, `"encoder"`, `"decoder"` or the tower's own name where a model has
            several; else None.
        parameters: All tensors that freeze, biases included.
        measured: The tensors that the statistic is taken over: `parameters` without biases of full weights.
        adapter: Whether these are the tensors of a PEFT adapter.
        tau: The threshold that holds for it; set by the engine.
        monitor: The name of its statistic; set by the engine.
        frozen_at: The optimizer step (1-based) that it froze at, or None.
    """

    name: str
    group: str
    projection: str
    layer: int | None
    tower: str | None
    parameters: tuple[Tensor, ...]
    measured: tuple[Tensor, ...]
    adapter: bool
    tau: float = float("nan")
    monitor: str = ""
    frozen_at: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(parameter.numel() for parameter in self.parameters)

    def __repr__(self) -> str:
        return f"Component({self.name!r}, layer={self.layer}, group={self.group!r}, frozen_at={self.frozen_at})"


@dataclass(eq=False)
class Site:
    """A place in the model that holds parameters, before it is decided whether it is a component.

    Attributes:
        name: As in `Component.name`.
        kind: `"matrix"`, or why it is none: `"embedding"`, `"norm"`, `"convolution"`, `"vector"`, `"router"`,
            `"parameter"` (a bare tensor that multiplies nothing), `"head"` (the output embedding).
        shape: (output features, input features); None where that is not what it has.
        weights, biases: Its tensors.
        path: (attribute name, class name) of the modules from the block (exclusive) to the owner (inclusive).
        block: (number of its block list, index in that list); None outside the repeated blocks.
        adapter: Whether these are tensors that PEFT added to a layer.
        saved: Whether it lies in one of PEFT's `modules_to_save` copies.
        experts: Path of the module that holds the experts, where it is one of a mixture's experts.
        tower: As in `Component.tower`.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    weights: list[Tensor]
    biases: list[Tensor]
    path: tuple[tuple[str, str], ...]
    block: tuple[int, int] | None
    adapter: bool = False
    saved: bool = False
    experts: str | None = None
    tower: str | None = None

    @property
    def trainable(self) -> bool:
        return any(tensor.requires_grad for tensor in self.weights)

    @property
    def numel(self) -> int:
        return sum(tensor.numel() for tensor in (*self.weights, *self.biases))


def find_components(model: nn.Module, config: GradESConfig | None = None) -> list[Component]:
    """The components of `model`, in the order of its modules.

    Args:
        model: A model, wrapped (PEFT, compiled, data parallel) or not. Only what requires a gradient now is found.
        config: `target_modules` and `exclude_modules` are used; default: none of either.

    Returns:
        At least one component; tensors that several modules share belong to the first of them.

    Raises:
        ValueError: nothing is trainable, nothing is found, a name in `target_modules` matches nothing, or the model
            carries an adapter that cannot be frozen in part (AdaLoRA).
    """
    return survey(model, config)[0]


def survey(
    model: nn.Module, config: GradESConfig | None = None, *, require: bool = True
) -> tuple[list[Component], list[tuple[Site, str]]]:
    """Components as in `find_components`, and every other place with parameters together with why it is left out.

    With `require=False` an empty list of components is no error (`grades-hf inspect` prints the reasons itself).
    """
    target = config.target_modules if config is not None else None
    exclude = config.exclude_modules if config is not None else None
    root = unwrap(model)
    for module in root.modules():
        if isinstance(module, AdaLoraLayer):
            raise ValueError(
                "GradES cannot work with AdaLoRA: its rank allocator needs the gradient of every adapter at every "
                "step, and a frozen adapter has none. Use LoraConfig instead of AdaLoraConfig."
            )
    if require and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no trainable parameter, so there is nothing that GradES could freeze.")

    sites = _find_sites(root)
    reasons = [_why_left_out(site, target, exclude) for site in sites]
    components = _make_components([site for site, reason in zip(sites, reasons, strict=True) if reason is None], sites)
    if require:
        _check_found(components, sites, target, exclude)
    tracked = {component.name for component in components}
    left_out = [
        (site, reason or "shares its tensors with another layer")
        for site, reason in zip(sites, reasons, strict=True)
        if site.name not in tracked
    ]
    return components, left_out


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel, compile and PEFT wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None and isinstance(model, (PeftModel, PeftMixedModel)):
            inner = model.get_base_model() if isinstance(model, PeftModel) else model.base_model.model
        if inner is None:
            return model
        model = inner


def matches(name: str, target: str | Iterable[str]) -> bool:
    """PEFT's rule: a list holds full names or name endings, a string is a regular expression for the full name."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in target)


# --- what is left out, and what becomes a component --------------------------------------------------------------


def _why_left_out(site: Site, target: list[str] | str | None, exclude: list[str] | str | None) -> str | None:
    """None for what is tracked, else the reason in a few words."""
    if target is None or target == ALL_LINEAR:
        if site.kind != "matrix" and not (target == ALL_LINEAR and site.kind == "router"):
            return _REASONS[site.kind]
        if target is None and site.block is None:
            return "outside the repeated blocks"
        if site.saved:
            return "in modules_to_save (name it in target_modules to track it)"
    elif not matches(site.name, target):
        return "not in target_modules"
    if exclude is not None and matches(site.name, exclude):
        return "in exclude_modules"
    if not site.trainable:
        return "not trainable"
    return None


_REASONS = {
    "embedding": "an embedding",
    "norm": "a norm",
    "convolution": "a convolution",
    "vector": "a vector",
    "router": "a router",
    "parameter": "a bare parameter that multiplies no hidden states",
    "head": "the output embedding (LM head)",
}


def _make_components(chosen: list[Site], sites: list[Site]) -> list[Component]:
    users = Counter(id(tensor) for site in chosen for tensor in site.weights)
    owner: dict[int, str] = {}  # tensor -> the component that it went to
    weights: dict[str, list[Tensor]] = {}
    biases: dict[str, list[Tensor]] = {}
    first: dict[str, Site] = {}
    for site in chosen:
        tensors = [tensor for tensor in site.weights if tensor.requires_grad]
        own = [tensor for tensor in tensors if users[id(tensor)] == 1]
        # A tensor that many adapted layers share (VB-LoRA's vector bank) freezes with none of them; a weight that is
        # nothing but shared (tied layers) belongs to the layer that comes first.
        name = site.name
        for tensor in own or tensors:
            name = owner.setdefault(id(tensor), site.name)
            if name == site.name:
                weights.setdefault(name, []).append(tensor)
        first.setdefault(name, site)
        biases.setdefault(name, []).extend(site.biases)
    for site in sites:  # PEFT's bias="all": the weight is fixed, the bias trains beside the adapter
        if site.name in weights and not site.trainable:
            biases[site.name].extend(site.biases)

    components = []
    for name, measured in weights.items():
        site = first[name]
        seen = {id(tensor) for tensor in measured}
        followers = [
            tensor
            for tensor in biases.get(name, ())
            if tensor.requires_grad and not (id(tensor) in seen or seen.add(id(tensor)))  # type: ignore[func-returns-value]
        ]
        group = group_of(site.path, name, inside=site.block is not None, expert=site.experts is not None)
        components.append(
            Component(
                name=name,
                group=group,
                projection=projection_of(site.path, name, group),
                layer=site.block[1] if site.block is not None else None,
                tower=site.tower,
                parameters=(*measured, *followers),
                measured=tuple(measured),
                adapter=site.adapter,
            )
        )
    shapes = {site.name: site.shape for site in sites if site.shape is not None}
    refine_projections(components, shapes)
    return components


def _check_found(
    components: list[Component], sites: list[Site], target: list[str] | str | None, exclude: list[str] | str | None
) -> None:
    if isinstance(exclude, list):
        for item in exclude:
            if not any(matches(site.name, [item]) for site in sites):
                logger.warning("GradES: exclude_modules names %r, which matches no module of the model.", item)
    if isinstance(target, list):
        for item in target:
            if components and not any(matches(site.name, [item]) for site in sites):
                logger.warning("GradES: target_modules names %r, which matches no module of the model.", item)
    if components:
        return
    trainable = [site.name for site in sites if site.trainable]
    some = ", ".join(trainable[:4]) + (", ..." if len(trainable) > 4 else "")
    if target is not None:
        raise ValueError(
            f"target_modules={target!r} matches no trainable module of the model. Names are module paths without "
            f"PEFT's prefix; a list holds names or name endings, a string is a regular expression for the whole name. "
            f"Trainable here: {some or 'nothing'}."
        )
    if not any(site.block is not None for site in sites):
        raise ValueError(
            "model has no repeated blocks (no list of layers that hold attention or norms), so GradES does not know "
            f"which matrices to track. Name them with target_modules. Trainable here: {some or 'nothing'}."
        )
    raise ValueError(
        "GradES found no trainable attention or feed-forward matrix in the model's repeated blocks. Make some "
        "trainable (full weights, or a PEFT adapter on linear layers; prompt tuning has none), or name what to track "
        f"with target_modules. Trainable here: {some or 'nothing'}."
    )


# --- from modules to sites ---------------------------------------------------------------------------------------


def _find_sites(root: nn.Module) -> list[Site]:
    """Every place in the model with parameters, in the order of its modules."""
    block_lists = list(_find_block_lists(root, ""))
    walk = _Walk(root, block_lists)
    sites = list(walk.visit(root, "", (), None))
    towers = tower_labels([path for path, _ in block_lists])
    by_block: dict[tuple[int, int], list[Site]] = {}
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


def _find_block_lists(module: nn.Module, path: str) -> Iterator[tuple[str, list[nn.Module]]]:
    """(path, blocks) of every list of repeated blocks; of stages that hold lists of blocks, the blocks."""
    for name, child in module.named_children():
        child_path = _join(path, name)
        blocks = _blocks_of(child)
        if blocks:
            yield child_path, blocks
        else:
            yield from _find_block_lists(child, child_path)


def _blocks_of(container: nn.Module) -> list[nn.Module]:
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return []
    blocks = [_peel(member) for member in container]
    alike = len({type(block) for block in blocks}) == 1
    if isinstance(container, nn.Sequential) and not (alike and len(blocks) > 1):
        return []
    blocks = [block for block in blocks if _is_block(block)]
    inner = [_inner_blocks(block) for block in blocks]
    return [block for stage in inner for block in stage] if blocks and all(inner) else blocks


def _inner_blocks(stage: nn.Module) -> list[nn.Module]:
    """The blocks of a stage (Swin's); none where the module is a block itself, with attention outside such lists."""
    found = [
        block
        for _, blocks in _find_block_lists(stage, "")
        if len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        for block in blocks
    ]
    covered = {id(module) for block in found for module in block.modules()}
    for name, module in stage.named_modules():
        if id(module) not in covered and module is not stage and _is_attention(name, module):
            return []
    return found


def _is_block(module: nn.Module) -> bool:
    """A block holds matrices, and attention or a norm: heads and expert lists of plain linear layers do not."""
    if is_linear(module) or isinstance(module, BaseTunerLayer):
        return False
    has_matrix = any(
        is_linear(inner) or isinstance(inner, nn.MultiheadAttention) or _bare_parameters(inner)
        for inner in module.modules()
    )
    return has_matrix and any(
        inner is not module and (_is_attention(name, inner) or _other_kind(inner) == "norm")
        for name, inner in module.named_modules()
    )


def _is_attention(path: str, module: nn.Module) -> bool:
    return bool(ATTENTION.search(type(module).__name__) or ATTENTION.search(path.rsplit(".", 1)[-1]))


def _bare_parameters(module: nn.Module) -> bool:
    return _other_kind(module) is None and any(
        tensor.ndim in (2, 3) for tensor in module.parameters(recurse=False)
    )


def _peel(module: nn.Module) -> nn.Module:
    """The module inside a per-block wrapper (regional compile, activation checkpointing)."""
    while (inner := getattr(module, "_orig_mod", getattr(module, "_checkpoint_wrapped_module", None))) is not None:
        module = inner
    return module


class _Walk:
    """One pass over the module tree that turns parameters into sites, through PEFT's wrappers."""

    def __init__(self, root: nn.Module, block_lists: list[tuple[str, list[nn.Module]]]) -> None:
        self.blocks = {
            id(block): (number, index)
            for number, (_, blocks) in enumerate(block_lists)
            for index, block in enumerate(blocks)
        }
        output = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
        self.head = id(output) if output is not None else None
        self.lists: dict[str, int] = {}  # path of a list of alike modules inside a block -> its length
        self.seen: set[int] = set()

    def visit(
        self, module: nn.Module, name: str, path: tuple[tuple[str, str], ...], block: tuple[int, int] | None
    ) -> Iterator[Site]:
        if id(module) in self.seen:
            return
        self.seen.add(id(module))
        if id(module) in self.blocks:
            block, path = self.blocks[id(module)], ()
        elif name:
            path = (*path, (name.rsplit(".", 1)[-1], type(module).__name__))

        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's modules_to_save: copies under the original's name
            copies = getattr(module, "modules_to_save", None)
            for copy in copies.values() if copies else module.children():
                for site in self.visit(copy, name, path[:-1], block):
                    site.saved = True
                    yield site
        elif isinstance(module, BaseTunerLayer):
            inner: nn.Module = module
            while isinstance(inner, BaseTunerLayer):  # nested where several parameters of one module are adapted
                yield self._adapter(inner, name, path, block)
                inner = inner.base_layer
            yield from self.visit(inner, name, path[:-1], block)
        else:
            if block is not None and isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1:
                if len({type(child) for child in module.children()}) == 1:
                    self.lists[name] = len(module)
            yield from self._own(module, name, path, block)
            for child_name, child in module.named_children():
                yield from self.visit(child, _join(name, child_name), path, block)

    def _adapter(
        self, module: BaseTunerLayer, name: str, path: tuple[tuple[str, str], ...], block: tuple[int, int] | None
    ) -> Site:
        """All that one PEFT layer adds to its base layer."""
        base = module.get_base_layer()
        inside = {id(tensor) for tensor in module.base_layer.parameters()}
        tensors = [tensor for tensor in module.parameters() if id(tensor) not in inside]
        parameter = getattr(module, "parameter_name", None)  # LoRA on a bare parameter (target_parameters)
        shape = linear_shape(base) if parameter is None and is_linear(base) else None
        kind = "head" if id(base) == self.head else _other_kind(base) or "matrix"
        full = name if parameter is None or parameter == "weight" else _join(name, parameter)
        return Site(full, kind, shape, tensors, [], path, block, adapter=True)

    def _own(
        self, module: nn.Module, name: str, path: tuple[tuple[str, str], ...], block: tuple[int, int] | None
    ) -> Iterator[Site]:
        """The parameters that `module` itself holds."""
        own = dict(module.named_parameters(recurse=False))
        if not own:
            return
        if is_linear(module):
            kind = "head" if id(module) == self.head else "matrix"
            weights = [tensor for key, tensor in own.items() if not key.endswith("bias")]
            biases = [tensor for key, tensor in own.items() if key.endswith("bias")]
            yield Site(name, kind, linear_shape(module), weights, biases, path, block)
            return
        kind = "head" if id(module) == self.head else _other_kind(module) or ""
        if kind:
            yield Site(name, kind, None, list(own.values()), [], path, block)
            return
        biases_left = {key: tensor for key, tensor in own.items() if key.endswith("bias")}
        for key, tensor in own.items():
            if key.endswith("bias"):
                continue
            stem = key.removesuffix("weight").rstrip("_")
            bias = biases_left.pop(f"{stem}_bias" if stem else "bias", None)
            yield Site(
                name=name if key == "weight" else _join(name, key),
                kind="bare" if tensor.ndim in (2, 3) else "vector" if tensor.ndim < 2 else "parameter",
                shape=(tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else None,
                weights=[tensor],
                biases=[] if bias is None else [bias],
                path=path if key == "weight" else (*path, (key, "Parameter")),
                block=block,
            )
        for key, tensor in biases_left.items():
            yield Site(_join(name, key), "vector", None, [tensor], [], path, block)


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


def _other_kind(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if "norm" in type(module).__name__.lower():
        return "norm"
    return None


def _judge_bare_parameters(members: list[Site]) -> None:
    """A bare parameter of a block is a matrix if one side is the block's width and the others are as large together."""
    inputs = Counter(site.shape[1] for site in members if site.kind == "matrix" and site.shape is not None)
    norms = [tensor.numel() for site in members if site.kind == "norm" for tensor in site.weights]
    widths = {inputs.most_common(1)[0][0]} if inputs else set()
    widths |= {max(norms)} if norms else set()
    for site in members:
        if site.kind == "bare":
            tensor = site.weights[0]
            fits = any(width > 1 and width in tensor.shape and tensor.numel() >= width**2 for width in widths)
            site.kind = "matrix" if fits else "parameter"


def _mark_experts_and_routers(members: list[Site], lists: dict[str, int]) -> None:
    """Experts are fused tensors `[E, ., .]` or a list of E alike modules; a router has E rows and stands beside them."""
    holders: dict[str, tuple[int, bool]] = {}  # path of the module that holds experts -> E, whether that is certain
    for site in members:
        attention = any(ATTENTION.search(part) for segment in site.path for part in segment)
        if site.kind == "matrix" and not site.adapter and site.weights[0].ndim == 3 and not attention:
            holder = site.name if site.path[-1][1] != "Parameter" else site.name.rpartition(".")[0]
            holders[holder] = site.weights[0].shape[0], True
        for path, number in lists.items():
            if site.name.startswith(path + "."):
                holders.setdefault(path, (number, "expert" in path.rpartition(".")[2].lower()))
    for holder, (number, certain) in holders.items():
        beside = holder.rpartition(".")[0] + "."
        routers = [
            site
            for site in members
            if site.kind in ("matrix", "parameter")
            and site.shape is not None
            and site.shape[0] == number
            and site.name.startswith(beside)
            and not site.name.startswith(holder + ".")
        ]
        for router in routers:
            router.kind = "router"
        if routers or certain:
            for site in members:
                if site.name == holder or site.name.startswith(holder + "."):
                    site.experts = holder
    for site in members:
        segments = [part.lower() for segment in site.path for part in segment]
        if site.kind == "matrix" and any("router" in segment for segment in segments):
            site.kind = "router"
        elif site.experts is None and "experts" in (name for name, _ in site.path):
            site.experts = site.name


def _join(path: str, name: str) -> str:
    """`path.name`, without the segments that wrappers put between a module and the path that its user knows."""
    return _WRAPPER_SEGMENTS.sub("", f"{path}.{name}" if path else name).rstrip(".")
