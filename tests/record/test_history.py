"""History in memory and in other formats: what was recorded is read, and comes back from all of them."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import grades_hf
from grades_hf import GradES, GradESConfig, History
from tests.record import made
from tests.small import llama, tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints_0.1.0"
NAMES = [component.name for component in made.components()]
FORMATS = ["grades_history.json", "values.parquet", "values.arrow"]


@pytest.fixture
def history():
    found = made.go_on(made.empty(), range(1, 16))
    found.savings = {"steps": 15, "full": 10.0, "used": 9.0, "planned": 20.0}
    found.ended, found.shares = "stopped", {NAMES[0]: 0.25}
    look = {"step": 9, "votes": 3, "components": 5, "rise": 1.25, "rows": 1, "loss": 2.0}
    found.looks = [{**look, "average_loss": 1.5, "difference": -0.5, "error": None, "ended": False}]
    return found


def test_what_was_recorded_is_read(history):
    assert history.steps == list(range(1, 16))
    assert history.frozen == {NAMES[1]: 4, NAMES[3]: 12}
    assert [len(history.values[name]) for name in NAMES] == [15, 4, 15, 12, 15]
    series = history.values[NAMES[1]]
    expected = [float(np.float32(made.value(step, 1))) for step in range(2, 5)]
    assert math.isnan(series[0])
    assert list(series)[1:] == series[1:] == expected
    assert (series[-1], series[2], series[::-1][0]) == (expected[-1], expected[1], expected[-1])
    assert np.asarray(series)[1:].tolist() == expected
    with pytest.raises(IndexError):
        series[4]
    assert [step for step, _ in zip(history.steps, history.values[NAMES[0]], strict=True)] == history.steps
    assert history.values.keys() == set(NAMES)
    assert history.to_numpy().shape == (15, 5)
    assert np.isnan(history.to_numpy()[4:, 1]).all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_saved_comes_back(name, history, tmp_path):
    history.save(tmp_path / name)
    loaded = History.load(tmp_path / name)
    assert made.same(loaded, history)
    assert loaded.looks == history.looks
    assert loaded.shares == history.shares
    assert math.isnan(loaded.logs[2]["loss"])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_directory_stands_for_its_history(history, tmp_path):
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path)
    history.save(tmp_path / "grades_history.json")
    assert made.same(History.load(tmp_path), history)
    history.truncate(8)
    history.save(tmp_path)
    assert made.same(History.load(tmp_path), history)  # the Arrow file goes before an export


def test_the_json_file_is_plain_json(history, tmp_path):
    history.save(tmp_path / "h.json")
    data = json.loads((tmp_path / "h.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data["values"][NAMES[0]][0] is None
    assert len(data["values"][NAMES[1]]) == 4
    assert data["looks"][0]["error"] is None


def test_parquet_has_a_row_for_each_value(history, tmp_path):
    history.save(tmp_path / "h.parquet")
    table = pq.read_table(tmp_path / "h.parquet").to_pandas()
    assert len(table) == 15 * 3 + 4 + 12
    found = table[(table.name == NAMES[1]) & (table.step == 4)].value.item()
    assert found == history.values[NAMES[1]][3]


def test_parquet_of_0_1_0_is_read(history, tmp_path):
    import pyarrow as pa

    series = {name: list(values) for name, values in history.values.items()}
    columns = {
        "name": [name for name, values in series.items() for _ in values],
        "step": [step for values in series.values() for step in history.steps[: len(values)]],
        "value": pa.array([value for values in series.values() for value in values], pa.float64()),
    }
    frame = history.to_dict() | {"values": {name: [] for name in series}}
    pq.write_table(pa.table(columns).replace_schema_metadata({"grades_hf": json.dumps(frame)}), tmp_path / "h.parquet")
    assert made.same(History.load(tmp_path / "h.parquet"), history)


def test_csv_and_pandas_have_a_row_for_each_check(history, tmp_path):
    import pandas as pd

    frame = history.to_pandas()
    assert frame.index.tolist() == history.steps
    assert frame[NAMES[2]].tolist()[1:] == history.values[NAMES[2]][1:]
    assert frame[NAMES[1]].count() == 3
    history.save(tmp_path / "h.csv")
    read = pd.read_csv(tmp_path / "h.csv", index_col="step", dtype=dict.fromkeys(NAMES, np.float32))
    pd.testing.assert_frame_equal(read, frame)


def test_truncate_forgets_what_came_after(history):
    history.truncate(11)
    history.looks, history.shares = [], None
    assert made.same(history, made.go_on(made.empty(), range(1, 12)))
    assert (history.savings, history.ended) == (None, None)
    history.truncate(4, 3)
    assert history.frozen == {NAMES[1]: 4}
    assert {len(series) for series in history.values.values()} == {3}
    history.truncate(2)
    assert history.frozen == {}
    assert {len(series) for series in history.values.values()} == {2}


def test_versions_are_those_of_the_run(history):
    assert history.versions["torch"] == torch.__version__
    assert history.versions["grades_hf"] == grades_hf.__version__
    assert set(history.versions) <= set(sys.modules) | {"python"}


def test_a_step_has_one_log(history):
    history.record_log({"step": 15, "seconds": 9.0, "frozen": 2, "compute_saved": 0.5})
    assert len(history.logs) == 15
    assert history.logs[-1] == {"step": 15, "seconds": 3.75, "frozen": 2, "loss": 2 / 15, "compute_saved": 0.5}


def test_latest_holds_the_live_finite_values_of_the_last_check(history):
    assert history.latest() == {NAMES[i]: history.values[NAMES[i]][-1] for i in (0, 2, 4)}
    history.record(16, [NAMES[0], NAMES[2], NAMES[4]], torch.tensor([math.inf, math.nan, 1e300], dtype=torch.float64))
    assert history.latest() == {}
    assert [math.isnan(history.values[NAMES[i]][-1]) for i in (0, 2, 4)] == [True] * 3
    assert made.empty().latest() == {}


def test_checksums_tell_runs_apart(history):
    other = made.go_on(made.empty(), range(1, 15))
    assert history.checksum() != other.checksum()
    names = [name for name in NAMES if name not in other.frozen]
    other.record(15, names, torch.tensor([made.value(15, place) for place in (0, 2, 4)], dtype=torch.float64))
    assert history.checksum() == other.checksum()
    third = made.go_on(made.empty(), range(1, 15))
    third.record(15, names, torch.tensor([made.value(15, place) for place in (0, 2, 2)], dtype=torch.float64))
    assert history.checksum() != third.checksum()


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_are_whole_and_leave_the_file_alone(clone, tmp_path):
    history = made.empty()
    history.open(tmp_path)
    made.go_on(history, range(1, 9))
    other, before = clone(history), (tmp_path / "grades_history.arrow").read_bytes()
    assert made.same(other, history)
    made.go_on(other, range(9, 16))
    assert other.flush()
    assert (tmp_path / "grades_history.arrow").read_bytes() == before
    made.go_on(history, range(9, 16))
    assert made.same(other, history)
    assert made.same(History.load(tmp_path), history)


def test_state_dict_comes_back_also_through_torch(history, tmp_path):
    torch.save(history.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert made.same(History.from_dict(state), history)
    with pytest.raises(ValueError, match="rows"):
        History.from_dict({**state, "rows": state["rows"][1:]})
    with pytest.raises(ValueError, match="rows"):
        History.from_dict({**state, "rows": "x"})


def test_components_that_come_later_have_no_values_before(tmp_path):
    history, found = made.empty(), made.components()
    history.open(tmp_path)
    made.go_on(history, range(1, 8))
    found += made.components(2, first=5)
    history.add_components(found[5:])
    made.go_on(history, range(8, 16), {3: 12, 5: 10}, found=found)
    assert [len(series) for series in history.values.values()] == [15, 4, 15, 12, 15, 10, 15]
    late = list(history.values["layers.6.q_proj"])
    assert all(map(math.isnan, late[:7]))
    assert late[7:] == [float(np.float32(made.value(step, 6))) for step in range(8, 16)]
    assert made.same(History.load(tmp_path), history)
    assert made.same(copy.deepcopy(history), history)
    history.save(tmp_path / "h.json")
    assert made.same(History.load(tmp_path / "h.json"), history)
    assert history.sampled(3).steps == [1, 8, 15]
    assert history.to_pandas().shape == (15, 7)
    # a resumed run knows all of them from the start, in the order of the model
    again = made.empty([*found[5:], *found[:5]])
    again.adopt(History.load(tmp_path))
    assert {name: len(s) for name, s in again.values.items()} == {name: len(s) for name, s in history.values.items()}
    assert list(again.values["layers.6.q_proj"])[7:] == late[7:]
    again.open(tmp_path)
    assert History.load(tmp_path).values.keys() == again.values.keys()


@pytest.mark.parametrize("most", [1, 2, 3, 7, 14, 15, 99])
def test_sampled_has_the_first_and_the_last_check(most, history):
    steps, values = history.sampled(most)
    assert len(steps) == min(most, 15)
    assert steps[-1] == 15
    assert most == 1 or steps[0] == 1
    for name, series in history.values.items():
        expected = [float(series[step - 1]) for step in steps if step <= len(series)]
        assert np.array_equal(np.asarray(values[name]), np.array(expected, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_histories_of_0_1_0_are_read_and_known_by_their_checksum(kind):
    folder = GOLDEN / kind
    history = History.load(folder)
    text = json.loads((folder / "grades_history.json").read_text())
    assert history.steps == text["steps"]
    for name, series in text["values"].items():
        assert history.values[name][1:] == [float(np.float32(value)) for value in series[1:]]
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["stateful_callbacks"]
    saved = state["GradESCallback"]["attributes"]["checkpoint"]
    reading = saved.get("reading")
    history.truncate(6, None if reading is None else reading["step"] - 1)
    assert history.checksum() == saved["checksum"]


def test_an_old_json_history_goes_on_in_an_arrow_file(tmp_path):
    whole = made.go_on(made.empty(), range(1, 16))
    made.go_on(made.empty(), range(1, 13)).save(tmp_path / "grades_history.json")
    history = made.resumed(tmp_path, 10)
    made.go_on(history, range(11, 16))
    assert made.same(History.load(tmp_path), whole)
    assert history.earlier_seconds == 2.5


def test_the_engine_records_and_resumes(tmp_path):
    def train(engine, steps):
        batches = tokens(12).with_format("torch")
        for step in steps:
            row = batches[step % 12]["input_ids"][None]
            engine.model(input_ids=row, labels=row).loss.backward()
            engine.step()
            with torch.no_grad():
                for parameter in engine.model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
            engine.model.zero_grad()
            engine.log(1.0)

    def engine_of(model):
        return GradES(model, GradESConfig(tau=0.02, alpha=0.2, skip_validation=True), total_steps=10)

    whole = engine_of(llama())
    train(whole, range(10))
    first = engine_of(llama())
    first.history.open(tmp_path)
    train(first, range(6))
    first.history.flush()
    state, weights = first.state_dict(), copy.deepcopy(first.model.state_dict())
    checksum = first.history.checksum()
    train(first, range(6, 8))  # the work that a killed process loses
    first.history.flush()
    first.close()
    second = engine_of(llama())
    second.model.load_state_dict(weights)
    state.pop("history")
    second.load_state_dict(state)
    from grades_hf.state import adopt_history

    adopt_history(second, History.load(tmp_path), checksum)
    second.history.open(tmp_path)
    train(second, range(6, 10))
    second.history.flush()
    kept = [{**h.to_dict(), "logs": None} for h in (whole.history, second.history, History.load(tmp_path))]
    assert kept[0] == kept[1] == kept[2]
    seconds = [row["seconds"] for row in second.history.logs]
    assert seconds == sorted(seconds)
    assert whole.frozen  # else it says little
    for engine in (whole, second):
        engine.close()


def test_recording_a_check_of_ten_thousand_components_is_cheap():
    found = made.components(10_000)
    names = [component.name for component in found]
    history, values = made.empty(found), torch.rand(10_000, dtype=torch.float64)
    history.record(1, names, values)
    start = time.process_time()
    for step in range(2, 102):
        history.record(step, names, values)
    assert (time.process_time() - start) / 100 < 1e-3


def test_reading_a_history_needs_neither_torch_nor_transformers(history, tmp_path):
    history.save(tmp_path)
    script = (
        "import sys; from grades_hf.record.history import History; h = History.load(sys.argv[1]); h.latest(); "
        "h.sampled(3); print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
