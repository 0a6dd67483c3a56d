"""Checkpoints that grades-hf 0.1.0 has written are resumed: the same steps, the same weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from grades_hf import GradES, GradESCallback, GradESConfig, History
from tests import small

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints_0.1.0"
MAKES = {"full": small.llama, "lora": small.lora}
SAVES = {"save_strategy": "steps", "save_steps": 6}


@pytest.mark.compatibility("Faults", "a checkpoint of grades-hf 0.1.0", "works")
@pytest.mark.parametrize("kind", MAKES)
def test_a_run_of_0_1_0_goes_on(kind, tmp_path, caplog):
    """The whole run with a prefix and patience, a LoRA with a check left open."""
    expected = json.loads((GOLDEN / kind / "expected.json").read_text())
    whole = GradESCallback(**expected["options"])
    uninterrupted = small.trainer(MAKES[kind](), tmp_path / "whole", [whole], **SAVES)
    uninterrupted.train()
    assert whole.engine.frozen == expected["frozen"]
    assert any(step <= 6 for step in whole.engine.frozen.values())
    assert len(whole.engine.frozen) < len(whole.engine.components)

    caplog.clear()
    folder = shutil.copytree(GOLDEN / kind, tmp_path / "run")
    callback = GradESCallback(**expected["options"])
    resumed = small.trainer(MAKES[kind](), folder, [callback], **SAVES)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    assert [r.getMessage() for r in caplog.records if "other options" in r.getMessage()] == []
    assert callback.engine.frozen == expected["frozen"]
    weights = dict(uninterrupted.model.named_parameters())
    for name, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-6, msg=name)

    history = History.load(folder)
    assert history.steps == list(range(1, len(history.steps) + 1)) == whole.engine.history.steps
    for name, series in history.values.items():
        before = [math.nan if value is None else value for value in expected["values"][name]]
        assert list(series) == pytest.approx(before, rel=1e-4, nan_ok=True), name


def saved(kind: str) -> dict:
    state = json.loads((GOLDEN / kind / "checkpoint-6" / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["GradESCallback"]["attributes"]["checkpoint"]


@pytest.mark.compatibility("Faults", "a checkpoint of 0.1.0 made with an option that is gone", "refused")
@pytest.mark.parametrize(
    ("option", "value"), [("budget", 0.6), ("thaw", 2.0), ("criterion", "pflug"), ("criterion", "rise+pflug")]
)
def test_a_checkpoint_made_with_an_option_that_is_gone_says_so(option, value):
    state = saved("full")
    state["config"][option] = value
    model = small.llama()
    engine = GradES(model, GradESConfig(tau=1.0), total_steps=12)
    with pytest.raises(ValueError) as error:
        engine.load_state_dict(state)
    sentence = f"the checkpoint was made with {option}={value!r}, which is gone since grades-hf 0.2.0. "
    assert str(error.value) == sentence + "Finish this run with grades-hf 0.1.0."
    assert (engine.t, engine.frozen) == (0, {})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("part", ["events", "criterion", "step"])
@pytest.mark.parametrize("damage", [None, "x", [{"name": 3}], {"a": None}])
def test_a_damaged_state_of_0_1_0_is_refused(part, damage):
    state = {**saved("full"), part: damage}
    engine = GradES(small.llama(), GradESConfig(tau=1.0), total_steps=12)
    with pytest.raises(ValueError, match=r"GradES|checkpoint"):
        engine.load_state_dict(state)
    assert (engine.t, engine.frozen) == (0, {})


def test_options_of_0_1_0_are_read_where_they_say_nothing_and_refused_where_they_do():
    state = json.loads((GOLDEN / "full" / "checkpoint-6" / "trainer_state.json").read_text())
    options = state["stateful_callbacks"]["GradESCallback"]["args"]["config"]
    config = GradESConfig(**options)
    assert config.tau == dict(options["tau"])
    assert (config.alpha, config.patience, config.freeze_prefix) == (0.25, 2, True)
    for name, value in (("budget", 0.5), ("thaw", 1.5), ("quorum", 0.3), ("criterion", "pflug"), ("window", 7)):
        with pytest.raises(ValueError, match=rf"{name}=.* is gone since grades-hf 0\.2\.0.*Leave it out"):
            GradESConfig(**{**options, name: value})
