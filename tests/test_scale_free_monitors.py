"""relative_change and signal_to_noise against their formulas, element by element in float64."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from grades_hf import GradES, GradESConfig
from grades_hf.monitors import RelativeChange, Sampler, SignalToNoise
from grades_hf.monitors.norms import _grouped, square_distances, squares
from tests import small, toy

STEPS = 8
ADAMS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.99), weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
}


def relative_change(now: list[Tensor], before: list[Tensor]) -> float:
    """Of the concatenation of all tensors, one element after another."""
    pairs = [pair for a, b in zip(now, before, strict=True) for pair in zip(a.flatten(), b.flatten(), strict=True)]
    change = math.sqrt(sum((float(a) - float(b)) ** 2 for a, b in pairs))
    return change / (math.sqrt(sum(float(a) ** 2 for a, _ in pairs)) + math.sqrt(sum(float(b) ** 2 for _, b in pairs)))


def signal_to_noise(states: list[dict[str, Any]], betas: tuple[float, float]) -> float:
    total = 0.0
    for state in states:
        t = float(state["step"])
        for m, v in zip(state["exp_avg"].flatten().tolist(), state["exp_avg_sq"].flatten().tolist(), strict=True):
            if v > 0:
                total += abs(m / (1 - betas[0] ** t)) / math.sqrt(v / (1 - betas[1] ** t))
    return total


def run(kind: str, config: GradESConfig, make: Any = ADAMS["adamw"], seed: int = 0, factor: float = 1.0) -> Any:
    """The engine after STEPS steps, the gradients of each step, and the moments that each step found."""
    model = toy.build(kind)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
    gradients: list[dict[Tensor, Tensor]] = []
    moments: list[dict[Tensor, Any]] = []
    for (batch,) in toy.batches(seed)[:STEPS]:
        (factor * model(**batch).loss).backward()
        gradients.append({p: p.grad.clone() for c in engine.components for p in c.measured})
        moments.append({p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state})
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    return engine, gradients, moments


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("options", [{}, {"reduction": "mean"}, {"check_every": 3}, {"sample_size": 100}], ids=str)
def test_relative_change_is_its_formula(kind, options):
    engine, gradients, _ = run(kind, GradESConfig(tau=1e-30, monitor="relative_change", **options))
    every = options.get("check_every", 1)
    assert engine.history.steps == [t for t in range(1, STEPS + 1) if t % every == 0]
    for component in engine.components:
        values = engine.history.values[component.name]
        for t, value in zip(engine.history.steps, values, strict=True):
            if t == 1:
                assert math.isnan(value)
                continue
            now, before = ([gradients[s - 1][p] for p in component.measured] for s in (t, t - 1))
            assert value == pytest.approx(relative_change(now, before), rel=1e-9)
            assert 0 < value <= 1


@pytest.mark.parametrize("optimizer", ADAMS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_signal_to_noise_is_its_formula(kind, optimizer):
    betas = (0.8, 0.99) if optimizer == "adamw" else (0.9, 0.999)
    total, _, moments = run(kind, GradESConfig(tau=1e-30, monitor="signal_to_noise"), ADAMS[optimizer])
    mean, _, _ = run(kind, GradESConfig(tau=1e-30, monitor="signal_to_noise", reduction="mean"), ADAMS[optimizer])
    for component in total.components:
        values = total.history.values[component.name]
        assert math.isnan(values[0])
        expected = [signal_to_noise([found[p] for p in component.measured], betas) for found in moments[1:]]
        assert list(values)[1:] == pytest.approx(expected, rel=1e-6)
        assert list(mean.history.values[component.name])[1:] == pytest.approx(
            [v / component.numel for v in expected], rel=1e-6
        )
    second = {component.projection: mean.history.values[component.name][1] for component in mean.components}
    assert second["q"] == pytest.approx(1, rel=1e-6)
    assert kind == "lora" or 0 < second["up"] < 1  # some of its rows never had a gradient (ReLU)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("monitor", "tolerance"), [("relative_change", 1e-9), ("signal_to_noise", 1e-4)])
def test_the_scale_of_the_loss_does_not_matter(kind, monitor, tolerance):
    """Adam's own update has an epsilon, so its run is not quite the same."""

    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.0 if monitor == "relative_change" else 1e-2, eps=1e-12)

    one, _, _ = run(kind, GradESConfig(tau=1e-30, monitor=monitor), make)
    other, _, _ = run(kind, GradESConfig(tau=1e-30, monitor=monitor), make, factor=4096.0)
    for name, values in one.history.values.items():
        assert list(other.history.values[name])[1:] == pytest.approx(list(values)[1:], rel=tolerance)


def test_what_is_left_of_noise_is_what_the_docstrings_say():
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(50, 40))
    optimizer = torch.optim.Adam([parameter], lr=1e-5)
    ratio, change = SignalToNoise([optimizer]), RelativeChange()
    seen: list[tuple[float, float]] = []
    for step in range(400):
        parameter.grad = torch.randn(50, 40, generator=generator)
        if step > 100:
            seen.append((ratio.measure([parameter])[parameter].item() / 2000,
                         change.combine(change.measure([parameter])[parameter][None]).item()))  # fmt: skip
        change.remember([parameter])
        optimizer.step()
    means = torch.tensor(seen).mean(0)
    assert means[0].item() == pytest.approx(math.sqrt(2 / math.pi) * math.sqrt(0.1 / 1.9), rel=0.02)
    assert means[1].item() == pytest.approx(0.5**0.5, rel=0.01)


def test_a_gradient_that_turns_round_or_stays():
    monitor, parameter = RelativeChange(), nn.Parameter(torch.zeros(3, 4))
    gradient = torch.randn(3, 4)
    found = []
    for now in (gradient, -gradient, -gradient, torch.zeros(3, 4), torch.zeros(3, 4)):
        parameter.grad = now.clone()
        measured = monitor.measure([parameter])
        found += [monitor.combine(sums[None].double()).item() for sums in measured.values()]
        monitor.remember([parameter])
    assert found[:3] == [1.0, 0.0, 1.0]
    assert math.isnan(found[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (300, 1000), (4, 64, 70)])
def test_squares_match_float64(shape, dtype):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    copies = a.clone(), b.clone()
    pairs = ((squares([a]), a.double()), (square_distances([a], [b]), a.double() - b.double()))
    for (measured,), exact in pairs:
        assert measured.item() == pytest.approx(exact.square().sum().item(), rel=2e-6)
    for other, (measured,) in ((None, squares([a])), ([b], square_distances([a], [b]))):
        for chunk in (100, 1 << 23):
            assert _grouped([a], other, chunk, 2)[0].item() == pytest.approx(measured.item(), rel=4e-4)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["full", "lora"]), monitor=st.sampled_from(["relative_change", "signal_to_noise"]),
    resume_after=st.frozensets(st.integers(1, toy.STEPS - 1), max_size=3), seed=st.integers(0, 100),
    uses=st.sampled_from([(), (2, 1), (1, 1, 2, 2, 2)]), size=st.sampled_from([None, 5]),
)  # fmt: skip
def test_resumed_runs_are_the_same(kind, monitor, resume_after, seed, uses, size):
    """Also with blocks that a step does not use, and with a sample."""
    config = GradESConfig(
        tau=0.65 if monitor == "relative_change" else 0.5, reduction="mean", alpha=0.15, monitor=monitor,
        sample_size=size, count_flops=False,
    )  # fmt: skip
    steps = toy.batches(seed, 1, uses)
    whole = toy.train(kind, config, steps, "adamw")
    again = toy.train(kind, config, steps, "adamw", resume_after=resume_after)
    assert whole.moved == again.moved == []
    assert again.engine.frozen == whole.engine.frozen
    assert again.engine.history.to_dict()["values"] == whole.engine.history.to_dict()["values"]
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize("cls", [RelativeChange, SignalToNoise])
def test_a_sample_is_of_the_same_elements_in_every_sum(cls):
    parameter = nn.Parameter(torch.randn(30, 50))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    sampler = Sampler(200, {parameter: "w"})
    monitor = cls(sampler) if cls is RelativeChange else cls([optimizer], sampler)
    index = sampler._index(parameter).long()
    before = torch.zeros(0)
    for step in range(3):
        parameter.grad = torch.randn(30, 50)
        flat = parameter.grad.flatten()[index]
        if step:
            (sums,) = monitor.measure([parameter]).values()
            if cls is RelativeChange:
                value, expected = monitor.combine(sums[None]).item(), relative_change([flat], [before])
            else:
                state = optimizer.state[parameter]
                taken = {k: v.flatten()[index] if v.ndim else v for k, v in state.items()}
                value, expected = sums.item(), signal_to_noise([taken], (0.9, 0.999)) * 1500 / 200
            assert value == pytest.approx(expected, rel=1e-5)
        before = flat
        monitor.remember([parameter])
        optimizer.step()


def test_moments_that_are_not_there_are_refused():
    config = GradESConfig(tau=1.0, monitor="signal_to_noise")
    for optimizer in (None, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)):
        with pytest.raises(ValueError, match="signal_to_noise.*AdamW"):
            GradES(toy.build("full"), config, total_steps=STEPS, optimizer=optimizer)
    with pytest.raises(ValueError, match="finds no 'exp_avg_sq' in the state of Adamax"):
        run("full", config, lambda p: torch.optim.Adamax(p, lr=1e-3))


def test_signal_to_noise_keeps_nothing():
    model = small.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    engine = GradES(model, GradESConfig(tau=1e-30, monitor="signal_to_noise"), total_steps=4, optimizer=optimizer)
    for _ in range(3):
        ids = torch.randint(3, 64, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.previous_tensors() == {}
    assert sum(monitor.nbytes for monitor in engine.monitors.values()) == 0


# --- sharded ---------------------------------------------------------------------------------------------------------


def two_shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for monitor in ("relative_change", "signal_to_noise"):
        model = toy.build("full")
        for block in model.model.layers:
            fully_shard(block)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        config = GradESConfig(tau=1e-30, monitor=monitor, reduction="mean", count_flops=False)
        engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
        for (batch,) in toy.batches(0)[:STEPS]:
            model(**batch).loss.backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        found[monitor] = {name: list(values) for name, values in engine.history.values.items()}
        engine.close()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.compatibility("Distributed", "FSDP2, scale-free monitors", "works")
def test_shards_give_what_whole_tensors_give():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_shards, (folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for monitor in ("relative_change", "signal_to_noise"):
        config = GradESConfig(tau=1e-30, monitor=monitor, reduction="mean", count_flops=False)
        engine, _, _ = run("full", config, lambda p: torch.optim.AdamW(p, lr=1e-2))
        for name, values in engine.history.values.items():
            one, two = (found[monitor][name] for found in ranks)
            assert one[1:] == two[1:] == pytest.approx(list(values)[1:], rel=1e-9)
            assert all(math.isnan(first) for first in (one[0], two[0]))
    assert all(a != b for a, b in itertools.pairwise(list(values)[1:]))
