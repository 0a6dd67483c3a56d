"""What the race is run on: models, rows and their losses, each setting chosen for what it may do to a stopping rule."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from recipes.pypi import locate_model
from recipes.tasks.formats import TASKS
from recipes.tasks.rows import splits

Rows = dict[str, Tensor]  # what the model takes, by name; each (rows, ...)

LENGTH = 48  # tokens of a sequence of packed text
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
BENCHMARKS = ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "piqa", "siqa", "winogrande")
HELD, TEST = 192, 192  # rows to validate and to test on, at most


@dataclass(frozen=True)
class Places:
    """Where things are: the folder of stories260k, and that of the rows of the benchmarks and the digits."""

    model: str
    data: str


@dataclass(frozen=True)
class Setting:
    """A way of training.

    Attributes:
        family: What the tables put together.
        make: From the setting, a generator of random numbers and the places to the model and its rows.
        rows: How many there are to train on.
        epochs: How often each of them is seen.
        wrong: The part of the labels that are drawn at random, in the rows to train and to validate on.
        looks: Rows of a look, at most.
        held: Rows to validate on, at most.
        tau: Whether arms with a tau take part.
    """

    family: str
    make: Callable[[Setting, torch.Generator, Places], Task]
    rows: int
    epochs: float
    batch: int
    rate: float
    lora: bool = False
    wrong: float = 0.0
    warmup: float = 0.05
    constant: bool = False
    looks: int = 128
    held: int = HELD
    test: int = TEST
    what: str = ""
    tau: bool = False

    @property
    def steps(self) -> int:
        return int(self.rows * self.epochs / self.batch)

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of a step (1-based) in a schedule of so many: warm-up, then a cosine to 0 or nothing."""
        warm = min(1.0, step / max(1.0, self.warmup * steps))
        return self.rate * warm * (1.0 if self.constant else 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)))


@dataclass
class Task:
    """A model to train, and rows. The model is the same for the same seed, and so are the rows and their order."""

    model: nn.Module
    train: Rows
    held: Rows
    test: Rows
    order: Tensor | None = None

    def batches(self, size: int) -> Iterator[Rows]:
        """Batches without end, epoch after epoch."""
        assert self.order is not None
        for start in range(0, len(self.order) - size + 1, size):
            yield take(self.train, self.order[start : start + size])


def make(setting: Setting, seed: int, places: Places) -> Task:
    """The model and the rows of one seed, in the order in which they are trained on."""
    generator = torch.Generator().manual_seed(seed)
    set_seed(seed)
    task = setting.make(setting, generator, places)
    task.held, task.test = first(task.held, setting.held), first(task.test, setting.test)
    epochs = int(setting.epochs) + 2
    task.order = torch.cat([torch.randperm(setting.rows, generator=generator) for _ in range(epochs)])
    if setting.lora:
        set_seed(seed)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
        task.model = get_peft_model(task.model, config)  # type: ignore[arg-type]
    task.model.train()
    return task


def take(rows: Rows, chosen: Tensor) -> Rows:
    return {name: values[chosen] for name, values in rows.items()}


def first(rows: Rows, number: int) -> Rows:
    return {name: values[:number] for name, values in rows.items()}


def number_of(rows: Rows) -> int:
    return len(next(iter(rows.values())))


@torch.no_grad()
def losses(model: nn.Module, rows: Rows, together: int = 64) -> tuple[Tensor, Tensor | None]:
    """The loss of each row, and for classifiers whether each is right; in evaluation mode, in float64."""
    training = model.training
    model.eval()
    found, right = [], []
    for start in range(0, number_of(rows), together):
        batch = {name: values[start : start + together] for name, values in rows.items()}
        logits, labels = model(**batch).logits, batch["labels"]
        if logits.dim() == 3:  # tokens, the next of which is asked for unless there is a decoder of its own
            if not getattr(model.config, "is_encoder_decoder", False):
                logits, labels = logits[:, :-1], labels[:, 1:]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            found.append(each.sum(1) / (labels != -100).sum(1))
        elif labels.is_floating_point():
            found.append((logits[:, 0] - labels) ** 2)
        else:
            found.append(F.cross_entropy(logits, labels, reduction="none"))
            right.append((logits.argmax(1) == labels).double())
    model.train(training)
    return torch.cat(found).double(), torch.cat(right) if right else None


# --- text ------------------------------------------------------------------------------------------------------------


@functools.cache
def _manual(model: str) -> Tensor:
    """Python's language reference, as the interpreter carries it for `help()`, in sequences of tokens."""
    return _packed(model, [topics[name] for name in sorted(topics)])


@functools.cache
def _rows(name: str, split: str, data: str) -> list[dict[str, Any]]:
    """The rows of one split of a benchmark."""
    found: list[dict[str, Any]] = splits(TASKS[name], data)[split].to_list()
    return found


@functools.cache
def _questions(model: str, data: str, name: str, split: str) -> Tensor:
    """Questions and right answers of a benchmark, one after another, in sequences of tokens."""
    task, texts = TASKS[name], []
    for row in _rows(name, split, data):
        found = task.format(row)
        texts.append(f"{found['prompt']} {found['choices'][found['answer']]}")
    return _packed(model, texts)


def _packed(model: str, texts: list[str]) -> Tensor:
    tokenizer, ids = AutoTokenizer.from_pretrained(model), []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def _language(sequences: Tensor) -> Rows:
    return {"input_ids": sequences, "labels": sequences}


def manual(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """stories260k on Python's language reference."""
    text = _manual(places.model)
    text = text[torch.randperm(len(text), generator=generator)]
    held, test, train = text[: setting.held], text[setting.held :][: setting.test], text[setting.held + setting.test :]
    if len(train) < setting.rows:
        raise ValueError(f"Python's language reference has {len(text)} sequences of {LENGTH} tokens, too few.")
    model = AutoModelForCausalLM.from_pretrained(places.model)
    return Task(model, _language(train[: setting.rows]), _language(held), _language(test))


def one_benchmark(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """stories260k on the text of one benchmark."""
    text = _questions(places.model, places.data, setting.what, "train")
    text = text[torch.randperm(len(text), generator=generator)]
    test = _questions(places.model, places.data, setting.what, "validation")
    model = AutoModelForCausalLM.from_pretrained(places.model)
    train = text[setting.held :][: setting.rows]
    return Task(model, _language(train), _language(text[: setting.held]), _language(test))


def text_classifier(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """stories260k with a classification head: yes or no (BoolQ), or which benchmark a prompt is from."""
    tokenizer = AutoTokenizer.from_pretrained(places.model)
    names = ("boolq",) if setting.what == "boolq" else BENCHMARKS
    length = LENGTH if setting.what == "boolq" else 24

    def rows(split: str, number: int) -> Rows:
        texts, labels = [], []
        for place, name in enumerate(names):
            task = TASKS[name]
            found = _rows(task.name, split, places.data)
            chosen = torch.randperm(len(found), generator=generator)[: -(-number // len(names))].tolist()
            for row in (found[index] for index in chosen):
                texts.append(
                    f"{row['question']}? {row['passage']}" if setting.what == "boolq" else task.format(row)["prompt"]
                )
                labels.append(int(row["answer"]) if setting.what == "boolq" else place)
        tokens = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
        ids = torch.tensor([token + [0] * (length - len(token)) for token in tokens])
        mixed = torch.randperm(len(ids), generator=generator)
        mask = torch.tensor([[1] * len(token) + [0] * (length - len(token)) for token in tokens])
        return {"input_ids": ids[mixed], "attention_mask": mask[mixed], "labels": torch.tensor(labels)[mixed]}

    both, test = rows("train", setting.rows + setting.held), rows("validation", setting.test)
    model = AutoModelForSequenceClassification.from_pretrained(
        places.model, num_labels=max(2, len(names)), pad_token_id=0
    )
    chosen = torch.arange(setting.rows + setting.held)
    return Task(model, take(both, chosen[: setting.rows]), take(both, chosen[setting.rows :]), test)


def smollm2(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """SmolLM2-135M on the answers of a benchmark, given its prompts."""
    place = locate_model(SMOLLM2)
    tokenizer, task = AutoTokenizer.from_pretrained(place), TASKS[setting.what]

    def rows(split: str, number: int) -> Rows:
        found = _rows(task.name, split, places.data)
        parts = []
        for index in torch.randperm(len(found), generator=generator)[:number].tolist():
            row = task.format(found[index])
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(f" {row['choices'][row['answer']]}")["input_ids"] + [tokenizer.eos_token_id]
            parts.append((prompt, answer))
        length = max(len(prompt) + len(answer) for prompt, answer in parts)
        ids, mask, labels = [], [], []
        for prompt, answer in parts:
            more = length - len(prompt) - len(answer)
            ids.append(prompt + answer + [tokenizer.pad_token_id] * more)
            mask.append([1] * (length - more) + [0] * more)
            labels.append([-100] * len(prompt) + answer + [-100] * more)
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}

    both, test = rows("train", setting.rows + setting.held), rows("validation", setting.test)
    chosen = torch.arange(setting.rows + setting.held)
    train, held = take(both, chosen[: setting.rows]), take(both, chosen[setting.rows :])
    return Task(AutoModelForCausalLM.from_pretrained(place, dtype="float32"), train, held, test)


# --- from scratch ----------------------------------------------------------------------------------------------------


@functools.cache
def _digits(data: str, split: str) -> tuple[Tensor, Tensor]:
    rows = pyarrow.parquet.read_table(Path(data, "digits", f"{split}.parquet")).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("L").resize((8, 8)) for row in rows]
    pixels = torch.stack([torch.tensor(np.array(image), dtype=torch.float32)[None] / 127.5 - 1 for image in images])
    return pixels, torch.tensor([row["label"] for row in rows])


def digits(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """A small ViT on images of handwritten digits."""
    pixels, labels = _digits(places.data, "train")
    test = dict(zip(("pixel_values", "labels"), _digits(places.data, "validation"), strict=True))
    wrong = torch.rand(len(labels), generator=generator) < setting.wrong
    labels = torch.where(wrong, torch.randint(0, 10, labels.shape, generator=generator), labels)
    chosen = torch.randperm(len(labels), generator=generator)
    both = {"pixel_values": pixels[chosen], "labels": labels[chosen]}
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, num_labels=10,
    )  # fmt: skip
    held = {name: values[-setting.held :] for name, values in both.items()}
    return Task(ViTForImageClassification(config), first(both, setting.rows), held, test)


def bert(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """A small BERT on a task that can be solved: is the first of twelve tokens greater than 32?"""

    def rows(number: int) -> Rows:
        ids = torch.randint(0, 64, (number, 12), generator=generator)
        answer = ids[:, 0] > 32
        return {"input_ids": ids, "labels": answer.float() if setting.what == "regression" else answer.long()}

    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=1 if setting.what == "regression" else 2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    return Task(model, rows(setting.rows), rows(setting.held), rows(setting.test))


def t5(setting: Setting, generator: torch.Generator, places: Places) -> Task:
    """A small T5 on sequences of eight letters: backwards, or each replaced by another letter."""
    cipher = 2 + torch.randperm(16, generator=torch.Generator().manual_seed(0))

    def rows(number: int) -> Rows:
        letters = torch.randint(2, 18, (number, 8), generator=generator)
        labels = letters.flip(1) if setting.what == "backwards" else cipher[letters - 2]
        return {"input_ids": letters, "labels": labels}

    config = T5Config(
        vocab_size=18, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0, is_gated_act=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return Task(model, rows(setting.rows), rows(setting.held), rows(setting.test))


def _stories() -> dict[str, Setting]:
    found = {}
    for lora in (False, True):
        for name, rows, epochs, rate in (
            ("overfits", 75, 21, 1e-3),
            ("saturates", 200, 8, 3e-4),
            ("2 epochs", 800, 2, 1e-3),
            ("first epoch", 1600, 1, 1e-3),
        ):
            family = f"stories260k, {'LoRA' if lora else 'all weights'}"
            found[f"{name}, {'LoRA' if lora else 'all weights'}"] = Setting(
                family, manual, rows, epochs, 8, rate * (5 if lora else 1), lora, warmup=0.0, tau=True
            )
    return found


def _vit(rows: int, epochs: int, **options: float) -> Setting:
    return Setting("ViT from scratch, digits", digits, rows, epochs, 32, 1e-3, test=360, **options)  # type: ignore[arg-type]


SCRATCH, PRETRAINED, REAL = "from scratch, solvable tasks", "stories260k, other uses", "SmolLM2-135M, LoRA"
SETTINGS: dict[str, Setting] = {
    **_stories(),
    "ViT 100 x 100": _vit(100, 100),
    "ViT 300 x 100": _vit(300, 100),
    "ViT 1000 x 20": _vit(1000, 20),
    "ViT 1000 x 60": _vit(1000, 60),
    "ViT 300 x 80, 20 % wrong": _vit(300, 80, wrong=0.2),
    "ViT 1000 x 20, constant rate": _vit(1000, 20, constant=True),
    "BERT 2400 x 1": Setting(SCRATCH, bert, 2400, 1, 8, 4e-3, test=1000),
    "BERT 64 x 40": Setting(SCRATCH, bert, 64, 40, 8, 4e-3, test=1000),
    "BERT 600 x 4, regression": Setting(SCRATCH, bert, 600, 4, 8, 4e-3, test=1000, what="regression"),
    "T5 backwards, 200 x 40": Setting(SCRATCH, t5, 200, 40, 16, 3e-3, what="backwards"),
    "T5 cipher, 400 x 20": Setting(SCRATCH, t5, 400, 20, 16, 3e-3, what="cipher"),
    "classifier, BoolQ 128 x 20": Setting(PRETRAINED, text_classifier, 128, 20, 8, 3e-4, test=512, what="boolq"),
    "classifier, 8 sources 160 x 15": Setting(PRETRAINED, text_classifier, 160, 15, 8, 3e-4, test=512, what="sources"),
    "continued text, 1 epoch": Setting(PRETRAINED, one_benchmark, 1200, 1, 8, 1e-3, what="hellaswag"),
    "continued text, 3 epochs": Setting(PRETRAINED, one_benchmark, 500, 3, 8, 1e-3, what="hellaswag"),
    "SmolLM2, OpenBookQA 32 x 6": Setting(
        REAL, smollm2, 32, 6, 4, 5e-4, True, looks=64, held=64, test=128, what="openbookqa"
    ),
    "SmolLM2, WinoGrande 32 x 6": Setting(
        REAL, smollm2, 32, 6, 4, 5e-4, True, looks=64, held=64, test=128, what="winogrande"
    ),
    "SmolLM2, SIQA 192 x 1": Setting(REAL, smollm2, 192, 1, 4, 5e-4, True, looks=64, held=64, test=128, what="siqa"),
}
