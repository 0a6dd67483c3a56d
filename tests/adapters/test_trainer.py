"""GradESTrainer and the mixin: same run as with the callback, and what reporters and other trainers see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback, Seq2SeqTrainer, Trainer, TrainerCallback

from grades_hf import GradESCallback, GradESConfig, GradESTrainer, GradESTrainerMixin
from tests import small
from tests.small import llama, tokens

CONFIG = GradESConfig(tau={"q": 1e9, "k": 1e-30}, alpha=0.5, target_modules=["q_proj", "k_proj"])


class GradESSeq2SeqTrainer(GradESTrainerMixin, Seq2SeqTrainer):
    pass


@pytest.mark.compatibility("Trainer", "GradESTrainer", "works")
def test_the_trainer_does_what_the_callback_does(tmp_path):
    callback = GradESCallback(CONFIG)
    with_callback = small.trainer(llama(), tmp_path / "a", [callback])
    with_callback.train()
    trainer = small.trainer(llama(), tmp_path / "b", [], cls=GradESTrainer, extra={"grades": CONFIG})
    trainer.train()
    assert trainer.grades_callback.engine.frozen == callback.engine.frozen != {}
    final = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, final[n]) for n, p in with_callback.model.named_parameters())
    assert [log for log in trainer.state.log_history if "loss" in log] == [
        log for log in with_callback.state.log_history if "loss" in log
    ]


@pytest.mark.compatibility("Trainer", "report_to tensorboard (GradESTrainer)", "works")
def test_reporters_get_the_scalars(tmp_path):
    options = {"report_to": "tensorboard", "extra": {"grades": CONFIG.to_dict()}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
        trainer = small.trainer(llama(), tmp_path, [], cls=GradESTrainer, **options)
        trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events*")}
    written = EventAccumulator(str(folder))
    written.Reload()
    fractions = [(event.step, event.value) for event in written.Scalars("train/grades/frozen_fraction")]
    assert fractions == [(step, 0.5 if step >= 7 else 0.0) for step in range(1, 13)]
    medians = [event.step for event in written.Scalars("train/grades/attention/statistic_q50")]
    assert medians == list(range(2, 13))


def test_the_mixin_with_another_trainer(tmp_path):
    from transformers import Seq2SeqTrainingArguments

    arguments = Seq2SeqTrainingArguments(**small.arguments(tmp_path).to_dict() | {"report_to": "none"})
    trainer = GradESSeq2SeqTrainer(model=llama(), args=arguments, train_dataset=tokens(), grades=CONFIG)
    trainer.train()
    assert set(trainer.grades_callback.engine.frozen.values()) == {7}


def test_without_options_it_is_the_default_and_one_callback_is_enough(tmp_path):
    trainer = small.trainer(llama(), tmp_path, [], cls=GradESTrainer)
    assert trainer.grades_callback.config == GradESConfig()
    twice = small.trainer(llama(), tmp_path, [GradESCallback(CONFIG)], cls=GradESTrainer, extra={"grades": CONFIG})
    with pytest.raises(ValueError, match="2 GradESCallbacks"):
        twice.train()


class MyStopping(EarlyStoppingCallback):
    pass


@pytest.mark.compatibility("Trainer", "GradESTrainer, EarlyStoppingCallback with skip_validation=True", "refused")
@pytest.mark.parametrize("stopping", [EarlyStoppingCallback, MyStopping])
def test_early_stopping_needs_evaluations(stopping, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    extra = {"grades": dataclasses.replace(CONFIG, skip_validation=True), "eval_dataset": tokens(8)}
    with pytest.raises(ValueError, match=f"{stopping.__name__} needs evaluations"):
        small.trainer(llama(), tmp_path, [stopping()], cls=GradESTrainer, extra=extra, **options).train()


class Fail(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise RuntimeError("out of luck")


@pytest.mark.compatibility("Faults", "a callback that raises (GradESTrainer)", "works")
def test_an_error_leaves_the_model_as_trainable_as_before(tmp_path):
    model = llama()
    trainer = small.trainer(model, tmp_path, [Fail()], cls=GradESTrainer, extra={"grades": CONFIG})
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    assert trainer.grades_callback.engine.frozen
    assert all(p.requires_grad for p in model.parameters())


def test_trainer_itself_is_untouched(tmp_path):
    assert not hasattr(Trainer, "grades_callback")
