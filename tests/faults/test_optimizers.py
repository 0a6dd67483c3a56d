"""What is frozen stays frozen to the bit under an optimizer, or the optimizer is refused before the first step."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import nn
from transformers import Adafactor

from grades_hf import GradES, GradESConfig
from tests import small
from tests.small import llama, lora

CONFIG = GradESConfig(tau={".*": 1e-30, "q": 1e9, "up": 1e9}, alpha=0.25)
STEPS = 6
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Decaying(torch.optim.Optimizer):
    """Like Muon's reference implementation it moves, and decays, parameters that have no gradient."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                parameter.mul_(0.9).sub_(group["lr"] * gradient)
        return loss


class Child(Decaying):
    """Its step runs its base class's, so that torch's hooks run inside of each other."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return super().step(closure)


class Demanding(torch.optim.SGD):
    """Fails where a parameter in its groups has no gradient (DFW, BAdam)."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert all(p.grad.abs().sum() >= 0 for group in self.param_groups for p in group["params"])
        return super().step(closure)


class Lookahead(torch.optim.Optimizer):
    """An optimizer inside of an optimizer, which share their groups."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base, self.count = base, 0
        super().__init__([dict(group) for group in base.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.base.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                slow = self.state[parameter].setdefault("slow", parameter.clone())
                parameter.copy_(slow.lerp_(parameter, 0.5))
        return loss


class Hoarder(Decaying):
    """Keeps parameters of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.blocks = {"first": [(name, p) for name, p in enumerate(self.param_groups[0]["params"])]}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 2]


def of_torch(cls: type[torch.optim.Optimizer]) -> Make:
    options = {"lr": 1e-2}
    if "weight_decay" in inspect.signature(cls).parameters:
        options["weight_decay"] = 0.1
    return lambda model: cls(matrices(model) if cls.__name__ == "Muon" else model.parameters(), **options)


TORCH = {
    name: of_torch(cls)
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    if name not in ("LBFGS", "SparseAdam")  # refused below; for sparse gradients only, with or without GradES
}
OTHERS: dict[str, Make] = {
    "Adafactor with lr=None": lambda model: Adafactor(model.parameters()),
    "AdamW with a tensor for lr": lambda model: torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-2)),
    "AdamW with names": lambda model: torch.optim.AdamW(model.named_parameters(), lr=1e-2),
    "AdamW, fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "AdamW, foreach": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True),
    "AdamW with a list of betas": lambda model: torch.optim.AdamW(
        [{"params": list(model.parameters())[part], "betas": [0.9, 0.99]} for part in (slice(2), slice(2, None))]
    ),
    "moves what has no gradient": lambda model: Decaying(model.parameters()),
    "calls its base class": lambda model: Child(model.parameters()),
    "asks for each gradient": lambda model: Demanding(model.parameters(), lr=1e-2),
    "an optimizer inside": lambda model: Lookahead(torch.optim.AdamW(model.parameters(), lr=1e-2)),
}
BITSANDBYTES = "Adam Adam8bit AdamW32bit PagedAdamW8bit AdEMAMix8bit Lion8bit LAMB RMSprop8bit Adagrad"


def of_bitsandbytes(name: str) -> Make:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return lambda model: getattr(bitsandbytes.optim, name)(model.parameters(), lr=1e-2)


def moved(
    model: nn.Module, optimizer: Any, step: Callable[[], Any] | None = None
) -> tuple[GradES, list[str], set[str]]:
    """A short run: the engine, frozen tensors that moved (none), and what moved in the last step."""
    engine = GradES(model, CONFIG, total_steps=STEPS, optimizer=optimizer)
    ids = torch.tensor(small.tokens(4)["input_ids"])
    wrong: list[str] = []
    now: set[str] = set()
    for t in range(1, STEPS + 1):
        model(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (step or optimizer.step)()
        optimizer.zero_grad()
        now = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        frozen = {p for c in engine.components if c.frozen_at is not None for p in c.parameters}
        wrong += [f"{t}: {name}" for name, p in model.named_parameters() if p in frozen and name in now]
    return engine, wrong, now


def check(make: Make, model: nn.Module) -> None:
    optimizer = make(model)
    before = [list(group["params"]) for group in optimizer.param_groups]
    engine, wrong, now = moved(model, optimizer)
    assert wrong == []
    assert len(engine.frozen) == 4
    assert any("down_proj" in name for name in now)
    groups = [group["params"] for group in optimizer.param_groups]
    assert [[id(p) for p in group] for group in groups] == [[id(p) for p in group] for group in before]
    engine.close()
    assert "step" not in vars(optimizer)
    make(model).load_state_dict(optimizer.state_dict())


@pytest.mark.compatibility("Optimizers", "every optimizer of torch.optim but LBFGS", "works")
@pytest.mark.parametrize("name", TORCH)
def test_optimizers_of_torch(name):
    check(TORCH[name], llama())


@pytest.mark.compatibility("Optimizers", "those that move parameters without a gradient (Muon's reference)", "works")
@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers(name):
    check(OTHERS[name], llama())


@pytest.mark.compatibility("Optimizers", "bitsandbytes (8 bits, paged), on a CPU", "works")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", BITSANDBYTES.split())
def test_optimizers_of_bitsandbytes(name):
    check(of_bitsandbytes(name), llama())


@pytest.mark.compatibility("Optimizers", "LoRA+ (peft)", "works")
def test_lora_plus():
    def make(model: Any) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)

    check(make, lora(llama()))


REFUSED: dict[str, tuple[Make, str]] = {
    "LBFGS": (lambda model: torch.optim.LBFGS(model.parameters()), "needs a closure"),
    "parameters of its own": (lambda model: Hoarder(model.parameters()), "holds parameters outside"),
    "the model": (lambda model: attach(Decaying(model.parameters()), model), "holds parameters outside"),
    "another model's": (lambda model: torch.optim.SGD(llama().parameters(), lr=0.1), "holds none of the matrices"),
    "copies": (
        lambda model: torch.optim.SGD([p.detach().clone().requires_grad_(True) for p in model.parameters()], lr=0.1),
        "holds none of the matrices",
    ),
    "a gradient for each row": (lambda model: per_sample(model), "a gradient for each row"),
}


def per_sample(model: nn.Module) -> torch.optim.Optimizer:
    """As Opacus prepares a model."""
    for parameter in model.parameters():
        parameter.grad_sample = None  # type: ignore[attr-defined]
    return torch.optim.SGD(model.parameters(), lr=0.1)


def attach(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    optimizer.model = model  # type: ignore[attr-defined]
    return optimizer


@pytest.mark.compatibility(
    "Optimizers", "LBFGS; lists of parameters of their own (BAdam); per-sample gradients (Opacus)", "refused"
)
@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_are_refused(name):
    make, reason = REFUSED[name]
    model = llama()
    optimizer = make(model)
    with pytest.raises(ValueError, match=reason):
        GradES(model, CONFIG, total_steps=STEPS, optimizer=optimizer)
    assert all(p.requires_grad for p in model.parameters())
    assert "step" not in vars(optimizer)


@pytest.mark.compatibility("Optimizers", "LoRA-FA (peft)", "refused")
def test_lora_fa_is_refused_before_the_first_step():
    model = lora(llama())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
    with pytest.raises(ValueError, match="LoraFAOptimizer: its parameter groups hold"):
        GradES(model, GradESConfig(tau=1e9), total_steps=STEPS, optimizer=optimizer)


@pytest.mark.parametrize("cls", [Decaying, Child])
def test_the_wrapper_of_accelerate_in_float16_replaces_step(cls):
    """It puts a method of its own in the place of `step` while the scaler steps, and the first one back afterwards."""
    model = llama()
    with contextlib.suppress(AttributeError):
        Accelerator(cpu=True)
    prepared = Accelerator(cpu=True).prepare(cls(model.parameters()))
    inner = prepared.optimizer
    original = inner.step

    def step() -> None:  # what AcceleratedOptimizer.step does with a scaler
        inner.step = lambda *args, **kwargs: original(*args, **kwargs)
        inner.step()
        inner.step = original

    engine, wrong, _ = moved(model, prepared, step)
    assert wrong == []
    assert len(engine.frozen) == 4
    engine.close()
    assert len(inner.param_groups[0]["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_schedule_that_is_built_before_or_after_the_engine(when):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def schedule() -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimizer)

    schedules = [schedule()] if when == "before" else []
    engine = GradES(model, CONFIG, total_steps=STEPS, optimizer=optimizer)
    schedules += [schedule()] if when == "after" else []
    ids = torch.tensor(small.tokens(4)["input_ids"])
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        optimizer.step()
        schedules[0].step()  # it warns, which is an error here, if it has not seen the optimizer step
        optimizer.zero_grad()
    assert len(engine.frozen) == 4
    engine.close()
    optimizer.step()
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)


def test_a_closure_is_a_part_of_the_step():
    """Lightning computes gradients, and calls the engine, inside of `optimizer.step(closure)`."""
    model = llama()
    optimizer = Decaying(model.parameters())
    engine = GradES(model, CONFIG, total_steps=STEPS, optimizer=optimizer)
    ids = torch.tensor(small.tokens(4)["input_ids"])
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        engine.step()
        return loss

    for t in range(1, STEPS + 1):
        weights[t] = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step(closure)
    assert len(engine.frozen) == 4
    names = {p: name for name, p in model.named_parameters()}
    for component in engine.components:
        for p in component.parameters if component.frozen_at is not None else ():
            assert torch.equal(p, weights[component.frozen_at][names[p]])
