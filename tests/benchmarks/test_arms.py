"""The arms: what each one trains, when it ends, what is counted, and that a killed run ends like a whole one."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks import arms, train
from benchmarks.arms import ARMS, make_trainer
from benchmarks.internals import FlopCounter
from grades_hf import History
from recipes import finetune
from recipes.tasks.formats import TASKS
from tests.recipes.rows import all_tasks_dir

RUN: dict[str, Any] = {
    "task": "siqa,piqa", "completion_only_loss": False, "measure": "loss", "use_peft": False, "dtype": "float32",
    "train_rows": 40, "held_out_rows": 6, "max_length": 32, "test_rows": 4, "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "warmup_steps": 0.05,
    "lr_scheduler_type": "cosine", "alpha": 0.55, "tau": 1e-9, "monitor": "gradient_norm", "logging_steps": 5,
    "save_strategy": "steps", "save_steps": 4, "report_to": "none", "disable_tqdm": True, "seed": 3,
}  # fmt: skip
STEPS, CUT = 40, 22
needs_peer = pytest.mark.skipif(importlib.util.find_spec("grades") is None, reason="grades is not installed")


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    folders = {"model": str(tiny_model_dir), "data_dir": str(all_tasks_dir(tmp_path / "data", train=24, validation=6))}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **folders, "output_dir": str(tmp_path / "run")}), encoding="utf-8")
    return ["--config", str(file)]


def trained(config: list[str], output: Path, *options: str) -> dict[str, Any]:
    results = train.main([*config, "--output_dir", str(output), *options])
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    return results


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Kill(TrainerCallback):
    """Ends the process's training as a crash would."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


def killed(config: list[str], output: Path, at: int, *options: str) -> None:
    plan, arguments = train.prepare([*config, "--output_dir", str(output), *options])
    trainer = make_trainer(plan, arguments, output)
    trainer.add_callback(Kill(at))
    with pytest.raises(KeyboardInterrupt):
        train.run(plan, arguments, trainer)


def resumed(config: list[str], output: Path, *options: str) -> dict[str, Any]:
    return trained(config, output, *options, "--resume_from_checkpoint", str(train.newest_checkpoint(output)))


def test_stop_is_the_whole_run_cut_off(config: list[str], tmp_path: Path) -> None:
    whole = trained(config, tmp_path / "none", "--arm", "none", "--save_steps", str(CUT))
    cut = trained(config, tmp_path / "stop", "--arm", "stop")
    assert (whole["steps_run"], whole["steps_planned"]) == (STEPS, STEPS)
    assert (cut["steps_run"], cut["steps_planned"]) == (CUT, STEPS)
    assert equal(tmp_path / "stop", tmp_path / "none" / f"checkpoint-{CUT}")
    assert whole["compute"]["saved"] == 0
    assert cut["compute"]["used"] < 0.6 * whole["compute"]["used"]
    assert cut["compute"]["full"] == pytest.approx(whole["compute"]["full"], rel=0.1)  # batches differ in length
    assert cut["compute"]["saved"] == pytest.approx(1 - CUT / STEPS)


def test_short_has_a_schedule_of_its_own(config: list[str], tmp_path: Path) -> None:
    short = trained(config, tmp_path / "short", "--arm", "short")
    assert (short["steps_run"], short["steps_planned"]) == (CUT, STEPS)
    trained(config, tmp_path / "twin", "--arm", "none", "--max_steps", str(CUT))
    assert equal(tmp_path / "short", tmp_path / "twin")


def test_the_quality_is_the_loss_of_rows_that_nothing_was_trained_on(config: list[str], tmp_path: Path) -> None:
    options = ["--arm", "short", "--per_device_eval_batch_size", "1"]
    results = trained(config, tmp_path / "run", *options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    plan, _ = train.prepare([*config, *options])
    means = []
    for task, rows in plan.tests.items():
        losses = []
        for pair in TASKS[task].pairs(rows):  # one at a time, without padding
            ids = tokenizer(pair["prompt"] + pair["completion"] + tokenizer.eos_token)["input_ids"][:32]
            with torch.no_grad():
                losses.append(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item())
        means.append(sum(losses) / len(losses))
        assert results["evaluation"]["after"]["tasks"][task]["loss"] == pytest.approx(means[-1], rel=1e-5)
    assert results["evaluation"]["after"]["loss"] == pytest.approx(sum(means) / 2, rel=1e-5)
    assert plan.held_out is not None
    asked = [set(rows["prompt"]) for rows in (plan.train, plan.held_out)]
    tested = {TASKS[task].prompt(row) for task, rows in plan.tests.items() for row in rows}
    assert not asked[0] & asked[1]
    assert not (asked[0] | asked[1]) & tested


@pytest.mark.parametrize("learning_rate", ["1e-9", "1.0"])  # too small to get better by delta, and too large
def test_early_stopping_as_in_the_paper(learning_rate: str, config: list[str], tmp_path: Path) -> None:
    options = ["--arm", "es", "--learning_rate", learning_rate]
    results = trained(config, tmp_path / "es", *options)
    log = json.loads((tmp_path / "es" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert list(losses) == list(range(2, results["steps_run"] + 1, 2))  # 5 % of 40 steps
    best, without = math.inf, 0
    for step in losses:
        better = losses[step] < best and best - losses[step] > 0.0005
        best, without = min(best, losses[step]), 0 if better else without + 1
        if without == 3:
            break
    assert step == results["steps_run"]
    assert learning_rate == "1.0" or step == 8  # the first validation, and three that are no better
    plan, _ = train.prepare([*config, *options])
    trainer = finetune.build(plan, None, tmp_path / "again")
    trainer.model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(tmp_path / "es").state_dict()
    )  # the best weights
    with FlopCounter() as counter:
        assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-4)
    assert results["compute"]["validation"] == counter.total * len(losses) > 0
    assert results["seconds"].keys() == {"training", "validation", "saving", "evaluation"}
    assert all(value > 0 for value in results["seconds"].values())


def test_early_stopping_without_the_best_weights(config: list[str], tmp_path: Path) -> None:
    options = ["--arm", "es", "--restore_best", "false", "--learning_rate", "3e-2", "--save_steps", "2"]
    results = trained(config, tmp_path / "es", *options)
    last = tmp_path / "es" / f"checkpoint-{results['steps_run']}"
    assert equal(tmp_path / "es", last)


@pytest.mark.parametrize("arm", ["es", "grades"])
def test_a_killed_run_ends_like_a_whole_one(arm: str, config: list[str], tmp_path: Path) -> None:
    options = ["--arm", arm, "--learning_rate", "1e-2"]
    if arm == "grades":
        options += ["--tau", '{"attention": 1e9, "mlp": 1e-9}', "--alpha", "0.2"]
    whole = trained(config, tmp_path / "whole", *options)
    killed(config, tmp_path / "parts", 7, *options)
    assert not (tmp_path / "parts" / "results.json").exists()
    parts = resumed(config, tmp_path / "parts", *options)
    assert equal(tmp_path / "whole", tmp_path / "parts")
    assert parts["steps_run"] == whole["steps_run"]
    assert parts["evaluation"] == whole["evaluation"]
    assert parts["compute"] == pytest.approx(whole["compute"], rel=0.1)  # counted at other steps
    assert parts["compute"].get("validation") == whole["compute"].get("validation")


@pytest.mark.parametrize("arm", ["none", "stop", "es"])
def test_a_run_that_was_killed_after_its_last_step(arm: str, config: list[str], tmp_path: Path) -> None:
    """Trainer would take one more step, or go on after early stopping."""
    options = ["--arm", arm, "--learning_rate", "3e-2", "--save_steps", "2", "--save_total_limit", "30"]
    whole = trained(config, tmp_path / "run", *options)
    before = weights(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert (tmp_path / "run" / f"checkpoint-{whole['steps_run']}").is_dir()
    again = resumed(config, tmp_path / "run", *options)
    assert again["steps_run"] == whole["steps_run"]
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_peer
def test_the_peer_freezes_on_the_scale_of_weight_change(config: list[str], tmp_path: Path) -> None:
    seen = trained(config, tmp_path / "seen", "--observe", "true", "--monitor", "weight_change")
    assert seen["frozen"] == 0
    results = trained(config, tmp_path / "peer", "--arm", "peer", "--peer_tau", "1e9")
    assert (results["components"], results["frozen"], results["steps_run"]) == (35, 35, CUT)
    results = trained(config, tmp_path / "some", "--arm", "peer", "--peer_tau", "1e-12")
    assert (results["frozen"], results["steps_run"]) == (0, STEPS)
    assert not list((tmp_path / "some").glob("checkpoint-*"))
    options = ["--arm", "peer", "--peer_tau", "1", "--resume_from_checkpoint", str(tmp_path / "seen" / "checkpoint-4")]
    with pytest.raises(ValueError, match="arm='peer' cannot be resumed"):
        train.prepare([*config, *options])


def test_without_its_package_the_peer_is_refused(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"arm='peer' needs the package grades: pip install 'grades-hf\[benchmarks\]'"):
        train.prepare([*config, "--arm", "peer", "--peer_tau", "1"])


def test_observe_records_and_freezes_nothing(config: list[str], tmp_path: Path) -> None:
    plain = trained(config, tmp_path / "none", "--arm", "none")
    seen = trained(config, tmp_path / "seen", "--observe", "true", "--tau", "1e9")
    assert equal(tmp_path / "none", tmp_path / "seen")
    assert seen["frozen"] == 0
    assert seen["compute"]["used"] == pytest.approx(plain["compute"]["used"])
    history = History.load(tmp_path / "seen")
    assert {len(series) for series in history.values.values()} == {STEPS}
    shares = history.shares
    assert shares is not None
    assert shares.keys() == history.values.keys()
    sizes = {component["name"]: component["numel"] for component in history.components}
    ratios = [shares[name] / sizes[name] for name in shares]
    assert max(ratios) == pytest.approx(min(ratios))
    assert 0.2 < sum(shares.values()) < 1 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "all"], "arm='all' is unknown; use one of grades, none"),
        (["--arm", "es", "--held_out_rows", "0"], "arm='es' needs rows to validate on: set held_out_rows"),
        (["--arm", "peer"], "peer_tau is missing"),
        (["--arm", "none", "--observe", "true"], "observe=True records the statistic of GradES; arm='none' has none"),
        (["--arm", "stop", "--alpha", "0"], "must be a number in (0, 1]: the part of the steps that arm='stop' makes"),
        (["--task", "siqa,siqa"], "must name benchmarks, each once"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str, config: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train.prepare([*config, *options])


def test_the_newest_complete_checkpoint_is_resumed_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = {9: '{"global_step": 9}', 12: '{"global_step": 12}', 15: '{"global_st', 18: None}
    for step, state in states.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    with caplog.at_level("INFO", logger="recipes"):
        assert train.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    messages = [record.getMessage() for record in caplog.records]
    assert [("checkpoint-18" in m, "checkpoint-15" in m, "Resuming from" in m) for m in messages] == [
        (True, False, False), (False, True, False), (False, False, True),
    ]  # fmt: skip
    assert train.newest_checkpoint(tmp_path / "checkpoint-9") is None


def test_arms_have_a_line_each() -> None:
    assert all(f"* `{arm}`" in (arms.__doc__ or "") for arm in ARMS)
