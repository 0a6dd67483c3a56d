"""Lightning without a tau: looks see what `validation_step` returns, and leave no trace; a run that ends in any way."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from grades_hf import GradESLightningCallback
from tests import small
from tests.clients.checks import same_weights
from tests.clients.test_lightning import Module

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:DeprecationWarning"),
]

ROWS = torch.tensor(small.tokens(8)["input_ids"])
HELD_OUT = torch.tensor(small.tokens(24, seed=5)["input_ids"])
ENDS = {"rise": 0.05}


class Full(Module):
    """Logs, measures with torchmetrics and keeps a list, as people do."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=64)
        self.outputs: list[torch.Tensor] = []

    def validation_step(self, rows: torch.Tensor, index: int) -> Any:
        output = self.model(input_ids=rows, labels=rows)
        self.accuracy(output.logits.flatten(0, 1), rows.flatten())
        self.log("val_loss", output.loss)
        self.log("accuracy", self.accuracy)
        self.outputs.append(output.loss)
        return {"loss": output.loss}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.model.parameters(), lr=3e-2)


class Silent(Full):
    def validation_step(self, rows: torch.Tensor, index: int) -> None:
        super().validation_step(rows, index)


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        notes = (pl_module.training, len(pl_module.outputs), pl_module.accuracy._update_count)
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.seen.append((torch.get_rng_state(), notes, logged, pl_module.accuracy.tp.clone()))


def fit(
    folder: Path, *callbacks: Callback, module: Any = Full, resume: Any = None, rows: Any = ROWS, **options: Any
) -> tuple[Any, Trainer]:
    torch.manual_seed(0)
    made = module()
    defaults = {"max_steps": 40, "accelerator": "cpu", "check_val_every_n_epoch": 3}
    defaults |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    options = {**defaults, **options}
    if any(isinstance(c, ModelCheckpoint) for c in callbacks):
        options["enable_checkpointing"] = True
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)
    trainer.fit(made, DataLoader(rows, batch_size=4), DataLoader(HELD_OUT, batch_size=4), ckpt_path=resume)
    return made, trainer


@pytest.mark.compatibility("Client trainers", "Lightning without a tau, validation_step returns its loss", "works")
@pytest.mark.parametrize("sanity", [0, 2])
def test_a_look_ends_the_run_and_the_average_is_returned(sanity, tmp_path):
    callback = GradESLightningCallback(**ENDS)
    module, trainer = fit(tmp_path, callback, num_sanity_val_steps=sanity)
    look = callback.engine.ending.looks[-1]
    assert look["ended"]
    assert look["rows"] == 24
    assert trainer.global_step == look["step"] < 40
    assert trainer.current_epoch >= 1
    with torch.no_grad():
        module.eval()
        losses = [module.model(input_ids=row[None], labels=row[None]).loss for row in HELD_OUT]
    assert torch.stack(losses).mean().item() == pytest.approx(look["average_loss"], rel=1e-5)
    assert all(p.requires_grad for p in module.parameters())


def test_looks_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr("grades_hf.ending.ending.MARGIN", 1e9)
    runs = []
    for most in (12, 0):
        monkeypatch.setattr("grades_hf.ending.ending.MOST", most)
        callback, watch = GradESLightningCallback(), Watch()
        module, _ = fit(tmp_path, callback, watch, max_steps=12)
        runs.append((callback, module, watch))
    (a, with_looks, seen), (b, without, unseen) = runs
    assert a.engine.ending.looks
    assert not b.engine.ending.looks
    assert same_weights(with_looks.model, without.model)
    for one, other in zip(seen.seen, unseen.seen, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1:3] == other[1:3]
        assert torch.equal(one[3], other[3])


@pytest.mark.parametrize(
    "held_out",
    [
        DataLoader(HELD_OUT, batch_size=3),
        HELD_OUT,
        lambda module: torch.stack([module.model(input_ids=r[None], labels=r[None]).loss for r in HELD_OUT]),
    ],
    ids=["loader", "dataset", "function"],
)
def test_held_out_rows_of_the_user(held_out, tmp_path):
    runs = []
    for source in (held_out, None):
        callback = GradESLightningCallback(**ENDS, held_out=source)
        fit(tmp_path, callback)
        runs.append(callback.engine.ending.looks[-1])
    assert runs[0]["step"] == runs[1]["step"]
    assert runs[0]["loss"] == pytest.approx(runs[1]["loss"])


@pytest.mark.compatibility("Client trainers", "Lightning without a tau, validation_step returns no loss", "refused")
@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Silent, {}, "validation_step returns NoneType. Return the loss"),
        (Module, {}, "validation_step returns NoneType|decides by looks at held-out rows"),
        (Full, {"limit_val_batches": 0}, "looks at held-out rows"),
        (Full, {"min_steps": 3}, "min_steps=3"),
        (Full, {"min_epochs": 2}, "min_epochs=2"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(module, options, message, tmp_path):
    seen: list[Any] = []

    class Steps(Callback):
        def on_before_zero_grad(self, *args: Any) -> None:
            seen.append(1)

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, GradESLightningCallback(), Steps(), module=module, **options)
    assert not seen


def test_rows_with_a_tau_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are none"):
        fit(tmp_path, GradESLightningCallback(tau=1.0, held_out=HELD_OUT))


@pytest.mark.parametrize("average_device", [None, "cpu"])
def test_a_resumed_run_looks_where_an_uninterrupted_one_does(average_device, tmp_path):
    """With one batch an epoch, since which batches come after a resume is Lightning's own affair."""
    options = {**ENDS, "average_device": average_device}
    whole, resumed = GradESLightningCallback(**options), GradESLightningCallback(**options)
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    first, _ = fit(tmp_path, whole, every, rows=ROWS[:4])
    assert whole.engine.ending.looks[-1]["ended"]
    second, trainer = fit(tmp_path, resumed, resume=tmp_path / "epoch=3.ckpt", rows=ROWS[:4])
    assert resumed.engine.ending.looks == whole.engine.ending.looks
    assert trainer.global_step == whole.engine.t > 4
    assert same_weights(first.model, second.model)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    over = GradESLightningCallback(**options)
    third, trainer = fit(tmp_path, over, resume=last, rows=ROWS[:4])
    assert trainer.global_step == whole.engine.t
    assert over.engine.done
    assert same_weights(first.model, third.model)


def test_a_checkpoint_that_is_saved_after_the_run(tmp_path):
    callback = GradESLightningCallback(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
    _, trainer = fit(tmp_path, callback, max_steps=8)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = GradESLightningCallback(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5)
    fit(tmp_path, again, max_steps=12, resume=tmp_path / "after.ckpt")
    assert again.engine.frozen == callback.engine.frozen != {}
    assert again.engine.t == 12
    assert callback.state_dict()["step"] == 8
    fit(tmp_path, callback, max_steps=4)
    assert callback.engine.t == 4, "a new run begins anew"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_exception_all_is_as_without_grades(error, tmp_path):
    class Fail(Callback):
        copied: Any = None

        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            if trainer.global_step == 7:
                self.copied = copy.deepcopy(pl_module)
                torch.save(pl_module.model, io.BytesIO())
                raise error("boom")

    modules: list[Any] = []

    def make() -> Full:
        modules.append(Full())
        return modules[0]

    backward = torch.autograd.backward
    callback, fail = GradESLightningCallback(tau={"q": 1e9, ".*": 1e-30}, alpha=0.1), Fail()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, callback, fail, module=make)
    (module,) = modules
    assert callback.engine.frozen
    assert all(p.requires_grad for p in module.parameters())
    assert "configure_gradient_clipping" not in vars(module)
    assert torch.autograd.backward is backward
    clip = fail.copied.configure_gradient_clipping
    assert clip.__self__ is fail.copied
    fit(tmp_path, callback, max_steps=6)
    assert callback.engine.t == 6


def test_an_own_optimizer_step_without_lightnings_clipping_is_found(tmp_path):
    class Own(Full):
        def optimizer_step(self, epoch: Any, batch: Any, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.optimizer.step()

    with pytest.raises(RuntimeError, match="GradES has seen 0 optimizer steps and Lightning has made"):
        fit(tmp_path, GradESLightningCallback(tau=1e-30), module=Own, max_steps=3)
