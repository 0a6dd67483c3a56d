"""A callback and its trainer: however it comes to it, is copied, shared, restored, or called at other steps."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from grades_hf import GradESCallback, GradESConfig, GradESTrainer, GradESTrainerMixin
from tests import small
from tests.adapters import overfit
from tests.small import llama, tokens

CONFIG = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
FIRST = 7

pytestmark = pytest.mark.usefixtures("looks_at_every_step")


def frozen_at(callback: GradESCallback) -> set[int]:
    assert callback.engine is not None
    return set(callback.engine.frozen.values())


# --- the ways to a trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["constructor", "class", "added", "mixin", "trainer"])
def test_trackers_get_options_and_figures_however_the_callback_comes(how, tmp_path):
    """Trackers run before the callbacks of the user. If one is added later, they miss the options of the first run."""
    options: list[Any] = []
    logged: list[bool] = []

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            pickle.dumps(args)
            options.append(args.to_dict().get("grades"))

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(any(key.startswith("grades/") for key in logs))

    data = {"eval_dataset": tokens(4)}
    callback: Any = GradESCallback(CONFIG)
    if how == "class":
        callback = GradESCallback
    if how in ("mixin", "trainer"):
        cls = GradESTrainer if how == "trainer" else type("Mine", (GradESTrainerMixin, Trainer), {})
        trainer = small.trainer(llama(), tmp_path, [Tracker()], cls=cls, extra={**data, "grades": CONFIG}, max_steps=2)
    elif how == "added":
        trainer = small.trainer(llama(), tmp_path, [Tracker()], extra=data, max_steps=2)
        trainer.add_callback(callback)
    else:
        trainer = small.trainer(llama(), tmp_path, [Tracker(), callback], extra=data, max_steps=2)
    trainer.train()
    expected = None if how == "added" else (GradESConfig() if how == "class" else CONFIG).resolved().to_dict()
    assert options == [expected]
    assert logged == [True, True, False]
    trainer.train()
    assert options[1] is not None
    assert "to_dict" not in vars(trainer.args)


def test_no_evaluation_by_another_name_carries_our_figures(tmp_path):
    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            state.log_history.append({"end": 1})

    class Halfway(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                for prefix in ("eval", "test", "loss", "train"):
                    trainer.evaluate(metric_key_prefix=prefix)
                trainer.predict(tokens(4))
                trainer.log({"lossless": 1.0})

    trainer = small.trainer(llama(), tmp_path, [GradESCallback(CONFIG), Halfway()], extra={"eval_dataset": tokens(4)})
    trainer.train()
    trainer.evaluate(metric_key_prefix="test")
    with_ours = [log for log in trainer.state.log_history if any(key.startswith("grades/") for key in log)]
    assert with_ours == [log for log in trainer.state.log_history if "loss" in log]
    assert len(with_ours) == 11  # Trainer does not log a step in which a callback has evaluated
    assert sum("test_loss" in log for log in trainer.state.log_history) == 2


@pytest.mark.compatibility("Trainer", "auto_find_batch_size", "works")
def test_auto_find_batch_size_starts_again_clean(tmp_path, monkeypatch):
    class Memory(TrainerCallback):
        sizes: list[int] = []

        def on_step_end(self, args, state, control, train_dataloader=None, **kwargs):
            self.sizes.append(train_dataloader.total_batch_size)
            if state.global_step == 9 and len(self.sizes) == 9:
                raise RuntimeError("CUDA out of memory.")

    callback, memory = GradESCallback(CONFIG), Memory()
    trainer = small.trainer(llama(), tmp_path, [callback, memory], auto_find_batch_size=True)
    trainer.train()
    assert memory.sizes[:9] == [4] * 9
    assert len(set(memory.sizes)) == 2
    assert len(memory.sizes) == 9 + 12
    assert frozen_at(callback) == {FIRST}
    assert callback.engine.t == 12


# --- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda c: pickle.loads(pickle.dumps(c))])
@pytest.mark.parametrize("when", ["fresh", "in mid-run", "used"])
def test_a_copy_is_a_fresh_callback(when, how, tmp_path):
    callback = GradESCallback(CONFIG, patience=2)
    copies: list[GradESCallback] = []

    class Copy(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == FIRST:
                copies.append(how(callback))

    if when == "fresh":
        copies.append(how(callback))
    else:
        small.trainer(llama(), tmp_path / "a", [callback, Copy()]).train()
    if when == "used":
        copies = [how(callback)]
    (made,) = copies
    assert made.engine is None
    assert made.config == callback.config
    small.trainer(llama(), tmp_path / "b", [made]).train()
    assert frozen_at(made) == {FIRST + 1}
    assert when == "fresh" or frozen_at(callback) == {FIRST + 1}


def test_a_copied_or_pickled_trainer_runs_itself(tmp_path):
    """Ray's hyperparameter search pickles trainers; a wrapped method would run the original."""
    GradientState._reset_state()  # accelerate's keeps weak references after a run, which pickle refuses
    callback = GradESCallback(CONFIG)
    trainer = small.trainer(llama(), tmp_path, [callback])
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for made in (copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))):
        made.train()
        own = next(c for c in made.callback_handler.callbacks if isinstance(c, GradESCallback))
        assert frozen_at(own) == {FIRST}
        assert not torch.equal(made.model.lm_head.weight, before["lm_head.weight"])
    assert callback.engine is None
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())


def test_the_callback_does_not_hold_its_trainer(tmp_path):
    callback = GradESCallback(CONFIG)
    trainer = small.trainer(llama(), tmp_path, [callback])
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("trainer_class", [small.Trainer, GradESTrainer])
def test_a_callback_that_is_removed_in_the_course_of_a_run_ends_with_it(trainer_class, tmp_path):
    class Removing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == FIRST + 1:
                trainer.remove_callback(own)

    own: Any = GradESCallback
    more = {"grades": CONFIG} if trainer_class is GradESTrainer else {}
    callbacks = [Removing()] if more else [Removing(), GradESCallback(CONFIG)]
    trainer = trainer_class(llama(), small.arguments(tmp_path), train_dataset=tokens(), callbacks=callbacks, **more)
    own = next(c for c in trainer.callback_handler.callbacks if isinstance(c, GradESCallback))
    trainer.train()
    assert frozen_at(own) == {FIRST}
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    with pytest.raises(RuntimeError, match="closed"):
        own.engine.step()


def test_two_trainers_one_inside_the_other_with_one_callback_are_refused(tmp_path):
    class Inner(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                small.trainer(llama(), tmp_path / "b", [callback], max_steps=2).train()

    callback = GradESCallback(CONFIG)
    with pytest.raises(RuntimeError, match="Two runs at a time"):
        small.trainer(llama(), tmp_path / "a", [callback, Inner()]).train()


def test_two_trainers_one_inside_the_other_with_a_callback_each(tmp_path):
    class Inner(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                small.trainer(llama(), tmp_path / "b", [inner]).train()

    outer, inner = GradESCallback(CONFIG), GradESCallback(CONFIG)
    small.trainer(llama(), tmp_path / "a", [outer, Inner()]).train()
    assert frozen_at(outer) == frozen_at(inner) == {FIRST}


# --- restored callbacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_model_init", [False, True], ids=["model", "model_init"])
def test_restored_callbacks_keep_the_users(with_model_init, tmp_path):
    """Trainer replaces callbacks by copies of what it has saved: held-out rows are not in there."""
    options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": True}
    losses: list[int] = []

    def held_out(model):
        losses.append(1)
        return torch.stack([model(**{k: torch.tensor([v]) for k, v in row.items()}).loss for row in tokens(4, seed=9)])

    def build(callback: GradESCallback, folder: str) -> Trainer:
        how = {"model_init": lambda: llama()} if with_model_init else {}
        return overfit.trainer(
            None if with_model_init else llama(), tmp_path / folder, [callback], extra=how, max_steps=9, **options
        )

    callback = GradESCallback(rise=0.01, held_out=held_out)
    others = [build(callback, name) for name in ("a", "b")]
    for trainer in others:
        trainer.train()
    trainer = build(callback, "a")
    other_before = build(callback, "b")
    losses.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    ours = [c for c in trainer.callback_handler.callbacks if isinstance(c, GradESCallback)]
    assert ours == [callback]
    assert callback.held_out is held_out
    assert losses
    assert callback.engine.t > 3
    other_before.train()
    assert [c for c in other_before.callback_handler.callbacks if isinstance(c, GradESCallback)] == [callback]


# --- steps that do not match ---------------------------------------------------------------------------------------


class OwnLoop(Trainer):
    """A loop as others have: it knows some events only."""

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        calls, loader = self.calls, self.get_train_dataloader()
        self.current_gradient_accumulation_steps = 1
        self.create_optimizer_and_scheduler(8)
        self.state.max_steps = 8
        self.callback_handler.optimizer = self.optimizer
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        for inputs in loader:
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            self.training_step(self.model, inputs)
            for _ in range(calls):
                self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.state.global_step += 1
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            if self.control.should_training_stop:
                break
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)


@pytest.mark.compatibility("Trainer", "a trainer whose own loop calls no on_pre_optimizer_step", "refused")
@pytest.mark.parametrize("tau", [True, False], ids=["tau", "looks"])
@pytest.mark.parametrize(
    ("calls", "message"), [(0, "seen 0 optimizer steps and OwnLoop has made 1"), (2, "called for 2 .* has made 1")]
)
def test_a_loop_that_calls_at_other_steps_is_refused_at_the_first(calls, message, tau, tmp_path):
    callback = GradESCallback(CONFIG) if tau else GradESCallback()
    trainer = small.trainer(llama(), tmp_path, [callback], cls=OwnLoop, extra={"eval_dataset": tokens(4)})
    trainer.calls = calls
    if calls and not tau:  # the second call of a step has no loss
        message = "GradES"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.compatibility("Trainer", "a trainer whose own loop calls on_pre_optimizer_step", "works")
def test_an_own_loop_that_calls_once_a_step_works(tmp_path):
    callback = GradESCallback(CONFIG)
    trainer = small.trainer(llama(), tmp_path, [callback], cls=OwnLoop)
    trainer.calls = 1
    trainer.train()
    assert frozen_at(callback) == {5}
    assert callback.engine.t == 8


# --- foreign models ------------------------------------------------------------------------------------------------


class Body:
    """As SetFit's SetFitModel: no nn.Module, but it has one."""

    def __init__(self, body: torch.nn.Module) -> None:
        self.model_body = body


class SetFitLike(Trainer):
    """As SetFit's trainer inside: callbacks get its own arguments, and its model that is no nn.Module."""

    def __init__(self, callbacks: list[TrainerCallback], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        handler, foreign = self.callback_handler, Body(self.model)

        class Foreign:
            output_dir = self.args.output_dir

        def call_event(event: str, args: Any, state: Any, control: Any, **more: Any) -> Any:
            for callback in handler.callbacks:
                own = {"model": foreign, "st_model": self.model, "st_args": args, "optimizer": handler.optimizer}
                own |= {"lr_scheduler": handler.lr_scheduler, "train_dataloader": None, "eval_dataloader": None}
                ours = isinstance(callback, GradESCallback)
                result = getattr(callback, event)(Foreign() if ours else args, state, control, **own, **more)
                control = control if result is None else result
            return control

        handler.call_event = call_event
        for callback in callbacks:
            self.add_callback(callback)
        handler.on_init_end(self.args, self.state, self.control)


@pytest.mark.compatibility("Client trainers", "SetFit (its callbacks get no nn.Module)", "works")
@pytest.mark.parametrize("tau", [True, False], ids=["tau", "looks"])
def test_a_model_that_is_no_module(tau, tmp_path):
    callback = GradESCallback(CONFIG) if tau else overfit.ending()
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    trainer = overfit.trainer(llama(), tmp_path, [callback], cls=SetFitLike, **options, max_steps=12)
    trainer.train()
    assert not any("eval_loss" in log for log in trainer.state.log_history)
    assert (frozen_at(callback) == {FIRST}) if tau else callback.engine.ending.looks[-1]["ended"]


def test_a_model_that_is_no_module_and_has_no_trainer_is_one_sentence():
    from transformers import TrainerControl, TrainerState

    args, callback = small.arguments("/tmp"), GradESCallback(CONFIG)
    with pytest.raises(ValueError, match="a Body as the model, which is no torch.nn.Module"):
        callback.on_train_begin(args, TrainerState(max_steps=3), TrainerControl(), model=Body(llama()), optimizer=None)


def test_the_held_out_rows_are_the_training_rows(tmp_path, caplog):
    rows: Dataset = tokens(8)
    caplog.set_level(logging.WARNING)
    extra = {"train_dataset": rows, "eval_dataset": rows}
    overfit.trainer(llama(), tmp_path, [GradESCallback()], extra=extra, max_steps=2).train()
    assert sum("held-out rows are the training rows" in record.getMessage() for record in caplog.records) == 1
