"""What the tests read from `../shared`, and what they make themselves on a machine that has no such folder.

The environment variable `GRADES_HF_SHARED` names another folder; when it is empty the stand-ins are used in any case.

* A small Llama that has learned something: `shared/models/stories260k`; else one of the same shape that is trained
  here, in seconds, on Python's own documentation, and kept in `.cache/tests`.
* Real English text: passages of BoolQ; else that documentation (`pydoc_data.topics`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from filelock import FileLock

PROJECT = Path(__file__).resolve().parent.parent
VARIABLE = "GRADES_HF_SHARED"
CACHE = PROJECT / ".cache" / "tests"

VOCABULARY = 512
BLOCK, BATCH, STEPS = 64, 16, 150


def shared() -> Path | None:
    """The folder with shared models and data, or None where there is none."""
    named = os.environ.get(VARIABLE)
    folder = PROJECT.parent / "shared" if named is None else Path(named)
    return folder.resolve() if named != "" and folder.is_dir() else None


def find(*parts: str) -> Path | None:
    """A file or folder below the shared folder, or None."""
    folder = shared()
    path = None if folder is None else folder.joinpath(*parts)
    return path if path is not None and path.exists() else None


def model_dir() -> Path:
    """A folder from which `AutoModelForCausalLM` and `AutoTokenizer` load the small trained Llama."""
    return find("models", "stories260k") or trained_model_dir()


def text() -> list[str]:
    """Several hundred paragraphs of English."""
    passages = find("data", "boolq", "train.jsonl.gz")
    if passages is None:
        return documentation()
    with gzip.open(passages, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["passage"] for line in lines]


def documentation() -> list[str]:
    """The paragraphs of Python's language reference, without its code examples."""
    paragraphs = [" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")]
    return [paragraph for paragraph in paragraphs if len(paragraph) > 120]


def describe() -> str:
    """One line for the head of the test run."""
    model = "shared/models/stories260k" if find("models", "stories260k") else "a stand-in trained by the tests"
    data = "shared/data/boolq" if find("data", "boolq", "train.jsonl.gz") else "pydoc_data.topics"
    return f"model: {model}; text: {data}"


def trained_model_dir() -> Path:
    """The stand-in model, trained at the first call and kept; several processes may ask at the same time."""
    key = hashlib.sha256(Path(__file__).read_bytes() + "".join(documentation()).encode()).hexdigest()[:16]
    target = CACHE / f"llama-260k-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            unfinished = Path(tempfile.mkdtemp(dir=CACHE))
            try:
                _train(unfinished)
                unfinished.rename(target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _train(target: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

    paragraphs = documentation()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        paragraphs,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=VOCABULARY
    )

    threads, generator_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    tokens = torch.cat([torch.tensor(encoding.ids) for encoding in bpe.encode_batch(paragraphs)])
    blocks = tokens[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 10, STEPS)
    losses = []
    for _ in range(STEPS):
        batch = blocks[torch.randint(len(blocks), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.set_rng_state(generator_state)
    torch.set_num_threads(threads)
    first, last = losses[0], sum(losses[-10:]) / 10
    if last > first - 1.5:
        raise RuntimeError(f"the stand-in model has not learned: loss {first:.2f} at first, {last:.2f} at the end")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def questions(rows: int, seed: int) -> Dataset:
    """Questions about coloured rectangles, for machines without easy-VQA."""
    rng = random.Random(seed)
    colours = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
    table: dict[str, list] = {"image": [], "question": [], "answer": []}
    for _ in range(rows):
        name = rng.choice(list(colours))
        pixels = np.full((64, 64, 3), 255, np.uint8)
        left, top = rng.randrange(30), rng.randrange(30)
        pixels[top : top + 20, left : left + 30] = colours[name]
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, format="PNG")
        asked = rng.choice(list(colours))
        question, answer = rng.choice(
            [
                ("what color is the shape?", name),
                (f"is there a {asked} shape?", "yes" if asked == name else "no"),
            ]
        )
        table["image"].append({"bytes": buffer.getvalue(), "path": None})
        table["question"].append(question)
        table["answer"].append(answer)
    return Dataset.from_dict(table).cast_column("image", datasets.Image())
