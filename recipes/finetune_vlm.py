"""Fine-tune a vision-language model on questions about images, with a threshold for each tower.

    accelerate launch recipes/finetune_vlm.py --config recipes/configs/vlm_smolvlm.yaml --data_dir DIR
    python recipes/finetune_vlm.py --config recipes/configs/vlm_smolvlm.yaml --data_dir DIR --dry_run

`data_dir` holds `train.parquet` and `validation.parquet` with the columns `image`, `question`, `answer` (easy-VQA's).
`--dry_run` takes a small random model instead of the hub's, to see that everything fits together.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from datasets import Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from grades_hf import GradESTrainer, find_components
from grades_hf.criteria import assign_thresholds
from recipes.arguments import GradESArguments, ModelArguments, grades_config, parse

logger = logging.getLogger("recipes.finetune_vlm")

COLUMNS = ("image", "question", "answer")


@dataclass
class VisionArguments:
    """What it is fine-tuned on."""

    data_dir: str | None = field(
        default=None, metadata={"help": "Directory with train.parquet and validation.parquet."}
    )
    train_samples: int | None = field(default=None, metadata={"help": "Number of rows to train on; default: all."})
    eval_samples: int = field(default=200, metadata={"help": "Number of rows to measure the accuracy on."})
    dry_run: bool = field(default=False, metadata={"help": "Train a small random model instead, without the hub."})


def load_rows(data_dir: str | None, split: str, samples: int | None) -> Dataset:
    """The first rows of one split, with decoded images.

    Raises:
        ValueError: the file is missing, is no parquet file or lacks a column.
    """
    if data_dir is None:
        raise ValueError("data_dir is missing: pass the directory that holds train.parquet and validation.parquet.")
    file = Path(data_dir) / f"{split}.parquet"
    if not file.is_file():
        raise ValueError(f"data_dir={data_dir!r} holds no {file.name}.")
    try:
        rows = load_dataset("parquet", data_files=str(file), split="train")
    except DatasetGenerationError as error:
        raise ValueError(f"{file} cannot be read as a parquet file: {error.__cause__ or error}") from error
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(f"{file} lacks the column {missing[0]!r}; it has {', '.join(rows.column_names)}.")
    if samples is not None and samples < 1:
        raise ValueError(f"train_samples or eval_samples={samples} must be 1 or more.")
    rows = rows.select_columns(list(COLUMNS)).cast_column("image", Image(mode="RGB"))
    return rows if samples is None else rows.select(range(min(samples, len(rows))))


class Collator:
    """Rows to a batch: the prompt with its image as the processor writes it, then the answer, which is learned."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encoded = [self._encode(row) for row in rows]
        batch = {}
        for name in encoded[0]:
            parts = [row[name] for row in encoded]
            if name in ("pixel_values", "pixel_attention_mask", "image_grid_thw"):
                batch[name] = torch.cat(parts)
            else:
                filler = {"input_ids": self.tokenizer.pad_token_id, "labels": -100}.get(name, 0)
                batch[name] = pad_sequence(parts, batch_first=True, padding_value=filler)
        return batch

    def _encode(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=[row["image"]], return_tensors="pt")
        end = self.tokenizer.eos_token or ""
        answer = self.tokenizer(f" {row['answer']}{end}", add_special_tokens=False)["input_ids"]
        length = inputs["input_ids"].shape[1]
        extra = {"input_ids": torch.tensor(answer), "attention_mask": torch.ones(len(answer), dtype=torch.long)}
        result = {}
        for name, value in inputs.items():
            if value.ndim == 2 and value.shape == (1, length):
                value = torch.cat([value[0], extra.get(name, value.new_zeros(len(answer)))])
            result[name] = value
        result["labels"] = torch.tensor([-100] * length + answer)
        return result


@torch.no_grad()
def accuracy(model: nn.Module, rows: Dataset, collate: Collator, batch_size: int) -> float:
    """The part of the rows whose whole answer greedy decoding would give, 0 to 1."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in tqdm(range(0, len(rows), batch_size), desc="Accuracy", leave=False):
        part = rows.select(range(start, min(start + batch_size, len(rows))))
        batch = {name: value.to(device) for name, value in collate(list(part)).items()}
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch).logits[:, :-1].argmax(-1)
        right += int(((guesses == labels) | (labels == -100)).all(1).sum())
    model.train(training)
    return right / len(rows)


def random_model(rows: Dataset) -> tuple[nn.Module, Any]:
    """A random SmolVLM of width 32 and its processor, whose words are those of the rows."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    words = (f"User: {row['question']} Assistant: {row['answer']}" for row in rows.remove_columns("image"))
    tokenizer.train_from_iterator(words, trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=special[3:],
    )
    side = 32
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            size={"longest_edge": side}, max_image_size={"longest_edge": side}, do_image_splitting=False
        ),
        fast,
        image_seq_len=4,
        chat_template="{% for message in messages %}User: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
        " Assistant:",
    )
    config = Idefics3Config(  # type: ignore[call-arg]
        text_config={
            "model_type": "llama", "vocab_size": len(fast), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
            "eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": side, "patch_size": 8,
        },
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=fast.pad_token_id,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config), processor


def run(argv: list[str]) -> dict[str, Any]:
    """Parse, check, train, measure; returns what `results.json` holds.

    Raises:
        ValueError: an argument, the data or the thresholds do not fit.
    """
    types = (ModelArguments, VisionArguments, GradESArguments, TrainingArguments)
    model_arguments, data, freezing, training = parse(types, argv, description=(__doc__ or "").split("\n\n")[0])
    grades = grades_config(freezing)
    if model_arguments.load_in_4bit:
        raise ValueError("load_in_4bit=True: finetune_vlm.py does not know that argument; leave it out.")
    model_arguments.check()
    train = load_rows(data.data_dir, "train", data.train_samples)
    test = load_rows(data.data_dir, "validation", data.eval_samples)
    set_seed(training.seed)
    model: Any
    if data.dry_run:
        model, processor = random_model(train)
    else:
        processor = AutoProcessor.from_pretrained(model_arguments.model)
        processor.image_processor.do_image_splitting = False
        model = AutoModelForImageTextToText.from_pretrained(model_arguments.model, dtype=model_arguments.dtype)
    if model_arguments.method == "lora":
        model = get_peft_model(model, model_arguments.lora_config())
    if grades is not None:  # its thresholds fit this model: better refused before the first evaluation
        assign_thresholds(find_components(model, grades), grades.tau)

    training.remove_unused_columns = False
    collate = Collator(processor)
    options: dict[str, Any] = {
        "model": model,
        "args": training,
        "train_dataset": train,
        "data_collator": collate,
        "processing_class": processor,
    }
    trainer = Trainer(**options) if grades is None else GradESTrainer(**options, grades=grades)
    batch_size = training.per_device_eval_batch_size
    results: dict[str, Any] = {"rows": len(test), "before": accuracy(model, test, collate, batch_size)}
    trainer.train()
    trainer.save_model()
    results |= {
        "after": accuracy(model, test, collate, batch_size),
        "steps_run": trainer.state.global_step,
        "steps_planned": trainer.state.max_steps,
    }
    engine = trainer.grades_callback.engine if isinstance(trainer, GradESTrainer) else None
    if engine is not None:
        for tower in dict.fromkeys(component.tower for component in engine.components):
            own = [component for component in engine.components if component.tower == tower]
            frozen = [component.frozen_at for component in own if component.frozen_at is not None]
            results[f"frozen {tower}"] = f"{len(frozen)} of {len(own)}"
    Path(training.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", "\n".join(f"{name}: {value}" for name, value in results.items()))
    return results


def main() -> None:
    """The command: bad input ends it with one line and exit status 1, as in recipes/finetune.py."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("recipes", "grades_hf"):
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        run(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"finetune_vlm.py: error: {error}")


if __name__ == "__main__":
    main()
