"""Without a tau: proposals, looks, the average that is returned, and a run that nobody seems to have looked at."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from grades_hf import GradES, GradESConfig, History
from grades_hf.ending import Average, Rows
from grades_hf.ending.rows import AT_ONCE, TRIED
from grades_hf.record.counter import FlopCounter
from grades_hf.report.page import to_html
from grades_hf.report.runs import Run
from grades_hf.report.summary import sentence
from tests.ending import loops
from tests.ending.loops import HELD_OUT, STEPS, Whole, all_losses, dataset, train

BETTER = torch.linspace(-0.01, 0.01, 50)  # noise of 50 rows, far below the differences that the scripts use


class Script:
    """Losses of 50 rows that a test dictates: one mean for each pass, in the order in which passes are made."""

    def __init__(self, *means: float) -> None:
        self.means = list(means)
        self.passes: list[float] = []

    def __call__(self, model: nn.Module) -> torch.Tensor:
        assert not model.training
        mean = self.means[min(len(self.passes), len(self.means) - 1)]
        self.passes.append(mean)
        return mean + BETTER.roll(len(self.passes))


def test_a_run_that_overfits_ends_with_weights_that_are_better_than_the_last_ones():
    held = Rows([dataset()], 128)

    def loss(model: nn.Module) -> float:
        losses = all_losses(held, model.eval())
        return sum(losses) / len(losses)

    whole, ended = train("full", None), train("full", GradESConfig())
    assert ended.engine.done
    assert ended.steps < STEPS
    look = ended.engine.ending.looks[-1]
    assert loss(ended.model) == pytest.approx(look["average_loss"], rel=1e-6)
    assert loss(ended.model) < loss(whole.model) - 0.1
    assert ended.engine.frozen == {}
    assert ended.engine.history.looks == ended.engine.ending.looks
    ended.engine.close()
    assert ended.engine.history.ended == "look"
    assert all(p.requires_grad for p in ended.model.parameters())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_goes_on_as_if_nobody_had_looked(kind):
    """Also with dropout, which draws random numbers: 50 rows that get better at each look never end a run."""
    script = Script(*[10.0 - i for i in range(100)])
    bare, watched = train(kind, None, dropout=0.2), train(kind, GradESConfig(), held_out=script, dropout=0.2)
    assert len(watched.engine.ending.looks) > 3
    assert watched.steps == STEPS
    assert watched.randoms == bare.randoms
    assert all(torch.equal(watched.weights[name], weight) for name, weight in bare.weights.items())
    assert all(module.training for module in watched.model.modules())


def test_real_looks_leave_no_trace():
    """A look that computes real losses, in a model whose forward pass draws random numbers and writes to a buffer."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = loops.make("full")
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, **inputs):
            self.calls += 1
            torch.rand(3)
            return self.inner(**inputs)

    model = Noisy().train()
    model.inner.eval()  # a part that the user keeps in evaluation mode stays there
    engine = GradES(model, GradESConfig(), total_steps=STEPS, held_out=dataset())
    loops_made = 0
    for step in range(12):
        model(**loops.batch(step)).loss.backward()
        before = torch.get_rng_state(), model.calls.clone(), model.state_dict()
        before = before[0], before[1], {name: tensor.clone() for name, tensor in before[2].items()}
        looks = len(engine.ending.looks)
        engine.step()
        loops_made += len(engine.ending.looks) - looks
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before[2].items())
        assert model.training
        assert not model.inner.training
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.01)
        model.zero_grad()
    assert loops_made == 1
    engine.close()


def rule(script: Script, **options: object) -> GradES:
    return train("full", GradESConfig(**options), held_out=script).engine


def test_what_looks_cost_is_counted():
    run = train("full", GradESConfig(), held_out=dataset())
    savings, looks = run.engine.savings(), run.engine.ending.looks
    with FlopCounter() as row, torch.no_grad():
        run.model(input_ids=HELD_OUT[:1])
    passes = sum((1 + (look["loss"] is not None)) * look["rows"] for look in looks)
    passes += AT_ONCE + TRIED  # to see whether a batch says what its rows say
    assert savings.looks == pytest.approx(passes * row.total)
    assert savings.used == pytest.approx(savings.full + savings.looks)
    assert savings.saved == -savings.looks


def test_the_first_look_never_ends_a_run():
    engine = rule(Script(1.0, *[1.0 - i for i in range(1, 90)]))
    first = engine.ending.looks[0]
    assert (first["loss"], first["difference"], first["since"], first["ended"]) == (None, None, None, False)


def test_an_average_that_has_clearly_learned_costs_one_pass_and_goes_on():
    script = Script(*[10.0 - i for i in range(100)])
    engine = rule(script)
    assert not engine.done
    assert len(script.passes) == len(engine.ending.looks) > 3
    assert all(look["since"] == pytest.approx(-1.0) for look in engine.ending.looks[1:])


def test_a_run_ends_when_the_weights_lose_to_both_averages():
    engine = rule(Script(1.0, 1.0, 1.5))  # first look: 1.0; second: average 1.0, present 1.5
    assert [look["ended"] for look in engine.ending.looks] == [False, True]
    look = engine.ending.looks[-1]
    assert (look["average_loss"], look["loss"], look["rows"]) == (pytest.approx(1.0), pytest.approx(1.5), 50)
    assert engine.t == look["step"]
    assert f"step {look['step']} of {STEPS}" in engine.ended


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ((1.0, 1.0, 1.001), "the average is better by less than three standard errors"),
        ((1.6, 1.0, 1.5), "the average has clearly learned since the last look"),
        ((1.6, 1.6, 1.5), "the weights are better than both averages"),
    ],
)
def test_a_run_goes_on_otherwise(passes, why):
    script = Script(*passes, *[passes[-1] - 1 - i for i in range(90)])  # from then on every average has learned
    engine = rule(script)
    assert not engine.done, why
    assert engine.ending.looks[1]["ended"] is False


class Parts(Rows):
    """A quarter of 16 rows and a rest of 48, whose mean losses a test dictates in the order in which they are asked."""

    def __init__(self, *means: float) -> None:
        super().__init__([range(64)], 64)
        self.means = iter(means)
        self.asked: list[int] = []
        self.put_together(True)

    def losses(self, model, ranks, part):
        rows = torch.cat([batch for _, batch in part.alone])
        self.asked.append(len(rows))
        mean = next(self.means, -1000.0 * len(self.asked))  # from then on every average has learned
        noise = 0.001 * len(self.asked) * ((rows // 4 % 2) - 0.5)  # so that differences have an error
        return (mean + noise + rows).tolist()


@pytest.mark.parametrize(
    ("means", "asked", "rows", "computed", "ended"),
    [
        ((9.0, 8.0), [16], 16, False, False),  # the average has learned, as a quarter says
        ((9.0, 9.0 - 0.00029), [16], 16, False, False),  # by more than two of its standard errors, of 0.00013
        ((9.0, 9.0 - 0.00023, 9.0), [16, 16], 16, True, False),  # by less
        ((9.0, 9.0, 9.0), [16, 16], 16, True, False),  # the weights are no worse than their average
        ((9.0, 8.9999, 8.99995), [16, 16], 16, True, False),  # worse, but better than the average before
        ((9.0, 9.0, 9.5, 9.0, 9.5), [16, 16, 48, 48], 64, True, True),
        ((9.0, 9.0, 9.5, 9.0, 7.0), [16, 16, 48, 48], 64, True, False),  # only the quarter is worse
        ((9.0, 9.0, 9.0001, 9.0, 9.0001), [16, 16, 48, 48], 64, True, False),  # by less than three standard errors
    ],
)
def test_a_look_takes_all_rows_only_where_a_quarter_says_that_it_may_end_the_run(means, asked, rows, computed, ended):
    held = Parts(*means)
    looks = rule(held).ending.looks
    assert (looks[0]["rows"], looks[0]["loss"]) == (16, None)
    look = looks[1]
    assert held.asked[1 : 1 + len(asked)] == asked
    assert (look["rows"], look["loss"] is not None, look["difference"] is not None) == (rows, computed, computed)
    assert look["ended"] is ended


def test_rows_of_a_quarter_are_compared_with_the_same_rows():
    """The look before had all of them, this one a quarter; and the other way round."""
    held = Parts(9.0, 9.0, 9.5, 9.0, 7.0, 8.0)
    looks = rule(held).ending.looks
    assert [look["rows"] for look in looks[:3]] == [16, 64, 16]
    assert looks[1]["since"] == pytest.approx(0.0, abs=1e-6)
    assert looks[2]["since"] == pytest.approx(-1.0)


def test_all_rows_may_say_that_the_run_learns_where_a_quarter_does_not():
    held = Parts(9.0, 9.0, 9.5, 9.0, 7.0, 9.0, 9.5, 7.0)  # the third look: a quarter as before, the rest better
    looks = rule(held).ending.looks
    assert held.asked[5:8] == [16, 16, 48]
    assert (looks[2]["rows"], looks[2]["loss"], looks[2]["difference"]) == (64, None, None)
    assert looks[2]["since"] == pytest.approx(-1.5)
    assert looks[2]["ended"] is False


def test_the_last_looks_average_must_be_better_than_the_weights():
    """In a noisy second epoch the average beats the weights, which still beat the average of the last look."""
    engine = rule(Script(2.0, 1.9999, 1.5, -50.0))
    engine_ends = rule(Script(2.0, 1.9999, 2.5, -50.0))
    assert [look["ended"] for look in engine.ending.looks[:2]] == [False, False]
    assert [look["ended"] for look in engine_ends.ending.looks] == [False, True]


def test_three_standard_errors_are_those_of_the_paired_difference():
    """A spread over rows that both passes share does not count, one between them does."""
    shared = torch.linspace(0, 100, 50)

    def script(offsets):
        passes = iter([shared, shared + 1e-9, *[shared + offset for offset in offsets]])
        return lambda model: next(passes, shared - 1000 * torch.rand(()))

    noise = torch.linspace(-1, 1, 50)
    error = noise.std() / math.sqrt(50)
    assert rule(script([0.01])).done
    assert rule(script([noise + 3.1 * error])).done
    engine = rule(script([noise + 2.9 * error]))
    assert engine.ending.looks[1]["ended"] is False
    assert engine.ending.looks[1]["error"] == pytest.approx(float(error))


def test_looks_are_due_on_a_schedule_that_gradients_can_only_bring_forward():
    looks = rule(Script(*[10.0 - i for i in range(100)])).ending.looks
    assert looks[0]["step"] >= 10
    for before, after in itertools.pairwise(looks):
        assert after["step"] >= 1.25 * before["step"]
        if after["reason"] == "schedule":
            assert after["step"] == math.ceil(1.35 * before["step"])
        else:
            assert after["votes"] >= 0.5 * after["components"]
            assert after["step"] <= math.ceil(1.35 * before["step"])
    rises = [look["rise"] for look in looks]
    raised = [look["reason"] == "gradients" for look in looks]
    for (before, after), moved in zip(itertools.pairwise(rises), raised, strict=False):
        assert after == pytest.approx(before * 1.5 if moved else before)


def test_no_look_while_every_row_has_been_seen_once(caplog):
    config = GradESConfig()
    engine = train("full", config, epochs=True, held_out=Script(10.0, 9.0)).engine
    assert engine.ending.looks[0]["step"] > loops.ROWS / loops.BATCH
    first_epoch = train("full", config, held_out=Script(10.0, 9.0), steps=30)
    assert first_epoch.engine.ending.looks  # a loop that does not say epochs gets looks
    model = loops.make("full")
    engine = GradES(model, config, total_steps=STEPS, held_out=Script(1.0, 1.0, 2.0))
    for step in range(STEPS):
        model(**loops.batch(step)).loss.backward()
        engine.step(epoch=step / STEPS)
        model.zero_grad()
    assert engine.ending.looks == []
    engine.close()
    assert f"no look at held-out rows was due in {STEPS} of {STEPS} steps." in caplog.text


def test_nothing_is_looked_at_in_the_grace_period():
    engine = rule(Script(*[10.0 - i for i in range(100)]), alpha=0.5)
    assert engine.ending.looks[0]["step"] == STEPS // 2 + 1


def test_the_update_of_the_last_step_does_not_touch_what_is_returned():
    ended = train("full", GradESConfig(), held_out=Script(1.0, 1.0, 1.5))
    average = {p: tensor.clone() for p, tensor in ended.engine.tensors()["average"].items()}
    assert average.keys() == set(ended.model.parameters())
    assert all(torch.equal(p, tensor) for p, tensor in average.items())


def test_the_last_weights_on_request():
    last = train("full", GradESConfig(return_weights="last"), held_out=Script(1.0, 1.0, 1.5))
    bare = train("full", None, steps=last.steps - 1)
    assert all(torch.equal(last.weights[name], weight) for name, weight in bare.weights.items())


@pytest.mark.parametrize(("horizon", "every"), [(10.0, 1), (45.0, 2)])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_average_is_the_formulas(horizon, every, device):
    """The slow twin: one Python float an update, in float64."""
    weight = nn.Parameter(torch.zeros(3))
    average = Average(horizon, device)
    assert average.every == every

    class One:
        model, t = nn.Module(), 0

    One.model.weight = weight
    from contextlib import ExitStack

    from grades_hf.contracts import Step

    undo = ExitStack()
    average.attach(One, undo)  # type: ignore[arg-type]
    expected = None
    for t in range(1, 120):
        average.before_check(Step(t))
        updates = t - 1  # the weights are those after so many updates
        if updates >= 1 and (updates - 1) % every == 0:
            reach = min(horizon, max(1.0, (updates - 1 + every) / 2))
            a = 1 - (1 - 1 / reach) ** every
            value = math.sin(updates)
            expected = value if expected is None else expected + a * (value - expected)
        if expected is None:
            assert not average.ready
        else:
            assert average.tensors()[weight].tolist() == pytest.approx([expected] * 3, abs=1e-5)
        with torch.no_grad():
            weight.fill_(math.sin(t))
    undo.close()
    assert average.tensors() == {}


def test_half_precision_weights_have_an_average_in_float32_and_come_back_to_the_bit():
    script = Script(*[10.0 - i for i in range(100)])
    bare = train("full", None, dtype=torch.bfloat16)
    watched = train("full", GradESConfig(), held_out=script, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in watched.engine.tensors()["average"].values()} == {torch.float32}
    assert all(torch.equal(watched.weights[name], weight) for name, weight in bare.weights.items())


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_equals_uninterrupted(kind, dtype):
    whole = train(kind, GradESConfig(), dropout=0.1, dtype=dtype, epochs=True)
    assert whole.engine.ending.looks
    last = whole.engine.ending.looks[-1]["step"]
    for after in ([1], [9, 11, last - 1]) if dtype == torch.float32 else (range(1, STEPS),):
        again = train(kind, GradESConfig(), dropout=0.1, dtype=dtype, epochs=True, resume_after=list(after))
        assert again.steps == whole.steps
        assert again.engine.ending.looks == whole.engine.ending.looks
        assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_an_average_that_the_checkpoint_lacks_begins_anew(caplog):
    run = train("full", GradESConfig(), held_out=Script(9.0, 8.0), steps=9)
    state = run.engine.state_dict()
    del state["tensors"]["average"]
    run.engine.close()
    engine = GradES(run.model, GradESConfig(), total_steps=STEPS, held_out=Script(9.0, 8.0))
    engine.load_state_dict(state)
    assert "begins anew" in caplog.text
    assert not engine.ending._run.extension("average").ready
    for step in (9, 10):
        run.model(**loops.batch(step)).loss.backward()
        engine.step()
        run.model.zero_grad()
    now = engine.tensors()["average"]
    assert all(torch.equal(tensor, p) for p, tensor in now.items())  # the first update takes the weights as they are
    engine.close()


def test_without_held_rows_and_without_a_tau_there_are_three_ways_out():
    model = loops.make("full")
    with pytest.raises(ValueError, match=r"held_out=.*eval_dataset.*tau"):
        GradES(model, GradESConfig(), total_steps=9)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_rows_that_say_nothing_are_refused():
    model = loops.make("full")
    with pytest.raises(ValueError, match="no rows"):
        GradES(model, GradESConfig(), total_steps=9, held_out=[])
    with pytest.raises(ValueError, match="at least two rows"):
        GradES(model, GradESConfig(), total_steps=9, held_out=[{"input_ids": HELD_OUT[0], "labels": HELD_OUT[0]}])
    with pytest.raises(ValueError, match="no loss"):
        all_losses(Rows([[{"input_ids": HELD_OUT[0]}]], 3), model)
    with pytest.raises(ValueError, match="at least two rows"):
        train("full", GradESConfig(), held_out=lambda model: torch.ones(1))


def test_a_finished_run_is_not_trained_any_more():
    ended = train("full", GradESConfig(), held_out=Script(1.0, 1.0, 1.5))
    assert not any(p.requires_grad for p in ended.model.parameters())
    state = ended.engine.state_dict()
    ended.engine.close()
    engine = GradES(ended.model, GradESConfig(), total_steps=STEPS, held_out=Script(1.0))
    engine.load_state_dict(state)
    assert engine.done
    engine.close()


def held_out_with(masked):
    """Held-out rows, of which some have no label left."""
    labels = HELD_OUT.clone()
    labels[masked] = -100
    return [{"input_ids": ids, "labels": label} for ids, label in zip(HELD_OUT, labels, strict=True)]


@pytest.mark.parametrize("masked", [[0, 17], list(range(HELD_OUT.shape[0] - 1))])
def test_rows_without_labels_are_left_out(masked, caplog, tmp_path):
    run = train("full", GradESConfig(), held_out=Whole([held_out_with(masked)], 128))
    several = len(masked) < len(HELD_OUT) - 1
    assert run.engine.done == several
    said = "They are left out of every look" if several else "no look can end this run"
    assert caplog.text.count(said) == 1
    assert f"{len(masked)} of {len(HELD_OUT)} held-out rows" in caplog.text
    assert {look["rows"] for look in run.engine.ending.looks} == {len(HELD_OUT) - len(masked)}
    kept = dataset(HELD_OUT[[i for i in range(len(HELD_OUT)) if i not in masked]]) if several else None
    if several:
        same = train("full", GradESConfig(), held_out=Whole([kept], 128))
        assert same.steps == run.steps
        for look, other in zip(same.engine.ending.looks, run.engine.ending.looks, strict=True):
            assert look["average_loss"] == pytest.approx(other["average_loss"], rel=1e-4)
    again = train("full", GradESConfig(), held_out=Whole([held_out_with(masked)], 128), resume_after=[11, 13])
    assert again.steps == run.steps
    assert again.engine.ending.looks == run.engine.ending.looks


def test_rows_without_labels_are_told_of_when_a_look_meets_them(caplog):
    held = held_out_with([0, 17])
    rows = [*held, *held]
    train("full", GradESConfig(), held_out=rows)  # 0 and 40 are in the first quarter, 17 and 57 are not
    assert caplog.text.count("2 of 20 held-out rows") == caplog.text.count("have no finite loss") == 1


@pytest.mark.parametrize(("number", "told"), [(15, True), (16, False)])
@pytest.mark.parametrize("how", ["rows", "function"])
def test_few_held_out_rows_are_told_of_once(number, told, how, caplog):
    rows, function = dataset()[:number], lambda model: torch.linspace(1.0, 2.0, number)
    engine = train("full", GradESConfig(), held_out=rows if how == "rows" else function).engine
    assert len(engine.ending.looks) > 1
    assert caplog.text.count(f"only {number} held-out losses") == told


def test_a_run_that_no_look_ends_says_so_when_it_is_over(caplog):
    engine = train("full", GradESConfig(), held_out=Script(*[10.0 - i for i in range(100)])).engine
    assert "said to go on" not in caplog.text
    engine.close()
    assert caplog.text.count(f"looks at held-out rows in {STEPS} of {STEPS} steps said to go on") == 1


def test_losses_that_are_all_no_numbers_are_told_and_recorded(caplog, tmp_path):
    run = train("full", GradESConfig(), held_out=Script(math.nan))
    assert not run.engine.done
    assert "50 of 50 held-out rows" in caplog.text
    again = train("full", GradESConfig(), held_out=Script(math.nan), resume_after=[11, 13])
    assert len(again.engine.ending.looks) == len(run.engine.ending.looks)
    run.engine.history.save(tmp_path / "history.json")
    history = History.load(tmp_path / "history.json")
    look = history.looks[0]
    assert (look["rows"], look["average_loss"]) == (0, None)
    assert "no row has a finite loss" in sentence(history)
    assert "no row has a finite loss" in to_html([Run(tmp_path, "run", history, {})])


def test_labels_that_only_the_quarter_lacks_do_not_keep_a_run_from_ending():
    held = [*dataset(), *dataset()]
    masked = [
        {**row, "labels": torch.full_like(row["labels"], -100)} if i % 4 == 0 else row for i, row in enumerate(held)
    ]
    run = train("full", GradESConfig(), held_out=masked)
    assert run.engine.done
    assert {look["rows"] for look in run.engine.ending.looks} == {60}


def test_a_function_that_returns_other_rows_is_compared_with_nothing(caplog):
    numbers = iter([50, 50, 49, 50])

    def losses(model):
        return torch.linspace(9, 1, 50)[: next(numbers, 50)]  # one row fewer looks like other losses

    engine = rule(losses)
    assert not engine.done
    assert [look["ended"] for look in engine.ending.looks] == [False] * len(engine.ending.looks)
    assert engine.ending.looks[1]["difference"] is None
    assert "gives 49 losses now and gave 50 before" in caplog.text


def test_other_rows_after_a_resume_are_compared_with_nothing(caplog):
    held = [*dataset(), *dataset()]
    first = train("full", GradESConfig(), held_out=held, steps=14)
    looks = len(first.engine.ending.looks)
    assert looks
    state = first.engine.state_dict()
    first.engine.close()
    for rows, at_once, same in ((80, 3, True), (70, 8, False)):
        engine = GradES(first.model, GradESConfig(), total_steps=STEPS, held_out=Rows([held], rows, at_once=at_once))
        engine.load_state_dict(state)
        look = engine.ending._look(engine.extension("average"))
        assert (look["since"] is not None) == same
        assert ("gave 80 before" in caplog.text) != same
        if same:  # the losses are those of the same rows, so of a spread that pairing takes away
            assert look["since_error"] < 0.3 * torch.tensor(engine.ending._before).std() / math.sqrt(look["rows"])
        engine.close()


def test_that_rows_are_left_out_is_said_once_also_after_a_resume(caplog):
    train("full", GradESConfig(), held_out=Whole([held_out_with([0])], 128), resume_after=[15])
    assert caplog.text.count("have no finite loss") == 1
