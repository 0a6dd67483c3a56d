"""The harness's accuracies equal a literal computation of log-likelihoods; the model is left as it was."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from recipes import evaluate as script
from recipes.models import load_tokenizer
from recipes.tasks.formats import TASKS

from .rows import ROWS, siqa_dir, siqa_rows

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
    tokenizer = load_tokenizer(str(tiny_model_dir))
    words = ("calm", "très fière", "sleepy now", "ready to go home", "odd", "cold and wet")
    choice = random.Random(0)
    rows = [
        row | {"label": choice.choice("123")} | dict(zip(ANSWERS, choice.sample(words, 3), strict=True))
        for row in siqa_rows(24)
    ]
    random_model.train()
    state = torch.get_rng_state()
    scores = script.evaluate(random_model, tokenizer, "siqa", rows, batch_size=5)
    assert torch.equal(state, torch.get_rng_state())
    assert random_model.training
    expected = by_hand(random_model.eval(), tokenizer, "siqa", rows)
    assert {name: scores[name] for name in expected} == expected
    assert 0 < expected["acc"] != expected["acc_norm"] > 0  # or the test would not tell them apart
    p, n = scores["acc"], len(rows)
    assert scores["acc_stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert scores["rows"] == n


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_can_be_evaluated(task: str, tiny_model_dir: Path, random_model: LlamaForCausalLM) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    scores = script.evaluate(random_model, tokenizer, task, [ROWS[task]] * 2, batch_size=2)
    random_model.eval()
    assert scores["acc"] == by_hand(random_model, tokenizer, task, [ROWS[task]])["acc"]


def test_a_saved_adapter_is_evaluated_on_its_base_model(
    tiny_model_dir: Path, tmp_path: Path, random_model: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(tiny_model_dir))
    random_model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    data = siqa_dir(tmp_path / "data")
    script.main(["--model", str(tmp_path / "run"), "--task", "siqa", "--data_dir", str(data), "--eval_samples", "9"])
    printed = json.loads(capsys.readouterr().out)
    rows = script.evaluation_rows(script.load_split(TASKS["siqa"], "validation", str(data)), 9)
    assert printed == script.evaluate(adapted, tokenizer, "siqa", rows, batch_size=16)

    config = tmp_path / "run" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match="is an adapter, and its base model is missing.*--base_model"):
        script.load(str(tmp_path / "run"))
    model, _ = script.load(str(tmp_path / "run"), base_model=str(tmp_path / "base"))
    assert type(model).__name__.startswith("PeftModel")
