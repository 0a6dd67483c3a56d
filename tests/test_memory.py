"""What freezing gives back, at once: gradient, optimizer state and previous gradient, counted by their buffers."""

from __future__ import annotations

import pytest
import torch

from grades_hf import GradES, GradESConfig
from tests import small

FREEZES = 3  # the step at which half of the components freeze
MONITORS = ["gradient_change", "gradient_norm", "weight_change"]


def begin(kind, device="cpu", **options):
    """Model, optimizer and engine; the feed-forward matrices freeze at step FREEZES."""
    model = (small.llama() if kind == "full" else small.lora()).to(device)
    implementation = {options.pop("implementation", "fused"): True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **implementation)
    config = GradESConfig(tau={"mlp": 1e30, "attention": 1e-30}, alpha=(FREEZES - 1) / 10, **options)
    return model, optimizer, GradES(model, config, total_steps=10, optimizer=optimizer)


def backward(model, step):
    rows = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(step)).to(model.device)
    model(input_ids=rows, labels=rows).loss.backward()


def update(model, optimizer, engine, step):
    backward(model, step)
    engine.step()
    optimizer.step()
    optimizer.zero_grad()


def held(optimizer, engine, parameter):
    """The buffers that belong to a parameter, by kind."""
    state = optimizer.state[parameter]
    found = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"], "gradient": parameter.grad}
    previous = engine.tensors().get("previous", {}).get(parameter)
    return found if previous is None else {**found, "previous": previous}


@pytest.mark.parametrize("options", [{}, {"sample_size": 40}], ids=["exact", "sampled"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_buffer_of_a_frozen_component_dies_in_its_step(kind, monitor, implementation, options):
    model, optimizer, engine = begin(kind, monitor=monitor, implementation=implementation, **options)
    for step in range(1, FREEZES):
        update(model, optimizer, engine, step)
    backward(model, FREEZES)
    buffers = {
        (component.name, index, kind): tensor.untyped_storage()._weak_ref()
        for component in engine.components
        for index, parameter in enumerate(component.measured)
        for kind, tensor in held(optimizer, engine, parameter).items()
    }
    assert {kind for _, _, kind in buffers} >= {"exp_avg", "exp_avg_sq", "gradient"}
    assert ("previous" in {kind for _, _, kind in buffers}) == (monitor != "gradient_norm")
    engine.step()  # no garbage collection: what is freed now is freed at once
    dead = {key for key, buffer in buffers.items() if torch.UntypedStorage._expired(buffer)}
    for buffer in buffers.values():
        torch.UntypedStorage._free_weak_ref(buffer)
    frozen = {key for key in buffers if key[0] in engine.frozen}
    assert {engine.frozen[name] for name, _, _ in frozen} == {FREEZES}
    assert frozen <= dead, sorted(frozen - dead)
    # Of what is still trained nothing died, but for the gradient before the last, whose place the last one has taken.
    assert {kind for name, _, kind in dead - frozen} <= {"previous"}


@pytest.mark.parametrize("monitor", MONITORS)
def test_bytes_fall_by_what_was_frozen(monitor):
    model, optimizer, engine = begin("full", monitor=monitor)

    def count():
        states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
        return sum(t.nbytes for t in (*states, *engine.tensors().get("previous", {}).values()))

    for step in range(1, FREEZES):
        update(model, optimizer, engine, step)
    before = count()
    update(model, optimizer, engine, FREEZES)
    frozen = sum(p.nbytes for c in engine.components if c.name in engine.frozen for p in c.parameters)
    assert frozen > 0
    assert before - count() == frozen * (2 if monitor == "gradient_norm" else 3)


@pytest.mark.parametrize("monitor", ["gradient_change", "weight_change"])
def test_what_is_compared_is_kept_for_one_step_only(monitor):
    model, optimizer, engine = begin("full", monitor=monitor, check_every=4)
    kept = []
    for step in range(1, 10):
        update(model, optimizer, engine, step)
        kept.append(len(engine.tensors().get("previous", {})) > 0)
    assert kept == [False, False, True, False, False, False, True, False, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("monitor", MONITORS)
def test_the_peak_on_a_gpu_falls(monitor):
    """Gradient, two moments and what is compared with: so many times the frozen weights less, in the next step."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(1024, 1024, bias=False, device="cuda") for _ in range(8)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    tau = {r"[0-3]": 1e30, ".*": 1e-30}
    config = GradESConfig(tau=tau, alpha=0.2, monitor=monitor, target_modules="all-linear")
    engine = GradES(model, config, total_steps=10, optimizer=optimizer)
    inputs = torch.randn(4, 1024, device="cuda")
    peaks = []
    for _ in range(5):
        torch.cuda.reset_peak_memory_stats()
        model(inputs).square().mean().backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert set(engine.frozen.values()) == {3}
    frozen = sum(layer.weight.nbytes for layer in layers[:4])
    assert peaks[1] - peaks[4] >= frozen * (3 if monitor == "gradient_norm" else 4) - 2**22
