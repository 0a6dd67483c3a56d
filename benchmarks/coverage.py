"""Write docs/coverage.md (`python -m benchmarks.coverage`): what is tracked of each model in tests/architectures.py."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from grades_hf import find_components
from tests.architectures import TABLE, Architecture

TARGET = Path(__file__).parents[1] / "docs" / "coverage.md"

HEADER = """# What is tracked

Made by `python -m benchmarks.coverage` from the small random models in `tests/architectures.py`; the tests check that
it is up to date. *Matrices* is what that table says by hand, a regular expression for each model; *full* and *LoRA*
(`target_modules="all-linear"`, r=2) are what GradES finds, out of the matrices and out of those of them that PEFT
adapts. The share of the parameters is that of models of width 32, in which embeddings weigh more than in real ones.
For a real model: `grades-hf inspect MODEL`.

PEFT's `all-linear` adapts the fused experts of some mixtures and not of others; where it refuses a layer (Mamba's
`out_proj`) or breaks it (Llama 4's router), the other linear layers are adapted by name instead. The first part holds
the architectures that the project set out to cover, the second one others.

| architecture | matrices | full | LoRA | share of the parameters | groups |
|---|---:|---:|---:|---:|---|
"""
OTHERS = "| **others** | | | | | |\n"


def row(architecture: Architecture) -> str:
    """One line of the table."""
    with torch.device("meta"):
        model = architecture.build()
        expected = {p for name, p in model.named_parameters() if re.fullmatch(architecture.weights, name)}
        components = find_components(model)
        found = sum(p in expected for component in components for p in component.measured)
        share = sum(component.numel for component in components) / sum(p.numel() for p in model.parameters())
        groups = Counter(
            f"{component.tower} {component.group}" if component.tower else component.group for component in components
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice
            model = get_peft_model(model, LoraConfig(r=2, target_modules=architecture.lora_targets))
        adapted = len(find_components(model))
    return (
        f"| {architecture.name} | {architecture.matrices} | {found} of {len(expected)} "
        f"| {adapted} of {architecture.lora} | {share:.1%} "
        f"| {', '.join(f'{count} {group}' for group, count in groups.items())} |\n"
    )


def render() -> str:
    """The whole page."""
    listed = [row(architecture) for architecture in TABLE.values() if architecture.listed]
    others = [row(architecture) for architecture in TABLE.values() if not architecture.listed]
    return HEADER + "".join(listed) + OTHERS + "".join(others)


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET).write_text(render(), encoding="utf-8")
