"""Reading rows: every kind of file, every kind of damage, and no evaluation row among the training rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import pytest

from recipes.data import (
    Split,
    evaluation_rows,
    find_task,
    load_split,
    read_rows,
    training_rows,
)

from .rows import ROWS, siqa_dir, siqa_rows, write_jsonl

SIQA = find_task("siqa")


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = siqa_rows(5)
    write_jsonl(tmp_path / "a" / "siqa" / "train.jsonl.gz", rows)
    write_jsonl(tmp_path / "b" / "siqa" / "train.jsonl", rows)
    write_jsonl(tmp_path / "c" / "siqa" / "train.json", rows)
    (tmp_path / "d" / "siqa").mkdir(parents=True)
    (tmp_path / "d" / "siqa" / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "e" / "siqa").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e" / "siqa" / "train.parquet")
    for folder in "abcde":
        split = load_split(SIQA, "train", str(tmp_path / folder))
        assert split.rows == rows
        assert split.source.startswith(str(tmp_path / folder))


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task='squad' is unknown; use one of boolq, .*arc_easy"):
        find_task("squad")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"siqa/train\.jsonl\.gz is missing.*check data_dir and task"):
        load_split(SIQA, "train", str(tmp_path))


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.jsonl", "train.parquet"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / "siqa" / name
    if name.endswith("parquet"):
        file.parent.mkdir()
        datasets.Dataset.from_list(siqa_rows(50)).to_parquet(file)
    else:
        write_jsonl(file, siqa_rows(50))
    content = file.read_bytes()
    for kept in (len(content) // 2, len(content) - 9):
        file.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=rf"{name} cannot be read.*copy it again"):
            load_split(SIQA, "train", str(tmp_path))


def test_a_missing_column_is_named_with_its_row(tmp_path: Path) -> None:
    rows = siqa_rows(3)
    del rows[2]["answerB"]
    write_jsonl(tmp_path / "siqa" / "train.jsonl", rows)
    with pytest.raises(ValueError, match=r"train\.jsonl: row 3 lacks the column 'answerB'; siqa needs .*Rename"):
        load_split(SIQA, "train", str(tmp_path))


@pytest.mark.parametrize("label", ["", "x", None, "7"])
def test_a_row_without_a_label_is_named(tmp_path: Path, label: str | None) -> None:
    write_jsonl(tmp_path / "siqa" / "test.jsonl", [*siqa_rows(1), {**siqa_rows(1)[0], "label": label}])
    with pytest.raises(ValueError, match=r"test\.jsonl: row 2 is no row of siqa"):
        load_split(SIQA, "test", str(tmp_path))


@pytest.mark.parametrize(("text", "message"), [("", "holds no rows"), ("[1, 2]", "one JSON object a row")])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "siqa").mkdir()
    (tmp_path / "siqa" / "train.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_split(SIQA, "train", str(tmp_path))


def test_line_separators_within_a_text_do_not_end_a_row(tmp_path: Path) -> None:
    row = ROWS["boolq"] | {"passage": "one\u2028two\x85three"}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(file) == [row]


def test_no_evaluation_row_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = str(siqa_dir(tmp_path))
    train, test = load_split(SIQA, "train", folder), load_split(SIQA, "validation", folder)
    twin = {**test.rows[0], "context": f"  {test.rows[0]['context'].upper()}!", "answerA": "something else"}
    train.rows.append(twin)
    with caplog.at_level(logging.INFO):
        rows = training_rows(SIQA, train, test, None, seed=0)
    assert twin not in rows
    assert len(rows) == len(train.rows) - 1
    assert "Left out 1 of 49 training rows" in caplog.text
    with pytest.raises(ValueError, match=r"every row of .* is also in .*train on other rows"):
        training_rows(SIQA, Split(test.rows, "copy"), test, None, seed=0)


def test_samples_are_a_choice_of_the_seed() -> None:
    train, test = Split(siqa_rows(30), "train"), Split(siqa_rows(10, skip=500), "test")
    some = training_rows(SIQA, train, test, 8, seed=1)
    assert len(some) == 8
    assert some == training_rows(SIQA, train, test, 8, seed=1)
    assert some != training_rows(SIQA, train, test, 8, seed=2)
    assert evaluation_rows(test, 4) == evaluation_rows(test, 4)
    assert evaluation_rows(test, None) == test.rows
    for samples in (0, -1, 31):
        with pytest.raises(ValueError, match=rf"train_samples={samples} must be between 1 and the 30 rows"):
            training_rows(SIQA, train, test, samples, seed=1)
    with pytest.raises(ValueError, match="eval_samples=11 must be between 1 and the 10 rows"):
        evaluation_rows(test, 11)
