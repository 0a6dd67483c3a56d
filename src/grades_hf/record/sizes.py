"""How large the inputs of a model's layers are: what the FLOPs of a step grow with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..hooks import hook


class Sizes:
    """Reads off the inputs of a few layers in each forward pass.

    A layer is the innermost module that holds matrices, an adapted one with its adapter. Its kind is its path with `*`
    for each index: the layers of one kind get inputs of one size in all blocks, so the first of them is read and
    stands for all. What a layer computes grows with the elements of its input. What lies between layers grows with a
    layer's input, too, or (attention) with that and the length of another layer's input.

    Attributes:
        kinds: Module -> the kind of the layer that it is or lies in.
        layers: The modules that are layers.
        first: Kind -> its first layer.
        seen: Kind -> elements of its inputs in the running pass, those of the last call, and that one's length (its
            second dimension from the end).
        running: Whether a forward pass is read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[nn.Module, str] = {}
        self.layers: set[nn.Module] = set()
        self.first: dict[str, nn.Module] = {}
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.running = False
        inside, kind = None, ""
        for name, module in model.named_modules():
            if inside is None or not name.startswith(inside):
                inside = None
                if not _is_layer(module):
                    continue
                inside, kind = f"{name}." if name else "", re.sub(r"(?<![^.])\d+(?![^.])", "*", name) or "."
                self.layers.add(module)
                self.first.setdefault(kind, module)
            self.kinds[module] = kind

    def attach(self, undo: ExitStack) -> None:
        """Read every forward pass between `begin` and `end`."""
        for module in self.first.values():
            undo.callback(hook(module, "forward_pre", self._note, with_kwargs=True))

    def begin(self) -> None:
        self.seen, self.running = {}, True

    def end(self, keys: Iterable[str]) -> Iterator[tuple[str, float]]:
        """The size of this pass by kind, and for each of `keys` that joins two kinds (`"a|b"`)."""
        self.running = False
        yield from ((kind, float(elements)) for kind, (elements, _, _) in self.seen.items())
        for key in keys:
            first, _, second = key.partition("|")
            if second and first in self.seen and second in self.seen:
                yield key, float(self.seen[first][0]) * self.seen[second][2]

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.running:
            return
        inputs = args[0] if args and isinstance(args[0], Tensor) else first_tensor((args, dict(kwargs)))
        if inputs is not None:
            kind, elements = self.kinds[module], inputs.numel()
            length = inputs.shape[-2] if inputs.dim() > 1 else 1
            self.seen[kind] = self.seen.get(kind, (0,))[0] + elements, elements, length


def first_tensor(inputs: Any) -> Tensor | None:
    """The first tensor among the inputs of a module."""
    return next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention) or hasattr(module, "base_layer"):
        return True
    own = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return own and not any(p.dim() > 1 for child in module.children() for p in child.parameters())
