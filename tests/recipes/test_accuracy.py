"""The harness's accuracies equal a literal computation of log-likelihoods; the model is left as it was."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from recipes.tasks import accuracy
from recipes.tasks.formats import TASKS

from .rows import ROWS, siqa_rows

ANSWERS = ("answerA", "answerB", "answerC")


@pytest.fixture
def random_model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=256, initializer_range=0.3, **sizes))


@torch.no_grad()
def by_hand(model: torch.nn.Module, tokenizer: object, task: str, rows: list[dict[str, object]]) -> dict[str, float]:
    """acc and acc_norm, one choice at a time, without batching or padding."""
    right, right_normalized = [], []
    for row in rows:
        question = TASKS[task].format(row)
        scores = []
        for choice in question["choices"]:
            prompt_ids = tokenizer(question["prompt"])["input_ids"]
            ids = tokenizer(f"{question['prompt']} {choice}")["input_ids"]
            assert ids[: len(prompt_ids)] == prompt_ids
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_probabilities[i - 1, ids[i]].item() for i in range(len(prompt_ids), len(ids))))
        right.append(scores.index(max(scores)) == question["answer"])
        normalized = [s / len(c) for s, c in zip(scores, question["choices"], strict=True)]
        right_normalized.append(normalized.index(max(normalized)) == question["answer"])
    return {"acc": sum(right) / len(rows), "acc_norm": sum(right_normalized) / len(rows)}


def test_accuracy_equals_a_computation_by_hand(tiny_model_dir: Path, random_model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    words = ("calm", "très fière", "sleepy now", "ready to go home", "odd", "cold and wet")
    choice = random.Random(0)
    rows = [
        row | {"label": choice.choice("123")} | dict(zip(ANSWERS, choice.sample(words, 3), strict=True))
        for row in siqa_rows(24)
    ]
    random_model.train()
    state = torch.get_rng_state()
    scores = accuracy.measure(random_model, tokenizer, "siqa", rows, batch_size=5)
    assert torch.equal(state, torch.get_rng_state())
    assert random_model.training
    expected = by_hand(random_model.eval(), tokenizer, "siqa", rows)
    assert {name: scores[name] for name in expected} == expected
    assert 0 < expected["acc"] != expected["acc_norm"] > 0  # or the test would not tell them apart
    p, n = scores["acc"], len(rows)
    assert scores["acc_stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_can_be_evaluated(task: str, tiny_model_dir: Path, random_model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    scores = accuracy.measure(random_model, tokenizer, task, [ROWS[task]] * 2, batch_size=2)
    random_model.eval()
    assert scores["acc"] == by_hand(random_model, tokenizer, task, [ROWS[task]])["acc"]


def test_the_mean_of_several_benchmarks() -> None:
    one = {"acc": 0.5, "acc_norm": 0.25, "acc_stderr": 0.3, "acc_norm_stderr": 0.4}
    other = {"acc": 1.0, "acc_norm": 0.75, "acc_stderr": 0.4, "acc_norm_stderr": 0.3}
    assert accuracy.mean({"siqa": one}) == one
    found = accuracy.mean({"siqa": one, "piqa": other})
    assert found.pop("tasks") == {"siqa": one, "piqa": other}
    assert found == pytest.approx({"acc": 0.75, "acc_norm": 0.5, "acc_stderr": 0.25, "acc_norm_stderr": 0.25})
    single = {"acc": 1.0, "acc_norm": 1.0}  # one row has no standard error
    assert accuracy.mean({"siqa": single, "piqa": single}).keys() == {"acc", "acc_norm", "tasks"}
