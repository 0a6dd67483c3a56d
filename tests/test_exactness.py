"""The library does what Algorithm 1 says: same freezing steps, same values, bit-identical weights.

`tests/reference.py` is the slow twin. Both sides run the same float32 operations in the same order, so final weights
are compared with `torch.equal`; the statistic itself is summed in float32 here and in float64 there.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import pytest
import torch
from transformers import Trainer, TrainerCallback

from grades_hf import GradES, GradESCallback, GradESConfig
from tests import reference
from tests.runs import STEPS, Setting, cosine, differing, load, optimizer, pick_tau

CLIP, NO_CLIP = 0.3, 0.0
MONITORS = ("gradient_change", "gradient_norm", "weight_change")


@lru_cache
def unfrozen(setting: Setting, monitor: str, reduction: str = "sum") -> reference.Outcome:
    """The reference with tau = 0: it measures and freezes nothing."""
    return setting.reference(tau=0.0, alpha=0.0, monitor=monitor, reduction=reduction)


def choose(setting: Setting, **options) -> tuple[Setting, float, reference.Outcome]:
    """A threshold at which some but not all matrices freeze, at different steps, and what the reference makes of it.

    Where the batches in their order have none (all gradients are smallest in the first one), another order is taken.
    """
    every = options.get("check_every", 1)
    first = math.ceil(options["alpha"] * STEPS) + 1
    for shift in (0, 5, 11, 17):
        shifted = dataclasses.replace(setting, shift=shift)
        free = unfrozen(shifted, options["monitor"], options.get("reduction", "sum"))
        values = {name: {s: v for s, v in series.items() if s % every == 0} for name, series in free.values.items()}

        def run(tau: float, setting: Setting = shifted) -> reference.Outcome:
            return setting.reference(tau=tau, **options)

        try:
            return shifted, *pick_tau(run, values, first, options.get("patience", 1))
        except LookupError:
            continue
    raise AssertionError("no order of the batches has a fitting threshold")


def train(setting: Setting, folder, **options) -> tuple[Trainer, GradES]:
    callback = GradESCallback(GradESConfig(**options))
    trainer = setting.trainer(folder, [callback])
    trainer.train()
    assert callback.engine is not None
    return trainer, callback.engine


def measured(engine: GradES) -> dict[str, dict[int, float]]:
    """What the engine recorded, in the reference's form: no value, no entry."""
    history = engine.history
    return {
        name: {step: value for step, value in zip(history.steps, series, strict=False) if not math.isnan(value)}
        for name, series in history.values.items()
    }


def assert_same(trainer: Trainer, engine: GradES, outcome: reference.Outcome) -> None:
    assert engine.frozen == outcome.frozen
    assert trainer.state.global_step == outcome.last_step
    values = measured(engine)
    assert values.keys() == outcome.values.keys()
    for name, series in outcome.values.items():
        assert values[name] == pytest.approx(series, rel=2e-5), name
    assert differing(trainer.model, outcome) == []
    held = set(trainer.optimizer.state.keys())
    assert not [c.name for c in engine.components if c.frozen_at and held & set(c.parameters)], "optimizer state"


@pytest.mark.compatibility("Trainer", "full weights and LoRA, gradient accumulation, clipping", "works")
@pytest.mark.parametrize("max_grad_norm", [CLIP, NO_CLIP], ids=["clip", "noclip"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.55])
@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_trainer_equals_algorithm_1(kind, monitor, alpha, accumulation, max_grad_norm, tmp_path):
    setting = Setting(kind, accumulation, max_grad_norm)
    setting, tau, outcome = choose(setting, alpha=alpha, monitor=monitor)
    assert min(outcome.frozen.values()) > math.ceil(alpha * STEPS)
    trainer, engine = train(setting, tmp_path, tau=tau, alpha=alpha, monitor=monitor)
    assert_same(trainer, engine, outcome)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_clipping_in_these_cases_changes_the_gradient(kind):
    """Otherwise "clip" would test nothing."""
    norms: list[float] = []

    def collect(step, model):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    setting = Setting(kind, accumulation=4, max_grad_norm=CLIP)
    setting.reference(tau=0.0, alpha=0.0, monitor="gradient_norm", on_gradients=collect)
    assert min(norms) > CLIP


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("monitor", MONITORS)
def test_patience(kind, monitor, tmp_path):
    setting = Setting(kind)
    options = {"alpha": 0.3, "monitor": monitor, "patience": 3}
    setting, tau, outcome = choose(setting, **options)
    assert min(outcome.frozen.values()) >= math.ceil(0.3 * STEPS) + 3
    assert_same(*train(setting, tmp_path, tau=tau, **options), outcome)


@pytest.mark.parametrize("monitor", MONITORS)
def test_reduction_mean(monitor, tmp_path):
    setting = Setting(schedule="constant")  # per element, all weights move alike under Adam and a falling rate
    options = {"alpha": 0.3, "monitor": monitor, "reduction": "mean"}
    setting, tau, outcome = choose(setting, **options)
    total, mean = unfrozen(setting, monitor), unfrozen(setting, monitor, "mean")
    name = "model.layers.0.mlp.down_proj"
    elements = load("full").get_submodule(name).weight.numel()
    assert mean.values[name][5] == pytest.approx(total.values[name][5] / elements)
    assert_same(*train(setting, tmp_path, tau=tau, **options), outcome)


@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_checks_every_third_step_read_what_checks_at_every_step_read(kind, monitor, tmp_path):
    setting = Setting(kind)
    _, every = train(setting, tmp_path / "1", tau=1e-9, alpha=0.0, monitor=monitor)
    _, third = train(setting, tmp_path / "3", tau=1e-9, alpha=0.0, monitor=monitor, check_every=3)
    assert third.frozen == {}
    assert third.history.steps == [3, 6, 9, 12]
    for name, series in measured(every).items():
        assert measured(third)[name] == {step: series[step] for step in (3, 6, 9, 12)}, name


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("monitor", MONITORS)
def test_check_every_freezes_at_checks_only(kind, monitor, tmp_path):
    setting = Setting(kind)
    options = {"alpha": 0.3, "monitor": monitor, "check_every": 2, "patience": 2}
    setting, tau, outcome = choose(setting, **options)
    assert {step % 2 for step in outcome.frozen.values()} == {0}
    assert_same(*train(setting, tmp_path, tau=tau, **options), outcome)


@pytest.mark.compatibility("Trainer", "max_frozen_fraction ends training", "works")
def test_max_frozen_fraction_ends_training(tmp_path):
    setting = Setting()
    setting, tau, full = choose(setting, alpha=0.0, monitor="gradient_norm")
    part = 0.9 * len(full.frozen) / len(full.values)
    options = {"tau": tau, "alpha": 0.0, "monitor": "gradient_norm", "max_frozen_fraction": part}
    outcome = setting.reference(**options)
    assert outcome.last_step < STEPS
    assert_same(*train(setting, tmp_path, **options), outcome)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_ends_in_the_step_in_which_the_last_matrix_freezes(kind, tmp_path):
    setting = Setting(kind)
    options = {"tau": 1e9, "alpha": 0.55, "monitor": "gradient_norm"}
    outcome = setting.reference(**options)
    assert outcome.last_step == 8  # ceil(0.55 * 12) + 1
    trainer, engine = train(setting, tmp_path, **options)
    assert engine.done
    assert "train_runtime" in trainer.state.log_history[-1]
    assert_same(trainer, engine, outcome)


@pytest.mark.parametrize(
    ("monitor", "kind", "first"),
    [
        ("gradient_change", "full", 2),
        ("gradient_change", "lora", 2),
        ("weight_change", "full", 2),
        ("weight_change", "lora", 2),
        ("gradient_norm", "full", 1),
        ("gradient_norm", "lora", 1),
    ],
)
def test_alpha_0_never_freezes_for_want_of_a_previous_step(monitor, kind, first, tmp_path):
    """With a tau above all values everything freezes at the first step that has a value, and not before."""
    setting = Setting(kind)
    trainer, engine = train(setting, tmp_path, tau=1e9, alpha=0.0, monitor=monitor)
    assert set(engine.frozen.values()) == {first}
    assert trainer.state.global_step == first
    assert_same(trainer, engine, setting.reference(tau=1e9, alpha=0.0, monitor=monitor))


class Spoil(TrainerCallback):
    """Puts a number into one gradient just before the engine reads it; `mend` takes it out before the update."""

    def __init__(self, name: str, steps: tuple[int, ...], number: float) -> None:
        self.name, self.steps, self.number = name, steps, number
        self.mend = Mend(self)
        self.sound: torch.Tensor | None = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step + 1 in self.steps:
            weight = model.get_submodule(self.name).weight
            self.sound = weight.grad.clone()
            weight.grad.view(-1)[0] = self.number


class Mend(TrainerCallback):
    def __init__(self, spoil: Spoil) -> None:
        self.spoil = spoil

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.spoil.sound is not None:
            model.get_submodule(self.spoil.name).weight.grad = self.spoil.sound
            self.spoil.sound = None


@pytest.mark.compatibility("Faults", "single NaN or infinite gradients", "works")
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm"])
def test_a_value_that_is_not_finite_is_never_below_tau(monitor, number, tmp_path):
    name, steps = "model.layers.1.self_attn.k_proj", (4, 5, 6, 7, 8)
    callback = GradESCallback(tau=1e9, alpha=0.3, monitor=monitor)
    spoil = Spoil(name, steps, number)
    Setting().trainer(tmp_path, [spoil, callback, spoil.mend], max_steps=8, max_grad_norm=0.0).train()
    frozen = callback.engine.frozen
    assert name not in frozen
    assert len(frozen) == len(callback.engine.components) - 1
    assert set(frozen.values()) == {4}
    series = callback.engine.history.values[name]
    assert all(math.isnan(series[step - 1]) or math.isinf(series[step - 1]) for step in steps)


def test_a_value_that_is_not_finite_starts_patience_anew(tmp_path):
    name = "model.layers.1.self_attn.k_proj"
    callback = GradESCallback(tau=1e9, alpha=0.0, monitor="gradient_norm", patience=3)
    spoil = Spoil(name, (2,), math.nan)
    Setting().trainer(tmp_path, [spoil, callback, spoil.mend], max_steps=8, max_grad_norm=0.0).train()
    frozen = callback.engine.frozen
    assert frozen.pop(name) == 5
    assert set(frozen.values()) == {3}


@pytest.mark.compatibility("Custom loops", "plain PyTorch, zero_grad with set_to_none True and False", "works")
@pytest.mark.parametrize("monitor", MONITORS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_hand_written_loop_equals_algorithm_1(monitor, set_to_none):
    """Also where gradients are zeroed in place, so that the buffer of the step before does not survive."""
    setting = Setting(max_grad_norm=NO_CLIP)
    setting, tau, outcome = choose(setting, alpha=0.3, monitor=monitor)
    model = load("full").train()
    adamw = optimizer(model)
    engine = GradES(model, GradESConfig(tau=tau, alpha=0.3, monitor=monitor), total_steps=STEPS, optimizer=adamw)
    for step, (batch,) in enumerate(setting.batches(), start=1):
        model(**batch, num_items_in_batch=batch["labels"][..., 1:].ne(-100).sum()).loss.backward()
        engine.step()
        for group in adamw.param_groups:
            group["lr"] = cosine(step)
        adamw.step()
        adamw.zero_grad(set_to_none=set_to_none)
        if engine.done:
            break
    engine.close()
    assert engine.frozen == outcome.frozen
    assert differing(model, outcome) == []


def test_two_adapters_and_any_adapter_name_equal_algorithm_1():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests import standin

    def build():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(standin.model_dir())
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
        model = get_peft_model(model, config, adapter_name="first")
        model.add_adapter("second", config)
        model.base_model.set_adapter(["first", "second"])
        assert sum(p.requires_grad for p in model.parameters()) == 4 * 2 * 5
        return model.train()

    batches = Setting(batch=2).batches()
    free = reference.train(build(), batches, optimizer, cosine, tau=0.0, alpha=0.3, monitor="gradient_norm")

    def run(tau):
        return reference.train(build(), batches, optimizer, cosine, tau=tau, alpha=0.3, monitor="gradient_norm")

    tau, outcome = pick_tau(run, free.values, 5)
    model = build()
    adamw = optimizer(model)
    engine = GradES(model, GradESConfig(tau=tau, alpha=0.3), total_steps=STEPS, optimizer=adamw)
    assert {component.monitor for component in engine.components} == {"gradient_norm"}
    assert [len(component.parameters) for component in engine.components] == [4] * 10
    for step, (batch,) in enumerate(batches, start=1):
        model(**batch, num_items_in_batch=batch["labels"][..., 1:].ne(-100).sum()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        engine.step()
        for group in adamw.param_groups:
            group["lr"] = cosine(step)
        adamw.step()
        adamw.zero_grad()
    engine.close()
    assert engine.frozen == outcome.frozen
    assert differing(model, outcome) == []
