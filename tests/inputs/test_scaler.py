"""Half precision, gradient scaling and the optimizers that people train with: exact freezing in each of them."""

from __future__ import annotations

import importlib.util
import itertools
import math
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from grades_hf import GradES, GradESCallback, GradESConfig, GradESTrainer
from tests import reference, runs, small
from tests.resumable import record
from tests.runs import STEPS, Setting
from tests.small import Spy, between, llama, lora

# --- float16 with a gradient scaler -----------------------------------------------------------------------------------

ROWS = torch.tensor(small.tokens(48)["input_ids"]).view(12, 4, -1)
MAX_NORM = 0.05


def scaler() -> torch.amp.GradScaler:
    """One whose factor is too large at first, and again and again later: about half of the steps overflow."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)


def backward(model: nn.Module, rows: torch.Tensor, scaler: torch.amp.GradScaler) -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_ids=rows, labels=rows).loss
    scaler.scale(loss).backward()


def literal(clip: bool, monitor: str, tau: float, grace: int, patience: int) -> tuple[dict, dict, dict, list[int]]:
    """Algorithm 1 under a scaler, step for step: (frozen, values by step, final weights, skipped steps).

    A step that the scaler skips has no value, and neither has one that follows it and compares with it.
    """
    model = llama()
    optimizer, grad_scaler = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5), scaler()
    matrices = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if "proj" in n}
    frozen: dict[str, int] = {}
    values: dict[str, dict[int, float]] = {name: {} for name in matrices}
    below = dict.fromkeys(matrices, 0)
    previous: dict[str, torch.Tensor] = {}
    skipped_steps = []
    for step, rows in enumerate(ROWS, start=1):
        backward(model, rows, grad_scaler)
        gradients = [p.grad / grad_scaler.get_scale() for p in model.parameters() if p.grad is not None]
        skipped = any(not gradient.isfinite().all() for gradient in gradients)
        factor = grad_scaler.get_scale()
        if clip:
            grad_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            factor = 1.0
        for name, weight in matrices.items():
            if name in frozen:
                continue
            now = (weight if monitor == "weight_change" else weight.grad / factor).detach().clone()
            value = None
            if not skipped and monitor == "gradient_norm":
                value = now.double().abs().sum().item()
            elif not skipped and name in previous:
                value = (now.double() - previous[name].double()).abs().sum().item()
            if skipped:
                previous.clear()
                skipped_steps.append(step)
            else:
                previous[name] = now
            if value is not None:
                values[name][step] = value
            below[name] = below[name] + 1 if value is not None and value < tau and step > grace else 0
            if below[name] == patience:
                frozen[name] = step
                weight.requires_grad_(False)
                weight.grad = None
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
    return frozen, values, model.state_dict(), sorted(set(skipped_steps))


@pytest.mark.parametrize("clip", [False, True], ids=["noclip", "clip"])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
@pytest.mark.compatibility("Precision and memory", "float16, torch.amp.GradScaler in a loop", "works")
def test_a_loop_with_a_gradient_scaler_equals_algorithm_1(monitor: str, clip: bool) -> None:
    _, values, _, skipped = literal(clip, monitor, 0.0, 4, 1)
    assert 3 < len(skipped) < 9
    assert min(skipped) < 4 < max(skipped)
    late = [value for series in values.values() for step, value in series.items() if step > 4]
    tau = float(torch.tensor(late).median()) * 1.001
    frozen, values, final, skipped = literal(clip, monitor, tau, 4, 1)
    assert 0 < len(frozen) < 14

    model, grad_scaler = llama(), scaler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    config = GradESConfig(tau=tau, alpha=0.33, monitor=monitor)
    engine = GradES(model, config, total_steps=12, optimizer=optimizer, scaler=grad_scaler)
    for rows in ROWS:
        backward(model, rows, grad_scaler)
        if clip:
            grad_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        engine.step()
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
    assert engine.frozen == frozen
    for name, series in engine.history.values.items():
        measured = {step: value for step, value in enumerate(series, start=1) if math.isfinite(value)}
        assert measured == pytest.approx(values[name], rel=1e-5)
    assert all(torch.equal(tensor, final[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_overflow_anywhere_freezes_nothing(max_grad_norm: float, monitor: str) -> None:
    """Also where it is outside of what is tracked, and where clipping has made zeros of all other gradients."""
    model, grad_scaler = llama(), torch.amp.GradScaler("cpu", init_scale=16.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    engine = GradES(
        model,
        GradESConfig(tau=1e30, alpha=0.0, monitor=monitor),
        total_steps=12,
        optimizer=AcceleratedOptimizerWithScaler(optimizer, grad_scaler),
    )
    for step, rows in enumerate(ROWS, start=1):
        grad_scaler.scale(model(input_ids=rows, labels=rows).loss).backward()
        if step < 6:
            model.model.norm.weight.grad[0] = math.inf
        if max_grad_norm:
            grad_scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        engine.step()
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
        if engine.done:
            break
    assert set(engine.frozen.values()) == {6 if monitor == "gradient_norm" else 7}


class AcceleratedOptimizerWithScaler:
    """As accelerate's wrapper holds both, of which there is no public way to make one on a CPU."""

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.optimizer, self.scaler = optimizer, scaler


def use_scaler(trainer: Trainer, factor: float) -> None:
    """A scaler as fp16=True brings it on an accelerator, put where it goes; no autocast, so that sums are exact."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor, growth_interval=2)
    trainer.accelerator.native_amp = True
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
    trainer.accelerator.state._mixed_precision = "fp16"


class Overflow(TrainerCallback):
    """Makes one gradient of some optimizer steps infinite, before they are clipped or measured."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 in self.steps:
            handle = model.get_input_embeddings().weight.register_hook(lambda gradient: gradient + math.inf)
            self.handle = handle

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if hasattr(self, "handle"):
            self.handle.remove()


@pytest.fixture
def accelerate_state():
    """Leaves accelerate's state, which all accelerators of a process share, as it is in a new process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize(("monitor", "max_grad_norm"), [("gradient_change", 0.0), ("gradient_norm", 0.1)])
@pytest.mark.compatibility("Precision and memory", "float16, GradScaler in Trainer, with and without clipping", "works")
def test_trainer_with_a_scaler_measures_what_it_measures_without(monitor, max_grad_norm, tmp_path):
    """The factor is a power of two, so not one bit may differ."""

    def run(name: str, tau: float, factor: float | None) -> tuple[GradES, dict[str, torch.Tensor]]:
        callback = GradESCallback(tau=tau, alpha=0.3, monitor=monitor)
        options = {"max_grad_norm": max_grad_norm, "lr_scheduler_type": "constant"}
        trainer = small.trainer(llama(), tmp_path / name, [callback], **options)
        if factor is not None:
            use_scaler(trainer, factor)
        trainer.train()
        return callback.engine, dict(trainer.model.named_parameters())

    tau = between(run("seen", 1e-30, None)[0].history.values)
    plain, weights = run("plain", tau, None)
    scaled, scaled_weights = run("scaled", tau, 1024.0)
    assert 0 < len(plain.frozen) < 14
    assert scaled.frozen == plain.frozen
    assert record(scaled.history) == record(plain.history)
    assert all(torch.equal(p, scaled_weights[n]) for n, p in weights.items())


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize(("monitor", "max_grad_norm"), [("gradient_change", 1.0), ("gradient_norm", 0.0)])
def test_steps_that_trainer_skips_freeze_nothing(monitor, max_grad_norm, tmp_path):
    callback = GradESCallback(tau=1e30, alpha=0.25, monitor=monitor)  # 3 steps of grace
    overflow = Overflow({4, 5, 7})
    trainer = small.trainer(llama(), tmp_path, [callback, overflow], max_grad_norm=max_grad_norm)
    use_scaler(trainer, 16.0)
    trainer.train()
    assert set(callback.engine.frozen.values()) == {6 if monitor == "gradient_norm" else 9}
    empty = [4, 5, 6, 7, 8] if monitor != "gradient_norm" else [4, 5]
    for series in callback.engine.history.values.values():
        assert [step for step, value in enumerate(series, start=1) if not math.isfinite(value) and step > 2] == empty


@pytest.mark.usefixtures("accelerate_state")
def test_resuming_the_end_of_a_run_with_a_scaler(tmp_path):
    def train(resume: bool) -> Trainer:
        trainer = small.trainer(
            llama(), tmp_path, [GradESCallback(tau=1e30)], max_grad_norm=0.0, save_strategy="steps", save_steps=100
        )
        use_scaler(trainer, 16.0)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first, second = train(False), train(True)
    assert first.state.global_step == second.state.global_step == 7
    assert all(p.equal(q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_a_torch_that_does_not_tell_what_overflowed_is_refused(monkeypatch):
    monkeypatch.delattr(torch.amp.GradScaler, "_found_inf_per_device")
    model = llama()
    options = {"total_steps": 1, "optimizer": torch.optim.SGD(model.parameters())}
    with pytest.raises(RuntimeError, match=r"lacks _found_inf_per_device\. Use torch"):
        GradES(model, GradESConfig(tau=1.0), **options, scaler=scaler())
    GradES(model, GradESConfig(tau=1.0), **options, scaler=torch.amp.GradScaler("cpu", enabled=False))


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def autocast(model: nn.Module) -> nn.Module:
    """`model` with a forward pass as `bf16=True` makes it."""
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    return model


def bfloat16(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16)


@pytest.mark.usefixtures("accelerate_state")
@pytest.mark.parametrize(("kind", "monitor"), [("full", "gradient_change"), ("lora", "gradient_norm")])
@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        pytest.param(
            {"bf16": True},
            autocast,
            marks=pytest.mark.compatibility("Precision and memory", "bfloat16 autocast (bf16=True)", "works"),
            id="autocast",
        ),
        pytest.param(
            {},
            bfloat16,
            marks=pytest.mark.compatibility("Precision and memory", "bfloat16 weights", "works"),
            id="weights",
        ),
    ],
)
def test_bfloat16_equals_algorithm_1(options, prepare, kind, monitor, tmp_path):
    """Bit for bit, with the same arithmetic in the literal twin."""
    setting = Setting(kind)

    def twin(tau: float) -> reference.Outcome:
        return reference.train(
            prepare(runs.load(kind)),
            setting.batches(),
            runs.optimizer,
            runs.cosine,
            tau=tau,
            alpha=0.3,
            monitor=monitor,
            max_grad_norm=setting.max_grad_norm,
        )

    tau, outcome = runs.pick_tau(twin, twin(0.0).values, first=5)
    callback = GradESCallback(tau=tau, alpha=0.3, monitor=monitor)
    model = runs.load(kind) if options else prepare(runs.load(kind))
    trainer = setting.trainer(tmp_path, [callback], model=model, **options)
    trainer.train()
    assert callback.engine.frozen == outcome.frozen
    assert runs.differing(trainer.model, outcome) == []
    assert trainer.state.global_step == STEPS


# --- optimizers -------------------------------------------------------------------------------------------------------

SETS = {"q": 1e9, "down": 1e9, "attention": 1e-30, "mlp": 1e-30}  # two of seven matrices freeze, at the first check
bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
ARGS = {"sgd": "momentum=0.9", "rmsprop": "momentum=0.9"}


def wide() -> nn.Module:
    """Matrices of 4,096 elements and more, which bitsandbytes keeps 8-bit states for."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, max_position_embeddings=32))


def check(trainer: Trainer, callback: GradESCallback, spy: Spy, first: int = 5, steps: int = 12) -> None:
    """q and down froze before the update of step `first`, and everything else moved at every step."""
    engine = callback.engine
    names = {p: n for n, p in trainer.model.named_parameters()}
    frozen = {names[p] for c in engine.components for p in c.parameters if c.name.endswith(("q_proj", "down_proj"))}
    assert set(engine.frozen.values()) == {first}
    assert frozen == {names[p] for c in engine.components if c.frozen_at for p in c.parameters}
    spy.weights[steps + 1] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for name in (names[p] for c in engine.components for p in c.parameters):
        pairs = itertools.pairwise(spy.weights[step][name] for step in range(1, steps + 2))
        moved = {step for step, (a, b) in enumerate(pairs, start=1) if not torch.equal(a, b)}
        assert moved == {step for step in range(1, steps + 1) if name not in frozen or step < first}, name
    optimizer = trainer.optimizer.optimizer
    for parameter, name in names.items():
        assert (len(optimizer.state.get(parameter, {})) > 0) <= (name not in frozen)
    everything = {p for group in optimizer.param_groups for p in group["params"]}
    assert everything == {p for p in names if p.requires_grad}  # after training, what was frozen does again


def frozen_and_resumed(optim: str, make: Any, folder: Any) -> None:
    """Half of the weights decays in vain; a resumed run ends with the very same weights."""

    def run(name: str, resume: str | None = None) -> tuple[Trainer, GradESCallback, Spy]:
        callback, spy = GradESCallback(tau=SETS, alpha=0.3), Spy()
        options = {"optim": optim, "optim_args": ARGS.get(optim), "save_strategy": "steps", "save_steps": 7}
        options |= {"weight_decay": 0.5, "learning_rate": 1e-1 if optim == "sgd" else 1e-2}
        trainer = small.trainer(make(), folder / name, [callback, spy], **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, callback, spy

    whole, callback, spy = run("whole")
    check(whole, callback, spy)
    resumed, resumed_callback, _ = run("resumed", str(folder / "whole" / "checkpoint-7"))
    assert resumed_callback.engine.frozen == callback.engine.frozen
    latest = [c.engine.history.latest() for c in (callback, resumed_callback)]
    assert latest[0] == latest[1]
    assert all(p.equal(q) for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


@pytest.mark.compatibility("Optimizers", "AdamW: adamw_torch, adamw_torch_fused", "works")
@pytest.mark.compatibility("Optimizers", "Adafactor, SGD with momentum, Adagrad, RMSprop", "works")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_optimizers(optim: str, tmp_path: Any) -> None:
    frozen_and_resumed(optim, llama, tmp_path)


@bitsandbytes
@pytest.mark.filterwarnings("ignore:.*:UserWarning:bitsandbytes")  # on a CPU it comments on its kernels
@pytest.mark.compatibility(
    "Optimizers", "bitsandbytes: adamw_8bit, ademamix_8bit, lion_8bit, rmsprop_bnb_8bit", "works"
)
@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_8bit", wide),
        ("adamw_8bit", lora),
        ("ademamix_8bit", llama),
        ("lion_8bit", wide),
        ("rmsprop_bnb_8bit", llama),
    ],
)
def test_optimizers_of_bitsandbytes(optim: str, make: Any, tmp_path: Any) -> None:
    frozen_and_resumed(optim, make, tmp_path)


@pytest.mark.compatibility("Optimizers", "galore_*_layerwise, apollo_adamw_layerwise, lomo, adalomo", "refused")
@pytest.mark.parametrize(
    ("optim", "instead"),
    [("galore_adamw_layerwise", "galore_adamw"), ("apollo_adamw_layerwise", "apollo_adamw"), ("lomo", "adafactor")],
)
def test_optimizers_that_update_during_backward_are_refused(optim: str, instead: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=f"optim='{optim}': .*Use {instead}\\."):
        small.trainer(llama(), tmp_path, [GradESCallback(tau=1.0)], optim=optim, optim_target_modules="all-linear")


# --- a batch that does not fit ----------------------------------------------------------------------------------------


class TooLarge(TrainerCallback):
    """A batch of four does not fit any more at some step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.sizes: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sizes.append(state.train_batch_size)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.sizes[-1] > 2 and state.global_step + 1 == self.step:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")  # as torch words it


@pytest.mark.compatibility("Precision and memory", "auto_find_batch_size", "works")
@pytest.mark.parametrize(("step", "mixin"), [(1, False), (8, True)], ids=["callback", "mixin"])
def test_auto_find_batch_size_starts_over(step: int, mixin: bool, tmp_path: Any) -> None:
    """Also when something was frozen already: nothing of the first attempt is left but its updates of the weights."""
    too_large, spy = TooLarge(step), Spy()
    config = GradESConfig(tau=SETS, alpha=0.3)
    callback = GradESCallback(config)
    options = {"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 1}
    if mixin:
        extra = {"grades": config}
        trainer = small.trainer(llama(), tmp_path, [too_large, spy], GradESTrainer, extra, **options)
        callback = trainer.grades_callback
    else:
        trainer = small.trainer(llama(), tmp_path, [callback, too_large, spy], **options)
    trainer.train()
    assert too_large.sizes[0] == 4
    assert 1 <= too_large.sizes[-1] <= 3
    steps = math.ceil(48 / too_large.sizes[-1])
    assert callback.engine.total_steps == trainer.state.global_step == steps > 12
    check(trainer, callback, spy, first=math.ceil(0.3 * steps) + 1, steps=steps)
