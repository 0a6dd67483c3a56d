"""Each statistic against its formula, and what it keeps in memory."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.statistics import GradientChange, GradientNorm, Sampler, WeightChange
from grades_hf.statistics.norms import _grouped, l1_distances, l1_norms
from grades_hf.statistics.sampling import latin_hypercube
from tests import small, transfers
from tests.resumable import record

SHAPES = [(), (5,), (3, 7), (300, 1000), (4, 64, 70), (2, 100_000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_l1_norms_match_float64(shape, dtype):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    copies = a.clone(), b.clone()
    for measured, expected in ((l1_norms([a])[0], a.double()), (l1_distances([a], [b])[0], a.double() - b.double())):
        assert measured.item() == pytest.approx(expected.abs().sum().item(), rel=tolerance)
        assert measured.dtype == torch.float64
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


@pytest.mark.parametrize("chunk", [100, 20_000, 1 << 23])
def test_what_runs_on_an_accelerator_gives_the_same(chunk):
    """Here on the CPU, whose `_foreach_norm` is less exact than an accelerator's."""
    kinds = itertools.product((torch.float32, torch.bfloat16, torch.float64), [*SHAPES, (0, 3)])
    a = [torch.randn(shape).to(dtype) for dtype, shape in kinds]
    b = [torch.randn_like(tensor) for tensor in a]
    for measured, expected in ((_grouped(a, None, chunk), l1_norms(a)), (_grouped(a, b, chunk), l1_distances(a, b))):
        assert [norm.item() for norm in measured] == pytest.approx(expected.tolist(), rel=2e-4)


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float32, torch.bfloat16, torch.float64]])
def test_small_tensors_are_measured_together_as_each_alone(dtypes):
    shapes = [(4, 4), (16, 576), (576, 16), (), (0, 3), (300, 400), (4, 4), (2, 8), (16, 576)]
    a = [torch.randn(shape).to(dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes * 20)]
    b = [torch.randn_like(tensor) for tensor in a]
    copies = [tensor.clone() for tensor in [*a, *b]]
    for together, alone, expected in (
        (l1_norms(a), [l1_norms([x]) for x in a], [x.double() for x in a]),
        (l1_distances(a, b), [l1_distances([x], [y]) for x, y in zip(a, b, strict=True)],
         [x.double() - y.double() for x, y in zip(a, b, strict=True)]),
    ):  # fmt: skip
        assert together.tolist() == pytest.approx([tensor.abs().sum().item() for tensor in expected], rel=2e-6)
        if len(dtypes) == 1:
            assert torch.equal(together, torch.cat(alone))
    assert all(map(torch.equal, [*a, *b], copies))


def test_l1_distance_of_transposed_tensors():
    a, b = torch.randn(70, 900).t(), torch.randn(70, 900).t()
    assert l1_distances([a], [b])[0].item() == pytest.approx((a - b).abs().sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l1_distance_makes_no_temporary_of_the_size_of_a_matrix(dtype):
    a, b = torch.randn(4000, 1000).to(dtype), torch.randn(4000, 1000).to(dtype)
    with torch.profiler.profile(profile_memory=True) as profile:
        l1_distances([a], [b])
        l1_norms([a])
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= a.numel() * 4 / 10


def value(monitor, parameter):
    """What it measures, None where there is nothing to compare with."""
    found, values = monitor.measure([parameter])
    return values.item() if found else None


def loop(monitor, parameter, gradients, *, set_to_none=True):
    """The monitor's values over a plain training loop whose step t has gradients[t - 1]."""
    values = []
    for gradient in gradients:
        (parameter * gradient).sum().backward()
        values.append(value(monitor, parameter))
        monitor.remember([parameter])
        parameter.data.sub_(0.1 * parameter.grad)
        if set_to_none:
            parameter.grad = None
        else:
            parameter.grad.zero_()
    return values


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_change_is_equation_1(set_to_none):
    parameter = nn.Parameter(torch.randn(4, 6))
    gradients = [torch.randn(4, 6) for _ in range(6)]
    values = loop(GradientChange(), parameter, gradients, set_to_none=set_to_none)
    assert values[0] is None
    expected = [(b - a).abs().sum().item() for a, b in itertools.pairwise(gradients)]
    assert values[1:] == pytest.approx(expected, rel=1e-5)


def test_gradient_norm_is_equation_3():
    gradients = [torch.randn(4, 6) for _ in range(3)]
    values = loop(GradientNorm(), nn.Parameter(torch.randn(4, 6)), gradients)
    assert values == pytest.approx([g.abs().sum().item() for g in gradients], rel=1e-5)


def test_weight_change_is_the_last_completed_update():
    gradients = [torch.randn(4, 6) for _ in range(4)]
    values = loop(WeightChange(), nn.Parameter(torch.randn(4, 6)), gradients)
    assert values[0] is None
    assert values[1:] == pytest.approx([0.1 * g.abs().sum().item() for g in gradients[:-1]], rel=1e-4)


def test_gradients_are_kept_not_copied_where_the_loop_drops_them():
    monitor, parameter = GradientChange(), nn.Parameter(torch.randn(4, 6))
    loop(monitor, parameter, [torch.randn(4, 6) for _ in range(3)])
    (parameter * torch.randn(4, 6)).sum().backward()
    gradient = parameter.grad
    monitor.remember([parameter])
    assert monitor.previous[parameter] is gradient


def test_a_view_of_a_bucket_is_copied():
    monitor, parameter = GradientChange(), nn.Parameter(torch.randn(4, 6))
    loop(monitor, parameter, [torch.randn(4, 6) for _ in range(3)])
    bucket = torch.zeros(100)
    parameter.grad = bucket[:24].view(4, 6)
    monitor.remember([parameter])
    bucket.fill_(7)
    assert torch.equal(monitor.previous[parameter], torch.zeros(4, 6))


def test_a_kept_gradient_that_is_overwritten_gives_no_value_and_one_warning(caplog):
    monitor = GradientChange()
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(4, 6)
        monitor.remember(parameters)
        for parameter in parameters:
            parameter.grad = None
    seen = []
    for _ in range(4):  # a loop that suddenly zeroes in place
        values = []
        for parameter in parameters:
            (parameter * torch.randn(4, 6)).sum().backward()
            values.append(value(monitor, parameter))
        seen.append([measured is not None for measured in values])
        gradients = [parameter.grad.clone() for parameter in parameters]
        monitor.remember(parameters)
        for parameter in parameters:
            parameter.grad.zero_()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if len(seen) > 1:
                assert torch.equal(monitor.previous[parameter], gradient)
    assert seen == [[True, True], [False, False], [True, True], [True, True]]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("cls", [GradientChange, WeightChange])
def test_forget_frees_the_memory(cls):
    monitor, parameter = cls(), nn.Parameter(torch.randn(4, 6))
    loop(monitor, parameter, [torch.randn(4, 6) for _ in range(3)])
    storage = monitor.previous[parameter].untyped_storage()._weak_ref()
    monitor.forget([parameter])
    gc.collect()
    assert not monitor.previous
    assert torch.UntypedStorage._expired(storage)


@pytest.mark.parametrize("cls", [GradientChange, WeightChange])
def test_what_the_next_check_does_not_need_is_not_kept(cls):
    monitor, parameters = cls(), [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn(4, 6)
    monitor.remember(parameters)
    assert set(monitor.previous) == set(parameters)
    monitor.remember(parameters[:1])
    assert set(monitor.previous) == set(parameters[:1])
    monitor.remember([])
    assert monitor.previous == {}


# --- samples ---------------------------------------------------------------------------------------------------------


def sampled(cls, parameters, size):
    return cls(Sampler(size, {parameter: f"matrix {index}" for index, parameter in enumerate(parameters)}))


@pytest.mark.parametrize("cls", [GradientChange, GradientNorm, WeightChange])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_sample_of_all_elements_is_exact(cls, set_to_none):
    start, gradients = torch.randn(7, 6), [torch.randn(7, 6) for _ in range(4)]
    exact = loop(cls(), nn.Parameter(start.clone()), gradients, set_to_none=set_to_none)
    parameter = nn.Parameter(start.clone())
    values = loop(sampled(cls, [parameter], 42), parameter, gradients, set_to_none=set_to_none)
    assert values[1:] == pytest.approx(exact[1:], rel=1e-6)
    assert (values[0] is None) == (exact[0] is None)


@pytest.mark.parametrize("cls", [GradientChange, GradientNorm, WeightChange])
@pytest.mark.parametrize("layout", ["rows", "columns", "three dimensions"])
def test_a_sample_is_what_its_indices_say(cls, layout):
    start = {"rows": torch.randn(30, 50), "columns": torch.randn(50, 30).t()}.get(layout, torch.randn(3, 20, 25))
    parameter, index, values = nn.Parameter(start), None, []
    monitor = sampled(cls, [parameter], 200)
    kept, expected = [], []
    for _ in range(4):
        parameter.grad = torch.randn(1500).view(50, 30).t() if layout == "columns" else torch.randn(start.shape)
        index = monitor.sampler._index(parameter).long() if index is None else index
        source = (parameter.detach() if cls is WeightChange else parameter.grad).clone()
        flat = (source.t() if layout == "columns" else source).reshape(-1)
        kept.append(flat[index])
        base = torch.zeros(200) if cls is GradientNorm else kept[-2] if len(kept) > 1 else None
        expected.append(None if base is None else (kept[-1] - base).abs().sum().item() * 1500 / 200)
        values.append(value(monitor, parameter))
        monitor.remember([parameter])
        parameter.data.sub_(0.1 * parameter.grad)
    assert index.unique().numel() > 150
    assert [v is None for v in values] == [e is None for e in expected]
    assert [v for v in values if v is not None] == pytest.approx([e for e in expected if e is not None], rel=1e-5)
    if cls is not GradientNorm:
        assert [kept.nbytes for kept in monitor.previous.values()] == [200 * 4]


def test_samples_depend_on_the_name_alone():
    one, two = (nn.Parameter(torch.randn(100, 100)) for _ in range(2))
    state = torch.get_rng_state()
    sampler = Sampler(64, {one: "a", two: "b"})
    first, second = (sampler.take(p, p.detach()) for p in (one, two))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    again = Sampler(64, {one: "b", two: "a"})
    assert torch.equal(again._index(two), sampler._index(one))
    assert not torch.equal(sampler._index(one), sampler._index(two))
    sampler.forget(one)
    assert torch.equal(sampler.take(one, one.detach()), first)
    assert sampler.nbytes == 2 * 64 * 4
    assert first.shape == second.shape == (64,)


def test_the_estimate_is_unbiased_where_a_few_rows_and_columns_are_all():
    """Each element has the same chance; every n-th element would miss the only column, or see nothing else."""
    matrix = torch.zeros(96, 64)
    matrix[::8] = 1.0
    matrix[:, 3] += 20.0
    total = matrix.sum().item()
    estimates = torch.tensor([matrix.view(-1)[latin_hypercube(96, 64, 256, seed)].mean() * 6144 for seed in range(400)])
    error = estimates.std().item() / 20
    assert abs(estimates.mean().item() - total) < 4 * error
    uniform = torch.tensor([matrix.view(-1)[torch.randint(6144, (256,))].mean() * 6144 for _ in range(400)])
    assert estimates.std() < 0.5 * uniform.std()


def test_indices_stay_inside():
    for rows, columns, size in ((1, 5000, 64), (5000, 1, 64), (3, 7, 20), (2, 2, 1)):
        for seed in range(20):
            index = latin_hypercube(rows, columns, size, seed)
            assert index.shape == (size,)
            assert index.min() >= 0
            assert index.max() < rows * columns


def test_relative_error_on_real_gradients(tiny_model_dir, text_blocks):
    """As Sampler says: a few percent at 1024 elements, for gradients and for their change."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    steps = []
    for rows in text_blocks[:256].view(2, 2, 64):
        model.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.numel() > 2048 and "layers" in n})
    first, second = steps
    assert len(first) >= 25
    for matrices in ([second[name] for name in first], [second[name] - first[name] for name in first]):
        errors = []
        for index, matrix in enumerate(matrices):
            sampler = Sampler(1024, {matrix: f"{index}"})
            estimate = sampler.take(matrix, matrix).double().abs().sum().item() * sampler.factor(matrix)
            errors.append(estimate / matrix.double().abs().sum().item() - 1)
        errors = torch.tensor(errors)
        assert errors.square().mean().sqrt() < 0.04
        assert errors.abs().max() < 0.15


def train(engine, model, steps, seed=7, start=0):
    """`steps` steps of a plain loop on fixed batches, from the batch `start` on."""
    optimizer = engine.freezer.optimizers[0]
    rows = torch.randint(3, 64, (50, 2, 8), generator=torch.Generator().manual_seed(seed))
    for batch in rows[start : start + steps]:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            break


def begin(kind, config, steps=12):
    model = small.llama() if kind == "full" else small.lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, GradES(model, config, total_steps=steps, optimizer=optimizer)


def middle(history, part=0.5):
    return small.between(history.values, part)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
def test_sampled_values_in_a_run(monitor, kind):
    """One run and its exact twin: the same steps have values, near the exact ones; what is kept is small."""
    histories, kept = [], []
    for size in (None, 100):
        model, _, engine = begin(kind, GradESConfig(tau=1e-30, monitor=monitor, sample_size=size))
        train(engine, model, 5)
        histories.append(engine.history)
        kept += [list(engine.tensors().get("previous", {}).values())]
        engine.close()
    exact, estimate = histories
    for name, series in exact.values.items():
        for step, (a, b) in enumerate(zip(series, estimate.values[name], strict=True)):
            assert math.isfinite(a) == math.isfinite(b), (name, step)
            assert not math.isfinite(a) or b == pytest.approx(a, rel=0.5)
    assert all(tensor.ndim == 1 and tensor.numel() <= 100 for tensor in kept[1])
    assert len(kept[1]) == len(kept[0])


@pytest.mark.parametrize("options", [{"sample_size": 50}, {"delay_transfer": True}, {"sample_size": 50, "patience": 2}])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
def test_resumed_bit_for_bit(monitor, options):
    model, _, engine = begin("full", GradESConfig(tau=1e-30, monitor=monitor, **options))
    train(engine, model, 12)
    tau = middle(engine.history)
    config = GradESConfig(tau=tau, alpha=0.3, monitor=monitor, **options)

    model, _, whole = begin("full", config)
    train(whole, model, 12)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert 0 < len(whole.frozen) < len(whole.components)
    whole.close()

    model, optimizer, engine = begin("full", config)
    train(engine, model, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), engine.state_dict()))
    engine.close()
    model, optimizer, engine = begin("full", config)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    engine.load_state_dict(saved[2])
    train(engine, model, 5, start=7)
    engine.close()
    assert engine.frozen == whole.frozen
    assert engine.history.to_dict() == whole.history.to_dict()
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("options", [{"sample_size": 50}, {"delay_transfer": True}])
def test_resumed_by_trainer(options, tmp_path):
    def run(folder, config, **more):
        callback = GradESCallback(config)
        model = small.llama()
        saves = {"save_strategy": "steps", "save_steps": 7}
        trainer = small.trainer(model, folder, [callback], **saves)
        trainer.train(**more)
        return model.state_dict(), callback.engine

    _, engine = run(tmp_path / "a", GradESConfig(tau=1e-30, alpha=0.3, **options))
    assert len(engine.history.steps) == 12
    config = GradESConfig(tau=middle(engine.history), alpha=0.3, **options)
    expected, whole = run(tmp_path / "b", config)
    assert 0 < len(whole.frozen) < len(whole.components)
    weights, engine = run(tmp_path / "b", config, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-7"))
    assert engine.frozen == whole.frozen
    assert record(engine.history) == record(whole.history)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_a_sample_of_another_size_is_not_taken_over(caplog):
    model, _, engine = begin("full", GradESConfig(tau=1e-30, sample_size=50))
    train(engine, model, 3)
    state = engine.state_dict()
    engine.close()
    _, _, engine = begin("full", GradESConfig(tau=1e-30, sample_size=60))
    engine.load_state_dict(state)
    assert "sample_size: 50 -> 60" in caplog.text
    assert engine.tensors().get("previous", {}) == {}
    state["config"]["sample_size"] = 60
    del state["history"]
    _, _, engine = begin("full", GradESConfig(tau=1e-30, sample_size=60))
    with pytest.raises(ValueError, match="sample_size=60"):
        engine.load_state_dict(state)


# --- one step later --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_delayed_transfer_freezes_one_step_later(kind, check_every):
    def run(**options):
        model, _, engine = begin(kind, GradESConfig(check_every=check_every, **options))
        before = {}
        for step in range(12):
            before[step + 1] = {p: p.detach().clone() for c in engine.components for p in c.measured}
            train(engine, model, 1, start=step)
        after = {p: p.detach().clone() for c in engine.components for p in c.measured}
        engine.close()
        return engine, before, after

    plain, _, _ = run(tau=1e-30)
    later, _, _ = run(tau=1e-30, delay_transfer=True)
    assert later.history.to_dict()["values"] == plain.history.to_dict()["values"]
    assert later.history.steps == plain.history.steps == list(range(check_every, 13, check_every))

    tau = middle(plain.history)
    engine, before, after = run(tau=tau, alpha=0.4, delay_transfer=True)
    assert 0 < len(engine.frozen) < len(engine.components)
    checks = engine.history.steps
    for component in engine.components:
        series = dict(zip(checks, engine.history.values[component.name], strict=False))
        below = [step for step, measured in series.items() if step > engine.t_grace and measured < tau]
        frozen = engine.frozen.get(component.name)
        assert (frozen is None) == (not below or below[0] == 12), component  # what step 12 shows is never acted upon
        if frozen is not None:
            assert frozen == below[0] + 1
            for parameter in component.measured:
                assert not torch.equal(before[frozen - 1][parameter], before[frozen][parameter])
                assert torch.equal(before[frozen][parameter], after[parameter])


def test_a_delayed_transfer_reads_nothing_in_the_step_of_the_check(monkeypatch):
    model, _, engine = begin("full", GradESConfig(tau=1e-30, delay_transfer=True, check_every=2))
    reads = transfers.watch(monkeypatch, engine)
    train(engine, model, 6)
    assert reads == [3, 5]
    engine.close()
    assert reads == [3, 5, 6]
    assert engine.history.steps == [2, 4, 6]


def test_a_malformed_open_check_is_refused():
    model, _, engine = begin("full", GradESConfig(tau=1e-30, delay_transfer=True))
    train(engine, model, 3)
    state = engine.state_dict()
    assert json.loads(json.dumps(state["open"]))["step"] == 3
    for broken in ({"step": 3}, {"step": 3, "values": {"nothing": 1.0}}):
        _, _, other = begin("full", GradESConfig(tau=1e-30, delay_transfer=True))
        with pytest.raises(ValueError, match="state of GradES|does not have"):
            other.load_state_dict({**state, "open": broken})
        assert other.t == 0


def test_a_witness_that_freezes_tells_nothing_about_the_loop(caplog):
    """Found by the property tests: the first matrix froze at step 2, and its gradient died of that."""
    model = small.llama()
    tau = {"model.layers.0.self_attn.q_proj": 1e30, ".*": 1e-30}
    engine = GradES(model, GradESConfig(tau=tau, alpha=0, monitor="gradient_change"), total_steps=9)
    for _ in range(5):
        ids = torch.randint(3, 64, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        engine.step()
        model.zero_grad(set_to_none=False)
    assert engine.frozen == {"model.layers.0.self_attn.q_proj": 2}
    values = engine.history.values["model.layers.1.mlp.up_proj"]
    assert [math.isnan(value) for value in values] == [True, False, False, False, False]
    assert "something wrote to a gradient" not in caplog.text
