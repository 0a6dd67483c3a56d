"""Criteria against literal twins: exact on any series, for each component by itself, resumable anywhere."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grades_hf import GradES, GradESConfig
from grades_hf.contracts import Criterion
from grades_hf.criteria import Rise, Threshold, grace_steps, smoothing
from grades_hf.ending.ending import RAISE
from tests import toy

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None)
STEPS = 36
LEVELS, BETAS = (1.0001, 1.2, 1.5), (0.0, 0.5, 0.9)

# --- the twins: a verdict from the whole series of one component, in rational numbers ---------------------------------


def below(series: Sequence[float], tau: float, patience: int, grace: int) -> bool:
    """Algorithm 1: the last `patience` checks were made after the grace period, and are all below tau."""
    after = series[grace:]
    last = after[-patience:]
    return len(last) == patience and all(math.isfinite(value) and value < tau for value in last)


def risen(series: Sequence[float], level: float, beta: float) -> bool:
    """The average has risen to `level` times its own minimum."""
    if not counts(series[-1]):
        return False
    decay, averages, counted = Fraction(beta), [], []
    for n, value in enumerate((Fraction(v) for v in series if counts(v)), start=1):
        if counted and beta:  # no more than twice and no less than half the average of those before
            value = max(averages[-1] / 2, min(averages[-1] * 2, value))
        counted.append(value)
        weights = [decay ** (n - i) for i in range(1, n + 1)]
        averages.append(sum(w * v for w, v in zip(weights, counted, strict=True)) / sum(weights))
    whole = [average for n, average in enumerate(averages, start=1) if 1 - decay**n >= Fraction(1, 2)]
    return bool(whole) and averages[-1] >= Fraction(level) * min(whole)


def counts(value: float) -> bool:
    return math.isfinite(value) and value > 0


def a_series(seed: int, length: int) -> list[float]:
    """Falls, then rises, with noise; some values are missing, infinite or 0."""
    generator = random.Random(seed)
    turn, steepness = generator.uniform(0.2, 0.9) * length, generator.uniform(0, 0.06)
    series = []
    for n in range(length):
        value = math.exp(steepness * abs(n - turn) + generator.gauss(0, 0.15))
        series.append(generator.choice([math.nan, math.inf, 0.0]) if generator.random() < 0.1 else value)
    return series


def verdicts(criterion: Criterion, several: Sequence[Sequence[float]]) -> list[list[bool]]:
    """Of each check, those of all components."""
    places = torch.arange(len(several))
    columns = torch.tensor(several, dtype=torch.float64)
    return [criterion.update(places, n + 1, columns[:, n]).tolist() for n in range(columns.shape[1])]


# --- any series -------------------------------------------------------------------------------------------------------

MAKES = st.one_of(
    st.tuples(
        st.just("threshold"), st.lists(st.sampled_from([0.7, 1.0, 1.5]), min_size=4, max_size=4),
        st.integers(1, 3), st.integers(0, 12),
    ),
    st.tuples(st.just("rise"), st.sampled_from(LEVELS), st.sampled_from(BETAS)),
)  # fmt: skip


def made(case: tuple[Any, ...]) -> tuple[Callable[[], Criterion], Callable[[int, Sequence[float]], bool]]:
    """A maker of the criterion for four components, and its twin of a component's place and series."""
    kind, *how = case
    if kind == "threshold":
        taus, patience, grace = how
        return lambda: Threshold(taus, patience, grace), lambda i, series: below(series, taus[i], patience, grace)
    level, beta = how
    return lambda: Rise(4, level, beta), lambda i, series: risen(series, level, beta)


@SETTINGS
@given(
    case=MAKES, seeds=st.lists(st.integers(0, 10_000), min_size=4, max_size=4), length=st.integers(1, 40),
    resume_after=st.frozensets(st.integers(1, 39)), shuffle=st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_series_gets_the_verdict_of_the_twin(case, seeds, length, resume_after, shuffle):
    """Several components in any order, some of which are gone; the memory through JSON at any moment."""
    make, twin = made(case)
    series = [a_series(seed, length) for seed in seeds]
    leaves = [shuffle.randint(1, 2 * length) for _ in seeds]
    criterion = make()
    for n in range(length):
        order = [i for i in range(4) if n < leaves[i]]
        shuffle.shuffle(order)
        values = torch.tensor([series[i][n] for i in order], dtype=torch.float64)
        found = criterion.update(torch.tensor(order, dtype=torch.long), n + 1, values)
        assert found.tolist() == [twin(i, series[i][: n + 1]) for i in order]
        if n in resume_after:
            memory = json.loads(json.dumps(criterion.memory.tolist()))
            criterion = make()
            criterion.memory = torch.tensor(memory, dtype=torch.float64)


def test_the_series_above_fulfil_both_criteria_and_not_at_once():
    for twin in (
        lambda series: below(series, 1.0, 2, 3),
        *(lambda series, r=r, b=b: risen(series, r, b) for r in LEVELS for b in BETAS),
    ):
        firsts = [next((n for n in range(1, 41) if twin(a_series(seed, 40)[:n])), None) for seed in range(20)]
        assert len({first for first in firsts if first is not None}) > 3


@SETTINGS
@given(
    level=st.sampled_from(LEVELS), beta=st.sampled_from(BETAS), seed=st.integers(0, 10_000), power=st.integers(-40, 40)
)
def test_scale_does_not_matter_to_a_rise(level, beta, seed, power):
    series = a_series(seed, 60)
    scaled = [2.0**power * value for value in series]
    assert verdicts(Rise(1, level, beta), [series]) == verdicts(Rise(1, level, beta), [scaled])


@SETTINGS
@given(level=st.sampled_from(LEVELS), beta=st.sampled_from(BETAS), seed=st.integers(0, 10_000))
def test_checks_without_a_value_are_to_a_rise_as_if_they_had_not_been_made(level, beta, seed):
    series = a_series(seed, 60)
    every, some = Rise(1, level, beta), Rise(1, level, beta)
    whole = [found for (found,) in verdicts(every, [series])]
    assert not any(found for found, value in zip(whole, series, strict=True) if not counts(value))
    kept = [value for value in series if counts(value)]
    assert [f for f, v in zip(whole, series, strict=True) if counts(v)] == [f for (f,) in verdicts(some, [kept])]
    assert torch.equal(every.memory, some.memory)


@pytest.mark.parametrize("criterion", [Threshold([2.0] * 3, 2), Rise(3, 1.2, 0.5)], ids=lambda c: c.name)
def test_forgetting_begins_anew_and_growing_changes_nothing(criterion):
    verdicts(criterion, [a_series(seed, 9) for seed in range(3)])
    before = criterion.memory.clone()
    criterion.grow(2)
    assert torch.equal(criterion.memory[:3], before)
    assert not criterion.memory[3:].any()
    criterion.forget(torch.tensor([1]))
    assert not criterion.memory[1].any()
    assert torch.equal(criterion.memory[[0, 2]], before[[0, 2]])
    criterion.forget()
    assert not criterion.memory.any()


def test_grace_steps_are_counted_in_decimal():
    assert [grace_steps(0.55, n) for n in (100, 20, 21, 1)] == [55, 11, 12, 1]
    assert grace_steps(0.0, 7) == 0


def test_the_average_reaches_over_a_tenth_of_the_run():
    assert [1 / (1 - smoothing(steps)) for steps in (10, 100, 500, 10_000)] == pytest.approx([10, 10, 50, 100])
    assert smoothing(500, check_every=7) == pytest.approx((1 - 1 / 50) ** 7)


# --- in the engine ----------------------------------------------------------------------------------------------------


class Votes:
    """Every verdict of an engine's criterion: step -> names of the components."""

    def __init__(self) -> None:
        self.found: dict[int, set[str]] = {}

    def watch(self, engine: GradES) -> GradES:
        update = engine.criterion.update

        def watching(places, step, values):
            verdict = update(places, step, values)
            self.found[step] = {engine.components[i].name for i in places[verdict].tolist()}
            return verdict

        engine.criterion.update = watching
        return engine


def loop(config: GradESConfig, rate: Callable[[int], float], resume_after: int = 0) -> tuple[GradES, Votes]:
    """The toy without an end, a learning rate of its own at each step; the engine goes through JSON on the way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "STEPS", STEPS)
        steps = toy.batches(3)
    model = toy.build("full")
    optimizer = toy.optimize("sgd", model)
    how = {"total_steps": STEPS, "optimizer": optimizer}
    if config.tau is None:
        how["held_out"] = lambda model: torch.ones(2)  # every look says to go on
    votes = Votes()
    engine = votes.watch(GradES(model, config, **how))
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
            tensors = {key: state.pop(key) for key in ("history", "previous", "tensors")}
            engine.close()
            engine = votes.watch(GradES(model, config, **how))
            engine.load_state_dict({**json.loads(json.dumps(state)), **tensors})
    return engine, votes


@settings(SETTINGS, max_examples=15)
@given(
    rise=st.sampled_from([0.02, 0.2]), monitor=st.sampled_from(["auto", "gradient_norm"]),
    check_every=st.sampled_from([1, 2]), delay=st.booleans(), resume_after=st.integers(0, STEPS - 1),
    peak=st.sampled_from([1, 9]),
)  # fmt: skip
def test_a_run_without_tau_votes_as_the_twin(rise, monitor, check_every, delay, resume_after, peak):
    """What the statistic does in warm-up is not remembered; after a look a higher rise is asked for."""
    config = GradESConfig(rise=rise, monitor=monitor, check_every=check_every, delay_transfer=delay)

    def learning_rate(step: int) -> float:  # up to its peak, then down, and up again to half of it
        return 1e-3 * min(step, peak) if step < 20 else 5e-4 * peak if step > 25 else 1e-3 * min(peak, 2)

    engine, votes = loop(config, learning_rate, resume_after)
    history, level = engine.history, 1 + rise
    looks = {look["step"]: look for look in engine.ending.looks}
    for n, step in enumerate(history.steps):
        if step not in votes.found or step < peak:
            continue
        first = next(i for i, at in enumerate(history.steps) if at >= peak)
        expected = {
            name
            for name, series in history.values.items()
            if risen(list(series)[first : n + 1], level, engine.criterion.beta)
        }
        assert votes.found[step] == expected, (step, level)
        if (look := looks.get(step + delay)) is not None:
            assert (look["votes"], look["rise"]) == (len(expected), level)
            assert (look["reason"] == "gradients") == (len(expected) >= len(engine.components) / 2)
            level *= RAISE if look["reason"] == "gradients" else 1
    assert looks
    assert engine.frozen == {}
    assert engine.extension("warm_up").rate == 1e-3 * peak


def test_a_threshold_does_not_look_at_the_learning_rate():
    engine, _ = loop(GradESConfig(tau=1e9, alpha=0.1, patience=8), lambda step: 1e-3 * step)
    assert set(engine.frozen.values()) == {math.ceil(0.1 * STEPS) + 8}
    assert engine.extension("warm_up") is None


def test_the_other_mode_at_a_resume_begins_anew(caplog):
    with_tau, _ = loop(GradESConfig(tau=1e9, patience=50), lambda step: 1e-3)
    state = json.loads(json.dumps(with_tau.state_dict(tensors=False)))
    assert state["criterion"]
    with_tau.close()
    engine = GradES(toy.build("full"), GradESConfig(), total_steps=STEPS, held_out=lambda model: torch.ones(2))
    engine.load_state_dict(state)
    assert not engine.criterion.memory.any()
    assert "tau: 1000000000.0 -> None" in caplog.text
    engine.close()
