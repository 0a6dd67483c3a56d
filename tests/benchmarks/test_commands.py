"""Each benchmark command on a tiny model: it runs, and its JSON says what it must. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import logging

import pytest
import torch

from benchmarks import common, memory, overhead, step_cost
from grades_hf import find_components

PEER = importlib.util.find_spec("grades") is not None


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.skipif(not PEER, reason="needs grades 1.0.6"))])
def peer(request):
    """Whether the peer takes part; both commands work without it."""
    return request.param


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def run(command, folder, peer, *more):
    arguments = ["--shape", "tiny", "--length", "8", "--rank", "2", "--output", str(folder), *more]
    path = command.main(arguments if peer else [*arguments, "--no-peer"])
    assert path.parent == folder
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "versions", "machine", "results"} == document.keys()
    assert document["command"].startswith(f"python -m {command.__name__} --device cpu --shape tiny")
    assert str(folder) not in path.read_text(encoding="utf-8")
    assert len(document["commit"].rstrip("+")) == 40
    assert document["versions"]["torch"] == torch.__version__
    assert ("grades" in document["versions"]) == peer
    assert document["machine"]["threads"] == 1
    return document["results"]


def test_overhead(tmp_path, peer, capsys):
    results = run(overhead, tmp_path, peer, "--rounds", "2", "--sample-size", "16")
    assert results.keys() == {"full", "lora"}
    for mode, ways in results.items():
        assert ("peer" in ways) == peer
        first = "gradient_change" if mode == "full" else "gradient_norm"
        expected = {"bare", "gradient_change", "gradient_norm", "weight_change", f"{first}, check_every=10"}
        assert expected <= ways.keys()
        for name, values in ways.items():
            if name == "bare":
                continue
            assert values["hook_share"]["n"] == 2
            assert 0 < values["hook_share"]["min"] <= values["hook_share"]["median"] <= values["hook_share"]["max"]
            assert values["step_ratio"]["min"] > 0
        assert ways["gradient_norm"]["kept_bytes"] == 0
        assert ways["gradient_change"]["kept_bytes"] == ways["weight_change"]["kept_bytes"] > 0
        assert ways["gradient_change"]["over_bandwidth_limit"]["median"] > 0
        assert ways["default"]["kept_bytes"] > 0  # the average of the weights
        assert ways["default"]["look_steps"]["min"] > 0
        assert "earlier_hook_share" not in ways["gradient_norm"]
    sampled = results["full"]["gradient_change, sample_size=16"]
    assert sampled["kept_bytes"] == 14 * 16 * 8
    assert "gradient_change takes" in capsys.readouterr().out


def test_overhead_beside_an_earlier_version(tmp_path):
    ways = run(overhead, tmp_path, False, "--rounds", "1", "--modes", "lora", "--against", "HEAD")["lora"]
    document = json.loads((tmp_path / "overhead-cpu-tiny.json").read_text(encoding="utf-8"))
    assert f"--against {document['commit'].rstrip('+')}" in document["command"]
    for name in ("gradient_change", "gradient_norm", "weight_change"):
        assert ways[name]["earlier_hook_share"]["n"] == 1
        assert ways[name]["earlier_hook_share"]["min"] > 0
    with pytest.raises(ValueError, match="no such commit"):
        run(overhead, tmp_path, False, "--against", "none-such")


def test_memory(tmp_path, peer, capsys):
    results = run(memory, tmp_path, peer, "--sample-size", "16")
    for mode, ways in results.items():
        model = common.model(common.shape("tiny"), rank=2 if mode == "lora" else None)
        components = find_components(model)
        tracked = sum(p.nbytes for c in components for p in c.parameters)
        bare = ways["no monitoring"]["none"]
        assert bare["kept"] == 0
        assert bare["weights"] == sum(p.nbytes for p in model.parameters())
        assert bare["gradients"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
        for name in ("gradient_change", "gradient_norm", "weight_change"):
            sets = ways[name]
            assert sets.keys() == {"none", "bottom half", "all but the top block", "all matrices"}
            assert sets["none"]["kept"] == (0 if name == "gradient_norm" else tracked)
            everything = sets["all matrices"]
            assert everything["kept"] == 0
            assert bare["gradients"] - everything["gradients"] == tracked
            steps = 4 * sum(len(c.parameters) for c in components)  # AdamW's counters
            assert bare["optimizer"] - everything["optimizer"] == 2 * tracked + steps
            assert sets["none"]["peak"] > sets["bottom half"]["peak"] > everything["peak"]
        if peer:
            assert ways["peer"]["none"]["kept"] == tracked
            assert ways["peer"]["all matrices"]["optimizer"] == bare["optimizer"]
    assert "all but the top block" in capsys.readouterr().out


def test_step_cost(tmp_path, capsys):
    arguments = ["--shape", "tiny", "--length", "8", "--rank", "2", "--rounds", "1"]
    path = step_cost.main([*arguments, "--output", str(tmp_path)])
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert len(results) == 6
    for table in results.values():
        assert table["nothing"]["flops_ratio"] == 1
        assert table["nothing"]["time_ratio"]["n"] == 1
        assert table["forward pass alone"]["flops_ratio"] < table["lower half, cut"]["flops_ratio"] < 1
    full, lora = results["full, checkpointing none"], results["lora, checkpointing none"]
    assert full["lower half, cut"]["flops"] < full["lower half"]["flops"]
    assert lora["lower half, cut and merged"]["flops"] < lora["lower half, cut"]["flops"]
    assert "all but the top block, cut and merged" in capsys.readouterr().out


def test_a_missing_peer_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "grades", None)
    for command in (overhead, memory):
        with pytest.raises(ModuleNotFoundError, match="--no-peer"):
            command.main(["--shape", "tiny", "--output", str(tmp_path)])


def test_ratios_are_taken_round_by_round():
    assert common.ratio([2.0, 6.0, 3.0], [1.0, 2.0, 3.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("qwen3-0.6b", 596_049_920), ("llama-3.1-8b", 8_030_261_248)],
)
def test_shapes_are_the_real_ones(name, parameters):
    model = common.model(common.shape(name), device="meta", dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="smollm2-135m"):
        common.shape("gpt-5")
