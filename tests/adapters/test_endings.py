"""However a run ends, by an error or Ctrl-C anywhere in Trainer's loop, everything is as without GradES."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from grades_hf import GradESCallback, GradESConfig, GradESTrainer
from tests import small
from tests.adapters import overfit
from tests.small import llama, tokens

CONFIG = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5, skip_validation=False)
FIRST, AT = 7, 9  # the step that freezes, and the one in which something goes wrong
BACKWARD, CLIP = torch.autograd.backward, (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_)


class Bomb:
    """Raises once, at step `AT`."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.armed, self.step = error, True, 0

    def __call__(self, *_: Any, **__: Any) -> None:
        if self.armed and self.step >= AT:
            self.armed = False
            raise self.error("boom")


class Count(TrainerCallback):
    def __init__(self, bomb: Bomb) -> None:
        self.bomb = bomb

    def on_step_begin(self, args, state, control, **kwargs):
        self.bomb.step = state.global_step + 1


def event(name: str) -> Callable[[Bomb], TrainerCallback]:
    return lambda bomb: type("Fails", (TrainerCallback,), {name: lambda self, *a, **k: bomb()})()


class Rows(torch.utils.data.Dataset):
    def __init__(self, bomb: Bomb) -> None:
        self.rows, self.bomb = tokens(), bomb

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.bomb()
        return self.rows[index]


class Explosive(nn.Module):
    """A loss that goes wrong when it is differentiated."""

    def __init__(self, bomb: Bomb) -> None:
        super().__init__()
        self.bomb = bomb

    def forward(self, outputs: Any, labels: Any, **_: Any) -> Any:
        loss = outputs["loss"] if "loss" in outputs else outputs["logits"].square().mean()
        if loss.requires_grad:
            loss.register_hook(self.bomb)
        return loss


def place(where: str, bomb: Bomb, trainer: Trainer) -> None:
    """Put the bomb where it belongs."""
    if where == "forward":
        trainer.model.lm_head.register_forward_hook(lambda *_: bomb())
    elif where == "backward":
        trainer.compute_loss_func = Explosive(bomb)
    elif where == "clipping":
        clip = trainer._clip_grad_norm
        trainer._clip_grad_norm = lambda model: (bomb(), clip(model))[1]
    elif where == "the update":
        create = trainer.create_optimizer

        def created(*args: Any) -> torch.optim.Optimizer:
            optimizer = create(*args)
            inner = getattr(optimizer, "optimizer", optimizer)
            if not inner._optimizer_step_pre_hooks:
                inner.register_step_pre_hook(lambda *_: None)
                step = type(inner).step

                def stepped(closure: Any = None) -> Any:
                    bomb()
                    return step(inner, closure)

                inner.step = stepped
            return optimizer

        trainer.create_optimizer = created
    elif where == "data":
        trainer.train_dataset = Rows(bomb)
    elif where == "evaluation":
        trainer.evaluate = lambda *a, **k: bomb() or {"eval_loss": 1.0}
    elif where == "saving":
        save = trainer.save_model
        trainer.save_model = lambda *a, **k: (bomb(), save(*a, **k))[1]


PLACES = ["forward", "backward", "clipping", "the update", "data", "evaluation", "saving", "a callback before",
          "a callback after", "on_log", "on_save", "on_evaluate", "on_optimizer_step"]  # fmt: skip
CASES = [
    *(("constructor", where, (RuntimeError, KeyboardInterrupt)[i % 2]) for i, where in enumerate(PLACES)),
    *(("added", where, KeyboardInterrupt) for where in ("forward", "the update", "a callback after", "on_save")),
    *(("mixin", where, KeyboardInterrupt) for where in ("clipping", "a callback before", "saving")),
]
OPTIONS = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}


def build(how: str, folder: Path, bomb: Bomb, where: str, callback: GradESCallback, **options: Any) -> Trainer:
    events = {"a callback before": "on_pre_optimizer_step", "a callback after": "on_pre_optimizer_step"}
    name = events.get(where, where)
    extra: list[TrainerCallback] = [event(name)(bomb)] if hasattr(TrainerCallback, name) else []
    before = [Count(bomb), *extra] if where == "a callback before" else [Count(bomb)]
    after = [] if where == "a callback before" else extra
    data: dict[str, Any] = {"eval_dataset": tokens(4)}
    options = {**OPTIONS, **options}
    if how == "mixin":
        data["grades"] = CONFIG
        return small.trainer(llama(), folder, [*before, *after], cls=GradESTrainer, extra=data, **options)
    if how == "added":
        trainer = small.trainer(llama(), folder, [*before], extra=data, **options)
        for item in [callback, *after]:
            trainer.add_callback(item)
        return trainer
    return small.trainer(llama(), folder, [*before, callback, *after], extra=data, **options)


def hooks(model: nn.Module) -> int:
    """How many hooks a model has."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = sum(len(getattr(module, name)) for module in model.modules() for name in names)
    return own + sum(
        len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in model.parameters()
    )


def check_as_before(trainer: Trainer, arguments: dict[str, Any], hooked: int) -> None:
    model, optimizer = trainer.model, trainer.optimizer
    assert torch.autograd.backward is BACKWARD
    assert (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_) == CLIP
    assert all(p.requires_grad for p in model.parameters())
    assert hooks(model) == hooked
    assert trainer.args.to_dict() == arguments
    assert "to_dict" not in vars(trainer.args)
    inner = getattr(optimizer, "optimizer", optimizer)
    grouped = [p for group in inner.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert not inner._optimizer_state_dict_post_hooks
    saved = inner.state_dict()
    fresh = torch.optim.AdamW([{"params": group["params"]} for group in inner.param_groups])
    fresh.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    assert not any(str(key).startswith("grades") for key in saved["state"])


@pytest.mark.compatibility("Faults", "Ctrl-C and errors at any point of a step, an evaluation or a save", "works")
@pytest.mark.parametrize(("how", "where", "error"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_after_an_exception_all_is_as_without_grades(how, where, error, tmp_path):
    bomb, callback = Bomb(error), GradESCallback(CONFIG)
    trainer = build(how, tmp_path, bomb, where, callback)
    place(where, bomb, trainer)
    arguments, hooked = trainer.args.to_dict(), hooks(trainer.model)
    with pytest.raises(error, match="boom"):
        trainer.train()
    engine = trainer.grades_callback.engine if how == "mixin" else callback.engine
    assert set(engine.frozen.values()) == {FIRST}
    check_as_before(trainer, arguments, hooked)
    assert engine.history.ended == "stopped"

    model = trainer.model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plain = small.trainer(model, tmp_path / "plain", [], max_steps=2)
    plain.train()
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())

    again = trainer if how == "mixin" else small.trainer(llama(), tmp_path / "again", [callback])
    again.train()
    engine = again.grades_callback.engine if how == "mixin" else callback.engine
    assert set(engine.frozen.values()) == {FIRST}
    assert again.state.global_step == 12


@pytest.mark.parametrize("how", ["constructor", "added"])
def test_after_an_exception_without_a_tau(how, tmp_path):
    """torch's backward and clipping are wrapped meanwhile."""
    bomb, callback = Bomb(KeyboardInterrupt), GradESCallback()
    trainer = build(how, tmp_path, bomb, "on_optimizer_step", callback)
    arguments, hooked = trainer.args.to_dict(), hooks(trainer.model)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    check_as_before(trainer, arguments, hooked)
    assert callback.engine.history.ended == "stopped"


def test_an_error_before_the_first_step_leaves_eval_on_start(tmp_path):
    """The evaluation before the first step is left out without touching the arguments, which trainers may share."""
    fails = event("on_train_begin")
    bomb = Bomb(RuntimeError)
    bomb.step = AT
    evaluated = []
    watch = type("Watch", (TrainerCallback,), {"on_prediction_step": lambda self, *a, **k: evaluated.append(1)})()
    options = {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "extra": {"eval_dataset": tokens(4)}}
    trainer = small.trainer(llama(), tmp_path, [GradESCallback(tau=1e9), fails(bomb), watch], **options)
    with pytest.raises(RuntimeError, match="boom"):
        trainer.train()
    assert trainer.args.eval_on_start
    trainer.train()
    assert trainer.args.eval_on_start
    assert evaluated == []


def test_the_progress_bar_is_trainers_own(tmp_path, capsys):
    """Another open bar with as many steps is left alone."""
    from tqdm.auto import tqdm

    other = tqdm(total=12)
    callback = GradESCallback(CONFIG)
    trainer = small.trainer(llama(), tmp_path, [callback], disable_tqdm=False)
    trainer.train()
    assert "frozen 2/14" in capsys.readouterr().err
    assert not other.postfix
    other.close()
    assert next(c for c in trainer.callback_handler.callbacks if isinstance(c, ProgressCallback)).training_bar is None


@pytest.mark.parametrize("tau", [True, False], ids=["tau", "looks"])
def test_five_folds_leave_nothing_alive_but_what_the_user_holds(tau, tmp_path):
    callback = GradESCallback(CONFIG) if tau else overfit.ending()
    gone: list[weakref.ref[Any]] = []
    for fold in range(5):
        trainer = overfit.trainer(llama(), tmp_path / str(fold), [callback], max_steps=14)
        trainer.train()
        assert callback.engine.t > 0
        gone += [weakref.ref(thing) for thing in (trainer, trainer.model, trainer.optimizer.optimizer)]
        gone += [weakref.ref(p) for p in trainer.model.parameters()]
        del trainer
        gc.collect()
        assert [type(reference()) for reference in gone if reference() is not None] == []
    assert callback.engine.history.steps


def test_nothing_is_kept_alive_by_an_interrupted_run(tmp_path):
    bomb, callback = Bomb(KeyboardInterrupt), GradESCallback(CONFIG)
    trainer = build("added", tmp_path, bomb, "on_optimizer_step", callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    gone = [weakref.ref(thing) for thing in (trainer, trainer.model, trainer.optimizer.optimizer)]
    del trainer
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
