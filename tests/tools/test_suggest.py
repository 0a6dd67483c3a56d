"""`grades-hf suggest`: the replay held to a literal reading of Algorithm 1, the thresholds to a search of all."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from grades_hf import GradES, GradESConfig, History
from grades_hf.tools import cli
from grades_hf.tools.suggest import Rule, _blocks, compute, replay, shares_of, suggest, to_text
from tests.report.histories import changed, looked
from tests.report.histories import history as made_up

PROJECTIONS = ("q", "v", "up")


def observed(config: dict[str, Any] | None = None, steps: int = 30, missing: bool = True, **options: Any) -> History:
    """A run in which nothing froze, with falling values and some that are missing."""
    record = made_up(frozen=0.0, steps=steps, planned=steps, projections=PROJECTIONS, layers=3, **options)
    record.config = {**GradESConfig(tau=1e-300, alpha=0.3).to_dict(), **(config or {})}
    values = {name: list(series) for name, series in record.values.items()}
    for place, series in enumerate(values.values()):
        for index in range(1, len(series)):
            series[index] = (1 + place % 4) * (3 / index + 0.3 * math.sin(7 * index + place) ** 2)
            if missing and (index + place) % 11 == 0:
                series[index] = math.nan
    record = changed(record, values=values)
    for component in record.components:
        component["adapter"] = False
        component["numel"] = 10 * (1 + len(component["projection"]))
    return record


def literally(record: History, tau: dict[str, float], rule: Rule) -> tuple[dict[str, int], int]:
    """Algorithm 1, step by step."""
    frozen: dict[str, int] = {}
    for t in range(1, record.total_steps + 1):
        due = t - 1 if rule.delay_transfer else t  # the step whose values are decided upon
        if due in record.steps and due > rule.grace:
            checks = [s for s in record.steps if rule.grace < s <= due][-rule.patience :]
            for name, series in record.values.items():
                recent = [series[record.steps.index(s)] for s in checks]
                if name not in frozen and len(recent) == rule.patience and all(v < tau[name] for v in recent):
                    frozen[name] = t
            if len(frozen) >= rule.max_frozen_fraction * len(record.values):
                return frozen, t
    return frozen, record.total_steps


def cost_literally(record: History, frozen: dict[str, int], last: int, rule: Rule) -> float:
    """The sum over the steps of what each one costs."""
    total, shares = 0.0, shares_of(record)
    for t in range(1, last + 1):
        step = 1.0
        for name, share in shares.items():
            if frozen.get(name, math.inf) < t:
                step -= share
        for layer, share in enumerate(_blocks(record, shares) if rule.freeze_prefix else ()):
            below = [c["name"] for c in record.components if c["layer"] is not None and c["layer"] <= layer]
            if all(frozen.get(name, math.inf) < t for name in below):
                step -= share
        total += step
    return total / record.total_steps


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_replay_is_algorithm_1(check_every: int, delay: bool, patience: int, fraction: float) -> None:
    record = observed({"check_every": check_every})
    keep = [index for index, step in enumerate(record.steps) if step % check_every == 0]
    values = {name: [series[index] for index in keep] for name, series in record.values.items()}
    record = changed(record, steps=[record.steps[index] for index in keep], values=values)
    rule = Rule(9, patience, fraction, delay, freeze_prefix=True)
    shares = shares_of(record)
    blocks = _blocks(record, shares)
    seen = set()
    for scale in (0.02 * 1.1**power for power in range(80)):
        tau = {name: scale * (1 + place % 4) for place, name in enumerate(record.values)}
        found = replay(record, tau, rule)
        assert found == literally(record, tau, rule)
        assert compute(record, *found, shares, blocks) == pytest.approx(cost_literally(record, *found, rule))
        seen.add(len(found[0]))
    assert len(seen) > 2  # none, some, all


@pytest.mark.parametrize("by", ["all", "group", "projection"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("target", [0.5, 0.7, 0.95])
def test_the_smallest_thresholds_that_reach_the_target(by: str, prefix: bool, target: float) -> None:
    record = observed()
    found = suggest(record, target, by=by, freeze_prefix=prefix)
    assert found.compute <= target < found.more <= 1
    rule = Rule(9, 1, 1.0, False, prefix)
    keys = {c["name"]: {"all": ".*", "group": c["group"], "projection": c["projection"]}[by] for c in record.components}
    assert found.tau.keys() == set(keys.values())

    def cost(scale: float) -> tuple[float, dict[str, int]]:
        tau = {name: scale * found.tau[key] for name, key in keys.items()}
        frozen, last = literally(record, tau, rule)
        return cost_literally(record, frozen, last, rule), frozen

    assert cost(1.0) == (pytest.approx(found.compute), found.frozen)
    # Every threshold of the family that does something else, from all values that one could be equal to.
    scales = sorted(
        v / found.tau[keys[name]]
        for name, series in record.values.items()
        for step, v in zip(record.steps, series, strict=True)
        if step > 9 and math.isfinite(v)
    )
    smaller = (cost(scale)[0] for scale in reversed(scales) if scale < 1)
    assert next(used for used in smaller if used > found.compute + 1e-9) == pytest.approx(found.more)


def test_the_first_freezing_of_a_real_run_is_the_one_that_was_replayed(tmp_path: Path) -> None:
    """Up to its first freezing a run has the values of the observed one, and the same thresholds freeze the same."""

    def run(config: GradESConfig) -> GradES:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine = GradES(model, config, total_steps=20, optimizer=optimizer)
        batches = torch.randint(32, (20, 4, 8), generator=torch.Generator().manual_seed(1))
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
            if engine.done:
                break
        engine.close()
        return engine

    record = run(GradESConfig(tau=1e-300, alpha=0.3)).history
    found = suggest(record, 0.9)
    first = min(found.frozen.values())
    engine = run(GradESConfig(tau=found.tau, alpha=0.3))
    really = {name for name, step in engine.frozen.items() if step == first}
    assert min(engine.frozen.values()) == first
    assert really == {name for name, step in found.frozen.items() if step == first}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = observed()
    record.save(tmp_path / "grades_history.json")
    assert cli.main(["suggest", str(tmp_path), "--target-compute", "0.7"]) == 0
    text = capsys.readouterr().out
    found = suggest(record, 0.7)
    assert text == to_text(record, found)
    taus = json.loads(text.split("tau: ")[1].splitlines()[0])
    assert taus == pytest.approx(found.tau)
    GradESConfig(tau=taus)
    rows = [line.split() for line in text.splitlines()]
    head = rows.index(["layer", *PROJECTIONS])
    for layer in range(3):
        steps = [found.frozen.get(f"None.{layer}.{projection}.0") for projection in PROJECTIONS]
        assert rows[head + 1 + layer] == [str(layer), *("-" if step is None else str(step) for step in steps)]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_shares_of_a_step_are_in_the_history(adapter: bool) -> None:
    record = observed()
    for component in record.components:
        component["adapter"] = adapter
    record.shares = dict.fromkeys(record.values, 0.001)
    found = suggest(record, 0.7, by="all")
    assert found.compute == pytest.approx(
        (found.last_step - sum(0.001 * (found.last_step - t) for t in found.frozen.values())) / 30
    )
    (value,) = found.tau.values()
    assert f"tau: {float(f'{value:.9g}')}\n" in to_text(record, found, "all")


def test_towers_have_thresholds_of_their_own() -> None:
    record = observed(towers=("vision", "language"))
    found = suggest(record, 0.8)
    assert found.tau.keys() == {f"{tower}.{name}" for tower in ("vision", "language") for name in PROJECTIONS}
    assert "\nvision\nlayer " in to_text(record, found)
    with pytest.raises(ValueError, match="freeze_prefix=True needs the cost of each block"):
        suggest(record, 0.8, freeze_prefix=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-compute", "1.5"], "target_compute=1.5 must be a number between 0 and 1"),
        (["--target-compute", "nan"], "target_compute=nan must be"),
        (["--target-compute", "0.2"], "target_compute=0.2 is out of reach: .* the run uses 0.333. Lower alpha"),
        (["--target-compute", "0.7", "--alpha", "1"], r"alpha=1.0 must be a number in \[0, 1\)"),
        (["--target-compute", "0.7", "--patience", "0"], "patience=0 must be a whole number"),
    ],
)
def test_what_cannot_be_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    observed(missing=False).save(tmp_path / "grades_history.json")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["suggest", str(tmp_path), *options])
    assert re.search(message, capsys.readouterr().err)


def test_runs_that_tell_too_little_are_refused(tmp_path: Path) -> None:
    record = made_up(frozen=0.9)
    record.config = GradESConfig(tau=1.0).to_dict()
    with pytest.raises(ValueError, match=r"the run froze \d+ of 21 components.*tau=1e-30"):
        suggest(record, 0.7)
    record = observed()
    record.components[0]["adapter"] = True
    with pytest.raises(ValueError, match="does not say what share of a step they are"):
        suggest(record, 0.7)
    record.config["tau"] = None
    with pytest.raises(ValueError, match="only the second matrix of each LoRA pair"):
        suggest(record, 0.7)
    with pytest.raises(ValueError, match="recorded no values"):
        suggest(made_up_empty(), 0.7)
    with pytest.raises(SystemExit):
        cli.main(["suggest", str(tmp_path / "none"), "--target-compute", "0.7"])


def test_a_run_without_a_tau_names_its_statistic() -> None:
    record = looked("completed", steps=40)
    for component in record.components:
        component["adapter"] = False
    text = to_text(record, suggest(record, 0.7))
    assert "These hold for monitor='gradient_per_loss'" in text


def test_thresholds_that_freeze_everything_at_once_are_warned_of() -> None:
    record = observed(missing=False)
    record = changed(record, values={name: [1.0] * 30 for name in record.values})
    text = to_text(record, suggest(record, 0.7))
    assert "Warning: all 9 components would freeze at once, at step 10:" in text
    assert "Warning" not in to_text(observed(), suggest(observed(), 0.7))


@pytest.mark.parametrize("value", [0.0, math.nan, -1.0, 1e308, 5e-324])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_degenerate_values_give_a_sentence(value: float, all_of_them: bool) -> None:
    record = observed(missing=False)
    names = list(record.values)[: None if all_of_them else 1]
    values = {name: [value] * 30 if name in names else list(series) for name, series in record.values.items()}
    record = changed(record, values=values)
    if all_of_them and not 0 < value < 1e300:
        with pytest.raises(ValueError, match="no value greater than 0 was recorded after step 9"):
            suggest(record, 0.7)
    elif value != 5e-324:  # the least number of all: half of it is none
        found = suggest(record, 0.7)
        assert all(0 < tau < math.inf for tau in found.tau.values())
        assert to_text(record, found)


def made_up_empty() -> History:
    record = observed()
    return changed(record, steps=[], values={name: [] for name in record.values})
