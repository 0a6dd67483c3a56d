"""PEFT's classes, where PEFT is in use: a model has adapters only if something has imported it already.

Importing PEFT takes seconds, and so nothing here does.
"""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import nn


def is_adapter_layer(module: nn.Module) -> TypeGuard[Any]:
    """Whether this is a layer that PEFT has put adapters on."""
    return _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def is_saved_copy(module: nn.Module) -> TypeGuard[Any]:
    """Whether this holds copies of a module that PEFT trains as a whole (`modules_to_save`)."""
    return _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper")


def is_adalora_layer(module: nn.Module) -> bool:
    """Whether this is a layer of AdaLoRA."""
    return _is(module, "peft.tuners.adalora", "AdaLoraLayer")


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that PEFT's wrapper holds; any other model itself."""
    if _is(model, "peft", "PeftModel"):
        base: nn.Module = model.get_base_model()  # type: ignore[operator]
        return base
    if _is(model, "peft", "PeftMixedModel"):
        return model.base_model.model  # type: ignore[union-attr, return-value]
    return model


def _is(module: nn.Module, where: str, name: str) -> bool:
    found = getattr(sys.modules.get(where), name, None)
    return found is not None and isinstance(module, found)
