"""The stand-ins are what the tests take them for: a model that has learned English, in the shape of the shared one."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import standin


@pytest.fixture(params=["shared", "made by the tests"])
def model_dir(request, tiny_model_dir):
    if request.param == "made by the tests":
        return standin.trained_model_dir()
    if standin.find("models", "stories260k") is None:
        pytest.skip("there is no shared folder")
    return tiny_model_dir


def test_model_has_learned(model_dir, real_text):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() == 260_032
    assert len(tokenizer) == standin.VOCABULARY
    batch = torch.tensor([tokenizer(text)["input_ids"][:64] for text in real_text if len(text) > 400][:32])
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch).loss.item()
    assert loss < 5.2, "a model that knows nothing has ln(512) = 6.24"
    text = "Freezing stops the update of a matrix."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_an_empty_variable_forces_the_stand_ins(monkeypatch):
    monkeypatch.setenv(standin.VARIABLE, "")
    assert standin.shared() is None
    assert standin.text() == standin.documentation()
    assert standin.model_dir().parent == standin.CACHE
    assert "stand-in" in standin.describe()


def test_dataset_blocks(text_dataset):
    dataset = text_dataset(rows=8, length=32)
    assert dataset.column_names == ["input_ids", "labels"]
    assert all(len(row) == 32 for row in dataset["input_ids"])
    assert text_dataset(rows=4, length=32, skip=4)["input_ids"][:] == dataset["input_ids"][4:]
