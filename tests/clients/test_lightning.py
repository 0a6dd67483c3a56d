"""Lightning's Trainer, held to a plain loop with the same batches: freezing, clipping, resuming, two refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from grades_hf import GradES, GradESConfig, GradESLightningCallback
from tests import small
from tests.clients.checks import same_weights
from tests.small import llama

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning"),  # advice on loggers and workers
    pytest.mark.filterwarnings("ignore:.*isinstance.*LeafSpec.*:FutureWarning"),
]

ROWS = torch.tensor(small.tokens(48)["input_ids"])
OPTIONS: dict[str, Any] = {"tau": {"q": 1e9, "down": 1e9, ".*": 1e-30}, "alpha": 0.5}
STEPS, CLIP = 6, 0.05


class Module(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.model = llama()
        self.number = optimizers
        self.seen: list[torch.Tensor] = []

    def training_step(self, rows: torch.Tensor, index: int) -> torch.Tensor:
        self.seen.append(rows)
        return self.model(input_ids=rows, labels=rows).loss

    def configure_optimizers(self) -> Any:
        made = [adamw(self.model) for _ in range(self.number)]
        return made[0] if self.number == 1 else made


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)


def fit(
    folder: Path,
    *callbacks: Callback,
    rows: torch.Tensor = ROWS,
    accumulation: int = 2,
    resume: Path | None = None,
    **more: Any,
) -> tuple[Module, Trainer]:
    torch.manual_seed(0)
    module = Module()
    options: dict[str, Any] = {"accelerator": "cpu", "max_steps": STEPS, "gradient_clip_val": CLIP}
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= more
    trainer = Trainer(
        default_root_dir=folder, accumulate_grad_batches=accumulation, callbacks=list(callbacks), **options
    )
    trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume)
    return module, trainer


def loop(steps: Sequence[Sequence[torch.Tensor]]) -> tuple[nn.Module, GradES]:
    """The same by hand, over the micro-batches of each step."""
    torch.manual_seed(0)
    model = llama()
    optimizer = adamw(model)
    engine = GradES(model, GradESConfig(**OPTIONS), total_steps=STEPS, optimizer=optimizer)
    for batches in steps:
        for rows in batches:
            (model(input_ids=rows, labels=rows).loss / len(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    engine.close()
    return model, engine


def same_run(lightning: GradES, plain: GradES) -> bool:
    """Whether two engines did the same, but for the names: a LightningModule has the model inside."""
    ours, theirs = lightning.history.to_dict(), plain.history.to_dict()
    values = {name.removeprefix("model."): series for name, series in ours["values"].items()}
    frozen = {name.removeprefix("model."): step for name, step in lightning.frozen.items()}
    return frozen == plain.frozen and values == theirs["values"] and ours["steps"] == theirs["steps"]


@pytest.mark.compatibility("Client trainers", "Lightning, GradESLightningCallback", "works")
def test_lightning_equals_a_plain_loop(tmp_path: Path) -> None:
    model, engine = loop(ROWS.view(STEPS, 2, 4, -1))
    callback = GradESLightningCallback(**OPTIONS)
    module, _ = fit(tmp_path, callback)
    assert callback.engine is not None
    assert same_run(callback.engine, engine)
    assert list(engine.frozen.values()) == [4] * 4
    assert same_weights(module.model, model)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert "configure_gradient_clipping" not in vars(module)


@pytest.mark.parametrize("epoch", [0, 1])
def test_resumed_equals_uninterrupted(epoch: int, tmp_path: Path) -> None:
    """On the batches that Lightning gives: which ones come after a resume is its own affair."""
    whole, resumed = GradESLightningCallback(**OPTIONS), GradESLightningCallback(**OPTIONS)
    every_epoch = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first, _ = fit(tmp_path, whole, every_epoch, rows=ROWS[:8], accumulation=1)
    module, _ = fit(tmp_path, resumed, rows=ROWS[:8], accumulation=1, resume=tmp_path / f"epoch={epoch}.ckpt")
    done = 2 * (epoch + 1)
    assert len(module.seen) == STEPS - done
    model, engine = loop([[rows] for rows in first.seen[:done] + module.seen])
    assert resumed.engine is not None
    assert same_run(resumed.engine, engine)
    assert same_weights(module.model, model)


def test_without_a_tau_the_loss_is_lightnings(tmp_path: Path) -> None:
    """It does not pass through a forward pass of the module; accumulation divides it, as it does gradients."""
    losses: list[float] = []

    class Watch(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
            losses.append(loss.item())

    rows = {"held_out": lambda module: torch.ones(2)}  # every look says to go on
    by_loss, norms = GradESLightningCallback(**rows), GradESLightningCallback(monitor="gradient_norm", **rows)
    fit(tmp_path, by_loss, Watch(), gradient_clip_val=None)
    fit(tmp_path, norms, gradient_clip_val=None)
    steps = [sum(losses[2 * i : 2 * i + 2]) for i in range(STEPS)]
    assert by_loss.engine is not None
    assert norms.engine is not None
    for name, series in norms.engine.history.values.items():
        expected = [norm / loss for norm, loss in zip(series, steps, strict=True)]
        assert list(by_loss.engine.history.values[name]) == pytest.approx(expected, rel=1e-5)


def test_without_a_tau_it_needs_held_out_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"held-out rows, and has none\. Pass held_out="):
        fit(tmp_path, GradESLightningCallback())


def test_training_ends_when_all_is_frozen(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, GradESLightningCallback(tau=1e9, alpha=0.5))
    assert trainer.global_step == 4
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_history_has_a_row_per_log(tmp_path: Path) -> None:
    callback = GradESLightningCallback(**OPTIONS)
    fit(tmp_path, callback, accumulation=1, log_every_n_steps=4)
    assert callback.engine is not None
    history = callback.engine.history
    assert [row["step"] for row in history.logs] == [4]
    assert history.logs[0]["frozen"] == 4
    assert 4.0 < history.logs[0]["loss"] < 4.4, "near log(64)"
    assert history.ended == "completed"


class ByHand(Module):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (ByHand, {"max_steps": 3}, "automatic_optimization=False"),
        (lambda: Module(2), {"max_steps": 3}, "automatic_optimization"),
        (Module, {"max_epochs": -1}, "inf steps"),
    ],
)
def test_what_has_no_single_plan_is_refused(module: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {**options, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    callback = GradESLightningCallback(**OPTIONS)
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[callback], enable_checkpointing=False, **options)
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.fit(module(), DataLoader(ROWS, batch_size=4))
