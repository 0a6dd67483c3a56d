"""Fine-tune a vision-language model on questions about images, with a threshold for each tower.

    accelerate launch --quiet recipes/finetune_vlm.py --config recipes/configs/vlm_smolvlm.yaml --data_dir DIR
    python recipes/finetune_vlm.py --config recipes/configs/vlm_smolvlm.yaml --data_dir DIR --dry_run

`data_dir` holds `train.parquet` and `validation.parquet` with the columns `image`, `question`, `answer` (easy-VQA's).
`--dry_run` takes a small random model instead of the hub's, to see that everything fits together.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from datasets import Dataset, Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from recipes import dry_run
from recipes.arguments import GradESArguments, command, grades_config, option, parse, thresholds
from recipes.finetune import GradESSFTTrainer
from recipes.tasks.rows import read

logger = logging.getLogger("recipes.finetune_vlm")

COLUMNS = ("image", "question", "answer")


@dataclass
class VisionArguments:
    """What is fine-tuned, and on what."""

    model: str = option("HuggingFaceTB/SmolVLM-256M-Instruct", "Directory or hub id of a vision-language model.")
    data_dir: str | None = option(None, "Directory with train.parquet and validation.parquet.")
    train_rows: int | None = option(None, "Train on at most this many rows. Default: all.")
    test_rows: int = option(200, "Measure the loss and the accuracy of the answers' tokens on this many rows.")
    dry_run: bool = option(False, "Train a small random model instead, without the hub.")


def load_rows(data_dir: str | None, split: str, number: int | None) -> Dataset:
    """The first rows of one split, as TRL takes them: `images`, `prompt` and `completion`.

    Raises:
        ValueError: the file is missing, is no parquet file or lacks a column.
    """
    if data_dir is None:
        raise ValueError("data_dir is missing: pass the directory that holds train.parquet and validation.parquet.")
    file = Path(data_dir) / f"{split}.parquet"
    if not file.is_file():
        raise ValueError(f"data_dir={data_dir!r} holds no {file.name}. Pass the directory that does.")
    rows = read(str(file))["train"]
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise ValueError(f"data_dir: {file} lacks the column {missing[0]!r}; it has {', '.join(rows.column_names)}.")
    if number is not None and number < 1:
        name = "train_rows" if split == "train" else "test_rows"
        raise ValueError(f"{name}={number} must be 1 or more.")
    rows = rows.select_columns(list(COLUMNS)).cast_column("image", Image(mode="RGB"))
    rows = rows if number is None else rows.select(range(min(number, len(rows))))
    asked = [[{"role": "user", "content": str(text)}] for text in rows["question"]]
    answers = [[{"role": "assistant", "content": str(text)}] for text in rows["answer"]]
    return rows.remove_columns(["question", "answer"]).add_column("prompt", asked).add_column("completion", answers)


def random_model(rows: Dataset) -> tuple[nn.Module, Any]:
    """A random SmolVLM of width 32 and its processor, whose words are those of the rows."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<pad>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"]
    texts = zip(rows["prompt"], rows["completion"], strict=True)
    words = (f"User: {prompt[0]['content']} Assistant: {answer[0]['content']}" for prompt, answer in texts)
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
        chat_template="{% for m in messages %}{{ 'User:' if m['role'] == 'user' else 'Assistant:' }}"
        "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
        "{% endfor %}{% if m['role'] == 'user' %} {% else %}<end_of_utterance>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
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
    types = (VisionArguments, ModelConfig, SFTConfig, GradESArguments)
    data, model_arguments, training, arguments = parse(types, argv, (__doc__ or "").split("\n")[0])
    grades = grades_config(arguments)
    train = load_rows(data.data_dir, "train", data.train_rows)
    test = load_rows(data.data_dir, "validation", data.test_rows)
    if data.dry_run:
        train, test = train.select(range(min(16, len(train)))), test.select(range(min(8, len(test))))
        training.max_steps, training.report_to, training.disable_tqdm = dry_run.STEPS, [], True
        training.per_device_train_batch_size, training.gradient_accumulation_steps = 2, 1

    def build() -> SFTTrainer:
        set_seed(training.seed)
        model: Any
        if data.dry_run:
            model, processor = random_model(train)
        else:
            processor = AutoProcessor.from_pretrained(data.model)
            processor.image_processor.do_image_splitting = False
            model = AutoModelForImageTextToText.from_pretrained(data.model, dtype=model_arguments.dtype)
        options: dict[str, Any] = {"peft_config": get_peft_config(model_arguments), "processing_class": processor}
        options |= {"args": training, "train_dataset": train, "eval_dataset": test}
        options |= {} if grades is None else {"grades": grades}
        return (SFTTrainer if grades is None else GradESSFTTrainer)(model, **options)

    trainer = build()
    if grades is not None and grades.tau is not None:  # better refused now than after the first evaluation
        thresholds(trainer.model, grades)
        if data.dry_run:
            grades = dry_run.fitting(grades, trainer)
            trainer = build()

    def measured() -> dict[str, float]:
        scores = trainer.evaluate()
        return {"loss": scores["eval_loss"], "accuracy": scores["eval_mean_token_accuracy"]}

    results: dict[str, Any] = {"rows": len(test), "before": measured()}
    trainer.train()
    trainer.save_model()
    results |= {"after": measured(), "steps_run": trainer.state.global_step, "steps_planned": trainer.state.max_steps}
    engine = trainer.grades_callback.engine if isinstance(trainer, GradESSFTTrainer) else None
    if engine is not None:
        for tower in dict.fromkeys(component["tower"] for component in engine.history.components):
            own = [item["name"] for item in engine.history.components if item["tower"] == tower]
            results[f"frozen {tower}"] = f"{sum(name in engine.frozen for name in own)} of {len(own)}"
    Path(training.output_dir, "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    logger.info("%s", "\n".join(f"{name}: {value}" for name, value in results.items()))
    return results


def main() -> None:
    """The command."""
    with command("finetune_vlm.py"):
        run(sys.argv[1:])


if __name__ == "__main__":
    main()
