"""Frozen LoRA pairs for free: while training goes on, a frozen pair's layer multiplies by its merged weight.

The merged weight W + scaling * B A is a second tensor beside the base weight, which is never written to. So there is
nothing to take out for a save, after a crash or at the end: `state_dict()`, `save_pretrained()`, `disable_adapter()`
and PEFT's `merge` see the base weight and the pair as they are, to the bit.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contracts import Extension, Run, Trait
from ..find.components import Component, unwrap
from ..hooks import hook

logger = logging.getLogger(__name__)

LOST = 0.25  # the part of an update that rounding may change without a warning

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Merger(Extension):
    """Merges frozen LoRA pairs into a copy of their base weight, and keeps those copies right until `close`.

    What is merged: plain LoRA (also rsLoRA and `lora_bias`) on `nn.Linear` and `Conv1D` with one active adapter. Left
    as they are, and told at the start: other adapters (DoRA, `target_parameters`, ...), dropout in the adapter (a
    merged pair drops nothing, so the function would be another one), quantized base weights, base weights that are
    trained or that several layers share.

    The function that is trained differs by rounding only. Figures of a small trained Llama, four of five blocks merged,
    relative to the norm of logits and gradients: in float32 the logits differ by 4e-7 and the gradients by 2e-6. With
    bfloat16 base weights the logits are 5e-3 away from exact ones, merged or not, and the gradients 2e-2, merged or
    not. But a merged weight is rounded to the base weight's type, the same way in every step, and what is small beside
    the weight gets lost: in bfloat16, updates of 9, 3, 1 and 0.3 % of their weight's norm come out wrong by 2, 8, 22
    and 52 %. A warning tells where it is more than 25 %. Float32 base weights hold the whole update; autocast
    (`bf16=True`) rounds what it multiplies by, merged or not.

    Memory: on a CPU one more tensor of the size of each merged base weight. On an accelerator none: the base weight
    moves to the host's memory until `close`, and `state_dict()` gives it from there. Whatever runs the model without
    the adapter (`disable_adapter()`, as the reference model of DPO and GRPO does) copies it back for each call, layer
    by layer.

    Attributes:
        layers: Component name -> its layer, for all that can be merged.

    Raises:
        ValueError: none of the components can be merged, or the model's layers are not run by PEFT alone (sharded
            parameters, Unsloth's kernels).
    """

    name = "merging"
    refuses = {
        Trait.SHARDED: "merge_frozen_adapters=True does not work with sharded parameters (FSDP2). Leave it out, or "
        "train with DDP.",
    }

    def attach(self, run: Run, undo: ExitStack) -> None:
        root, components = unwrap(run.model), run.components
        _refuse(root)
        owners: dict[int, Any] = {
            id(tensor): module
            for module in root.modules()
            if isinstance(module, lora.LoraLayer)
            for attribute in module.adapter_layer_names
            for tensor in getattr(module, attribute).parameters()
        }
        uses = Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)
        self.layers: dict[str, Any] = {}
        self._adapters: dict[str, str] = {}
        reasons: Counter[str] = Counter()
        for component in components:
            layer = owners.get(id(component.measured[0]))
            reason = _why_not(layer, component, uses)
            if reason is None:
                self.layers[component.name] = layer
                (self._adapters[component.name],) = _active(layer)
            else:
                reasons[reason] += 1
        why = "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())
        if not self.layers:
            raise ValueError(
                f"merge_frozen_adapters=True can merge none of the {len(components)} components: {why}. It needs plain "
                "LoRA without dropout (lora_dropout=0) on linear layers that are not quantized; else leave it out."
            )
        if reasons:
            logger.warning(
                "GradES: merge_frozen_adapters applies to %d of %d components, not to the others: %s.",
                len(self.layers),
                len(components),
                why,
            )
        else:
            logger.info("GradES: merge_frozen_adapters applies to all %d components.", len(components))
        self._wanted: list[str] = []
        self._told = False
        self._components = components
        undo.callback(self._close)
        undo.callback(hook(root, "forward_pre", self._before_forward))  # PEFT's generate() calls it without its wrapper

    @property
    def merged(self) -> set[str]:
        """Names of the components whose layer runs on its merged weight now."""
        return {name for name in self._wanted if isinstance(self.layers[name], MergedLinear)}

    def merge(self, components: Iterable[Component]) -> None:
        """Merge those of `components` that can be, from the next forward pass on; not between forward and backward."""
        new = [c.name for c in components if c.name in self.layers and c.name not in self._wanted]
        self._wanted += new
        self.reassert()
        if not self._told:
            self._tell_lost(new)

    def reassert(self) -> None:
        """Merge again what something else (loading weights, PEFT's `merge`) has taken out since; between steps."""
        for name in self._wanted:
            layer, adapter = self.layers[name], self._adapters[name]
            if isinstance(layer, MergedLinear) and (layer.written_to() or layer.rescaled()):
                split(layer)
            if not isinstance(layer, MergedLinear) and not layer.merged and _active(layer) == [adapter]:
                merge(layer, adapter)

    def on_grad_pattern(self) -> None:
        self.merge(component for component in self._components if component.frozen_at is not None)

    def release(self) -> None:
        """Every layer is as before."""
        for name in self.merged:
            split(self.layers[name])
        self._wanted.clear()

    def _close(self) -> None:
        self.release()
        self.layers, self._components = {}, []

    def _tell_lost(self, names: Sequence[str]) -> None:
        layers = [self.layers[name] for name in names]
        lost = [x._merged.lost for x in layers if isinstance(x, MergedLinear) and x._merged.lost is not None]
        values = torch.stack([norm.to(lost[0].device) for norm in lost]).tolist() if lost else []
        many = [value for value in values if value > LOST]
        if many:
            self._told = True
            logger.warning(
                "GradES: rounding the merged weights to the type of the base weights changes the updates of %d of %d "
                "pairs by more than %.0f %% (the worst by %.0f %%). Load the base model in float32 and train with "
                "bf16=True, or leave merge_frozen_adapters out.",
                len(many),
                len(values),
                100 * LOST,
                100 * max(many),
            )

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        for name in self._wanted:
            layer = self.layers[name]
            if isinstance(layer, MergedLinear) and layer.written_to():
                split(layer)


@dataclass
class Merged:
    """What a layer runs on while its pair is merged.

    Attributes:
        base: A second module like the layer's base layer, with the merged weight.
        active: The layer's active adapters, of which it has one.
        adapter: That one.
        scaling: Its factor.
        versions: See `_versions`.
        device: Where the base weight was, and goes back to.
        lost: Norm of what rounding has changed over the norm of the update, a 0-d tensor; None in float32 and float64.
    """

    base: nn.Module
    active: list[str]
    adapter: str
    scaling: float
    versions: list[int]
    device: torch.device
    lost: Tensor | None


def _split_first(name: str) -> Callable[..., Any]:
    def method(self: MergedLinear, *args: Any, **kwargs: Any) -> Any:
        split(self)
        return getattr(self, name)(*args, **kwargs)

    return method


class MergedLinear(lora.Linear):
    """PEFT's LoRA layer while its pair is merged: a plain call costs what the base layer costs.

    To PEFT it is not merged: base weight and pair are as they were, and any other call (adapters disabled or switched,
    another scaling) computes with those. What changes them makes it an ordinary layer first.
    """

    _merged: Merged

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = self._merged
        if (
            args
            or kwargs
            or self._disable_adapters
            or self.merged_adapters
            or self.active_adapters != now.active
            or self.rescaled()
        ):
            with self._base_on_device():
                return super().forward(x, *args, **kwargs)
        return cast("Tensor", now.base(x))

    def written_to(self) -> bool:
        """Whether the base weight or the pair has changed since."""
        return _versions(self, self._merged.adapter) != self._merged.versions

    def rescaled(self) -> bool:
        """Whether PEFT has given the pair another factor since."""
        return bool(self.scaling.get(self._merged.adapter) != self._merged.scaling)

    @contextmanager
    def _base_on_device(self) -> Iterator[None]:
        base: Any = self.base_layer
        if base.weight.device == self._merged.device:
            yield
            return
        self._modules["base_layer"] = _like(base, weight=base.weight.detach().to(self._merged.device))
        try:
            yield
        finally:
            self._modules["base_layer"] = base

    merge = _split_first("merge")
    unmerge = _split_first("unmerge")
    update_layer = _split_first("update_layer")
    delete_adapter = _split_first("delete_adapter")
    _apply = _split_first("_apply")
    _load_from_state_dict = _split_first("_load_from_state_dict")


@torch.no_grad()
def merge(layer: Any, adapter: str) -> None:
    """Let `layer` run on its merged weight; on an accelerator the base weight moves to the CPU."""
    base = layer.base_layer
    device = base.weight.device
    with torch.autocast(device.type, enabled=False):
        update = layer.get_delta_weight(adapter)
        tensors = {"weight": base.weight.detach().clone().add_(update)}
        if layer.lora_bias[adapter]:
            bias = (layer.lora_B[adapter].bias * layer.scaling[adapter]).to(base.weight.dtype)
            tensors["bias"] = bias if base.bias is None else base.bias + bias
    lost = None
    if base.weight.dtype.itemsize < 4:
        exact = base.weight.float() + update
        lost = (tensors["weight"] - exact).norm() / update.float().norm()  # NaN, which is no loss, for an empty update
    if device.type != "cpu":
        base.weight.data = base.weight.data.cpu()
    layer._merged = Merged(
        _like(base, **tensors),
        list(layer.active_adapters),
        adapter,
        layer.scaling[adapter],
        _versions(layer, adapter),
        device,
        lost,
    )
    layer.__class__ = MergedLinear


def split(layer: Any) -> None:
    """Undo `merge`: the layer is PEFT's again, its base weight where it was."""
    weight = layer.base_layer.weight
    if weight.device != layer._merged.device:
        weight.data = weight.data.to(layer._merged.device)
    del layer._merged
    layer.__class__ = lora.Linear


def _like(base: nn.Module, **tensors: Tensor) -> nn.Module:
    """A module that shares everything with `base` but these parameters."""
    other = copy.copy(base)
    other._parameters = {**base._parameters, **{n: nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}}
    return other


def _versions(layer: Any, adapter: str) -> list[int]:
    """Torch's count of in-place changes for each tensor that the merged weight is made of."""
    tensors = [*_pair(layer, adapter), layer.base_layer.weight]
    if layer.lora_bias[adapter] and layer.base_layer.bias is not None:
        tensors.append(layer.base_layer.bias)
    return [tensor._version for tensor in tensors]


def _pair(layer: Any, adapter: str) -> list[Tensor]:
    return [*layer.lora_A[adapter].parameters(), *layer.lora_B[adapter].parameters()]


def _active(layer: Any) -> list[str]:
    """The active adapters that this layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _refuse(root: nn.Module) -> None:
    if any(str(type(module).forward.__module__).startswith("unsloth") for module in root.modules()):
        raise ValueError(
            "merge_frozen_adapters=True does not work with Unsloth, whose kernels compute base weight and adapter "
            "themselves. Leave it out."
        )


def _why_not(layer: Any, component: Component, uses: Counter[int]) -> str | None:
    """Why a component cannot be merged, in a few words; None where it can."""
    if layer is None:
        return "with adapters of another kind than LoRA" if component.adapter else "with full weights"
    if type(layer) is not lora.Linear:
        return f"of PEFT's type lora.{type(layer).__name__} (only lora.Linear can be merged)"
    active = _active(layer)
    if len(active) != 1:
        return f"with {len(active)} active adapters"
    (adapter,) = active
    if adapter in layer.lora_variant:
        return f"with {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')}"
    if not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return f"with lora_dropout={layer.lora_dropout[adapter].p:g}"
    base = layer.base_layer
    weight = base._parameters.get("weight")
    if type(base) not in (nn.Linear, Conv1D):
        return f"on a layer of type {type(base).__name__}"
    if "forward" in vars(layer) or "forward" in vars(base):
        return "on a layer whose forward was replaced (accelerate's device map does so)"
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS or weight.is_meta:
        return "on a quantized or absent weight"
    if weight.requires_grad:
        return "on a base weight that is trained itself"
    if uses[id(weight)] > 1:
        return "on a base weight that several layers share"
    if any(
        tensor.requires_grad and id(tensor) not in map(id, component.parameters) for tensor in _pair(layer, adapter)
    ):
        return "with a tensor that several adapters share"
    return None
