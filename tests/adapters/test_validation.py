"""Validation as people set it up: the default breaks no usual set-up, and says what it does."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from grades_hf import GradESCallback, GradESTrainer
from tests.adapters import overfit
from tests.small import llama


class ReadsLogs(TrainerCallback):
    """Keeps what it finds in logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "eval_loss" in logs:
            self.losses.append(logs["eval_loss"])


class ReadsMetrics(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        assert "eval_loss" in metrics


class Shows(TrainerCallback):
    """Looks at training logs only."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs.get("loss")


class Asks(TrainerCallback):
    """Wants an evaluation after the first step, as Transformers' documentation has it."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate |= state.global_step == 1


STEPS = {"eval_strategy": "steps", "eval_steps": 4}
EPOCHS = {"eval_strategy": "epoch"}
SAVES = {"save_strategy": "steps", "save_steps": 4}
LEFT_OUT = [
    ({**STEPS}, []),
    ({**STEPS, "eval_on_start": True}, []),
    ({**EPOCHS}, []),
    ({**EPOCHS, "save_strategy": "epoch"}, []),
    ({**STEPS, **SAVES}, [Shows]),
    ({**STEPS, "eval_delay": 3}, []),
]
KEPT = [
    ({**STEPS, **SAVES, "load_best_model_at_end": True}, [], "load_best_model_at_end"),
    ({**EPOCHS, "save_strategy": "epoch", "load_best_model_at_end": True}, [], "load_best_model_at_end"),
    ({**STEPS, "save_strategy": "best", "metric_for_best_model": "loss"}, [], 'save_strategy="best"'),
    ({**STEPS, "lr_scheduler_type": "reduce_lr_on_plateau"}, [], "reduce_lr_on_plateau"),
    ({**STEPS, **SAVES, "metric_for_best_model": "loss", "greater_is_better": False}, [], "metric_for_best_model"),
    ({**STEPS, "metric_for_best_model": "loss"}, [EarlyStoppingCallback], "EarlyStoppingCallback"),
    ({**STEPS}, [ReadsMetrics], "ReadsMetrics"),
    ({**EPOCHS}, [ReadsLogs], "ReadsLogs"),
]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.name.startswith("grades_hf") and r.levelno >= logging.WARNING]
    return [line for line in found if "scheduled evaluations" in line]


def run(folder: Any, callbacks: list[type[TrainerCallback]], options: dict[str, Any], **grades: Any) -> Trainer:
    made = [callback() for callback in callbacks]
    config = {"rise": 1e6, **grades} if "tau" not in grades else grades  # no look
    trainer = overfit.trainer(llama(), folder, [*made, GradESCallback(**config)], **{"max_steps": 8, **options})
    trainer.train()
    return trainer


def evaluations(trainer: Trainer) -> list[int]:
    return [log["step"] for log in trainer.state.log_history if "eval_loss" in log]


@pytest.mark.compatibility("Trainer", "scheduled evaluations that nothing needs: left out by default", "works")
@pytest.mark.parametrize(("options", "callbacks"), LEFT_OUT, ids=range(len(LEFT_OUT)))
def test_evaluations_that_nothing_needs_are_left_out_and_one_line_says_so(options, callbacks, tmp_path, caplog):
    trainer = run(tmp_path, callbacks, options)
    assert evaluations(trainer) == []
    (line,) = lines(caplog)
    assert "left out, since looks at held-out rows decide" in line
    assert "skip_validation=False" in line
    assert trainer.args.eval_on_start is options.get("eval_on_start", False)
    caplog.clear()
    assert evaluations(run(tmp_path, callbacks, options, skip_validation=False)) != []
    assert lines(caplog) == []


@pytest.mark.compatibility(
    "Trainer",
    "load_best_model_at_end, save_strategy best, metric_for_best_model, ReduceLROnPlateau, EarlyStoppingCallback, "
    "callbacks that read metrics: evaluations stay",
    "works",
)
@pytest.mark.parametrize(("options", "callbacks", "needs"), KEPT, ids=range(len(KEPT)))
@pytest.mark.parametrize("tau", [None, 1e-30], ids=["looks", "tau"])
def test_evaluations_that_something_needs_stay_and_one_line_says_so(tau, options, callbacks, needs, tmp_path, caplog):
    grades = {} if tau is None else {"tau": tau}
    trainer = run(tmp_path / "auto", callbacks, options, **grades)
    expected = [4, 8] if options["eval_strategy"] == "steps" else [2, 4, 6, 8]
    assert evaluations(trainer) == expected
    (line,) = lines(caplog)
    assert "run as usual" in line
    assert needs in line
    with pytest.raises(ValueError, match="needs evaluations") as error:
        run(tmp_path / "forced", callbacks, options, **grades, skip_validation=True)
    assert "skip_validation" in str(error.value)


def test_what_needs_them_may_come_after_the_trainer(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4}
    trainer = overfit.trainer(llama(), tmp_path, [GradESCallback(tau=1e-30, skip_validation=True)], **options)
    trainer.add_callback(ReadsMetrics())
    with pytest.raises(ValueError, match="ReadsMetrics needs evaluations"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_an_evaluation_that_a_callback_asks_for_is_made(tmp_path):
    assert evaluations(run(tmp_path, [Asks], STEPS)) == [1]


def test_an_own_plateau_scheduler_keeps_them(tmp_path, caplog):
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    extra = {"optimizers": (optimizer, scheduler)}
    options = {**STEPS, "max_steps": 4, "metric_for_best_model": "loss"}
    trainer = overfit.trainer(model, tmp_path, [GradESCallback()], extra=extra, **options)
    trainer.train()
    assert evaluations(trainer) == [4]
    assert "schedule" in lines(caplog)[0]


@pytest.mark.compatibility("Trainer", "load_best_model_at_end with the average that a look returns", "works")
@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
@pytest.mark.parametrize("cls", [Trainer, GradESTrainer])
def test_load_best_model_at_end_chooses_among_checkpoints_of_which_the_average_is_the_last(
    cls, strategy, tmp_path, caplog
):
    options: dict[str, Any] = {"save_strategy": strategy, "load_best_model_at_end": True, "max_steps": 60}
    every = "epoch" if strategy == "epoch" else "steps"
    options |= {"eval_strategy": every, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    if every == "steps":
        options |= {"eval_steps": 4, "save_steps": 4}
    callback = overfit.ending()
    if cls is GradESTrainer:
        extra = {"grades": overfit.ENDS}
        trainer = overfit.trainer(llama(), tmp_path, [], cls=cls, extra=extra, **options)
        callback = trainer.grades_callback
    else:
        trainer = overfit.trainer(llama(), tmp_path, [callback], **options)
    trainer.train()
    look = callback.engine.ending.looks[-1]
    assert look["ended"]
    last = trainer.state.global_step
    assert last == look["step"] < 60
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert max(losses) == last, "the average is evaluated, too"
    best = min(losses, key=losses.__getitem__)
    assert trainer.state.best_global_step == best
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert all(torch.equal(saved[name], trainer.model.state_dict()[name]) for name in saved)
    said = [r.getMessage() for r in caplog.records if "load_best_model_at_end=True has loaded" in r.getMessage()]
    assert len(said) == 1
    assert f"checkpoint-{best}" in said[0]
    assert ("what GradES returned" in said[0]) is (best == last)


def test_without_load_best_the_model_holds_the_average(tmp_path):
    average, last = ({}, {"return_weights": "last"})
    trainers = []
    for number, more in enumerate((average, last)):
        callback = GradESCallback(**overfit.ENDS, **more)
        trainer = overfit.trainer(llama(), tmp_path / str(number), [callback])
        trainer.train()
        trainers.append((trainer, callback.engine.ending.looks[-1]))
    (averaged, look), (present, other) = trainers
    assert look == other
    losses = [trainer.evaluate()["eval_loss"] for trainer in (averaged, present)]
    assert losses == pytest.approx([look["average_loss"], look["loss"]], rel=1e-4)
