"""The file of a history: appended to, exact on resume, whole after any crash, and never worth a run."""

from __future__ import annotations

import errno
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from grades_hf import History
from grades_hf.record import journal, storage
from grades_hf.record.history import FILE_NAME
from tests.record import made

NAMES = [component.name for component in made.components()]


@pytest.fixture
def whole():
    """A run that was not interrupted and had no file."""
    return made.go_on(made.empty(), range(1, 21))


def written(folder: Path, steps: range) -> History:
    history = made.empty()
    history.open(folder)
    made.go_on(history, steps)
    assert history.flush()
    return history


def test_a_run_with_a_file_says_the_same_as_one_without(whole, tmp_path):
    history = written(tmp_path, range(1, 21))
    assert made.same(history, whole)
    assert made.same(History.load(tmp_path), whole)
    assert made.same(History.load(tmp_path / FILE_NAME), whole)
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_the_file_is_one_that_arrow_reads(whole, tmp_path):
    written(tmp_path, range(1, 21))
    table = pa.ipc.open_stream((tmp_path / FILE_NAME).read_bytes()).read_all()
    checks = table.filter(pa.compute.is_valid(table["step"]))
    assert checks["step"].to_pylist() == whole.steps
    rows = np.array(checks["values"].to_pylist(), dtype=np.float32)
    assert np.array_equal(rows, whole.to_numpy(), equal_nan=True)
    assert table["note"].drop_null()[0].as_py().startswith('{"format":2,')


def test_a_save_costs_what_came_since_the_last_one(tmp_path, monkeypatch):
    history = written(tmp_path, range(1, 6))
    sizes, given = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: sizes.append(len(data)) or given(f, data, at))
    made.go_on(history, range(6, 101))
    assert len(sizes) == 19
    assert max(sizes) < 1500
    assert history.flush()
    assert len(sizes) == 19  # nothing has come since


def test_what_changes_in_the_middle_is_written_too(tmp_path):
    history = written(tmp_path, range(1, 11))
    history.record_log({"step": 10, "seconds": 9.0, "frozen": 1, "compute_saved": 0.5})
    history.events = [{**event, "tau": 0.75} for event in history.events]
    assert history.flush()
    assert made.same(History.load(tmp_path), history)
    history.truncate(6)
    assert history.flush()
    assert made.same(History.load(tmp_path), history)
    history.truncate(5)
    made.go_on(history, range(6, 9))
    history.events[0]["tau"] = 0.5
    assert history.flush()
    assert History.load(tmp_path).steps == list(range(1, 9))
    assert made.same(made.resumed(tmp_path, 4), made.go_on(made.empty(), range(1, 5))) is False  # of the tau
    again = made.go_on(made.resumed(tmp_path, 3), range(4, 9))
    assert again.flush()
    assert made.same(History.load(tmp_path), made.go_on(made.empty(), range(1, 9)))


def test_values_beyond_a_window_are_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WINDOW", 4 * 5 * 10)
    monkeypatch.setattr("grades_hf.record.history.WINDOW", 4 * 5 * 10)
    history = made.empty()
    history.open(tmp_path)
    made.go_on(history, range(1, 101), flush_every=1000)
    assert history._rows.waiting <= 4 * 5 * 10
    assert len(History.load(tmp_path).steps) >= 90
    in_memory = made.go_on(made.empty(), range(1, 101), flush_every=1000)
    assert made.same(history, in_memory)
    history.flush()
    assert made.same(History.load(tmp_path), in_memory)


def test_logs_do_not_write_at_every_step(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])
    history = written(tmp_path, range(1, 6))
    for step in range(6, 16):
        now[0] += 1
        made.go_on(history, range(step, step + 1), flush_every=1000)
        assert history.flush(urgent=False)
        assert History.load(tmp_path).steps[-1] == step // 5 * 5
    assert History.load(tmp_path).logs[-1]["step"] == 15


@pytest.mark.parametrize("step", [10, 11, 13, 14])
def test_a_resumed_run_has_the_record_of_one_that_was_not_interrupted(step, whole, tmp_path):
    written(tmp_path, range(1, 16))
    history = made.resumed(tmp_path, step)
    assert History.load(tmp_path).steps == list(range(1, step + 1))
    assert [row["step"] for row in History.load(tmp_path).logs] == history.steps
    assert history.earlier_seconds == step / 4
    made.go_on(history, range(step + 1, 21))
    assert made.same(history, whole)
    assert made.same(History.load(tmp_path), whole)
    table = pa.ipc.open_stream((tmp_path / FILE_NAME).read_bytes()).read_all()
    assert table["step"].drop_null().to_pylist() == whole.steps  # what does not count is not in the file


def test_a_resumed_run_goes_on_where_an_open_check_was_not_recorded(whole, tmp_path):
    written(tmp_path, range(1, 16))
    history = made.resumed(tmp_path, 10, check=9)
    assert (history.steps[-1], history.logs[-1]["step"]) == (9, 10)
    history.logs.pop()
    made.go_on(history, range(10, 21))
    assert made.same(History.load(tmp_path), whole)


def test_resumed_again_and_again(whole, tmp_path):
    written(tmp_path, range(1, 4))
    for step in range(2, 19):
        made.go_on(made.resumed(tmp_path, step), range(step + 1, step + 3), flush_every=1)
    made.go_on(made.resumed(tmp_path, 19), range(20, 21))
    assert made.same(History.load(tmp_path), whole)


def test_where_there_is_no_room_for_a_second_file_the_first_is_told_what_does_not_count(whole, tmp_path, monkeypatch):
    written(tmp_path, range(1, 16))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _no_space)
        history = made.resumed(tmp_path, 13)
    assert os.listdir(tmp_path) == [FILE_NAME]
    assert History.load(tmp_path).steps == list(range(1, 14))
    made.go_on(history, range(14, 21))
    assert made.same(history, whole)
    assert made.same(History.load(tmp_path), whole)
    assert made.same(made.resumed(tmp_path, 20), whole)


def test_another_run_in_the_same_directory_begins_anew(tmp_path):
    old = written(tmp_path, range(1, 11))
    new = written(tmp_path, range(1, 4))
    assert new.flush()
    assert History.load(tmp_path).steps == [1, 2, 3]
    assert not old.values[NAMES[0]][:0]
    assert list(old.values[NAMES[0]])[9] == float(np.float32(made.value(10, 0)))  # what it has written stays readable
    made.go_on(old, range(11, 14), flush_every=99)
    assert not old.flush()
    assert History.load(tmp_path).steps == [1, 2, 3]
    assert len(old.values[NAMES[0]]) == 13


def test_a_file_that_was_deleted_is_written_anew(whole, tmp_path):
    history = written(tmp_path, range(1, 11))
    (tmp_path / FILE_NAME).unlink()
    made.go_on(history, range(11, 21))
    assert made.same(History.load(tmp_path), whole)


# --- crashes -------------------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_off_at_any_byte_is_read_up_to_there(tmp_path):
    history = made.empty()
    history.open(tmp_path)
    made.go_on(history, range(1, 9), flush_every=3)
    history.flush()
    data, path = (tmp_path / FILE_NAME).read_bytes(), tmp_path / "torn.arrow"
    expected = {n: made.go_on(made.empty(), range(1, n + 1), flush_every=99).to_dict() for n in (0, 3, 6, 8)}
    seen = set()
    first = len(data)
    for size in range(len(data), 0, -1):
        path.write_bytes(data[:size])
        try:
            found = History.load(path)
        except ValueError:  # not even the first message is whole; `open` puts it there at once
            first = size
            break
        assert found.to_dict() == expected[len(found.steps)]
        seen.add(len(found.steps))
    assert seen == {0, 3, 6, 8}
    for size in range(first, 0, -7):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"torn\.arrow"):
            History.load(path)


@pytest.mark.parametrize("torn", [1, 9, 100, 300])
def test_what_a_killed_write_has_left_is_cut_at_the_next_one(torn, whole, tmp_path):
    written(tmp_path, range(1, 16))
    path = tmp_path / FILE_NAME
    os.truncate(path, path.stat().st_size - torn)
    history = made.resumed(tmp_path, 10)
    made.go_on(history, range(11, 21))
    assert made.same(History.load(tmp_path), whole)
    with open(path, "ab") as file:
        file.write(bytes(torn))  # what a file system may leave after a power cut
    assert made.same(made.resumed(tmp_path, 20), whole)
    assert made.same(History.load(tmp_path), whole)


KILLED = """
import os, sys
from tests.record import made
from grades_hf import History
history = made.empty(made.components(40), total_steps=100000)
history.open(sys.argv[1])
print("begun", flush=True)
for step in range(1, 100000):
    made.go_on(history, range(step, step + 1), flush_every=1, found=made.components(40))
"""


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.1 + 0.05 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        found = History.load(folder)
        expected = made.empty(made.components(40), total_steps=100000)
        made.go_on(expected, range(1, len(found.steps) + 1), found=made.components(40))
        found.versions = expected.versions
        assert made.same(found, expected)


# --- a disk that is full, a directory that cannot be written ---------------------------------------------------------


def _no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_costs_the_record_for_as_long_as_it_is_full(whole, tmp_path, caplog, monkeypatch):
    history = written(tmp_path, range(1, 11))
    before = (tmp_path / FILE_NAME).read_bytes()
    written_by = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda f, data, at: written_by(f, data[:50], at) if len(data) > 60 else _no_space())
        for step in range(11, 16):
            made.go_on(history, range(step, step + 1), flush_every=99)
            assert not history.flush()
    assert (tmp_path / FILE_NAME).read_bytes() == before
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1
    assert "could not be written, training goes on" in messages[0]
    made.go_on(history, range(16, 21))
    assert made.same(history, whole)
    assert made.same(History.load(tmp_path), whole)


@pytest.mark.usefixtures("capsys")  # else the limit holds for the file that pytest captures into, too
def test_a_file_that_may_not_grow(whole, tmp_path):
    history = written(tmp_path, range(1, 11))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / FILE_NAME).stat().st_size + 100, limits[1]))
    try:
        made.go_on(history, range(11, 15), flush_every=99)
        assert not history.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert History.load(tmp_path).steps == list(range(1, 11))
    made.go_on(history, range(15, 21))
    assert made.same(History.load(tmp_path), whole)


def test_a_full_disk_while_values_beyond_the_window_come(tmp_path, monkeypatch):
    monkeypatch.setattr("grades_hf.record.history.WINDOW", 100)
    history = made.empty()
    history.open(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _no_space)
        made.go_on(history, range(1, 51), flush_every=999)
    made.go_on(history, range(51, 101))
    assert made.same(History.load(tmp_path), made.go_on(made.empty(), range(1, 101)))


def test_a_directory_that_is_not_there_is_known_before_the_first_step(tmp_path):
    with pytest.raises(FileNotFoundError):
        made.empty().open(tmp_path / "no" / FILE_NAME)


def test_a_failed_save_leaves_the_old_file(whole, tmp_path, monkeypatch):
    for name in ("h.json", "h.parquet", "h.csv", "h.arrow"):
        whole.save(tmp_path / name)
        old = (tmp_path / name).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", _no_space)
            with pytest.raises(OSError, match="No space"):
                made.empty().save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.arrow", "h.csv", "h.json", "h.parquet"]


def test_save_to_its_own_file_appends(whole, tmp_path):
    history = written(tmp_path, range(1, 11))
    inode = (tmp_path / FILE_NAME).stat().st_ino
    made.go_on(history, range(11, 21), flush_every=99)
    history.save(tmp_path)
    history.save(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).stat().st_ino == inode
    assert made.same(History.load(tmp_path), whole)


def test_a_file_that_is_read_while_it_is_written(tmp_path):
    history = written(tmp_path, range(1, 11))
    reader = History.load(tmp_path)
    made.go_on(history, range(11, 16))
    assert reader.steps == list(range(1, 11))
    assert len(list(reader.values[NAMES[0]])) == 10
    made.go_on(made.resumed(tmp_path, 7), range(8, 11))
    assert list(reader.values[NAMES[0]])[9] == float(np.float32(made.value(10, 0)))


def test_nothing_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        written(tmp_path, range(1, 4))
        History.load(tmp_path).values[NAMES[0]][-1]
        made.resumed(tmp_path, 2)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_memory_and_size_of_a_long_run(tmp_path):
    """100,000 checks by 448 in proportion: a fiftieth of the checks; see benchmarks/scaling.py."""
    found = made.components(448)
    names = [component.name for component in found]
    history = made.empty(found, total_steps=2000)
    history.open(tmp_path)
    values, slowest = torch.rand(448, dtype=torch.float64), 0.0
    for step in range(1, 2001):
        history.record(step, names, values)
        if step % 100 == 0:
            history.record_log({"step": step, "seconds": float(step), "frozen": 0, "loss": 1.0})
            start = time.process_time()
            assert history.flush()
            slowest = max(slowest, time.process_time() - start)
    assert (tmp_path / FILE_NAME).stat().st_size < 200e6 / 50
    assert slowest < 0.2
    assert history._rows.waiting == 0
    assert math.isclose(history.latest()[names[0]], values[0].item(), rel_tol=1e-6)
