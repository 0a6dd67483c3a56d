"""The race: the run goes on as if nobody had looked, what is read off it is right, and what its page says of rows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks import race, race_page, race_tasks
from benchmarks.race_tasks import SETTINGS, Places

NOWHERE = Places("", "")
RESULTS = race_page.RESULTS / "race.json"


@pytest.fixture
def small(monkeypatch):
    """Settings that need no files, with few rows to evaluate; by name."""

    def change(name, **options):
        setting = dataclasses.replace(SETTINGS[name], **{"looks": 48, "held": 64, "test": 64, **options})
        monkeypatch.setitem(race.SETTINGS, name, setting)
        return race.Job(NOWHERE, name, 3)

    return change


def plain(job, part=1.0):
    """A run without anything of the race, as the losses of the test rows."""
    loop = race.Loop(job, part)
    for step in range(1, loop.steps + 1):
        loop.backward(step)
        loop.clip()
        loop.update()
    return race_tasks.losses(loop.model, loop.task.test)[0]


def test_the_run_is_the_same_as_without_an_engine_although_it_was_ended(small):
    job = small("BERT 64 x 40")
    found = race.run(job)
    arms = {row["arm"]: row for row in found["arms"]}
    assert arms["default"]["end"] < 1, "else it is not seen that the run goes on"
    assert found["looks"][-1]["ended"]
    assert arms["full"]["loss"] == float(plain(job).mean())
    assert arms["short"]["loss"] == float(plain(job, race.SHORT).mean())
    assert arms["default"]["loss"] != arms["look, last weights"]["loss"]
    assert arms["full"]["error"] == 0 < arms["default"]["error"]
    assert set(arms) == set(race_page.ARMS) - {"threshold", "peer"}


def test_the_old_vote_sees_what_the_engine_sees(small):
    job = small("T5 backwards, 200 x 40", epochs=4)
    runner = race.Race(job)
    for step in range(1, runner.steps + 1):
        loss = runner.backward(step)
        runner.vote.step(loss, runner.setting.rate_at(step, runner.steps))
        runner.clip()
        runner.engine.step(epoch=runner.epoch(step))
        assert not runner.engine.done
        ours, theirs = runner.vote.criterion.ratios(), runner.engine.criterion.ratios()
        assert torch.allclose(ours, theirs, rtol=1e-4, equal_nan=True)
        runner.update()
    assert ours.isfinite().any()


def test_no_look_in_a_first_epoch(small):
    found = race.run(small("BERT 2400 x 1", rows=240))
    arms = {row["arm"]: row for row in found["arms"]}
    assert found["looks"] == []
    for arm in ("default", "schedule alone", "look, last weights"):
        assert arms[arm] == {**arms["full"], "arm": arm}


def test_early_stopping():
    rule, seen = race.EarlyStopping(2), []
    for loss in (3.0, 2.0, 1.9996, 2.5, 2.0):
        seen.append(rule.validate(torch.tensor([loss, loss, 99.0]), lambda loss=loss: [torch.tensor(loss)]))
    assert seen == [False, False, False, False, True]
    assert float(rule.best[0]) == pytest.approx(1.9996)
    assert rule.cost(2) == pytest.approx(5 * 2 / 3 / 2)


def test_a_threshold_is_the_smallest_that_gives_the_compute():
    late = {"a": [5.0, 4.0, 3.0, 2.0, 1.0], "b": [6.0, 5.0, 4.0, 3.0, 2.0]}
    tau = race.choose(late, 10)
    # At 3: a freezes at its third late step, b at its fourth; the run ends there.
    assert tau == pytest.approx(5)
    assert race.choose({"a": [2.0, 2.0, 1.0, 1.0]}, 10) == pytest.approx(2)
    with pytest.raises(ValueError, match="no threshold"):
        race.choose({"a": [math.nan] * 4}, 10)


def test_labels_are_wrong_where_they_are_to_be():
    assert {name for name, setting in SETTINGS.items() if setting.wrong} == {"ViT 300 x 80, 20 % wrong"}


@pytest.mark.parametrize("name", ["BERT 64 x 40", "BERT 600 x 4, regression", "T5 cipher, 400 x 20"])
def test_losses_of_rows_are_those_of_the_model(name, small):
    job = small(name)
    task = race_tasks.make(race.SETTINGS[name], 3, NOWHERE)
    each, right = race_tasks.losses(task.model, task.held)
    task.model.eval()
    with torch.no_grad():
        assert float(each.mean()) == pytest.approx(float(task.model(**task.held).loss), rel=1e-5)
    assert (right is not None) == (name == "BERT 64 x 40")
    again = race_tasks.make(race.SETTINGS[job.setting], 3, NOWHERE)
    assert torch.equal(again.order, task.order)
