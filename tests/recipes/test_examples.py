"""Training examples: the labels decode to the answer, and nothing else carries a loss."""

from __future__ import annotations

import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from recipes.examples import IGNORE, encode
from recipes.tasks.formats import TASKS

from .rows import FORMATTED, ROWS


@pytest.mark.parametrize("name", list(TASKS))
def test_labels_decode_to_the_answer(name: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = encode(TASKS[name], [ROWS[name]], tiny_tokenizer, max_length=512)
    prompt, choices, answer = FORMATTED[name]
    scored = [label for label in example["labels"] if label != IGNORE]
    assert tiny_tokenizer.decode(scored).strip() == choices[answer]
    assert scored == example["input_ids"][-len(scored) :]
    text = tiny_tokenizer.decode(example["input_ids"], skip_special_tokens=True)
    assert text.strip() == f"{prompt} {choices[answer]}"
    assert len(example["attention_mask"]) == len(example["labels"]) == len(example["input_ids"])


@pytest.mark.parametrize("name", list(TASKS))
def test_the_harness_scores_the_same_tokens(name: str, tiny_model_dir: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    scorer = HFLM(pretrained=model, tokenizer=_tokenizer(tiny_model_dir))
    prompt, choices, answer = FORMATTED[name]
    context, continuation = scorer._encode_pair(prompt, f" {choices[answer]}")
    (example,) = encode(TASKS[name], [ROWS[name]], scorer.tokenizer, max_length=512)
    assert example["input_ids"] == context + continuation
    assert [label for label in example["labels"] if label != IGNORE] == continuation


def test_a_long_prompt_loses_its_beginning(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (whole,) = encode(TASKS["siqa"], [ROWS["siqa"]], tiny_tokenizer, max_length=512)
    answer = sum(label != IGNORE for label in whole["labels"])
    (cut,) = encode(TASKS["siqa"], [ROWS["siqa"]], tiny_tokenizer, max_length=answer + 3)
    assert {key: values[-answer - 3 :] for key, values in whole.items()} == cut
    with pytest.raises(ValueError, match=f"max_length={answer} tokens are too few for the answer 'thankful'"):
        encode(TASKS["siqa"], [ROWS["siqa"]], tiny_tokenizer, max_length=answer)


def _tokenizer(folder: str) -> PreTrainedTokenizerBase:
    from recipes.models import load_tokenizer

    return load_tokenizer(str(folder))
