"""The loss of each held-out row is that of a batch of its own, however many pass through the model at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

from grades_hf.ending import Rows
from grades_hf.ending.rows import TRIED
from grades_hf.parallel.ranks import Ranks
from tests.ending import loops
from tests.ending.loops import HELD_OUT, all_losses

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
LABELS: dict[str, Any] = {
    "classification": lambda i: i % 3,
    "regression": lambda i: i / 10,
    "several labels": lambda i: [float(i % 2), 1.0, 0.0],
}


def texts(label: Any = None) -> list[dict[str, Any]]:
    """Rows of 3 to 9 tokens; the labels are the tokens, with the first two left out, or one label a row."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(20):
        ids = torch.randint(3, 60, (3 + i % 7,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]] if label is None else label(i)})
    return rows


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        empty = width - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * empty)
        batch["attention_mask"].append([1] * len(row["input_ids"]) + [0] * empty)
        tokens = isinstance(row["labels"], list) and isinstance(row["labels"][0], int)
        batch["labels"].append(row["labels"] + [-100] * empty if tokens else row["labels"])
    return {key: torch.tensor(value) for key, value in batch.items()}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind in LABELS:
        labels = 1 if kind == "regression" else 3
        problem = "multi_label_classification" if kind == "several labels" else None
        config = transformers.BertConfig(vocab_size=64, **SIZES, num_labels=labels, problem_type=problem)
        return transformers.BertForSequenceClassification(config).eval()
    if kind == "T5":
        config = transformers.T5Config(vocab_size=64, d_model=32, d_ff=48, d_kv=16, num_layers=2, num_heads=2)
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config).eval()
    config = transformers.LlamaConfig(vocab_size=64, **SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    return model.to(torch.bfloat16) if kind == "bfloat16" else model


class Counted:
    """The forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


@pytest.mark.parametrize("kind", ["causal", "bfloat16", "T5", *LABELS])
def test_rows_of_a_batch_are_told_apart(kind: str) -> None:
    model, rows = make(kind), texts(LABELS.get(kind))
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    expected = [model(**padded([row])).loss.item() for row in rows]
    counted = Counted(model)
    for passes in (1 + TRIED + 3, 3):
        with torch.no_grad():
            assert all_losses(held, model) == pytest.approx(expected, rel=0.02 if kind == "bfloat16" else 1e-5)
        assert counted.passes == passes
        counted.passes = 0
    assert len(held) == len(rows)


def test_a_row_without_labels_keeps_no_others_apart() -> None:
    model, rows = make("causal"), texts()
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    with torch.no_grad():
        losses = all_losses(held, model)
    assert held.together
    assert [i for i, loss in enumerate(losses) if loss != loss] == [1]


class Computed(nn.Module):
    """Computes the loss of a batch in the way that `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = make("causal"), kind


class Reduced(Computed):
    """As trainers do that reduce it themselves."""

    def forward(self, **batch: Any) -> Any:
        output = self.inner(**batch)
        labels = batch["labels"][:, 1:]
        each = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="none")
        mask = labels != -100
        if self.kind == "sum over mask":
            output.loss = -(-each).sum() / torch.as_tensor(mask.sum()).clamp(min=1)
        elif self.kind == "weighted tokens":
            weights = mask / (1 + torch.arange(labels.shape[1]))
            output.loss = torch.sum(each * weights) / weights.sum()
        else:  # the mean over rows, as of preference losses, beside other means that are only noted
            rows = each.sum(-1)
            output.noted = rows.sigmoid().mean().item()
            output.loss = (rows / 2).mean()
        return output


@pytest.mark.parametrize("kind", ["sum over mask", "weighted tokens", "mean over rows"])
def test_rows_of_a_loss_that_the_trainer_reduces_are_told_apart(kind: str) -> None:
    model, rows = Reduced(kind).eval(), texts()
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    expected = [model(**padded([row])).loss.item() for row in rows]
    with torch.no_grad():
        all_losses(held, model)
        counted = Counted(model)
        assert all_losses(held, model) == pytest.approx(expected, rel=1e-5)
    assert counted.passes == 3


class Smoothed(Computed):
    """Adds something to it, or makes it that of another thing than the rows' mean."""

    def forward(self, **batch: Any) -> Any:
        output = self.inner(**batch)
        logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        if self.kind == "smoothing":
            output.loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        elif self.kind == "weights":
            output.loss = nn.functional.cross_entropy(logits, labels, weight=torch.linspace(1, 2, 64))
        elif self.kind == "an auxiliary loss":
            output.loss += 1e-3
        elif self.kind == "two means":
            output.loss = (output.loss + nn.functional.cross_entropy(2 * logits, labels)) / 2
        elif self.kind == "rows that see each other":
            labels = torch.arange(len(batch["input_ids"]))
            pooled = output.logits.mean(1)
            output.loss = nn.functional.cross_entropy(pooled @ pooled.T, labels) + 0 * output.loss
        return output


OTHERS = ["smoothing", "weights", "an auxiliary loss", "two means", "rows that see each other"]


@pytest.mark.parametrize("kind", OTHERS)
def test_where_they_cannot_each_row_has_a_pass_of_its_own(kind: str) -> None:
    model, rows = Smoothed(kind).eval(), texts()
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    counted = Counted(model)
    all_losses(held, model)
    counted.passes = 0
    assert all_losses(held, model) == [model(**padded([row])).loss.double().item() for row in rows]
    assert counted.passes == 2 * len(rows)


def test_rows_that_are_put_end_to_end_have_passes_of_their_own() -> None:
    model, rows = make("causal"), [{"input_ids": ids, "labels": ids} for ids in HELD_OUT.tolist()]
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithFlattening())  # type: ignore[arg-type]
    held = Rows([loader], 128)
    alone = [model(**DataCollatorWithFlattening()([row])).loss.item() for row in rows]
    all_losses(held, model)
    assert all_losses(held, model) == pytest.approx(alone, rel=1e-6)


def test_the_mean_of_united_rows_is_one_loss(tiny_tokenizer: Any) -> None:
    model, rows = make("classification"), texts(LABELS["classification"])
    collate = DataCollatorWithPadding(tiny_tokenizer)
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    held = Rows([loader], 18)
    held.unite(4)
    assert len(held) == len(all_losses(held, model)) == 4  # the last two rows are no batch


class Map(Dataset[Any]):
    def __len__(self) -> int:
        return len(HELD_OUT)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": HELD_OUT[index], "labels": HELD_OUT[index]}


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(loops.dataset())


@pytest.mark.parametrize("number", [7, 128])
@pytest.mark.parametrize(
    "source", [loops.dataset(), Map(), Stream(), DataLoader(Map(), batch_size=16), DataLoader(Stream(), batch_size=4)]
)
def test_every_source_gives_the_same_rows_each_time(source: Any, number: int) -> None:
    model = loops.make("full").eval()
    rows = Rows([source], number)
    losses = all_losses(rows, model)
    assert losses == all_losses(rows, model) == all_losses(Rows([source], number), model)
    expected = [model(input_ids=row[None], labels=row[None]).loss.item() for row in HELD_OUT]
    assert all(min(abs(loss - other) for other in expected) < 1e-5 for loss in losses)
    assert len(losses) == min(number, len(HELD_OUT))


@pytest.mark.parametrize(
    ("rows", "at_once", "first", "number"),
    [
        (128, 8, 32, 2),
        (128, 1, 32, 2),
        (128, 64, 32, 2),
        (128, 1000, 32, 2),
        (100, 48, 25, 2),
        (70, 8, 18, 2),
        (61, 8, 16, 2),
        (60, 8, 60, 1),  # too few for a quarter
        (33, 32, 33, 1),
        (20, 8, 20, 1),
        (17, 17, 17, 1),
        (2, 8, 2, 1),
    ],
)
def test_the_first_part_of_a_look_is_a_quarter_if_that_says_something(rows, at_once, first, number):
    model = loops.make("full").eval()
    held = Rows([[{"input_ids": ids, "labels": ids} for ids in loops.rows(rows, 3)]], rows, at_once=at_once)
    parts = held.parts(model, Ranks(model))
    assert [len(parts), sum(size for size, _ in parts[0].batches)] == [number, first]
    assert len(all_losses(held, model)) == rows


def test_a_quarter_has_rows_of_every_source_and_of_all_of_it() -> None:
    held = Rows([range(40), range(100, 140)], 40, at_once=32)
    held.put_together(True)
    model = loops.make("full")
    parts = held.parts(model, Ranks(model))
    rows = [[int(row) for _, batch in part.batches for row in batch] for part in parts]
    assert rows[0] == [*range(0, 40, 4), *range(100, 140, 4)]
    assert sorted(rows[0] + rows[1]) == [*range(40), *range(100, 140)]
    assert [[int(batch) for _, batch in part.alone] for part in parts] == rows


@pytest.mark.parametrize("bad", [3, 9])
def test_a_row_without_a_finite_loss_takes_no_others_of_its_batch_with_it(bad: int) -> None:
    model, rows = Reduced("mean over rows").eval(), texts()
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    with torch.no_grad():
        expected = all_losses(held, model)
        assert held.together
        model.inner.model.embed_tokens.weight[61] = torch.nan  # type: ignore[union-attr, index]
        rows[bad]["input_ids"][0] = 61
        again = Rows([loader], 128)
        again.put_together(True)
        losses = all_losses(again, model)
    assert [i for i, loss in enumerate(losses) if loss != loss] == [bad]
    assert losses[:bad] + losses[bad + 1 :] == pytest.approx(expected[:bad] + expected[bad + 1 :], rel=1e-5)


def test_a_sum_that_the_caller_divides_is_told_apart() -> None:
    """As transformers' models do where Trainer counts the tokens of a batch."""

    class Counting(Computed):
        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch, num_items_in_batch=(batch["labels"][:, 1:] != -100).sum())

    model, rows = Counting("").eval(), texts()
    loader: Any = DataLoader(rows, batch_size=8, collate_fn=padded)  # type: ignore[arg-type]
    held = Rows([loader], 128)
    with torch.no_grad():
        losses = all_losses(held, model)
        assert losses == pytest.approx([model(**padded([row])).loss.item() for row in rows], rel=1e-5)
    assert held.together
