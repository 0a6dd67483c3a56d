"""find_components: every attention and feed-forward matrix of a model, found by structure.

The rule: inside the model's repeated blocks, every weight that multiplies hidden states is a component. That is every
linear layer (`nn.Linear`, GPT-2's `Conv1D`, a quantized linear through its adapter), the packed projection of
`nn.MultiheadAttention`, every such layer that PEFT adapted, and every bare parameter that spans the block's width
(fused experts). Left out are norms, embeddings (with relative-position tables), convolutions of any kernel size,
routers (weights with one row per expert, and what is called a router), weights with a single row or column (gates of
shared experts), the state of state-space models (`A_log`, `D`), and all that lies outside the blocks: LM and
classification heads, poolers, projectors between towers, downsampling between stages.

Doubtful cases: a linear layer of a block counts whatever it reads, also positions (Conformer's `linear_pos`, XLNet's
`r`, DeBERTa's `pos_key_proj`) or a low-rank code (DeepSeek's `kv_b_proj`, Mamba's `dt_proj`). A shared expert is a
plain feed-forward. Weights that several layers share are one component, which belongs to the first of them; a tensor
that many adapted layers share beside tensors of their own (VB-LoRA's bank) freezes with none of them.
"""

from __future__ import annotations

import contextlib
import logging
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from ..config import GradESConfig
from .adapters import is_adalora_layer, without_adapters
from .labels import group_of, projection_of, refine_projections
from .structure import Site, find_sites

logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"


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
        parameters: All tensors that freeze, biases included. After the run: those that the model still has.
        measured: The tensors that the statistic is taken over: `parameters` without biases of full weights.
        adapter: Whether these are the tensors of a PEFT adapter.
        tau: The threshold that holds for it, None for criteria without one; set by the engine.
        monitor: The name of its statistic; set by the engine.
        frozen_at: The optimizer step (1-based) that it froze at, or None.
    """

    name: str
    group: str
    projection: str
    layer: int | None
    tower: str | None
    parameters: Sequence[Tensor]
    measured: Sequence[Tensor]
    adapter: bool
    tau: float | None = None
    monitor: str = ""
    frozen_at: int | None = None

    _numel: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements of all its tensors."""
        return sum(parameter.numel() for parameter in self.parameters) if self._numel is None else self._numel

    def __repr__(self) -> str:
        return f"Component({self.name!r}, layer={self.layer}, group={self.group!r}, frozen_at={self.frozen_at})"


class Released(Sequence[Tensor]):
    """Parameters of a model that are not kept alive: as long as the model lives, those of these names."""

    def __init__(self, model: weakref.ref[nn.Module], names: Iterable[str]) -> None:
        self._model, self._names = model, tuple(names)

    def _tensors(self) -> list[Tensor]:
        model, found = self._model(), []
        for name in self._names if model is not None else ():
            with contextlib.suppress(AttributeError):  # taken out of the model since
                found.append(model.get_parameter(name))  # type: ignore[union-attr]
        return found

    def __len__(self) -> int:
        return len(self._tensors())

    def __getitem__(self, place: Any) -> Any:
        return self._tensors()[place]

    def __reduce__(self) -> Any:
        return tuple, ((),)


def release(components: Iterable[Component], model: nn.Module) -> None:
    """The run is over: what says how it went stays, and keeps no parameter alive."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    held = weakref.ref(model)
    for component in components:
        component._numel = component.numel
        component.parameters = Released(held, [names[p] for p in component.parameters if p in names])
        component.measured = Released(held, [names[p] for p in component.measured if p in names])


def find_components(model: nn.Module, config: GradESConfig | None = None) -> list[Component]:
    """The components of `model`, in the order of its modules.

    Args:
        model: A model, wrapped (PEFT, compiled, data parallel) or not. Only what requires a gradient now is found.
        config: `target_modules` and `exclude_modules` are used; default: none of either.

    Returns:
        At least one component; tensors that several modules share belong to the first of them.

    Raises:
        ValueError: nothing is trainable, nothing is found, `target_modules` matches nothing or is no valid regular
            expression, or the model carries an adapter that cannot be frozen in part (AdaLoRA).
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
    for argument, pattern in (("target_modules", target), ("exclude_modules", exclude)):
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{argument}={pattern!r} is no valid regular expression: {error}.") from error
    root = unwrap(model)
    for module in root.modules():
        if is_adalora_layer(module):
            raise ValueError(
                "GradES cannot work with AdaLoRA: its rank allocator needs the gradient of every adapter at every "
                "step, and a frozen adapter has none. Use LoraConfig instead of AdaLoraConfig."
            )
    if require and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no trainable parameter, so there is nothing that GradES could freeze.")

    sites = find_sites(root)
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


def measure_last_factors(model: nn.Module, components: Iterable[Component]) -> None:
    """Let the statistic of LoRA pairs be that of B alone.

    The gradient of A is the weight's gradient times B, and that of B the same times A. B starts at 0 and grows, A
    starts at its size and hardly does: so the gradient of A rises whatever happens to that of the weight.
    """
    last = {parameter for name, parameter in model.named_parameters() if re.search(r"\.lora_(embedding_)?B\b", name)}
    for component in components:
        component.measured = tuple(p for p in component.measured if p in last) or component.measured


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel, compile and PEFT wrappers."""
    while True:
        inner = without_adapters(extract_model_from_parallel(model, keep_torch_compile=False))
        if inner is model:
            return model
        model = inner


def kinds(components: Iterable[Component]) -> str:
    """How many of which matrices, for a log: `"2 q, 1 up"`."""
    counts = Counter(f"{c.tower} {c.projection}" if c.tower else c.projection for c in components)
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def matches(name: str, target: str | Iterable[str]) -> bool:
    """PEFT's rule: a list holds full names or name endings, a string is a regular expression for the full name."""
    if isinstance(target, str):
        return re.fullmatch(target, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in target)


# --- what is left out, and what becomes a component --------------------------------------------------------------


def _why_left_out(site: Site, target: list[str] | str | None, exclude: list[str] | str | None) -> str | None:
    """None for what is tracked, else the reason in a few words."""
    if target is None or target == ALL_LINEAR:
        if not (site.kind == "matrix" or (target == ALL_LINEAR and site.linear and site.kind != "head")):
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
        group = group_of(site.path, inside=site.block is not None, expert=site.expert)
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
