"""GradESCallback in a real Trainer: exact steps, what is logged and written, what is refused, starting and ending."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from grades_hf import GradESCallback, GradESConfig, History
from tests import small
from tests.small import Spy, between, llama, lora, tokens


@pytest.fixture(params=["full", "lora"])
def make_model(request):
    return llama if request.param == "full" else lora


def observe(make_model, tmp_path, **options):
    """A run that freezes nothing; its history."""
    callback = GradESCallback(tau=1e-30, **options)
    small.trainer(make_model(), tmp_path / "observe", [callback]).train()
    return callback.engine.history


def test_frozen_weights_never_move_and_live_ones_do(make_model, tmp_path):
    history = observe(make_model, tmp_path)
    callback, spy = GradESCallback(tau=between(history.values), alpha=0.3), Spy()
    trainer = small.trainer(make_model(), tmp_path, [callback, spy])
    trainer.train()
    engine = callback.engine
    assert 0 < len(engine.frozen) < len(engine.components)
    final = dict(trainer.model.named_parameters())
    names = {id(p): n for n, p in final.items()}
    for component in engine.components:
        own = [names[id(p)] for p in component.parameters]
        if component.frozen_at is None:
            assert any(not torch.equal(spy.weights[12][n], final[n]) for n in own)
        else:
            assert component.frozen_at > engine.t_grace == 4
            for step in range(component.frozen_at, 13):  # the update of the freezing step is the first one left out
                assert all(torch.equal(spy.weights[component.frozen_at][n], spy.weights[step][n]) for n in own)
            assert all(torch.equal(spy.weights[component.frozen_at][n], final[n]) for n in own)
            assert any(not torch.equal(spy.weights[component.frozen_at - 1][n], final[n]) for n in own)


def test_a_frozen_component_has_no_gradient_and_no_optimizer_state_but_keeps_its_place(make_model, tmp_path):
    def look(model, optimizer):
        inner = optimizer.optimizer
        frozen = {p for p in model.parameters() if not p.requires_grad}
        grouped = [p for group in inner.param_groups for p in group["params"]]
        return (
            [p for p in grouped if p in frozen and (p.grad is not None or p in inner.state)],
            len([p for p in grouped if p in frozen]),
        )

    callback, spy = GradESCallback(tau=1e9, alpha=0.5, max_frozen_fraction=1.0, target_modules=["q_proj"]), Spy(look)
    small.trainer(make_model(), tmp_path, [callback, spy], max_steps=8).train()
    assert callback.engine.t == 5  # all q_proj at the first step after the grace period
    assert [violations for violations, _ in spy.seen] == [[]] * 5
    assert spy.seen[-1][1] == sum(len(c.parameters) for c in callback.engine.components)


def test_requires_grad_is_as_before_after_training_unless_kept(make_model, tmp_path):
    for keep in (False, True):
        model = make_model()
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        callback = GradESCallback(tau=1e9, keep_frozen=keep, target_modules=["v_proj"])
        small.trainer(model, tmp_path, [callback]).train()
        after = {n: p.requires_grad for n, p in model.named_parameters()}
        changed = {n for n in before if before[n] != after[n]}
        assert len(callback.engine.frozen) == 2
        assert (changed == set()) is not keep
        if keep:
            assert all("v_proj" in n and before[n] and not after[n] for n in changed)
        if not keep:  # and the weights can be trained again
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_all_frozen_ends_training_in_the_same_step_with_log_and_checkpoint(make_model, tmp_path):
    callback = GradESCallback(tau=1e9, alpha=0.25)
    trainer = small.trainer(
        make_model(), tmp_path, [callback], save_strategy="steps", save_steps=100, logging_steps=100
    )
    result = trainer.train()
    assert result.global_step == trainer.state.global_step == 4
    assert set(callback.engine.frozen.values()) == {4}
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    log, summary = trainer.state.log_history
    assert log["step"] == 4
    assert log["grades/frozen_fraction"] == 1.0
    assert "loss" in log
    assert "train_runtime" in summary


def test_max_frozen_fraction_ends_training(tmp_path):
    history = observe(llama, tmp_path)
    callback = GradESCallback(tau=between(history.values, 0.8), alpha=0.1, max_frozen_fraction=0.5)
    trainer = small.trainer(llama(), tmp_path, [callback])
    trainer.train()
    assert trainer.state.global_step == max(callback.engine.frozen.values())
    assert callback.engine.frozen_fraction >= 0.5


class Counting(Trainer):
    """Notes the steps at which it evaluates."""

    def evaluate(self, *args, **kwargs):
        self.evaluated = [*getattr(self, "evaluated", []), self.state.global_step]
        return super().evaluate(*args, **kwargs)


@pytest.mark.compatibility("Trainer", "eval_strategy and eval_on_start, with skip_validation True and False", "works")
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_that_nothing_needs_are_left_out_and_one_line_says_so(strategy, tmp_path, caplog):
    def train(**grades):
        caplog.clear()
        options = {"eval_strategy": strategy, "eval_on_start": True, "extra": {"eval_dataset": tokens(8)}}
        if strategy == "steps":
            options["eval_steps"] = 3
        trainer = small.trainer(llama(), tmp_path, [GradESCallback(tau=1e-30, **grades)], cls=Counting, **options)
        trainer.train()
        assert trainer.args.eval_on_start
        return getattr(trainer, "evaluated", []), sum("are left out" in r.getMessage() for r in caplog.records)

    assert train() == train(skip_validation=True) == ([], 1)
    assert train(skip_validation=False) == ([0, 3, 6, 9, 12] if strategy == "steps" else [0, 12], 0)


@pytest.mark.compatibility(
    "Trainer", "load_best_model_at_end, save_strategy best, ReduceLROnPlateau, EarlyStoppingCallback", "works"
)
@pytest.mark.compatibility("Trainer", "what needs evaluations, with skip_validation=True", "refused")
@pytest.mark.parametrize(
    ("options", "callbacks", "needs"),
    [
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, [], "load_best_model_at_end"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, [], 'save_strategy="best"'),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, [], "schedule"),
        ({"metric_for_best_model": "loss"}, [EarlyStoppingCallback()], "EarlyStoppingCallback"),
    ],
)
def test_what_needs_evaluations_gets_them_and_is_refused_where_they_are_to_be_left_out(
    options, callbacks, needs, tmp_path, caplog
):
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, **options}
    extra = {"eval_dataset": tokens(8)}

    def make(callback, folder):
        trainer = small.trainer(llama(), tmp_path / folder, [*callbacks, callback], extra=extra, **options)
        if callbacks:
            trainer.args.load_best_model_at_end = False
        return trainer

    with pytest.raises(ValueError, match=needs) as error:
        make(GradESCallback(tau=1.0, skip_validation=True), "no").train()
    assert "skip_validation" in str(error.value)
    assert not (tmp_path / "no" / "grades_history.arrow").exists()

    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    fine = make(callback, "yes")
    fine.train()
    assert len(callback.engine.frozen) == 2
    assert any("eval_loss" in log for log in fine.state.log_history)
    assert sum("run as usual" in r.getMessage() and needs in r.getMessage() for r in caplog.records) == 1


@pytest.mark.compatibility("Trainer", "GradESCallback() without options", "works")
def test_a_run_that_overfits_ends_and_returns_the_average(tmp_path):
    """Four rows again and again: held-out rows get worse and worse."""

    def train(callbacks):
        options = {"max_steps": 150, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "logging_steps": 150}
        extra = {"eval_dataset": tokens(16, seed=9)}
        trainer = small.trainer(llama(), tmp_path, callbacks, extra=extra, **options)
        trainer.train_dataset = trainer.train_dataset.select(range(4))
        trainer.train()
        return trainer, trainer.evaluate()["eval_loss"]

    callback = GradESCallback()
    ended, loss = train([callback])
    _, whole = train([])
    assert callback.engine.history.ended == "look"
    assert ended.state.global_step == callback.engine.ending.looks[-1]["step"] < 150
    assert loss < whole
    assert callback.engine.frozen == {}
    assert all(p.requires_grad for c in callback.engine.components for p in c.parameters)


def test_logs_carry_frozen_fraction_and_quartiles(make_model, tmp_path):
    history = observe(make_model, tmp_path)
    callback = GradESCallback(tau=between(history.values), alpha=0.3)
    trainer = small.trainer(make_model(), tmp_path, [callback], save_strategy="steps", save_steps=12)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 12
    assert saved == logs
    engine = callback.engine
    for log in logs:
        step = log["step"]
        frozen = sum(at <= step for at in engine.frozen.values())
        assert log["grades/frozen_fraction"] == frozen / len(engine.components)
        for group in ("attention", "mlp"):
            series = [engine.history.values[c.name] for c in engine.components if c.group == group]
            values = torch.tensor([s[step - 1] for s in series if len(s) >= step], dtype=torch.float64)
            values = values[values.isfinite()]
            quartiles = [log.get(f"grades/{group}/statistic_q{q}") for q in (25, 50, 75)]
            if not len(values):
                assert quartiles == [None, None, None]
            else:
                expected = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
                assert quartiles == pytest.approx(expected)
    assert ("grades/mlp/statistic_q25" in logs[0]) == (engine.statistics.keys() != {"gradient_change"})
    assert "grades/mlp/statistic_q25" in logs[1]


def test_history_has_a_row_per_log_and_how_the_run_ended(make_model, tmp_path):
    callback = GradESCallback(tau=between(observe(make_model, tmp_path).values), alpha=0.3)
    trainer = small.trainer(make_model(), tmp_path, [callback], logging_steps=5)
    trainer.train()
    history = History.load(tmp_path)
    logs = {log["step"]: log for log in trainer.state.log_history if "loss" in log}
    assert [row["step"] for row in history.logs] == [5, 10, 12]
    for row in history.logs[:2]:
        log = logs[row["step"]]
        assert row["loss"] == log["loss"]
        assert row["frozen"] == sum(at <= row["step"] for at in history.frozen.values())
        assert row["compute_saved"] == log["grades/compute_saved"]
    assert "loss" not in history.logs[2]
    assert 0 < history.logs[0]["seconds"] < history.logs[1]["seconds"] < history.logs[2]["seconds"]
    savings = callback.engine.savings()
    assert history.savings == dataclasses.asdict(savings)
    assert history.logs[2]["compute_saved"] == savings.fraction > 0
    assert history.ended == "completed"

    all_at_once = GradESCallback(tau=1e9, alpha=0.5)
    small.trainer(make_model(), tmp_path, [all_at_once]).train()
    history = History.load(tmp_path)
    assert (history.ended, history.savings["used"], len(history.logs)) == ("converged", history.savings["full"], 7)


class _Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3
        return control


class _Look(TrainerCallback):
    """Reads the history file after every log."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_log(self, args, state, control, **kwargs):
        self.seen.append(History.load(self.folder))


def test_the_history_file_has_each_log_before_its_checkpoint(tmp_path):
    look = _Look(tmp_path)
    callbacks = [GradESCallback(tau=1e9), look, _Stop()]
    small.trainer(llama(), tmp_path, callbacks, save_strategy="steps", save_steps=1).train()
    assert [history.logs[-1]["step"] for history in look.seen] == [1, 2, 3, 3]
    assert [history.steps for history in look.seen] == [[1], [1, 2], [1, 2, 3], [1, 2, 3]]
    assert [history.ended for history in look.seen] == [None] * 4
    assert History.load(tmp_path).ended == "stopped"


def test_info_lines(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="grades_hf")
    history = observe(llama, tmp_path)
    caplog.clear()
    callback = GradESCallback(tau=between(history.values), alpha=0.5)
    small.trainer(llama(), tmp_path, [callback]).train()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("grades_hf")]
    assert lines[0].startswith("GradES tracks 14 components (8 attention, 6 mlp) with 3,840 parameters; ")
    assert "statistic gradient_change (sum)" in lines[0]
    assert "freezing from step 7 of 12 on" in lines[0]
    freezing_steps = sorted(set(callback.engine.frozen.values()))
    assert len(lines) == 1 + len(freezing_steps) + 1
    for line, step in zip(lines[1:-1], freezing_steps, strict=True):
        assert line.startswith(f"GradES step {step}: froze ")
    assert f"{len(callback.engine.frozen)} of 14 components are frozen" in lines[-1]


def test_freezing_everything_at_once_is_called_a_likely_mistake(tmp_path, caplog):
    small.trainer(llama(), tmp_path, [GradESCallback(tau=1e9)]).train()
    assert [r.levelname for r in caplog.records if "tau is probably too large" in r.getMessage()] == ["WARNING"]


def test_progress_bar_shows_what_is_frozen(tmp_path, capsys):
    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    small.trainer(llama(), tmp_path, [callback], disable_tqdm=False).train()
    shown = capsys.readouterr().err
    assert "frozen 0/2" in shown
    assert "frozen 2/2" in shown


def test_history_file(make_model, tmp_path):
    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    small.trainer(make_model(), tmp_path, [callback]).train()
    history = History.load(tmp_path)
    assert history.to_dict() == callback.engine.history.to_dict()
    assert history.config == callback.config.resolved().to_dict()
    assert [event["step"] for event in history.events] == [7, 7]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_second_train_starts_clean(make_model, tmp_path):
    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    trainer = small.trainer(make_model(), tmp_path, [callback])
    trainer.train()
    first = callback.engine
    trainer.train()
    assert callback.engine is not first
    assert callback.engine.frozen == first.frozen
    assert len(callback.engine.history.steps) == 7


@pytest.mark.compatibility("Trainer", "several train() calls, trainers that share a model or a callback", "works")
def test_a_shared_callback_and_one_model_in_two_trainers(make_model, tmp_path):
    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    model = make_model()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    for part in ("a", "b"):
        small.trainer(model, tmp_path / part, [callback]).train()
        assert set(callback.engine.frozen.values()) == {7}
        assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    other = make_model()
    small.trainer(other, tmp_path / "c", [callback]).train()
    assert set(callback.engine.frozen.values()) == {7}


@pytest.mark.compatibility("Trainer", "model_init", "works")
def test_model_init_and_hyperparameter_like_repeats(make_model, tmp_path):
    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    trainer = Trainer(
        model_init=lambda trial=None: make_model(),
        args=small.arguments(tmp_path),
        train_dataset=tokens(),
        callbacks=[callback],
    )
    finals = []
    for _ in range(2):
        trainer.train()
        assert set(callback.engine.frozen.values()) == {7}
        finals.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(finals[0][n], finals[1][n]) for n in finals[0])


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt


@pytest.mark.compatibility("Faults", "Ctrl-C, then a new trainer for the same model", "works")
def test_an_interrupted_run_leaves_a_model_that_a_new_trainer_can_train(make_model, tmp_path):
    model = make_model()
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        small.trainer(
            model,
            tmp_path,
            [
                GradESCallback(
                    tau=1e9, alpha=0.5, max_frozen_fraction=1.0, target_modules=["q_proj", "k_proj"], patience=4
                ),
                Interrupt(),
            ],
        ).train()
    trainer = small.trainer(model, tmp_path, [GradESCallback(tau=1e-30)])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    final = dict(model.named_parameters())
    assert all(not torch.equal(weights[n], final[n]) for n in weights)


@pytest.mark.compatibility("Trainer", "two GradESCallbacks", "refused")
def test_two_callbacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 GradESCallbacks"):
        small.trainer(llama(), tmp_path, [GradESCallback(tau=1.0), GradESCallback(tau=2.0)])


def test_ways_to_give_the_options():
    config = GradESConfig(tau=0.5, alpha=0.2)
    assert GradESCallback(tau=0.5, alpha=0.2).config == config
    assert GradESCallback(config).config == config
    assert GradESCallback(config.to_dict()).config == config
    assert GradESCallback(config, patience=3).config == GradESConfig(tau=0.5, alpha=0.2, patience=3)
    assert GradESCallback().config == GradESConfig()
    assert GradESCallback(GradESConfig(check_every=2), tau=0.5).config == GradESConfig(tau=0.5, check_every=2)
    with pytest.raises(ValueError, match=r"monitor='gradient_change' needs a tau"):
        GradESCallback(monitor="gradient_change")
    with pytest.raises(ValueError, match=r"tau=0\.5"):
        GradESCallback(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": {"attention": 1.0}}, "without a threshold"),
        ({"tau": {"attention": 1.0, "mlp": 1.0, "conv_proj": 1.0}}, "conv_proj"),
        ({"tau": 1.0, "target_modules": ["nothing_like_it"]}, "nothing_like_it"),
    ],
)
def test_options_that_do_not_fit_the_model_leave_an_earlier_history_alone(options, message, tmp_path):
    (tmp_path / "grades_history.arrow").write_text("of an earlier run")
    trainer = small.trainer(llama(), tmp_path, [GradESCallback(**options)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert (tmp_path / "grades_history.arrow").read_text() == "of an earlier run"


def test_a_model_with_nothing_trainable_is_refused(tmp_path):
    model = llama()
    trainer = small.trainer(model, tmp_path, [GradESCallback(tau=1.0)])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.compatibility("Faults", "output_dir is a file", "refused")
def test_an_output_directory_that_cannot_be_written_stops_before_the_first_step(tmp_path):
    trainer = small.trainer(llama(), tmp_path / "run", [GradESCallback(tau=1.0)])
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match="run"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.compatibility("Faults", "disk full while the history is written", "works")
def test_a_full_disk_during_training_costs_the_record_but_not_the_run(tmp_path, caplog, monkeypatch):
    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            def no_space(*_):
                raise OSError(28, "No space left on device")

            if state.global_step == 5:
                monkeypatch.setattr(os, "pwrite", no_space)

    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    trainer = small.trainer(llama(), tmp_path, [callback, Fill()])
    trainer.train()
    assert trainer.state.global_step == 7
    assert any("could not be written, training goes on" in r.getMessage() for r in caplog.records)
    assert History.load(tmp_path).steps[-1] <= 5  # the old file, whole


@pytest.mark.compatibility("Adapters", "disable_adapter in every step", "works")
def test_disable_adapter_in_every_step_does_not_unfreeze(tmp_path):
    """As in TRL's DPO: the reference pass switches requires_grad on again, before the policy's forward pass."""

    class Reference(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                model(**inputs)
            return super().compute_loss(model, inputs, **kwargs)

    config = GradESConfig(tau={"q": 1e9, "up": 1e-30}, alpha=0.5, target_modules=["q_proj", "up_proj"])
    options = {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2}
    callback, spy = GradESCallback(config), Spy()
    small.trainer(lora(), tmp_path, [callback, spy], cls=Reference, **options).train()
    plain, plain_spy = GradESCallback(config), Spy()
    small.trainer(lora(), tmp_path / "plain", [plain, plain_spy], **options).train()
    assert callback.engine.frozen == plain.engine.frozen
    assert set(plain.engine.frozen.values()) == {7}
    for step in range(1, 13):  # frozen ones do not move, and do not enter the norm that clips the others
        assert all(torch.equal(spy.weights[step][n], plain_spy.weights[step][n]) for n in spy.weights[step])


@pytest.mark.compatibility(
    "Adapters", "disable_adapter between forward and backward, with gradient checkpointing", "works"
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch, of the reference pass
@pytest.mark.parametrize("first", ["policy", "reference"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_disable_adapter_between_forward_and_backward_with_checkpointing(first, use_reentrant, tmp_path):
    """A checkpointed block is computed again in backward, and must find what required a gradient in forward."""

    class Reference(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            if first == "policy":
                loss = super().compute_loss(model, inputs, **kwargs)
            with torch.no_grad(), self.accelerator.unwrap_model(model).disable_adapter():
                model(**inputs)
            return loss if first == "policy" else super().compute_loss(model, inputs, **kwargs)

    config = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
    options = {**small.checkpointing_arguments(use_reentrant), "gradient_accumulation_steps": 2}
    trainers = [
        small.trainer(lora(), tmp_path / name, [GradESCallback(config)], cls=cls, **more)
        for name, cls, more in (("with", Reference, options), ("plain", Trainer, {"gradient_accumulation_steps": 2}))
    ]
    for trainer in trainers:
        trainer.train()
    weights, plain = (dict(trainer.model.named_parameters()) for trainer in trainers)
    assert all(torch.equal(weights[n], plain[n]) for n in plain)


@pytest.mark.compatibility("Trainer", "resuming a checkpoint that was made without GradES", "works")
def test_resuming_a_checkpoint_made_without_grades(tmp_path, caplog):
    small.trainer(llama(), tmp_path, [], save_strategy="steps", save_steps=6).train()
    callback = GradESCallback(tau=1e9, alpha=0.75, monitor="gradient_norm")
    trainer = small.trainer(llama(), tmp_path, [callback], save_strategy="steps", save_steps=6)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert set(callback.engine.frozen.values()) == {10}
    assert sum("made without GradES" in r.getMessage() for r in caplog.records) == 1


def test_resuming_the_end_of_a_finished_run_changes_nothing(make_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    first = small.trainer(make_model(), tmp_path, [GradESCallback(tau=1e9, alpha=0.5)], **options)
    first.train()
    assert first.state.global_step == 7
    callback = GradESCallback(tau=1e9, alpha=0.5)
    again = small.trainer(make_model(), tmp_path, [callback], **options)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == 7
    assert set(callback.engine.frozen.values()) == {7}
    finals = dict(again.model.named_parameters())
    assert all(torch.equal(p, finals[n]) for n, p in first.model.named_parameters())
    assert History.load(tmp_path).frozen == callback.engine.frozen
    assert result.metrics["train_loss"] == 0.0  # as Trainer says of a run without a step


@pytest.mark.compatibility("Faults", "a checkpoint of another model or of other target_modules", "refused")
def test_a_checkpoint_with_components_that_the_model_lacks_is_refused(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    small.trainer(llama(), tmp_path, [GradESCallback(tau=1e9, target_modules=["q_proj"])], **options).train()
    kept = (tmp_path / "grades_history.arrow").read_bytes()
    trainer = small.trainer(llama(), tmp_path, [GradESCallback(tau=1e9, target_modules=["k_proj"])], **options)
    with pytest.raises(ValueError, match=r"components that the model does not have .*q_proj"):
        trainer.train(resume_from_checkpoint=True)
    assert all(p.requires_grad for p in trainer.model.parameters())
    assert (tmp_path / "grades_history.arrow").read_bytes() == kept


@pytest.mark.compatibility("Trainer", "restore_callback_states_from_checkpoint", "works")
def test_resume_with_restored_callbacks_keeps_the_users_handle(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "restore_callback_states_from_checkpoint": True}
    config = GradESConfig(tau={"q": 1e9, "k": 1e-30}, alpha=0.5, target_modules=["q_proj", "k_proj"])
    small.trainer(llama(), tmp_path, [GradESCallback(config)], **options).train()
    callback = GradESCallback(tau=1.0)
    trainer = small.trainer(llama(), tmp_path, [callback], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert callback.engine.config == config.resolved()  # the checkpoint's options hold
    assert set(callback.engine.frozen.values()) == {7}
    assert callback.engine.t == 12


@pytest.mark.compatibility("Faults", "the history damaged at a resume", "works")
def test_a_damaged_history_costs_the_record_but_not_the_run(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12}
    config = GradESConfig(tau={"q": 1e9, "k": 1e-30}, alpha=0.25, target_modules=["q_proj", "k_proj"])
    first = small.trainer(llama(), tmp_path, [GradESCallback(config)], **options)
    first.train()
    (tmp_path / "grades_history.arrow").write_text('{"format": 1, "con')
    callback = GradESCallback(config)
    again = small.trainer(llama(), tmp_path, [callback], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert sum("damaged" in r.getMessage() for r in caplog.records) == 1
    assert set(callback.engine.frozen.values()) == {4}
    finals = dict(again.model.named_parameters())
    assert all(torch.equal(p, finals[n]) for n, p in first.model.named_parameters())
    assert History.load(tmp_path).steps == [9, 10, 11, 12]


@pytest.mark.compatibility("Trainer", "hyperparameter_search", "works")
def test_hyperparameter_search_starts_every_trial_clean(tmp_path):
    frozen = []

    class Watch(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            frozen.append(dict(callback.engine.frozen))

    callback = GradESCallback(tau=1e9, alpha=0.5, target_modules=["q_proj"])
    trainer = Trainer(
        model_init=lambda trial=None: llama(),
        args=small.arguments(tmp_path, save_strategy="steps", save_steps=4),
        train_dataset=tokens(),
        eval_dataset=tokens(8),
        callbacks=[callback, Watch()],
    )
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        n_trials=2,
        backend="optuna",
    )
    assert best.objective > 0
    assert [set(steps.values()) for steps in frozen] == [{7}, {7}]
