"""Each statistic against its formula, and what it keeps in memory."""

from __future__ import annotations

import gc
import itertools
import logging

import pytest
import torch
from torch import nn

from grades_hf.monitors import GradientChange, GradientNorm, WeightChange
from grades_hf.monitors.norms import l1_distance, l1_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (300, 1000), (4, 64, 70), (2, 100_000)])
def test_l1_norms_match_float64(shape, dtype):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert l1_norm(a).item() == pytest.approx(a.double().abs().sum().item(), rel=tolerance)
    copies = a.clone(), b.clone()
    assert l1_distance(a, b).item() == pytest.approx((a.double() - b.double()).abs().sum().item(), rel=tolerance)
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


def test_l1_distance_of_transposed_tensors():
    a, b = torch.randn(70, 900).t(), torch.randn(70, 900).t()
    assert l1_distance(a, b).item() == pytest.approx((a - b).abs().sum().item(), rel=1e-6)


def test_l1_distance_makes_no_temporary_of_the_size_of_a_matrix():
    a, b = torch.randn(4000, 1000), torch.randn(4000, 1000)
    with torch.profiler.profile(profile_memory=True) as profile:
        l1_distance(a, b)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= a.numel() * 4 / 10


def loop(monitor, parameter, gradients, *, set_to_none=True):
    """The monitor's values over a plain training loop whose step t has gradients[t - 1]."""
    values = []
    for gradient in gradients:
        (parameter * gradient).sum().backward()
        value = monitor.measure(parameter)
        values.append(None if value is None else value.item())
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
    for parameter in parameters:
        loop(monitor, parameter, [torch.randn(4, 6) for _ in range(3)])
    seen = []
    for _ in range(4):  # a loop that suddenly zeroes in place
        values = []
        for parameter in parameters:
            (parameter * torch.randn(4, 6)).sum().backward()
            values.append(monitor.measure(parameter))
        seen.append([value is not None for value in values])
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
