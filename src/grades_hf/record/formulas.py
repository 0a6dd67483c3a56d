"""FLOPs of single operators: matrix products, convolutions and attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def _sdpa_cpu(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _sdpa_cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """(S, K) x (G, K, N) and (G, M, K) x (K, S): each row or column meets one group; (K, S) x (S, N): all of S."""
    if a.dim() == b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _grouped_mm_fallback_backward(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _grouped_mm(a, b)  # Transformers' operator always computes both gradients


# What torch.utils.flop_counter has no formula for, and the most frequent ones, for which its own are slow.
FORMULAS: dict[str, Callable[..., int]] = {
    "aten::mm": _mm,
    "aten::bmm": _mm,
    "aten::addmm": _addmm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa_cpu,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_cpu_backward,
    "aten::_grouped_mm": _grouped_mm,
    "transformers::grouped_mm_fallback": _grouped_mm,
    "transformers::grouped_mm_fallback_backward": _grouped_mm_fallback_backward,
}


def is_batched(func: Any) -> bool:
    """Whether an operator is a batch of products, as attention is."""
    name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
    return name in ("bmm", "baddbmm") or "attention" in name


def matrix_flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """FLOPs of matrix products, convolutions and attention; 0 for every other operator."""
    packet = getattr(func, "overloadpacket", func)
    formula = FORMULAS.get(getattr(packet, "_qualified_op_name", "")) or flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
