"""What GradES would track of a model, from its configuration alone: no weight is loaded or allocated."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ..config import GradESConfig
from ..find.components import Component, survey
from ..find.structure import Site


def build(source: str) -> PreTrainedModel:
    """The model that a hub id, a local directory or a configuration file describes, on the meta device.

    Raises:
        ValueError: the configuration cannot be found or read, or describes no model of transformers.
    """
    if source.endswith(".json") and not Path(source).is_file():
        raise ValueError(f"MODEL={source!r}: there is no such file.")
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise ValueError(f"MODEL={source!r}: the directory holds no config.json.")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"MODEL={source!r} cannot be read: {reason} Pass a hub id, a local directory or a config.json."
        ) from error
    with torch.device("meta"):
        try:
            model: PreTrainedModel = _model_class(config)(config)
            return model
        except (ArithmeticError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"MODEL={source!r} is no usable configuration: {error}") from error


def _model_class(config: PreTrainedConfig) -> Any:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    return AutoModel.from_config


def parse_lora(text: str) -> LoraConfig:
    """`r=16,target_modules=q_proj+v_proj` or a JSON object as a `LoraConfig`.

    Raises:
        ValueError: the text is neither, or LoraConfig has no such option or refuses its value.
    """
    try:
        options = json.loads(text) if text.lstrip().startswith("{") else dict(_pair(part) for part in text.split(","))
    except json.JSONDecodeError as error:
        raise ValueError(f"lora={text!r} is no JSON object: {error}.") from error
    known = {option.name: str(option.type) for option in dataclasses.fields(LoraConfig) if option.init}
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"lora={text!r}: LoraConfig has no option {name!r}.")
        if isinstance(value, str) and "list" in known[name]:
            options[name] = pattern_or_names(value.split("+"))
    try:
        return LoraConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora={text!r} is refused by LoraConfig: {error}") from error


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"lora has {text!r}, which is no NAME=VALUE pair; write r=16,target_modules=all-linear.")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), {"True": True, "False": False}.get(value, value)


def pattern_or_names(values: Sequence[str]) -> list[str] | str:
    """One value that is no plain name is a regular expression (or all-linear), as PEFT reads a string."""
    if len(values) == 1 and not re.fullmatch(r"[\w.]+", values[0]):
        return values[0]
    return list(values)


def inspect(
    source: str,
    *,
    lora: LoraConfig | None = None,
    target_modules: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
) -> str:
    """What would be tracked, and what is left out and why, as text.

    Raises:
        ValueError: the model cannot be read, the adapter does not fit it, or nothing would be tracked.
    """
    base = build(source)
    total = sum(parameter.numel() for parameter in base.parameters())
    model: nn.Module = base
    if lora is not None:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT has to say comes again when the adapters are really made
            model = get_peft_model(base, lora)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = GradESConfig(tau=1.0, target_modules=target_modules, exclude_modules=exclude_modules)
    components, left_out = survey(model, config)

    tracked = sum(component.numel for component in components)
    what = f"adapters of {trainable:,} parameters" if lora is not None else "all trainable"
    layers = {(component.tower, component.layer) for component in components if component.layer is not None}
    lines = [
        f"{type(base).__name__} ({base.config.model_type}): {total:,} parameters, {what}",
        f"tracked: {len(components)} components in {len(layers)} layers, {tracked:,} parameters",
        f"         {tracked / total:.2%} of the model's, {tracked / trainable:.2%} of the trainable ones",
        "",
        *_table(_component_rows(components, trainable)),
        "",
        "left out:",
        *_table(_left_out_rows(left_out)),
    ]
    return "\n".join(lines) + "\n"


def _component_rows(components: Sequence[Component], trainable: int) -> list[tuple[str, ...]]:
    families: dict[tuple[str, ...], list[Component]] = {}
    for component in components:
        families.setdefault((component.tower or "", component.group, component.projection), []).append(component)
    rows: list[tuple[str, ...]] = [
        ("tower", "group", "projection", "count", "layers", "parameters", "of the trainable", "example")
    ]
    for (tower, group, projection), members in families.items():
        layers = [component.layer for component in members if component.layer is not None]
        numel = sum(component.numel for component in members)
        span = f"{min(layers)}-{max(layers)}" if layers else ""
        numbers = (f"{len(members)}", span, f"{numel:,}", f"{numel / trainable:.2%}")
        rows.append((tower, group, projection, *numbers, members[0].name))
    return rows if any(row[0] for row in rows[1:]) else [row[1:] for row in rows]


def _left_out_rows(left_out: Sequence[tuple[Site, str]]) -> list[tuple[str, ...]]:
    reasons: dict[str, list[Site]] = {}
    for site, reason in left_out:
        reasons.setdefault(reason, []).append(site)
    rows: list[tuple[str, ...]] = [("reason", "count", "parameters", "which")]
    for reason, sites in reasons.items():
        names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", site.name) for site in sites))
        which = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        rows.append((reason, f"{len({site.name for site in sites})}", f"{sum(site.numel for site in sites):,}", which))
    return rows


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns of equal width; numbers to the right, the last column free."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [all(re.fullmatch(r"[\d,.%]+", row[i]) for row in rows[1:]) for i in range(len(widths))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, numbers, strict=True)
        ).rstrip()
        for row in rows
    ]
