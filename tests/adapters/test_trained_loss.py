"""A look sees the loss that is trained on, whoever computes it, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from grades_hf import GradESCallback, GradESTrainer
from tests.adapters import looks, overfit
from tests.small import llama, lora, tokens

SHORT = {"max_steps": 8, "logging_steps": 2}


def doubled(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1]
    return 2 * nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


class Own(Trainer):
    """Computes a loss of its own, notes it, and logs it."""

    count = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = 3 * outputs.loss + outputs.logits.square().mean()
        self.count += 1
        self.__dict__.setdefault("notes", []).append(loss.item())
        self.log({"part": outputs.loss.item()})
        return (loss, outputs) if return_outputs else loss


class Bare(Trainer):
    """Has not thought of evaluations: no `return_outputs`."""

    def compute_loss(self, model, inputs, num_items_in_batch=None):
        return 3 * model(**inputs).loss


class Dropping(nn.Module):
    """Dropout and a buffer that counts; its batches have no "labels"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(6, 6), "down_proj": nn.Linear(6, 6)}) for _ in "ab"
        )
        self.drop, self.norm = nn.Dropout(0.2), nn.BatchNorm1d(6)

    def forward(self, x, target):
        for layer in self.layers:
            x = x + layer["down_proj"](torch.relu(layer["up_proj"](self.drop(x))))
        return {"loss": (self.norm(x) if self.training else x).sub(target).square().mean()}


class Noisy(Dataset):
    """Rows that are augmented when they are fetched."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index] + 0.1 * torch.randn(6) + np.random.rand(), "target": self.y[index]}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "lora": {"model": lora},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "compute_loss_func": {"extra": {"compute_loss_func": doubled}},
    "compute_loss": {"cls": Own},
    "accumulation": {"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"},
    "several sets": {"extra": {"eval_dataset": {"a": tokens(5, seed=7), "b": tokens(6, seed=8)}}},
    "mixin": {"cls": GradESTrainer},
}


@pytest.mark.compatibility(
    "Trainer", "looks with label smoothing, compute_loss_func, a subclass's compute_loss, several eval sets", "works"
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("looks_at_every_step")
def test_looks_see_the_trained_loss_and_leave_no_trace(name, tmp_path):
    options = {**SHORT, **CASES[name]}
    make, cls, extra = options.pop("model", llama), options.pop("cls", Trainer), options.pop("extra", {})
    if cls is GradESTrainer:
        trainer = overfit.trainer(make(), tmp_path, [], cls, {"grades": {}}, **options)
        trainer.train()
        assert trainer.grades_callback.engine.ending.looks
        return
    looks.check(lambda folder, callbacks: overfit.trainer(make(), folder, callbacks, cls, extra, **options), tmp_path)
    if name != "several sets":
        looks.same_as_evaluation(overfit.trainer(make(), tmp_path / "e", [], cls, extra, **options))


def test_a_trainer_that_cannot_evaluate_is_asked_for_what_it_trains_on(tmp_path):
    looks.check(lambda folder, callbacks: overfit.trainer(llama(), folder, callbacks, Bare, **SHORT), tmp_path)


def test_augmented_rows_dropout_buffers_and_batches_without_labels(tmp_path):
    def build(folder: Path, callbacks: list[Any]) -> Trainer:
        data = {"train_dataset": Noisy(0), "eval_dataset": Noisy(1)}
        return overfit.trainer(Dropping(), folder, callbacks, extra=data, **SHORT, remove_unused_columns=False)

    callback = looks.check(build, tmp_path, target_modules=["up_proj", "down_proj"])
    assert callback.engine.ending.looks[0]["rows"] == 8


@pytest.mark.parametrize("seed", [None, 3])
def test_masked_language_modelling_masks_the_same_each_time(seed, tiny_model_dir, tmp_path, monkeypatch):
    """Also where the collator has a generator of its own, which training uses, too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}

    def build(folder: Path, callbacks: list[Any]) -> Trainer:
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **sizes))
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=seed)
        data = {set_: rows.remove_columns("labels") for set_, rows in (
            ("train_dataset", tokens(8)), ("eval_dataset", tokens(12, seed=5)))}  # fmt: skip
        return overfit.trainer(model, folder, callbacks, extra={**data, "data_collator": collator}, **SHORT)

    callback = looks.check(build, tmp_path)
    assert abs(callback.engine.ending.looks[1]["since"]) < 0.5, "both looks saw the same masks"


@pytest.mark.compatibility("Client trainers", "Seq2SeqTrainer without a tau (predict_with_generate)", "works")
def test_seq2seq(tmp_path):
    from tests.clients.test_seq2seq import bart, pairs

    def build(folder: Path, callbacks: list[Any]) -> Trainer:
        more = {"predict_with_generate": True, "learning_rate": 3e-2, **SHORT}
        arguments = Seq2SeqTrainingArguments(
            str(folder), per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, **more,
        )  # fmt: skip
        rows = pairs()
        data = {"train_dataset": rows.select(range(8)), "eval_dataset": rows.select(range(8, 20))}
        return Seq2SeqTrainer(model=bart(), args=arguments, callbacks=callbacks, **data)

    looks.check(build, tmp_path)


def test_a_contrastive_loss_is_looked_at_in_batches(tmp_path):
    """A row alone has nothing to be compared with, and a loss of 0."""

    class Contrastive(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(input_ids=inputs["input_ids"])
            pooled = outputs.logits.mean(1)
            scores = pooled @ pooled.T
            loss = nn.functional.cross_entropy(scores, torch.arange(len(scores)))
            return (loss, outputs) if return_outputs else loss

    def build(folder: Path, callbacks: list[Any]) -> Trainer:
        return overfit.trainer(llama(), folder, callbacks, Contrastive, **SHORT)

    callback = looks.check(build, tmp_path)
    look = callback.engine.ending.looks[0]
    assert look["rows"] == 8, "16 rows, two a batch"
    assert look["average_loss"] > 0


# --- refused before the first step ---------------------------------------------------------------------------------


WITHOUT = [
    ({"eval_dataset": None}, r"Pass held_out= .*eval_dataset, or pass a tau"),
    ({"eval_dataset": []}, "no rows"),
    ({"eval_dataset": tokens(4).remove_columns("labels")}, "computes none for the first of them"),
    ({"eval_dataset": TensorDataset(torch.ones(4, 3))}, "makes no batch of the held-out rows"),
]


@pytest.mark.compatibility("Trainer", "no held-out rows, or rows without a loss, and no tau", "refused")
@pytest.mark.parametrize(("extra", "message"), WITHOUT, ids=range(len(WITHOUT)))
@pytest.mark.parametrize("cls", [Trainer, GradESTrainer])
def test_without_rows_or_without_their_loss_it_is_refused_before_the_first_step(cls, extra, message, tmp_path):
    callbacks = [GradESCallback()] if cls is Trainer else []
    model = llama()
    trainer = overfit.trainer(model, tmp_path, callbacks, cls, extra, max_steps=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not (tmp_path / "grades_history.arrow").exists()
    assert all(p.requires_grad for p in model.parameters())
    trainer.eval_dataset = tokens(4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_an_evaluation_that_fails_is_not_passed_over(tmp_path):
    class Full(Trainer):
        def prediction_step(self, *args, **kwargs):
            raise torch.OutOfMemoryError("no memory for a held-out row")

    trainer = overfit.trainer(llama(), tmp_path, [GradESCallback()], Full, max_steps=2)
    with pytest.raises(torch.OutOfMemoryError, match="held-out row"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_rows_with_a_tau_are_refused(tmp_path):
    with pytest.raises(ValueError, match="held_out is about looks"):
        overfit.trainer(llama(), tmp_path, [GradESCallback(tau=1.0, held_out=tokens(4))]).train()


@pytest.mark.usefixtures("looks_at_every_step")
def test_a_metric_is_looked_at_where_the_user_asks(tmp_path):
    def compute(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    extra = {"compute_metrics": compute, "preprocess_logits_for_metrics": lambda logits, labels: logits.clone()}
    callback = GradESCallback(look_metric="accuracy")
    overfit.trainer(llama(), tmp_path, [callback], extra=extra, **SHORT).train()
    assert -1 <= callback.engine.ending.looks[0]["average_loss"] <= 0
    wrong = overfit.trainer(llama(), tmp_path, [GradESCallback(look_metric="f1")], extra=extra, **SHORT)
    with pytest.raises(
        ValueError, match="look_metric='f1' is not among what compute_metrics returns. Use one of accuracy"
    ):
        wrong.train()
    assert wrong.state.global_step == 0
