"""DDP with two real processes (gloo): the same freezing and weights as one process on the same global batch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from grades_hf import GradES, GradESCallback, GradESConfig
from grades_hf.parallel.ranks import rebuild_reducer
from tests import small
from tests.adapters.test_resume import last_complete_checkpoint
from tests.ddp_worker import Case, plain_loop

pytestmark = pytest.mark.slow

# Some matrices freeze in two steps, some never; no value comes near a threshold.
GRADES = {"tau": {"q": 1e9, "down": 1e9, "attention": 1e-30, "mlp": 1e-30}, "alpha": 0.25, "patience": 1}
CASES = [
    Case(
        f"{method}-unused{unused:d}-static{static:d}-checkpoint{checkpointing:d}-accumulate{accumulation}",
        method,
        GRADES,
        accumulation,
        checkpointing,
        unused,
        static,
    )
    for method, unused, static, checkpointing, accumulation in itertools.product(
        ["full", "lora"], [False, True], [False, True], [False, True], [1, 3]
    )
    if not (static and accumulation > 1)  # torch's static graph fails under no_sync, with or without GradES
    and (method == "full" or unused == checkpointing)  # of LoRA half of them
]

CASES += [
    Case(
        f"{method}-unused0-static{static:d}-reentrant-accumulate{accumulation}",
        method,
        GRADES,
        accumulation,
        checkpointing=True,
        find_unused=False,
        static_graph=static,
        reentrant=True,
    )
    for method, static, accumulation in itertools.product(["full", "lora"], [False, True], [1, 3])
    if not (static and accumulation > 1)
]
# What freezes at the third step and what at the very last one.
LAST = {"tau": {"q": 1e9, "attention": 1e-30, "mlp": 1e-30}, "alpha": 0.875}
LOOPS = [
    {"name": f"loop-{index}", "loop": grades, "interrupt": interrupt, "wrapped": wrapped}
    for index, (grades, interrupt, wrapped) in enumerate(
        itertools.product([GRADES, LAST], [False, True], [False, True])
    )
]
FAULTS = Case("faults", "full", GRADES, save_steps=2)
# Where, at which step, and which rank is killed (None: both); freezing happens in step 3.
KILLS = [
    ("after freezing, before the update", 3, 1),
    ("checkpoint: only the model is written", 4, None),
    ("checkpoint: trainer_state.json is cut off", 6, 0),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks of every case report, all cases run by one pair of processes."""
    output = tmp_path_factory.mktemp("ddp")
    resumed = [dataclasses.replace(case, resume=True) for case in CASES if case.name.endswith("accumulate1")]
    (output / "whole").mkdir()
    whole = dataclasses.replace(FAULTS, name="whole")
    done = launch([dataclasses.asdict(case) for case in [*CASES, *resumed, whole]] + LOOPS, output)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def launch(cases: list[dict], output: Path) -> subprocess.CompletedProcess:
    (output / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += ["-m", "tests.ddp_worker", str(output / "cases.json"), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.mark.compatibility(
    "Distributed",
    "DDP: find_unused_parameters, static_graph, gradient checkpointing (reentrant or not), accumulation, full and LoRA",
    "works",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_equal_one_process(case, ranks, tmp_path):
    callback = GradESCallback(case.grades)
    single = case.trainer(tmp_path, 4, [callback])
    single.train()
    reports = [torch.load(ranks / f"{case.name}-{rank}.pt") for rank in range(2)]
    assert 0 < len(callback.engine.frozen) < len(callback.engine.components)
    for report in reports:
        assert report["frozen"] == callback.engine.frozen
        assert report["apart"] == [0.0] * 8
        assert report["trainable"] == [n for n, p in single.model.named_parameters() if p.requires_grad]
        for name, parameter in single.model.named_parameters():
            torch.testing.assert_close(report["weights"][name], parameter.detach(), rtol=0, atol=1e-6)
            assert torch.equal(report["weights"][name], reports[0]["weights"][name])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_bytes_sent_fall_with_the_frozen_set(case, ranks):
    report = torch.load(ranks / f"{case.name}-0.pt")
    elements = {n: report["weights"][n].numel() for n in report["trainable"]}
    frozen = sum(n for name, n in elements.items() if "q_proj" in name or "down_proj" in name)
    before, after = report["bytes"][:3], report["bytes"][3:]
    assert before == [4 * sum(elements.values())] * 3
    assert after == [4 * (sum(elements.values()) - frozen)] * 5


@pytest.mark.compatibility("Custom loops", "DDP without Trainer, with state_dict and load_state_dict", "works")
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop["name"])
def test_a_plain_loop_equals_one_process(loop, ranks):
    """Also where the last step freezes, and in the step after the engine's end, which trains everything again."""
    single = plain_loop(loop["loop"])
    assert set(single["frozen"].values()) == ({8} if loop["loop"] is LAST else {3})
    for rank in range(2):
        report = torch.load(ranks / f"{loop['name']}-{rank}.pt")
        assert report["frozen"] == single["frozen"]
        assert report["apart"] == 0.0
        for name, weight in single["weights"].items():
            torch.testing.assert_close(report["weights"][name], weight, rtol=0, atol=1e-6)


@pytest.mark.compatibility("Faults", "DDP: kill -9 of one rank or all, before, in and after a checkpoint", "works")
def test_killed_again_and_again(ranks, tmp_path):
    """torchrun ends the other rank; each run goes on from the newest complete checkpoint, to the same end."""
    for kill in [*KILLS, None]:
        checkpoint = last_complete_checkpoint(tmp_path / FAULTS.name)
        case = dataclasses.replace(FAULTS, kill=kill, resume=checkpoint is not None)
        if checkpoint is not None:
            case.checkpoint = Path(checkpoint).name
        done = launch([dataclasses.asdict(case)], tmp_path)
        assert (done.returncode == 0) == (kill is None), done.stderr[-4000:]
        assert kill is None or "Signal 9 (SIGKILL)" in done.stderr
    for rank in range(2):
        whole = torch.load(ranks / f"whole-{rank}.pt")
        resumed = torch.load(tmp_path / f"faults-resumed-{rank}.pt")
        assert resumed["frozen"] == whole["frozen"]
        assert set(whole["frozen"].values()) == {3}
        assert all(torch.equal(resumed["weights"][n], whole["weights"][n]) for n in whole["weights"])


@pytest.mark.compatibility("Distributed", "DDP, resume_from_checkpoint", "works")
@pytest.mark.parametrize("case", [c for c in CASES if c.name.endswith("accumulate1")], ids=lambda case: case.name)
def test_resumed_equals_uninterrupted(case, ranks):
    for rank in range(2):
        whole = torch.load(ranks / f"{case.name}-{rank}.pt")
        resumed = torch.load(ranks / f"{case.name}-resumed-{rank}.pt")
        assert resumed["frozen"] == whole["frozen"]
        assert resumed["apart"] == [0.0] * 3
        assert resumed["bytes"] == whole["bytes"][5:]
        assert all(torch.equal(resumed["weights"][n], whole["weights"][n]) for n in whole["weights"])


def test_a_torch_without_the_private_parts_is_refused(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.delattr(nn.parallel.DistributedDataParallel, "_remove_autograd_hooks")
    with pytest.raises(RuntimeError, match=r"lacks DistributedDataParallel\._remove_autograd_hooks\. Use torch"):
        GradES(small.llama(), GradESConfig(tau=1.0), total_steps=1)


@pytest.mark.compatibility("Distributed", "DDP with torch.compile", "refused")
def test_compiled_ddp_is_refused(tmp_path, monkeypatch):
    arguments = small.arguments(tmp_path, torch_compile=True)
    monkeypatch.setattr(type(arguments), "world_size", 2)
    with pytest.raises(ValueError, match="torch_compile"):
        small.Trainer(small.llama(), arguments, callbacks=[GradESCallback(tau=1.0)])


def test_mixed_precision_of_ddp_is_refused():
    class Wrapper:
        mixed_precision = "anything"

    with pytest.raises(RuntimeError, match="autocast"):
        rebuild_reducer(Wrapper())
