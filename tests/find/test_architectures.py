"""Every architecture of `architectures.TABLE`: what is tracked, what it is called, and a few steps with freezing."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback

from grades_hf import GradESCallback, find_components
from grades_hf.find.components import Component
from tests.architectures import TABLE, Architecture
from tests.small import arguments

every_architecture = pytest.mark.parametrize("architecture", TABLE.values(), ids=TABLE.keys())


def tracked_names(architecture: Architecture, model: nn.Module) -> set[str]:
    """The parameters that the table says are tracked."""
    names = {name for name, _ in model.named_parameters() if re.fullmatch(architecture.weights, name)}
    assert len(names) == architecture.matrices, "the table contradicts itself"
    return names


def with_lora(architecture: Architecture, model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        # PEFT's own: GPT-2's weights are transposed; a rank pattern that it adds to mixtures matches no linear layer
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
        return get_peft_model(model, LoraConfig(r=2, target_modules=architecture.lora_targets))


@every_architecture
def test_exactly_the_matrices_of_the_table_are_found_by_their_labels(architecture: Architecture) -> None:
    model = architecture.build()
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = tracked_names(architecture, model)
    components = find_components(model)

    assert {names[p] for c in components for p in c.measured} == expected
    assert {c.name for c in components} == {name.removesuffix(".weight") for name in expected}
    assert all(len(c.measured) == 1 for c in components)
    biases = {names[p] for c in components for p in c.parameters} - expected
    own = {f"{name.removesuffix('.weight')}.bias" for name in expected}
    assert own & set(names.values()) <= biases
    assert all(name.endswith("bias") for name in biases)
    by_name = {component.name: component for component in components}
    assert {name: described(by_name[name]) for name in architecture.labels} == architecture.labels


def described(component: Component) -> str:
    return " ".join(
        str(part)
        for part in (component.layer, component.group, component.projection, component.tower)
        if part is not None
    )


@every_architecture
def test_every_adapter_on_a_tracked_matrix_is_found(architecture: Architecture) -> None:
    model = architecture.build()
    expected = {name.removesuffix(".weight") for name in tracked_names(architecture, model)}
    labels = {component.name: described(component) for component in find_components(model)}
    model = with_lora(architecture, model)
    adapters = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", "weight")  # PEFT adapts some mixtures' fused experts too
            name = name if parameter == "weight" else f"{name}.{parameter}"
            adapters[name] = {module.lora_A["default"].weight, module.lora_B["default"].weight}

    components = find_components(model)
    assert {component.name for component in components} == adapters.keys() & expected
    assert len(components) == architecture.lora
    for component in components:
        assert set(component.measured) == adapters[component.name]
        assert component.adapter
        assert described(component) == labels[component.name]


class Snapshots(TrainerCallback):
    """All tracked tensors after each optimizer step; those before the first under 0."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[Any, torch.Tensor]] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.taken:
            self.take(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.take(state.global_step, model)

    def take(self, step: int, model: nn.Module) -> None:
        self.taken[step] = {parameter: parameter.detach().clone() for parameter in model.parameters()}


@pytest.mark.compatibility("Trainer", "all architectures of coverage.md, full weights and LoRA", "works")
@pytest.mark.parametrize("kind", ["full", "lora"])
@every_architecture
def test_training_with_freezing(architecture: Architecture, kind: str, tmp_path: Path) -> None:
    model = architecture.build()
    if kind == "lora":
        model = with_lora(architecture, model)
    inputs = architecture.inputs()
    components = find_components(model)
    # Every second component lies far below its threshold, the others far above.
    tau = {c.name: 1e12 if number % 2 == 0 else 1e-30 for number, c in enumerate(components)}
    callback, snapshots = GradESCallback(tau=tau, alpha=0.25), Snapshots()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4, remove_unused_columns=False, logging_strategy="no", save_strategy="no"),
        train_dataset=list(range(16)),
        data_collator=lambda rows: inputs,
        callbacks=[callback, snapshots],
    )
    trainer.train()

    idle = re.compile(architecture.idle or "(?!)")
    components = callback.engine.components
    busy = [component for component in components if not idle.fullmatch(component.name)]
    assert {c.name for c in busy if c.frozen_at is not None} >= {c.name for c in busy if tau[c.name] > 1}
    assert 0 < len(callback.engine.frozen) < len(components)
    last = snapshots.taken[4]
    for component in components:
        if component.frozen_at is not None:
            assert component.frozen_at > 1
            before = snapshots.taken[component.frozen_at - 1]
            assert all(torch.equal(last[p], before[p]) for p in component.parameters), component.name
    for component in busy:
        if component.frozen_at is None:
            assert any(not torch.equal(last[p], snapshots.taken[3][p]) for p in component.measured), component.name
