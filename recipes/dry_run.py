"""What `--dry_run` trains: a small random model of the same architecture on the shortest rows, without a download."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, set_seed

from grades_hf import GradESConfig, History
from recipes import pypi
from recipes.arguments import hushed, make_directory, thresholds

if TYPE_CHECKING:
    from recipes.finetune import Plan

logger = logging.getLogger(__name__)

STEPS, ROWS, TEST_ROWS = 12, 16, 2
LAYERS, HEAD_DIM = 2, 32

# The models of the configs: what of their config.json makes the architecture, and of its sizes the heads.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", (9, 3), {"tie_word_embeddings": True}),
    "Qwen/Qwen3-0.6B": ("qwen3", (16, 8), {"tie_word_embeddings": True}),
    "Qwen/Qwen3-14B": ("qwen3", (40, 8), {"tie_word_embeddings": False}),
    "microsoft/phi-4": ("phi3", (40, 10), {"tie_word_embeddings": False}),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", (32, 8), {"rope_parameters": LLAMA3}),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", (32, 8), {"sliding_window": None}),
}
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def shrink(plan: Plan) -> None:
    """Change a run into a few steps of a small model on its shortest rows, in a directory of its own."""
    training = plan.training
    output = Path(str(training.output_dir))
    make_directory(output)
    training.output_dir = str(output / "dry_run")
    training.max_steps, training.report_to, training.disable_tqdm = STEPS, [], True
    training.logging_strategy = type(training.logging_strategy)("no")
    training.save_strategy, training.eval_strategy = (
        type(training.save_strategy)("no"),
        type(training.eval_strategy)("no"),
    )
    training.resume_from_checkpoint, plan.recipe.evaluate_before = None, False
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        setattr(training, name, min(getattr(training, name), 2))
    plan.train = _shortest(plan.train)
    plan.held_out = None if plan.held_out is None else _shortest(plan.held_out)
    plan.tests = {name: test.select(range(min(TEST_ROWS, len(test)))) for name, test in plan.tests.items()}
    plan.model.load_in_4bit = plan.model.load_in_8bit = False
    logger.info(
        "This is a dry run: %d steps of a small random model shaped like %s, on the %d shortest rows.",
        STEPS,
        plan.recipe.model,
        len(plan.train),
    )
    with training.main_process_first(local=False):  # of several processes each writes the same files
        plan.location = write_small_model(plan.recipe.model, Path(training.output_dir) / "model")


def _shortest(rows: Any) -> Any:
    order = sorted(range(len(rows)), key=lambda number: len(str(rows[number])))
    return rows.select(order[:ROWS])


def write_small_model(model: str, folder: Path) -> str:
    """Save a small random model of the architecture of `model`, with a tokenizer; the folder, for `from_pretrained`.

    A local directory brings its own tokenizer. Of a hub id that is neither in the table above nor in the local cache,
    the architecture is not known, and Llama's is taken.
    """
    local = pypi.local_model(model)
    if model in ARCHITECTURES:
        kind, (heads, keys), options = ARCHITECTURES[model]
        sizes = {"num_attention_heads": heads, "num_key_value_heads": keys, "hidden_size": heads * HEAD_DIM}
        config = AutoConfig.for_model(kind, **sizes, **options)
    else:
        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True)
        except OSError:
            logger.info("The architecture of %s is not known without a download: the small model is a Llama.", model)
            config = AutoConfig.for_model("llama", num_attention_heads=4, num_key_value_heads=2)
    tokenizer = AutoTokenizer.from_pretrained(model) if local else _tokenizer()
    _shrink_config(config, len(tokenizer))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    set_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _shrink_config(config: Any, vocabulary: int) -> None:
    """Two narrow layers, with as few heads as keep the ratio of queries to keys."""
    heads, keys = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    if not heads or not hasattr(config, "num_hidden_layers"):
        raise ValueError(f"dry_run=True cannot shrink {type(config).__name__}: it has no number of layers and heads.")
    common = math.gcd(heads, keys or heads)
    config.num_attention_heads = 4 if keys in (None, heads) else 2 * heads // common
    if keys:
        config.num_key_value_heads = 4 if keys == heads else 2 * keys // common
    config.num_hidden_layers, config.hidden_size = LAYERS, config.num_attention_heads * HEAD_DIM
    if getattr(config, "head_dim", None):
        config.head_dim = HEAD_DIM
    if getattr(config, "intermediate_size", None):
        config.intermediate_size = 2 * config.hidden_size
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    config.vocab_size = vocabulary


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with a chat template."""
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, chat_template=CHAT, **special)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and figures; log lines are shown."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def fitting(grades: GradESConfig, trainer: Any) -> GradESConfig:
    """The options with thresholds that fit the small model: about half of the matrices fall below theirs.

    The statistic of a small random model has another size than that of the real one. So its values are recorded in a
    run that freezes nothing, and all thresholds are multiplied by the same number: the median of how low the matrices
    get, after the grace period and for as many checks as `patience` asks for, in proportion to their thresholds.
    """
    tau = thresholds(trainer.model, grades)
    trainer.grades_callback.config = dataclasses.replace(grades, tau=torch.finfo(torch.float64).tiny)
    logger.info("A first run freezes nothing, to see the values of the statistic.")
    with hushed(), quiet():
        trainer.train()
    history: History = trainer.grades_callback.engine.history
    free = sum(step <= history.t_grace for step in history.steps)  # checks at which nothing may freeze
    lows = []
    for name, series in history.values.items():
        runs = [series[at : at + grades.patience] for at in range(free, len(series) - grades.patience + 1)]
        lows.append(min((max(run) / tau[name] for run in runs if all(map(math.isfinite, run))), default=math.inf))
    lows = [low for low in lows if math.isfinite(low)]
    if not lows:
        logger.info("In %d steps nothing can freeze: alpha, patience or check_every leave no check for it.", STEPS)
        return grades
    factor = statistics.median(lows)
    logger.info("The thresholds are multiplied by %.3g, since the small model's gradients have another size.", factor)
    given: Any = grades.tau
    scaled = {key: value * factor for key, value in given.items()} if isinstance(given, dict) else given * factor
    return dataclasses.replace(grades, tau=scaled)
