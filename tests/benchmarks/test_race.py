"""The race: the run goes on as if nobody had looked, what is read off it is right, and what its page says of rows."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import race, race_page, race_rules, race_tasks, race_thresholds
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


def test_settings_by_name(monkeypatch, capsys):
    assert not any("SmolLM2" in name for name in race._chosen(None))
    assert race._chosen(["ViT 100 ", "T5"]) == ["ViT 100 x 100", "T5 backwards, 200 x 40", "T5 cipher, 400 x 20"]
    monkeypatch.setattr(race, "locate_model", lambda name: (name, ""))
    assert len(race._chosen(["SmolLM2"])) == 3

    def nowhere(name):
        raise RuntimeError("no network")

    monkeypatch.setattr(race, "locate_model", nowhere)
    assert race._chosen(["SmolLM2", "T5 cipher"]) == ["T5 cipher, 400 x 20"]
    assert "no network" in capsys.readouterr().out


def test_early_stopping():
    rule, seen = race_rules.EarlyStopping(2), []
    for loss in (3.0, 2.0, 1.9996, 2.5, 2.0):
        seen.append(rule.validate(torch.tensor([loss, loss, 99.0]), lambda loss=loss: [torch.tensor(loss)]))
    assert seen == [False, False, False, False, True]
    assert float(rule.best[0]) == pytest.approx(1.9996)
    assert rule.cost(2) == pytest.approx(5 * 2 / 3 / 2)


def test_a_threshold_is_the_smallest_that_gives_the_compute():
    late = {"a": [5.0, 4.0, 3.0, 2.0, 1.0], "b": [6.0, 5.0, 4.0, 3.0, 2.0]}
    tau = race_thresholds.choose(late, 10)
    # At 3: a freezes at its third late step, b at its fourth; the run ends there.
    assert tau == pytest.approx(5)
    assert race_thresholds.choose({"a": [2.0, 2.0, 1.0, 1.0]}, 10) == pytest.approx(2)
    with pytest.raises(ValueError, match="no threshold"):
        race_thresholds.choose({"a": [math.nan] * 4}, 10)


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


# --- the page --------------------------------------------------------------------------------------------------------


def row(arm, seed, loss, setting="a", **more):
    return {"setting": setting, "seed": seed, "kind": "run", "arm": arm, "loss": loss, "end": 1.0, "compute": 1.0,
            "looks": 0, "error": 0.01, **more}  # fmt: skip


def rows(**losses):
    """Rows of one setting: arm -> the loss of each seed; what is not named is as the full budget."""
    full = losses.pop("full")
    found = [row("full", seed, loss) for seed, loss in enumerate(full)]
    for arm in list(race_page.ARMS)[1:]:
        found += [row(arm, seed, loss) for seed, loss in enumerate(losses.get(arm, full))]
    return found


def test_differences_are_paired_by_seed():
    found = race_page.outcomes(rows(full=[3.0, 4.0, 5.0], short=[3.1, 4.2, 5.3]))["a"]["short"]
    assert (found.loss, found.error) == pytest.approx((0.2, 0.1 / 3**0.5))
    assert found.worse
    assert found.wrong == [0, 1, 2]


def test_one_seed_has_the_error_of_its_rows():
    found = race_page.outcomes(rows(full=[3.0], short=[3.015]))["a"]["short"]
    assert found.error == 0.01
    assert not found.worse


def test_what_is_worse_is_bold_and_named():
    given = rows(full=[3.0, 3.0], short=[3.1, 3.12], default=[3.2, 3.3], es=[2.0, 2.1])
    found = race_page.outcomes(given)
    heads, lines = race_page.losses(found, ["a"], {"a": 3.0})
    cells = {line[0]: line[1] for line in lines}
    assert heads == ["arm", "a"]
    assert cells["short"] == "**+0.110 ± 0.010 for 1.00**"
    assert cells["es"] == "-0.950 ± 0.050 for 1.00"
    text = race_page.goal_lines(given)
    assert "in no setting: **missed in 1 of 1**: a (+0.250 ± 0.050)." in text
    assert "wherever that helps: **missed in 1 of 1**: a (+1.200 ± 0.000)." in text
    assert "at most 12 times: holds, in 1." in text
    assert "**missed in 2 of 2**: a, seed 0 (+0.200 ± 0.010)" in text


def test_accuracy_counts_too():
    given = [row | {"accuracy": 0.9} for row in rows(full=[3.0, 3.0], default=[2.0, 2.0])]
    for one, worse in zip([r for r in given if r["arm"] == "default"], (0.80, 0.81), strict=True):
        one["accuracy"] = worse
    found = race_page.outcomes(given)
    assert found["a"]["default"].worse
    (line,) = race_page.accuracies(found, {"a": 0.9})[1]
    assert line[:2] == ["a", "90.0 %"]
    assert line[-1] == "**-9.5 ± 0.5**"
    (worst,) = [line for line in race_page.worst(found)[1] if line[0] == "**default**"]
    assert worst == ["**default**", "never worse", "-1.000", "-9.5 (a)", "1 of 1", "1.00"]


def test_what_has_not_run_is_said():
    given = [one for one in rows(full=[3.0, 4.0]) if one["arm"] != "peer"]
    text = race_page.extent(given, ["a", "b"])
    assert text == "1 settings, 2 seeds each, 2 runs. **Not run yet are the settings b.** " + (
        "**Not run yet are the arms peer.**\n"
    )
    assert "1 seed each, 1 runs" in race_page.extent([row("full", 1, 3.0)], ["a"])


def test_the_figure_is_drawn(tmp_path):
    race_page.figure(rows(full=[3.0, 4.0]), tmp_path / "race")
    assert (tmp_path / "race" / "race.png").stat().st_size > 10_000


def test_the_committed_race_is_whole():
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    for setting, own in race_page.outcomes(document["results"]["arms"]).items():
        assert set(own) >= set(race_page.ARMS) - {"threshold", "peer"}, setting
        assert all(len(outcome.runs) == len(own["full"].runs) for outcome in own.values()), setting
