"""Two real processes (gloo): what they share and what they do not, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.faults.rank_worker import FREEZING, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "tests.faults.rank_worker", str(output)]
    started = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-3000:] for error in errors)
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def assert_like(found: dict[str, Any], whole: dict[str, Any]) -> None:
    assert found["frozen"] == whole["frozen"]
    assert found["t"] == whole["t"]
    torch.testing.assert_close(torch.tensor(found["weights"]), torch.tensor(whole["weights"]), rtol=1e-9, atol=1e-9)


@pytest.mark.compatibility("Distributed", "DDP: static_graph with accumulation under no_sync, own loop", "works")
@pytest.mark.parametrize("case", ["static graph, accumulation", "accumulation"])
def test_accumulation_without_synchronization(case, ranks):
    whole = train(FREEZING, micro=2)
    assert len(whole["frozen"]) == 4
    assert ranks[0][case] == ranks[1][case]
    assert_like(ranks[0][case], whole)


def test_a_batch_that_involves_a_block_on_one_rank_only(ranks):
    first, second = (rank["unused"] for rank in ranks)
    assert first == second
    assert len(first["frozen"]) == 4


def test_what_no_rank_uses_does_not_count(ranks):
    first, second = (rank["never used"] for rank in ranks)
    assert first == second
    assert (len(first["frozen"]), first["t"], first["components"]) == (4, 4, 8)


def test_what_is_opened_is_reduced_from_its_first_step_on(ranks):
    assert ranks[0]["opened"] == ranks[1]["opened"]
    assert_like(ranks[0]["opened"], train(FREEZING, open_at=4))


@pytest.mark.compatibility("Distributed", "models that are independent per rank; DDP on a part of the ranks", "works")
@pytest.mark.parametrize("case", ["independent", "subgroup"])
def test_ranks_that_share_nothing_decide_alone(case, ranks):
    for rank, found in enumerate(ranks):
        assert_like(found[case], train({"tau": 30.0 if rank else 1e9, "alpha": 0.3}, seed=rank))
    assert ranks[0][case]["frozen"] != ranks[1][case]["frozen"]


@pytest.mark.compatibility("Distributed", "options that differ between ranks", "refused")
@pytest.mark.parametrize("option", ["tau", "check_every"])
def test_options_that_differ_are_refused_on_all_ranks(option, ranks):
    for rank, found in enumerate(ranks):
        assert f"this is rank {rank} of 2" in found[f"different {option}"]
