"""The engine in loops without Trainer: exact freezing, other loops, missing gradients, saving and loading its state."""

from __future__ import annotations

import io
import itertools
import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Adafactor

from grades_hf import GradES, GradESConfig
from tests import transfers
from tests.small import between, llama, lora, tokens

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, weight_decay=0.5),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, weight_decay=0.5, relative_step=False, scale_parameter=False),
}


def batches(steps=12):
    ids = torch.tensor(tokens(4 * steps)["input_ids"]).view(steps, 4, -1)
    return [{"input_ids": block, "labels": block} for block in ids]


def train(model, config, *, steps=12, optimizer="adamw", start=0, engine=None, state=None, **zero_grad):
    """A plain loop; returns (engine, optimizer, weights before each step)."""
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad]) if engine is None else engine[1]
    grades = GradES(model, config, total_steps=steps, optimizer=made) if engine is None else engine[0]
    weights = []
    for batch in batches(steps)[start:]:
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        model(**batch).loss.backward()
        grades.step()
        made.step()
        made.zero_grad(**zero_grad)
        if grades.done:
            break
    weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return grades, made, weights


@pytest.mark.compatibility(
    "Optimizers", "AdamW, fused AdamW, SGD with momentum, Adafactor, each with weight decay", "works"
)
@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_are_bit_identical_under_any_optimizer(make, optimizer):
    # measure first, then freeze about half
    seen, _, _ = train(make(), GradESConfig(tau=1e-30), optimizer=optimizer)
    model = make()
    engine, made, weights = train(model, GradESConfig(tau=between(seen.history.values), alpha=0.3), optimizer=optimizer)
    assert 0 < len(engine.frozen) < len(engine.components)
    names = {id(p): n for n, p in model.named_parameters()}
    for component in engine.components:
        for parameter in component.parameters:
            name = names[id(parameter)]
            moved = [not torch.equal(a[name], b[name]) for a, b in itertools.pairwise(weights)]
            last = len(moved) if component.frozen_at is None else component.frozen_at - 1
            assert moved == [True] * last + [False] * (len(moved) - last)
            assert (parameter in made.state) is (component.frozen_at is None)
    assert [p for group in made.param_groups for p in group["params"]] == [
        p for p in model.parameters() if id(p) in names and (p.requires_grad or p in _all(engine))
    ]


def _all(engine):
    return {p for component in engine.components for p in component.parameters}


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
def test_zeroing_in_place_or_dropping_gradients_gives_the_same_run(monitor):
    seen, _, _ = train(llama(), GradESConfig(tau=1e-30, monitor=monitor))
    config = GradESConfig(tau=between(seen.history.values), alpha=0.3, monitor=monitor)
    (a, _, final_a), (b, _, final_b) = (
        train(llama(), config, set_to_none=True),
        train(llama(), config, set_to_none=False),
    )
    assert a.frozen
    assert a.history.to_dict() == b.history.to_dict()
    assert all(torch.equal(final_a[-1][n], final_b[-1][n]) for n in final_a[-1])


@pytest.mark.compatibility("Custom loops", "accelerate, one process; save_state and load_state", "works")
def test_the_same_with_accelerate(tmp_path):
    seen, _, _ = train(llama(), GradESConfig(tau=1e-30))
    config = GradESConfig(tau=between(seen.history.values), alpha=0.4)
    plain, _, final = train(llama(), config)
    assert plain.frozen

    def prepared():
        accelerator = Accelerator(cpu=True)
        model = llama()
        model, optimizer = accelerator.prepare(model, OPTIMIZERS["adamw"](model.parameters()))
        engine = GradES(model, config, total_steps=12, optimizer=optimizer)
        accelerator.register_for_checkpointing(engine)
        return accelerator, model, optimizer, engine

    accelerator, model, optimizer, engine = prepared()
    for t, batch in enumerate(batches()):
        if t == 8:
            accelerator.save_state(tmp_path)
            accelerator, model, optimizer, engine = prepared()
            accelerator.load_state(tmp_path)
        accelerator.backward(model(**batch).loss)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.history.to_dict() == plain.history.to_dict()
    assert all(torch.equal(final[-1][n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
@pytest.mark.parametrize("check_every", [2, 3, 5])
def test_values_do_not_depend_on_how_often_is_checked(monitor, check_every):
    every, _, _ = train(llama(), GradESConfig(tau=1e-30, monitor=monitor))
    some, _, _ = train(llama(), GradESConfig(tau=1e-30, monitor=monitor, check_every=check_every))
    assert some.history.steps == [t for t in range(1, 13) if t % check_every == 0]
    for name, values in some.history.values.items():
        assert list(values) == [every.history.values[name][t - 1] for t in some.history.steps]


def test_reduction_mean_divides_by_the_number_of_elements():
    total, _, _ = train(llama(), GradESConfig(tau=1e-30), steps=3)
    mean, _, _ = train(llama(), GradESConfig(tau=1e-30, reduction="mean"), steps=3)
    for component in total.components:
        expected = total.history.values[component.name][2] / component.numel
        assert mean.history.values[component.name][2] == pytest.approx(expected, rel=1e-6)


def test_accumulated_batches_equal_one_large_batch():
    def run(parts):
        model = llama().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = GradES(model, GradESConfig(tau=1e-30), total_steps=6, optimizer=optimizer)
        for batch in batches(6):
            for part in batch["input_ids"].chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        return engine.history.values

    whole, parts = run(1), run(4)
    for name, values in whole.items():
        assert list(parts[name])[1:] == pytest.approx(list(values)[1:], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_never_freeze(bad):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = GradESConfig(tau=1e30, alpha=0.25, monitor="gradient_norm")
    engine = GradES(model, config, total_steps=8, optimizer=optimizer)
    for step, batch in enumerate(batches(8), start=1):
        model(**batch).loss.backward()
        if step < 6:
            for parameter in model.parameters():
                parameter.grad.view(-1)[0] = bad
        engine.step()
        optimizer.zero_grad()
        if engine.done:
            break
    assert set(engine.frozen.values()) == {6}
    assert all(math.isnan(v) or math.isinf(v) for series in engine.history.values.values() for v in series[:5])
    assert all(value is None for series in engine.history.to_dict()["values"].values() for value in series[:5])


def test_alpha_0_freezes_nothing_for_want_of_a_previous_gradient():
    engine, _, _ = train(llama(), GradESConfig(tau=1e30, alpha=0))
    assert set(engine.frozen.values()) == {2}
    engine, _, _ = train(llama(), GradESConfig(tau=1e30, alpha=0, monitor="gradient_norm"))
    assert set(engine.frozen.values()) == {1}


def test_a_step_without_an_update_is_no_convergence():
    """The first learning rate of a warm-up is 0."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    config = GradESConfig(tau=1e30, alpha=0, monitor="weight_change")
    engine = GradES(model, config, total_steps=4, optimizer=optimizer)
    for batch in batches(4):
        model(**batch).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 1e-3
        if engine.done:
            break
    assert set(engine.frozen.values()) == {3}
    assert all(math.isnan(values[1]) for values in engine.history.values.values())


def test_patience_counts_after_the_grace_period_only():
    engine, _, _ = train(llama(), GradESConfig(tau=1e30, alpha=0.5, patience=3))
    assert set(engine.frozen.values()) == {9}
    engine, _, _ = train(llama(), GradESConfig(tau=1e30, alpha=0.5, patience=2, check_every=2))
    assert set(engine.frozen.values()) == {10}


class Experts(nn.Module):
    """Two blocks of two experts each, of which each batch uses one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x, which):
        for layer in self.layers:
            x = x + layer[which](layer["norm"](x))
        return x


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm"])
def test_a_matrix_that_took_no_part_in_a_step_has_no_value(monitor):
    model = Experts()
    engine = GradES(model, GradESConfig(tau=1e-30, monitor=monitor), total_steps=6)
    for which in "aabaab":
        model(torch.randn(2, 8), which).square().sum().backward()
        engine.step()
        model.zero_grad()
    measured = {name: [math.isfinite(v) for v in values] for name, values in engine.history.values.items()}
    used = {"a": [True, True, False, True, True, False], "b": [False, False, True, False, False, True]}
    if monitor == "gradient_change":  # the step before must have used it, too
        used = {"a": [False, True, False, False, True, False], "b": [False] * 6}
    assert measured == {f"layers.{i}.{w}": used[w] for i in range(2) for w in "ab"}


@pytest.mark.compatibility("Custom loops", "state_dict and load_state_dict", "works")
@pytest.mark.parametrize(
    ("make", "monitor", "stop_at"),
    [
        (llama, "gradient_change", 7),
        (lora, "gradient_change", 1),
        (lora, "gradient_norm", 4),
        (llama, "gradient_norm", 9),
        (llama, "weight_change", 4),
        (lora, "weight_change", 7),
    ],
)
def test_saved_and_loaded_equals_uninterrupted(make, monitor, stop_at):
    seen, _, _ = train(make(), GradESConfig(tau=1e-30, monitor=monitor))
    config = GradESConfig(tau=between(seen.history.values), alpha=0.4, monitor=monitor, patience=2)
    whole, _, final = train(make(), config)
    assert whole.frozen

    model = make()
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    engine = GradES(model, config, total_steps=12, optimizer=optimizer)
    for batch in batches()[:stop_at]:
        model(**batch).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "engine": engine.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model = make()
    model.load_state_dict(saved["model"])
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    optimizer.load_state_dict(saved["optimizer"])
    engine = GradES(model, config, total_steps=12, optimizer=optimizer)
    engine.load_state_dict(saved["engine"])
    resumed, _, rest = train(model, config, engine=(engine, optimizer), start=stop_at)
    assert resumed.history.to_dict() == whole.history.to_dict()
    assert all(torch.equal(final[-1][n], rest[-1][n]) for n in final[-1])


@pytest.mark.compatibility("Custom loops", "load_state_dict from another model", "refused")
def test_a_state_of_another_model_is_refused_and_changes_nothing():
    engine, _, _ = train(llama(3), GradESConfig(tau=1e30))
    other = GradES(llama(2), GradESConfig(tau=1e30), total_steps=12)
    with pytest.raises(ValueError, match=r"layers\.2\."):
        other.load_state_dict(engine.state_dict())
    assert other.frozen == {}
    with pytest.raises(ValueError, match="no state of GradES"):
        other.load_state_dict({"epoch": 3})


@pytest.mark.parametrize("total_steps", [0, -1, 2.5, True, None])
def test_bad_total_steps_are_refused(total_steps):
    with pytest.raises(ValueError, match="total_steps"):
        GradES(llama(), GradESConfig(tau=1.0), total_steps=total_steps)


def test_a_thing_that_is_no_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer"):
        GradES(llama(), GradESConfig(tau=1.0), total_steps=1, optimizer=object())


def test_freezing_frees_the_gradients_and_states_of_what_froze():
    model = llama()
    config = GradESConfig(tau={"mlp": 1e30, "attention": 1e-30}, alpha=0.5)
    engine, optimizer, _ = train(model, config, steps=8)
    mlp = {p for c in engine.components if c.group == "mlp" for p in c.parameters}
    assert set(engine.tensors().get("previous", {})) == _all(engine) - mlp
    assert not mlp & set(optimizer.state)
    engine.close()
    assert engine.tensors().get("previous", {}) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_one_transfer_a_check(monkeypatch):
    model = lora()
    engine = GradES(model, GradESConfig(tau=1e-30), total_steps=3)
    reads = transfers.watch(monkeypatch, engine)
    for batch in batches(3):
        model(**batch).loss.backward()
        engine.step()
        model.zero_grad()
    assert reads == [1, 2, 3]


def test_several_adapters_train_and_freeze_as_one_layer():
    model = lora(adapter="first")
    model.add_adapter("second", model.peft_config["first"])
    model.base_model.set_adapter(["first", "second"])
    assert len({n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}) == 2
    engine, _, weights = train(model, GradESConfig(tau={"q": 1e30, "v": 1e-30}, target_modules=["q_proj", "v_proj"]))
    assert len(engine.components) == 4
    assert {len(c.parameters) for c in engine.components} == {4}
    assert set(engine.frozen) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    for name in weights[0]:
        if "q_proj.lora" in name:
            assert torch.equal(weights[6][name], weights[-1][name])


def test_switching_adapters_does_not_unfreeze():
    model = lora(adapter="first")
    model.add_adapter("second", model.peft_config["first"])
    model.set_adapter("first")
    config = GradESConfig(tau={"q": 1e30, "v": 1e-30}, alpha=0.25, target_modules=["q_proj", "v_proj"])
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    engine = GradES(model, config, total_steps=8, optimizer=optimizer)
    for step, batch in enumerate(batches(8), start=1):
        model.set_adapter("second")
        model.set_adapter("first")  # requires_grad of all its tensors is True again
        model(**batch).loss.backward()
        engine.step()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            if "q_proj.lora" in name and "first" in name:
                assert torch.equal(before[name], parameter) is (step >= 3)
            if "v_proj.lora_B.first" in name:
                assert not torch.equal(before[name], parameter)
