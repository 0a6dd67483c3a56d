"""Whatever is combined with what: frozen weights never move, and live ones are those of Algorithm 1."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from grades_hf import GradESConfig
from tests import reference, toy

SETTINGS = settings(max_examples=20, deadline=None, derandomize=True, database=None)
LEARNING_RATES = {"adamw": 1e-2, "adamw fused": 1e-2, "sgd": 1e-2, "adafactor": 1e-2}
MOMENTS = ("before forward", "before backward", "before clipping", "before the update")
SWITCHES = ("", *(f"{name} {moment}" for name in ("disable", "set") for moment in MOMENTS))


@dataclasses.dataclass(frozen=True)
class Case:
    """How a network is trained and frozen; `part` of the values lie below tau."""

    kind: str
    monitor: str
    optimizer: str
    accumulation: int
    part: float
    alpha: float
    patience: int
    check_every: int
    reduction: str
    fraction: float
    max_grad_norm: float | None
    uses: tuple[int, ...]
    seed: int

    @property
    def steps(self) -> list[list[dict[str, Any]]]:
        return toy.batches(self.seed, self.accumulation, self.uses)

    def reference(self, tau: float) -> reference.Outcome:
        return reference.train(
            toy.build(self.kind),
            self.steps,
            lambda model: toy.optimize(self.optimizer, model),
            lambda step: LEARNING_RATES[self.optimizer],
            tau=tau,
            alpha=self.alpha,
            monitor=self.monitor,
            reduction=self.reduction,
            patience=self.patience,
            check_every=self.check_every,
            max_grad_norm=self.max_grad_norm,
            max_frozen_fraction=self.fraction,
        )

    def tau(self) -> float:
        """Half way between two values of a run in which nothing freezes, so that rounding decides nothing.

        Raises:
            LookupError: the values are too close to each other, or there are none.
        """
        values = sorted(value for series in self.reference(0.0).values.values() for value in series.values())
        index = min(int(self.part * len(values)), len(values) - 2)
        if len(values) < 2 or values[index + 1] - values[index] <= 1e-6 * values[index + 1]:
            raise LookupError("no threshold")
        return (values[index] + values[index + 1]) / 2

    def config(self, tau: float, **options: Any) -> GradESConfig:
        return GradESConfig(
            tau=tau, alpha=self.alpha, monitor=self.monitor, reduction=self.reduction, patience=self.patience,
            check_every=self.check_every, max_frozen_fraction=self.fraction, **options,
        )  # fmt: skip


CASES = st.builds(
    Case,
    kind=st.sampled_from(["full", "lora"]),
    monitor=st.sampled_from(["gradient_change", "gradient_norm", "weight_change"]),
    optimizer=st.sampled_from(sorted(toy.OPTIMIZERS)),
    accumulation=st.sampled_from([1, 2, 4]),
    part=st.floats(0.05, 0.9),
    alpha=st.sampled_from([0.0, 0.15, 0.4]),
    patience=st.integers(1, 3),
    check_every=st.integers(1, 3),
    reduction=st.sampled_from(["sum", "mean"]),
    fraction=st.sampled_from([1.0, 1.0, 0.5]),
    max_grad_norm=st.sampled_from([None, 1.0]),
    uses=st.sampled_from([(), (), (2, 1), (1, 1, 2, 2, 2)]),
    seed=st.integers(0, 1000),
)
RESUMES = st.frozensets(st.integers(1, toy.STEPS - 1), max_size=3)


def threshold(case: Case) -> float:
    try:
        return case.tau()
    except LookupError:
        reject()


def assert_equal(run: toy.Run, outcome: reference.Outcome, tolerance: float = 0.0) -> None:
    assert run.moved == []
    assert run.engine.frozen == outcome.frozen
    assert run.engine.t == outcome.last_step
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weight, outcome.state[name], rtol=0, atol=tolerance, msg=name)


@SETTINGS
@given(case=CASES, resume_after=RESUMES, set_to_none=st.booleans(), switches=st.lists(st.sampled_from(SWITCHES)))
def test_any_run_equals_algorithm_1(case, resume_after, set_to_none, switches):
    """Resumed any number of times, with adapters switched at any moment."""
    tau = threshold(case)
    run = toy.train(
        case.kind, case.config(tau), case.steps, case.optimizer, max_grad_norm=case.max_grad_norm,
        # A block that a step does not use is not updated in the reference; where buffers live on, momentum moves it.
        set_to_none=set_to_none or bool(case.uses), resume_after=resume_after,
        switches=tuple(switches) if case.kind == "lora" and switches else ("",),
    )  # fmt: skip
    assert_equal(run, case.reference(tau))


def test_the_cases_freeze_some_and_resume_between():
    """Otherwise the test above would show nothing."""
    frozen: list[set[int]] = []

    @SETTINGS
    @given(case=CASES)
    def collect(case):
        frozen.append(set(case.reference(threshold(case)).frozen.values()))

    collect()
    assert sum(bool(steps) for steps in frozen) > len(frozen) / 2
    assert sum(len(steps) > 1 for steps in frozen) > len(frozen) / 5


@SETTINGS
@given(case=CASES, order=st.permutations(toy.MATRICES))
def test_the_order_of_components_does_not_matter(case, order):
    config = case.config(threshold(case))
    runs = [
        toy.train(case.kind, config, case.steps, case.optimizer, order=o, max_grad_norm=case.max_grad_norm)
        for o in (toy.MATRICES, order)
    ]
    assert runs[0].engine.frozen == runs[1].engine.frozen
    weights = [run.weights for run in runs]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-12)


@SETTINGS
@given(case=CASES)
def test_8_rows_equal_4_times_2(case):
    case = dataclasses.replace(case, uses=())
    tau = threshold(case)
    outcomes = []
    for accumulation in (1, 4):
        own = dataclasses.replace(case, accumulation=accumulation)
        run = toy.train(own.kind, own.config(tau), own.steps, own.optimizer, max_grad_norm=own.max_grad_norm)
        assert run.moved == []
        outcomes.append(run)
    assert outcomes[0].engine.frozen == outcomes[1].engine.frozen
    for name, weight in outcomes[0].weights.items():
        torch.testing.assert_close(outcomes[1].weights[name], weight, rtol=0, atol=1e-9)


@SETTINGS
@given(case=CASES, resume_after=RESUMES, sample_size=st.sampled_from([None, 4, 100]))
def test_freeze_prefix_and_sample_size(case, resume_after, sample_size):
    """No other run to compare with but the uninterrupted one; as long as no prefix is frozen, the one without them."""
    case = dataclasses.replace(case, uses=())
    tau = threshold(case)
    config = case.config(tau, freeze_prefix=True, sample_size=sample_size)
    runs = [
        toy.train(
            case.kind, config, case.steps, case.optimizer, max_grad_norm=case.max_grad_norm, resume_after=after,
        )
        for after in (frozenset(), resume_after)
    ]  # fmt: skip
    assert [run.moved for run in runs] == [[], []]
    whole, resumed = (run.engine for run in runs)
    assert resumed.history.to_dict() == whole.history.to_dict()
    assert resumed.extension("prefix").frozen == whole.extension("prefix").frozen
    final = runs[0].weights
    assert [name for name, weight in runs[1].weights.items() if not torch.equal(weight, final[name])] == []
    if sample_size != 4:  # a larger sample than there are elements is exact
        first = min(whole.extension("prefix").frozen.values(), default=math.inf)
        expected = {name: step for name, step in case.reference(tau).frozen.items() if step <= first}
        assert {name: step for name, step in whole.frozen.items() if step <= first} == expected


@SETTINGS
@given(case=CASES, resume_after=RESUMES, switches=st.lists(st.sampled_from(SWITCHES)))
def test_merged_adapters_equal_algorithm_1(case, resume_after, switches):
    case = dataclasses.replace(case, kind="lora")
    tau = threshold(case)
    run = toy.train(
        "lora", case.config(tau, merge_frozen_adapters=True), case.steps, case.optimizer,
        max_grad_norm=case.max_grad_norm, resume_after=resume_after, switches=tuple(switches) or ("",),
    )  # fmt: skip
    assert_equal(run, case.reference(tau), tolerance=1e-9)


# --- two processes ---------------------------------------------------------------------------------------------------


def some_cases() -> list[tuple[Case, float]]:
    """Twelve cases and their thresholds, the same in every process."""
    generator = random.Random(7)
    cases = []
    for kind, monitor in itertools.product(["full", "lora"], ["gradient_change", "gradient_norm", "weight_change"]):
        for accumulation in (1, 2):
            case = Case(
                kind, monitor, generator.choice(sorted(toy.OPTIMIZERS)), accumulation, generator.uniform(0.3, 0.7),
                generator.choice([0.0, 0.15, 0.4]), generator.randint(1, 2), generator.randint(1, 2), "sum", 1.0,
                generator.choice([None, 1.0]), (), generator.randint(0, 1000),
            )  # fmt: skip
            cases.append((case, case.tau()))
    return cases


def two_ranks(rank: int, folder: str) -> None:
    """One of two processes: trains every case on its half of each micro-batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for number, (case, tau) in enumerate(some_cases()):
        half = [
            [{**b, "x": b["x"].chunk(2)[rank], "labels": b["labels"].chunk(2)[rank]} for b in micro]
            for micro in case.steps
        ]
        run = toy.train(
            case.kind, case.config(tau), half, case.optimizer, max_grad_norm=case.max_grad_norm, share=0.5,
            resume_after=frozenset({4, 7}) if number % 2 else frozenset(), wrap=wrap,
        )  # fmt: skip
        result = {"frozen": run.engine.frozen, "moved": run.moved, "weights": run.weights}
        torch.save(result, Path(folder) / f"{number}-{rank}.pt")
    dist.destroy_process_group()


def wrap(model: torch.nn.Module) -> DistributedDataParallel:
    """Module-level, for it goes to other processes."""
    return DistributedDataParallel(model)


@pytest.mark.slow
def test_8_rows_equal_2_ranks_times_4():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(two_ranks, (folder,), nprocs=2)
        some = 0
        for number, (case, tau) in enumerate(some_cases()):
            outcome = case.reference(tau)
            some += bool(outcome.frozen)
            ranks = [torch.load(Path(folder) / f"{number}-{rank}.pt") for rank in range(2)]
            for result in ranks:
                assert result["moved"] == []
                assert result["frozen"] == outcome.frozen
            for name, weight in ranks[0]["weights"].items():
                assert torch.equal(weight, ranks[1]["weights"][name])
                torch.testing.assert_close(weight, outcome.state[name], rtol=0, atol=1e-9, msg=name)
        assert some > 6
