"""Criteria against literal twins: exact on any series, resumable anywhere, the same in the engine, Trainer and DDP."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from grades_hf import GradES, GradESCallback, GradESConfig, History
from grades_hf.config import CRITERIA
from grades_hf.criteria import make_criterion
from grades_hf.criteria.trend import critical_value, kendall
from grades_hf.report import plot_run, summarize, to_markdown
from grades_hf.report.plots import _statistic
from grades_hf.report.status import _rule as rule_of
from tests import small, toy

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
T = 200
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "threshold": [{"tau": 1.0}, {"tau": 1.5, "patience": 3}],
    "no_new_minimum": [{}, {"window": 7, "smoothing": 0.5}, {"window": 0.033, "smoothing": 0}],
    "rise": [{}, {"rise": 0.5, "smoothing": 0}, {"rise": 0.2, "smoothing": 0.5}],
    "no_significant_fall": [{}, {"window": 7}, {"window": 0.2, "significance": 0.3}],
    "significant_rise": [{}, {"window": 7, "significance": 0.2}, {"window": 0.15, "significance": 0.3}],
    "pflug": [{}, {"window": 1}, {"window": 30}],
    "no_new_minimum+rise": [{"window": 3, "smoothing": 0.5, "rise": 0.1}],
    "rise+significant_rise": [{"window": 7, "significance": 0.3, "smoothing": 0.5}],
    "threshold+no_new_minimum+no_significant_fall": [{"tau": 1.2, "patience": 2, "window": 4, "smoothing": 0.3}],
}
CASES = [(name, options) for name, every in OPTIONS.items() for options in every]
RELATIVE = [(name, options) for name, options in CASES if "threshold" not in name]


# --- the twins: a verdict from the whole series, in rational numbers ------------------------------------------------


def converged(config: GradESConfig, series: Sequence[float], total_steps: int = T, name: str | None = None) -> bool:
    """The verdict on the last of `series`; what was measured in the grace period of a threshold is not in it."""
    name = config.criterion if name is None else name
    if "+" in name:
        return all(converged(config, series, total_steps, part) for part in name.split("+"))
    if name == "threshold":
        last = series[-config.patience :]
        return len(last) == config.patience and all(math.isfinite(v) and v < config.tau for v in last)
    if not counts(name, series[-1]):
        return False
    values = [Fraction(v) for v in series if counts(name, v)]
    steps = Fraction(str(config.window)) * (total_steps if config.window < 1 else 1)
    window = math.ceil(math.ceil(steps) / config.check_every)
    if name == "pflug":
        return len(values) >= window and sum(values) < 0
    if name in ("no_new_minimum", "rise"):
        beta = Fraction(config.smoothing) ** config.check_every
        values = moderated(values, beta)
        averages = []
        for n in range(1, len(values) + 1):
            weights = [beta ** (n - i) for i in range(1, n + 1)]
            if 1 - beta**n >= Fraction(1, 2):
                averages.append(sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
        if not averages:
            return False
        if name == "rise":
            return averages[-1] >= (1 + Fraction(config.rise)) * min(averages)
        return len(averages) > window and min(averages[-window:]) >= min(averages[:-window])
    block = math.ceil(window / 10)
    if len(values) % block or len(values) < 10 * block:
        return False
    means = [sum(values[i : i + block]) / block for i in range(len(values) - 10 * block, len(values), block)]
    s = sum((b > a) - (b < a) for a, b in itertools.combinations(means, 2))
    if name == "significant_rise":
        return probability(s) <= Fraction(config.significance)
    return probability(-s) > Fraction(config.significance)


def moderated(values: list[Fraction], beta: Fraction) -> list[Fraction]:
    """Each no more than twice and no less than half the average of those before, unless nothing is averaged."""
    counted: list[Fraction] = []
    for value in values:
        if counted and beta:
            weights = [beta ** (len(counted) - i) for i in range(1, len(counted) + 1)]
            average = sum(w * v for w, v in zip(weights, counted, strict=True)) / sum(weights)
            value = max(average / 2, min(average * 2, value))
        counted.append(value)
    return counted


def probability(s: int, number: int = 10) -> Fraction:
    """P(S >= s) without a trend, from the number of orders with each number of inversions (Mahonian numbers)."""
    orders = mahonian(number)
    most = number * (number - 1) // 2
    return Fraction(sum(count for i, count in enumerate(orders) if most - 2 * i >= s), math.factorial(number))


def mahonian(number: int) -> list[int]:
    """The coefficients of (1)(1 + x)(1 + x + x^2)..., by long multiplication."""
    product = [1]
    for length in range(1, number + 1):
        terms = [(i + j, count) for i, count in enumerate(product) for j in range(length)]
        product = [sum(count for place, count in terms if place == i) for i in range(max(terms)[0] + 1)]
    return product


def a_series(seed: int, length: int, name: str = "") -> list[float]:
    """Falls, then rises, with noise; some values are missing, infinite or 0. For Pflug's test it goes below 0."""
    generator = random.Random(seed)
    turn, steepness = generator.uniform(0.2, 0.9) * length, generator.uniform(0, 0.06)
    series = []
    for n in range(length):
        value = math.exp(steepness * abs(n - turn) + generator.gauss(0, 0.15))
        if name == "pflug":
            value = (turn / 2 - n) / length + generator.gauss(0, 0.5)
        hole = generator.choice([math.nan, math.inf, 0.0]) if generator.random() < 0.1 else value
        series.append(hole)
    return series


def counts(name: str, value: float) -> bool:
    """Whether a criterion without tau makes anything of this value."""
    return math.isfinite(value) and (value > 0 or name == "pflug")


@SETTINGS
@given(
    case=st.sampled_from(CASES), seeds=st.lists(st.integers(0, 10_000), min_size=1, max_size=3, unique=True),
    length=st.integers(1, 60), check_every=st.sampled_from([1, 2, 5]), resume_after=st.frozensets(st.integers(1, 59)),
    shuffle=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_series_gets_the_verdict_of_the_twin(case, seeds, length, check_every, resume_after, shuffle):
    """Several components in any order, with the state through JSON at any moment."""
    name, options = case
    config = GradESConfig(criterion=name, check_every=check_every, alpha=0.0, **options).resolved(T)
    series = {f"w{seed}": a_series(seed, length, name) for seed in seeds}
    criterion = make_criterion(config, T, lambda name: 0.0 if config.tau is None else config.tau)
    for n in range(length):
        order = sorted(series)
        shuffle.shuffle(order)
        for component in order:
            verdict = criterion.update(component, (n + 1) * check_every, series[component][n])
            assert verdict is converged(config, series[component][: n + 1]), (component, n)
        if n in resume_after:
            state = json.loads(json.dumps(criterion.state_dict(), sort_keys=True))
            criterion = make_criterion(config, T, lambda name: 0.0 if config.tau is None else config.tau)
            criterion.load_state_dict(state)


def test_the_series_above_fulfil_every_criterion_and_not_at_once():
    for name, options in CASES:
        config = GradESConfig(criterion=name, **options).resolved(T)
        firsts = []
        for seed in range(20):
            series = a_series(seed, 60, name)
            firsts.append(next((n for n in range(1, 61) if converged(config, series[:n])), None))
        found = {first for first in firsts if first is not None}
        assert len(found) > 3, (name, options, firsts)


@SETTINGS
@given(case=st.sampled_from(RELATIVE), seed=st.integers(0, 10_000), factor=st.floats(1e-12, 1e12))
def test_scale_does_not_matter(case, seed, factor):
    name, options = case
    series = a_series(seed, 60, name)
    verdicts = []
    for c in (1.0, factor):
        criterion = make_criterion(GradESConfig(criterion=name, **options).resolved(T), T, lambda name: 0.0)
        verdicts.append([criterion.update("w", n, c * value) for n, value in enumerate(series, start=1)])
    assert verdicts[0] == verdicts[1]


@SETTINGS
@given(case=st.sampled_from(RELATIVE), seed=st.integers(0, 10_000))
def test_checks_without_a_value_are_as_if_they_had_not_been_made(case, seed):
    name, options = case
    series = a_series(seed, 60, name)
    verdicts = []
    for checks in (series, [v for v in series if counts(name, v)]):
        criterion = make_criterion(GradESConfig(criterion=name, **options).resolved(T), T, lambda name: 0.0)
        pairs = [(criterion.update("w", n, value), value) for n, value in enumerate(checks, start=1)]
        assert not any(verdict for verdict, value in pairs if not counts(name, value))
        verdicts.append([verdict for verdict, value in pairs if counts(name, value)])
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("significance", [0.5, 0.2, 0.05, 0.01, 0.001])
def test_critical_values_are_those_of_all_orders(number, significance):
    counts = [kendall(list(order)) for order in itertools.permutations(range(number))]
    critical = critical_value(number, significance)
    assert sum(s >= critical for s in counts) <= significance * len(counts) < sum(s >= critical - 2 for s in counts)
    assert all(probability(s, number) == Fraction(sum(c >= s for c in counts), len(counts)) for s in set(counts))


def test_critical_values_of_ten_are_those_of_the_tables():
    """Hollander and Wolfe, Nonparametric statistical methods, table of Kendall's K for n = 10."""
    assert [critical_value(10, a) for a in (0.06, 0.05, 0.025, 0.01, 0.005)] == [19, 21, 23, 27, 29]


def test_a_window_is_steps_or_a_part_of_the_run():
    def window(value: float, check_every: int = 1) -> int:
        config = GradESConfig(criterion="no_new_minimum", window=value, check_every=check_every)
        return make_criterion(config.resolved(T), T, lambda name: 0.0).window

    assert [window(w) for w in (1, 30, 0.1, 0.55, 0.003)] == [1, 30, 20, 110, 1]
    assert [window(w, 7) for w in (1, 30, 0.1, 0.55)] == [1, 5, 3, 16]
    config = GradESConfig(criterion="significant_rise", window=0.1).resolved(2010)
    trend = make_criterion(config, 2010, lambda name: 0.0)
    assert trend.block == 21


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize(
    "state", [[1], {"w": 3}, {"w": ["a"]}, {"w": [None]}, {"w": [math.nan] * 4}, {"w": [1.0] * 13}, {"w": [True]}]
)
def test_a_state_that_is_none_is_refused(state, name, options):
    criterion = make_criterion(GradESConfig(criterion=name, **options).resolved(T), T, lambda name: 1.0)
    for n, value in enumerate(a_series(1, 5), start=T):
        criterion.update("w", n, value)
    before = criterion.state_dict()
    with pytest.raises((AttributeError, TypeError, ValueError)):
        criterion.load_state_dict(state)
    assert criterion.state_dict() == before


def test_a_combination_takes_over_all_of_a_state_or_nothing():
    config = GradESConfig(criterion="rise+significant_rise").resolved(T)
    criterion = make_criterion(config, T, lambda name: 1.0)
    for n, value in enumerate(a_series(1, 5), start=1):
        criterion.update("w", n, value)
    state = criterion.state_dict()
    assert {name: list(part) for name, part in state.items()} == {"rise": ["w"], "significant_rise": ["w"]}
    for bad in ({"w": [1.0]}, {"w": [1.0, "a"]}, None):
        for broken in ({**state, "significant_rise": bad, "rise": {}}, {"rise": {}}, {**state, "pflug": {}}):
            with pytest.raises((AttributeError, TypeError, ValueError)):
                criterion.load_state_dict(broken)
            assert criterion.state_dict() == state
    criterion.update("v", 6, 1.0)
    criterion.forget(name for name in ["w"])
    assert {name: list(part) for name, part in criterion.state_dict().items()} == {
        "rise": ["v"], "significant_rise": ["v"],
    }  # fmt: skip
    criterion.forget()
    assert criterion.state_dict() == {"rise": {}, "significant_rise": {}}


def test_pflug_adds_up_and_takes_back():
    criterion = make_criterion(GradESConfig(criterion="pflug", window=3).resolved(T), T, lambda name: 0.0)
    values = [-1.0, 4.0, -2.0, -2.0, math.nan, 0.0, 1.0, math.inf, -0.5]
    verdicts = [criterion.update("w", n, value) for n, value in enumerate(values, start=1)]
    assert verdicts == [False, False, False, True, False, True, False, False, True]
    assert criterion.memory == {"w": [-0.5, 7]}


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "threshold"}, "tau is missing"),
        ({"criterion": "peak"}, "criterion='peak' is unknown"),
        ({"criterion": ["rise"]}, "criterion=\\['rise'\\] is unknown"),
        *(({"criterion": name, "tau": 0.5}, "tau=0.5 is a threshold") for name in CRITERIA if name != "threshold"),
        *(
            ({"criterion": name}, "joined by '\\+'")
            for name in ("rise+peak", "rise+rise", "rise+", "+", "", "rise + pflug", None)
        ),
        ({"criterion": "rise+significant_rise", "tau": 0.5}, "tau=0.5 is a threshold"),
        ({"criterion": "rise+significant_rise", "patience": 2}, "patience=2 is no option"),
        ({"criterion": "rise+threshold"}, "tau is missing"),
        ({"criterion": "rise+pflug"}, "use either alone"),
        ({"criterion": "pflug", "rise": 0.2}, "rise=0.2 is no option of criterion='pflug'"),
        ({"criterion": "pflug", "monitor": "gradient_norm"}, "monitor='gradient_norm' does not go together"),
        ({"tau": 1.0, "monitor": "gradient_product"}, "both signs, which only criterion='pflug'"),
        ({"criterion": "rise", "monitor": "gradient_product"}, "both signs, which only criterion='pflug'"),
        ({"criterion": "rise", "patience": 2}, "patience=2 is no option of criterion='rise'"),
        ({"criterion": "rise", "window": 0.2}, "window=0.2 is no option of criterion='rise'"),
        ({"criterion": "no_new_minimum", "rise": 0.2}, "rise=0.2 is no option"),
        ({"criterion": "significant_rise", "smoothing": 0.5}, "smoothing=0.5 is no option"),
        ({"tau": 1.0, "significance": 0.01}, "significance=0.01 is no option of criterion='threshold'"),
        *(({"criterion": "no_new_minimum", "window": w}, "window=") for w in (0, -1, 1.5, math.nan, "10", None, True)),
        *(({"criterion": "rise", "smoothing": s}, "smoothing=") for s in (-0.1, 1, math.nan, "0.9", False)),
        *(({"criterion": "rise", "rise": r}, "rise=") for r in (0, -0.1, math.inf, "5%", None)),
        *(({"criterion": "significant_rise", "significance": a}, "significance=") for a in (0, 0.6, math.nan, None)),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GradESConfig(**options)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_config_survives_json(name, options):
    config = GradESConfig(criterion=name, **options)
    assert GradESConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert GradESConfig(**json.loads(json.dumps(config.state_dict(), sort_keys=True))) == config


def test_the_order_of_a_combination_means_nothing():
    one, other = (GradESConfig(criterion=name, rise=0.2) for name in ("rise+significant_rise", "significant_rise+rise"))
    assert one == other
    assert one.criterion == "rise+significant_rise"


def test_pflug_takes_its_monitor():
    assert GradESConfig(criterion="pflug") == GradESConfig(criterion="pflug", monitor="gradient_product")
    assert GradESConfig(criterion="pflug").monitor == "gradient_product"


# --- the engine ------------------------------------------------------------------------------------------------------

STEPS = 36
# On the toy's 36 steps each of them freezes some matrices, at different steps.
RUNS = [
    {"criterion": "no_new_minimum", "window": 3, "smoothing": 0.5},
    {"criterion": "no_new_minimum", "window": 0.1, "smoothing": 0.7},
    {"criterion": "rise", "rise": 0.2, "smoothing": 0.5, "quorum": 0.0, "max_frozen_fraction": 1.0},
    {"criterion": "no_significant_fall", "window": 10, "significance": 0.1},
    {"criterion": "significant_rise", "window": 10, "significance": 0.3},
    {"criterion": "pflug", "window": 2},
    {"criterion": "no_new_minimum+rise", "window": 3, "smoothing": 0.5, "rise": 0.1},
    {"criterion": "rise+significant_rise", "window": 10, "significance": 0.4, "smoothing": 0.5},
]


def monitor_for(options: dict[str, Any], monitor: str) -> str:
    return "auto" if options["criterion"] == "pflug" else monitor


def run(kind: str, config: GradESConfig, seed: int = 0, **how: Any) -> toy.Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STEPS", STEPS)
        return toy.train(kind, config, toy.batches(seed), **how)


def expected(history: History, config: GradESConfig, first: int = 1) -> dict[str, int]:
    """What the twin freezes, given all that was measured from step `first` on; each component by itself."""
    config, frozen = config.resolved(STEPS), {}
    for name, series in history.values.items():
        known = [(step, value) for step, value in zip(history.steps, series, strict=False) if step >= first]
        for n, (step, _) in enumerate(known, start=1):
            at = step + config.delay_transfer
            if step > history.t_grace and at <= STEPS and converged(config, [v for _, v in known[:n]], STEPS):
                frozen[name] = at
                break
    return frozen


@settings(SETTINGS, max_examples=40)
@given(
    kind=st.sampled_from(["full", "lora"]), options=st.sampled_from(RUNS), seed=st.integers(0, 100),
    monitor=st.sampled_from(["gradient_change", "gradient_norm", "weight_change", "relative_change"]),
    alpha=st.sampled_from([0.0, 0.2, 0.5]), check_every=st.sampled_from([1, 1, 2]), delay=st.booleans(),
    resume_after=st.frozensets(st.integers(1, STEPS - 1), max_size=3),
    order=st.permutations(toy.MATRICES),
)  # fmt: skip
def test_any_run_freezes_what_the_twin_freezes(
    kind, options, seed, monitor, alpha, check_every, delay, resume_after, order
):
    """Resumed any number of times, with matrices in any order; frozen ones never move."""
    config = GradESConfig(
        **options, monitor=monitor_for(options, monitor), alpha=alpha, check_every=check_every, delay_transfer=delay,
       ,
    )  # fmt: skip
    whole = run(kind, config, seed)
    again = run(kind, config, seed, resume_after=resume_after)
    assert whole.moved == again.moved == []
    assert whole.engine.frozen == expected(whole.engine.history, config)
    assert again.engine.history.to_dict()["values"] == whole.engine.history.to_dict()["values"]
    assert again.engine.frozen == whole.engine.frozen
    for name, weight in whole.weights.items():  # a few seeds diverge, to NaN
        torch.testing.assert_close(again.weights[name], weight, rtol=0, atol=0, equal_nan=True, msg=name)
    other = run(kind, config, seed, order=order)
    assert other.engine.frozen == whole.engine.frozen


@pytest.mark.parametrize("options", RUNS, ids=lambda options: options["criterion"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_runs_freeze_some_at_different_steps(kind, options):
    """Otherwise the test above would show nothing."""
    steps = [
        set(run(kind, GradESConfig(**options, alpha=0.0), seed).engine.frozen.values())
        for seed in range(4)
    ]
    assert sum(len(found) for found in steps) > 4


def loop(config: GradESConfig, rate: Callable[[int], float], resume_after: int = 0) -> GradES:
    """The toy with a learning rate of its own at each step, and what the engine says on the way through JSON."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STEPS", STEPS)
        steps = toy.batches(3)
    model = toy.build("full")
    optimizer = toy.optimize("sgd", model)
    engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
    for t, (batch,) in enumerate(steps, start=1):
        optimizer.param_groups[0]["lr"] = rate(t)
        model(**batch).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            break
        if t == resume_after:
            state = engine.state_dict()
            previous = state.pop("previous")
            engine.close()
            engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
            engine.load_state_dict({**json.loads(json.dumps(state)), "previous": previous})
    return engine


@pytest.mark.parametrize("resume_after", [0, 8, 22])
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("options", RUNS, ids=lambda options: options["criterion"])
def test_what_the_statistic_does_in_warm_up_is_not_remembered(options, delay, resume_after):
    monitor = monitor_for(options, "gradient_norm")
    config = GradESConfig(**options, alpha=0.0, monitor=monitor, delay_transfer=delay)

    def rate(step: int) -> float:  # up to its peak at step 9, then down, and up again to half of it
        return 1e-3 * min(step, 9) if step < 20 else 4.5e-3 if step > 25 else 1e-3

    engine = loop(config, rate, resume_after)
    assert engine.frozen == expected(engine.history, config, first=9)
    assert engine.state_dict()["learning_rate"] == 1e-3 * 9
    constant = loop(config, lambda step: 9e-3)
    assert constant.frozen == expected(constant.history, config)


def test_a_threshold_does_not_look_at_the_learning_rate():
    config = GradESConfig(tau=1e9, alpha=0.1, patience=8)
    engine = loop(config, lambda step: 1e-3 * step)
    assert set(engine.frozen.values()) == {math.ceil(0.1 * STEPS) + 8}
    assert "learning_rate" not in engine.state_dict()


def test_a_threshold_in_a_combination_does_not_either():
    config = GradESConfig(criterion="threshold+no_new_minimum", tau=1e9, patience=50, alpha=0.0)
    engine = loop(dataclasses.replace(config, monitor="gradient_norm"), lambda step: 1e-6 * step)
    threshold, other = engine.criterion.parts
    assert {tuple(numbers) for numbers in threshold.memory.values()} == {(STEPS,)}
    assert {numbers[1] for numbers in other.memory.values()} == {1.0}  # one value: it began anew at every step


def test_another_criterion_at_a_resume_begins_anew(caplog):
    config = GradESConfig(tau=1e-30, alpha=0.0)
    first = run("full", config).engine
    state = json.loads(json.dumps(first.state_dict(tensors=False)))
    state["step"] = 30
    first.close()
    for options in RUNS:
        model = toy.build("full")
        config = GradESConfig(**options)
        engine = GradES(model, config, total_steps=STEPS, optimizer=toy.optimize("sgd", model))
        engine.load_state_dict(state)
        assert not any(part.memory for part in engine.criterion.parts)
        assert f"criterion: 'threshold' -> '{options['criterion']}'" in caplog.text
        engine.close()


def test_what_is_said_and_written_without_a_threshold(tmp_path, caplog):
    config = GradESConfig(criterion="rise", rise=0.2, smoothing=0.5, alpha=0.0)
    engine = run("full", config).engine
    assert "criterion rise, quorum 0.5; freezing from step 1" in engine.describe()
    assert f"{len(engine.frozen)} of 8 components are frozen" in engine.conclude()
    assert "tau" not in engine.describe() + engine.conclude()
    assert engine.frozen
    engine.history.save(tmp_path / "history.json")
    history = History.load(tmp_path / "history.json")
    assert {component["tau"] for component in history.components} == {None}
    assert {event["tau"] for event in history.events} == {None}
    page = to_markdown(summarize(history))
    assert "criterion rise" in page
    assert "None" not in page
    pytest.importorskip("altair")
    assert "NaN" not in json.dumps(plot_run(history).to_dict())


def test_a_combination_and_its_threshold_are_named():
    config = GradESConfig(criterion="rise+threshold", tau=0.5, alpha=0.0)
    engine = run("full", config).engine
    assert ", criterion threshold+rise, tau 0.5; freezing from" in engine.describe()
    assert "criterion threshold+rise, tau 0.5, none frozen" in to_markdown(summarize(engine.history))
    assert ", criterion threshold+rise, tau 0.5, freezing from" in rule_of(engine.history)
    assert "criterion" not in rule_of(run("full", GradESConfig(tau=0.5)).engine.history)


def test_values_below_0_are_drawn():
    pytest.importorskip("altair")
    history = run("full", GradESConfig(criterion="pflug", alpha=0.5)).engine.history
    values = [v for series in history.values.values() for v in series if math.isfinite(v)]
    assert min(values) < 0 < max(values)
    spec = _statistic(history).to_dict()
    scales = [layer["encoding"]["y"]["scale"] for layer in spec["layer"] if "scale" in layer["encoding"].get("y", {})]
    assert {scale["type"] for scale in scales} == {"linear"}
    (points,) = [layer["data"]["values"] for layer in spec["layer"] if "y2" in layer["encoding"]]
    assert scales[0]["domain"][0] < min(point["low"] for point in points) < 0


def test_all_at_once_right_after_the_grace_period_is_said(caplog):
    config = GradESConfig(criterion="no_new_minimum", window=1, smoothing=0.0, alpha=0.9)
    with caplog.at_level(logging.WARNING, logger="grades_hf"):
        engine = loop(config, lambda step: 0.0)
    assert (len(set(engine.frozen.values())) == 1) == ("ends like one that is simply stopped" in caplog.text)


# --- Trainer ---------------------------------------------------------------------------------------------------------


@pytest.mark.compatibility("Trainer", "criteria without tau, resume_from_checkpoint", "works")
@pytest.mark.parametrize("make", [small.llama, small.lora])
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "no_new_minimum", "window": 2, "smoothing": 0.3},
        {"criterion": "rise", "rise": 0.02, "smoothing": 0},
        {"criterion": "no_new_minimum+rise", "window": 1, "rise": 0.02, "smoothing": 0},
        {"criterion": "pflug", "window": 2},
    ],
    ids=lambda options: options["criterion"],
)
def test_a_resumed_trainer_goes_on_exactly(make, options, tmp_path):
    config = GradESConfig(**options, alpha=0.2)
    saves = {"max_steps": 14, "save_strategy": "steps", "save_steps": 4, "warmup_steps": 3, "learning_rate": 3e-3}

    def train(folder: Path, resume: str | None = None) -> tuple[Any, GradES]:
        callback = GradESCallback(config)
        trainer = small.trainer(make(), folder, [callback], **saves)
        trainer.train(resume_from_checkpoint=resume)
        assert callback.engine is not None
        return trainer, callback.engine

    trainer, whole = train(tmp_path)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    values = whole.history.to_dict()["values"]
    steps = set(whole.frozen.values())
    assert any(step > 4 for step in steps)
    assert whole.frozen
    resumed, engine = train(tmp_path, str(tmp_path / "checkpoint-4"))
    assert engine.frozen == whole.frozen
    assert engine.history.to_dict()["values"] == values
    assert all(torch.equal(resumed.model.state_dict()[name], tensor) for name, tensor in weights.items())


# --- two processes ---------------------------------------------------------------------------------------------------


def two_ranks(rank: int, folder: str) -> None:
    """One of two processes: trains on its half of each batch; its own values are made to differ before they are agreed
    upon."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    toy.STEPS = STEPS
    if rank == 1:
        real = GradES._measure
        GradES._measure = lambda self, *args: real(self, *args) * torch.rand(1).item()
    found = []
    for number, options in enumerate(RUNS):
        half = [[{k: v.chunk(2)[rank] if k != "use" else v for k, v in b.items()} for b in m] for m in toy.batches(1)]
        config = GradESConfig(**options, alpha=0.0)
        ran = toy.train(
            "full", config, half, share=0.5, wrap=DistributedDataParallel,
            resume_after=frozenset({7, 20}) if number % 2 else frozenset(),
        )  # fmt: skip
        found.append({"frozen": ran.engine.frozen, "moved": ran.moved, "weights": ran.weights})
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.compatibility("Distributed", "DDP, criteria without tau", "works")
def test_two_ranks_decide_as_one():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_ranks, (folder,), nprocs=2)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    for options, one, two in zip(RUNS, *ranks, strict=True):
        alone = run("full", GradESConfig(**options, alpha=0.0), seed=1)
        assert one["moved"] == two["moved"] == []
        assert one["frozen"] == two["frozen"] == alone.engine.frozen != {}
        for name, weight in alone.weights.items():
            assert torch.equal(one["weights"][name], two["weights"][name])
            torch.testing.assert_close(one["weights"][name], weight, rtol=0, atol=1e-9, msg=name)
