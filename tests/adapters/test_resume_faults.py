"""Resuming where something differs: other training arguments, a stretch without GradES, ended runs, damaged files."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.adapters.trainer import checkpoint
from grades_hf.criteria import Rise
from tests import small
from tests.adapters import looks, overfit
from tests.small import llama, lora

SAVES = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12, "logging_steps": 2}
CONFIG = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.25)


def half() -> Any:
    return llama().to(torch.bfloat16)


class Last(TrainerCallback):
    """What a run without a tau knows when the last step has been made."""

    def __init__(self, callback: GradESCallback) -> None:
        self.callback = callback

    def on_step_end(self, args, state, control, **kwargs):
        engine = self.callback.engine
        average = engine.extension("average")
        self.known = {
            "looks": copy.deepcopy(engine.ending.looks),
            "level": engine.criterion.level,
            "memory": engine.criterion.memory.tolist(),
            "origin": average._origin,
            "average": [tensor.tolist() for tensor in average._average.values()],
            "devices": {str(tensor.device) for tensor in average._average.values()},
        }


def states(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.mark.compatibility(
    "Trainer", "resuming a run without a tau (full, LoRA, bf16 weights, average_device)", "works"
)
@pytest.mark.parametrize(
    ("make", "options"),
    [(llama, {}), (lora, {}), (half, {}), (llama, {"average_device": "cpu"})],
    ids=["full", "lora", "bf16", "cpu"],
)
@pytest.mark.usefixtures("looks_at_every_step")
def test_without_a_tau_interrupted_equals_uninterrupted(make, options, tmp_path, monkeypatch):
    monkeypatch.setattr("grades_hf.ending.ending.MARGIN", 1e9)
    monkeypatch.setattr(Rise, "update", looks.always)
    runs = []
    for name, resume in (("a", None), ("b", None), ("b", "checkpoint-6")):
        callback = GradESCallback(look_rows=4, **options)
        last = Last(callback)
        trainer = overfit.trainer(make(), tmp_path / name, [callback, last], **SAVES)
        trainer.train(resume_from_checkpoint=None if resume is None else str(tmp_path / name / resume))
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        runs.append((last.known, weights, states(tmp_path / name, 12)))
    (known, weights, state), *others = runs
    assert [look["step"] for look in known["looks"]] == list(range(3, 12)), "looks before and after the interruption"
    for other_known, other_weights, other_state in others:
        assert other_known == known
        assert all(torch.equal(weights[n], other_weights[n]) for n in weights)
        assert other_state == state, "no clock is in it"


# --- other training arguments --------------------------------------------------------------------------------------


def resumed(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], **options: Any) -> GradESCallback:
    first = GradESCallback(CONFIG) if not options else GradESCallback(**options)
    overfit.trainer(llama(), tmp_path, [first], **{**SAVES, "max_steps": 12, **before}).train()
    callback = GradESCallback(CONFIG) if not options else GradESCallback(**options)
    trainer = overfit.trainer(llama(), tmp_path, [callback], **{**SAVES, **after})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert trainer.state.global_step == 12
    return callback


@pytest.mark.compatibility(
    "Trainer", "resuming with another batch size, accumulation or clipping: said, with what it means", "works"
)
@pytest.mark.parametrize(
    ("after", "options", "said"),
    [
        ({"per_device_train_batch_size": 2}, {}, "per_device_train_batch_size 4 -> 2"),
        ({"gradient_accumulation_steps": 2}, {}, "gradient_accumulation_steps 1 -> 2"),
        ({"max_grad_norm": 0.1}, {}, "max_grad_norm 1.0 -> 0.1"),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}, None),
        ({}, {}, None),
        ({"per_device_train_batch_size": 2}, {"rise": 1e6}, "looks come at other steps"),
        ({"max_grad_norm": 0.1}, {"rise": 1e6}, None),
    ],
)
def test_another_scale_of_the_gradients_is_said_once(after, options, said, tmp_path, caplog):
    callback = resumed(tmp_path, {}, after, **options)
    lines = [r.getMessage() for r in caplog.records if "was trained with other arguments" in r.getMessage()]
    assert len(lines) == (said is not None)
    if said:
        assert said in lines[0]
        assert "another scale from step 7 on" in lines[0]
    assert callback.engine.t == 12


@pytest.mark.compatibility("Trainer", "resuming with GradES after a stretch without it", "works")
@pytest.mark.parametrize("options", [{}, {"rise": 1e6}], ids=["tau", "looks"])
def test_grades_then_without_then_grades(options, tmp_path, caplog):
    first = GradESCallback(CONFIG) if not options else GradESCallback(**options)
    saves = {**SAVES, "save_steps": 4, "max_steps": 16}
    overfit.trainer(llama(), tmp_path, [first], **saves).train()
    without = overfit.trainer(llama(), tmp_path, [], **saves)
    without.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    callback = GradESCallback(CONFIG) if not options else GradESCallback(**options)
    again = overfit.trainer(llama(), tmp_path, [callback], **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert callback.engine.t == 16
    assert callback.engine.frozen == first.engine.frozen
    assert bool(callback.engine.frozen) is not bool(options)
    lines = [r.getMessage() for r in caplog.records if "trained without GradES" in r.getMessage()]
    assert len(lines) == 1
    assert "steps 9 to 12 were trained without GradES" in lines[0]
    assert ("frozen" in lines[0]) is not bool(options)
    series = callback.engine.history.values["model.layers.0.self_attn.k_proj"]
    if not options:
        assert callback.engine.history.steps == [*range(1, 9), *range(13, 17)]
        assert series[8] != series[8], "the check after the stretch has nothing to compare with"


class Mine(GradESCallback):
    """A user's own class, under whose name Trainer saves and looks for the state."""


def test_a_subclass_goes_on_from_what_the_class_has_saved(tmp_path):
    overfit.trainer(llama(), tmp_path, [GradESCallback(CONFIG)], **SAVES).train()
    callback = Mine(CONFIG)
    overfit.trainer(llama(), tmp_path, [callback], **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert set(callback.engine.frozen.values()) == {4}


# --- runs that GradES had ended ------------------------------------------------------------------------------------


@pytest.mark.compatibility("Trainer", "resuming a run that GradES had ended, by a tau or by a look", "works")
@pytest.mark.parametrize("by", ["tau", "look"])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_had_ended_is_over(by, strategy, tmp_path):
    def make() -> GradESCallback:
        return overfit.ending() if by == "look" else GradESCallback(tau=1e9, alpha=0.1)

    options = {"save_strategy": strategy, "save_steps": 100, "eval_strategy": strategy, "eval_steps": 100}
    options |= {"logging_steps": 3, "include_num_input_tokens_seen": "all"}
    first = overfit.trainer(llama(), tmp_path, [make()], **options)
    first.train()
    step = first.state.global_step
    assert step < 60
    logged, tokens = len(first.state.log_history), first.state.num_input_tokens_seen
    callback = make()
    again = overfit.trainer(llama(), tmp_path, [callback], **options)
    result = again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert callback.engine.done
    assert (result.global_step, again.state.global_step) == (step, step)
    assert result.training_loss == result.metrics["train_loss"] == 0.0, "as Trainer has it where nothing is left"
    assert len(again.state.log_history) <= logged + 1
    assert again.state.num_input_tokens_seen == tokens
    weights = dict(again.model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in first.model.named_parameters())
    assert all(p.requires_grad for p in again.model.parameters())


# --- damaged files -------------------------------------------------------------------------------------------------

NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]
HOSTILE = [None, [], {}, "", "x" * 1000, -1, 10**400, float("inf"), float("nan"), True, 1.5, [None], {"a": 1}, NESTED]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        found += [p for key in list(value)[:3] + list(value)[-2:] for p in paths(value[key], (*path, key))]
    elif isinstance(value, list):
        found += [p for index in range(min(2, len(value))) for p in paths(value[index], (*path, index))]
    return list(dict.fromkeys(found))


@pytest.mark.compatibility("Faults", "trainer_state.json with damaged entries of GradES", "works")
@pytest.mark.parametrize("kind", ["tau", "looks"])
def test_a_damaged_state_is_a_value_error_at_most(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("grades_hf.ending.ending.MARGIN", 1e9)
    if kind == "looks":
        monkeypatch.setattr(Rise, "update", looks.always)
    callback = GradESCallback(CONFIG) if kind == "tau" else GradESCallback(look_rows=4)
    trainer = overfit.trainer(llama(), tmp_path, [callback], **{**SAVES, "max_steps": 6})
    trainer.train()
    good = TrainerState.load_from_json(str(tmp_path / "checkpoint-6" / "trainer_state.json"))
    data = small.tokens(4)
    refused = survived = 0
    wrong: list[str] = []
    for path in paths(good.stateful_callbacks["GradESCallback"]):
        for hostile in HOSTILE:
            state = copy.deepcopy(good)
            place: Any = state.stateful_callbacks["GradESCallback"]
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = hostile
            model = llama()
            optimizer = torch.optim.AdamW(model.parameters())
            held_out = None if kind == "tau" else [{k: torch.tensor(v) for k, v in row.items()} for row in data]
            engine = GradES(model, callback.config, total_steps=6, optimizer=optimizer, held_out=held_out)
            try:
                checkpoint.resume(engine, "GradESCallback", state, tmp_path / "none.json", trainer.args)
                engine.conclude()
                survived += 1
            except ValueError as error:
                refused += bool(str(error))
            except Exception as error:
                wrong.append(f"{path} = {hostile!r:.80}: {error!r:.200}")
            engine.close()
    assert wrong == []
    assert refused > 20
    assert survived > 0


@pytest.mark.compatibility("Faults", "optimizer.pt with damaged entries of GradES", "works")
@pytest.mark.parametrize("kind", ["tau", "looks"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda t: torch.zeros(3),
        lambda t: torch.zeros_like(t, dtype=torch.int64),
        lambda t: "text",
        lambda t: t.unsqueeze(0),
        lambda t: None,
    ],
    ids=["shape", "type", "text", "dimension", "none"],
)
def test_damaged_tensors_cost_one_check_or_the_average(damage, kind, tmp_path):
    make = (lambda: GradESCallback(CONFIG)) if kind == "tau" else (lambda: GradESCallback(rise=1e6))
    overfit.trainer(llama(), tmp_path, [make()], **SAVES).train()
    path = tmp_path / "checkpoint-6" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    changed = 0
    for key, own in list(saved["state"].items()):
        if isinstance(key, str):
            saved["state"][key] = {index: damage(tensor) for index, tensor in own.items()}
            changed += len(own)
        else:
            for name in [name for name in own if name.startswith("grades")]:
                own[name] = damage(own[name])
                changed += 1
    assert changed
    torch.save(saved, path)
    callback = make()
    overfit.trainer(llama(), tmp_path, [callback], **SAVES).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert callback.engine.t == 12


def test_a_checkpoint_of_a_later_step_contradicts_itself(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    overfit.trainer(llama(), tmp_path, [GradESCallback(CONFIG)], **SAVES).train()
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["GradESCallback"]["attributes"]["checkpoint"]["step"] = 9
    path.write_text(json.dumps(state))
    trainer = overfit.trainer(llama(), tmp_path, [GradESCallback(CONFIG)], **SAVES)
    with pytest.raises(ValueError, match="contradicts itself: GradES saved its state at step '9'"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert all(p.requires_grad for p in trainer.model.parameters())
