"""The arms: what each one trains, when it ends, what is counted, and that a killed run ends like a whole one."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, TrainerCallback

from grades_hf import History
from recipes import arms, finetune
from recipes.arguments import ARMS
from recipes.data import Split, find_task, load_split, mark, mixed, training_rows
from recipes.evaluate import held_out_loss
from recipes.examples import encode
from recipes.models import load_tokenizer

from .rows import all_tasks_dir

RUN: dict[str, Any] = {
    "task": "siqa,piqa", "objective": "text", "measure": "loss", "evaluate_before": False, "method": "full",
    "dtype": "float32", "train_samples": 40, "holdout_samples": 6, "max_length": 32, "eval_samples": 4,
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3,
    "warmup_steps": 0.05, "lr_scheduler_type": "cosine", "alpha": 0.55, "tau": 1e-9, "monitor": "gradient_norm",
    "logging_steps": 5, "save_strategy": "steps", "save_steps": 4, "report_to": "none", "use_cpu": True, "seed": 3,
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
    finetune.main([*config, "--output_dir", str(output), *options])
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


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
    plan = finetune.prepare([*config, "--output_dir", str(output), *options])
    trainer = finetune.build(plan)
    trainer.add_callback(Kill(at))
    with pytest.raises(KeyboardInterrupt):
        finetune.run(plan, trainer)


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
    finetune.main([*config, "--output_dir", str(tmp_path / "twin"), "--arm", "none", "--max_steps", str(CUT)])
    assert equal(tmp_path / "short", tmp_path / "twin")


def test_the_quality_is_the_loss_of_rows_that_nothing_was_trained_on(config: list[str], tmp_path: Path) -> None:
    results = trained(config, tmp_path / "run", "--arm", "short")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    plan = finetune.prepare([*config, "--arm", "short"])
    losses = []
    for task, rows in plan.tests.items():
        total, tokens = 0.0, 0
        for row in rows:  # one at a time, without padding
            question = find_task(task).format(row)
            ids = tokenizer(f"{question['prompt']} {question['choices'][question['answer']]}")["input_ids"][:32]
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
            total, tokens = total + loss.item() * (len(ids) - 1), tokens + len(ids) - 1
        losses.append(total / tokens)
        assert results["evaluation"]["after"]["tasks"][task]["loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert results["evaluation"]["after"]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    asked = [{plan.task.prompt(row) for row in rows} for rows in (plan.train, plan.holdout)]
    tested = {find_task(task).prompt(row) for task, rows in plan.tests.items() for row in rows}
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
    plan = finetune.prepare([*config, *options])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "es")
    tokenizer = load_tokenizer(str(tmp_path / "es"))
    examples = encode(plan.task, plan.holdout, tokenizer, 32, "text")
    assert held_out_loss(model, tokenizer, examples, 4)["loss"] == pytest.approx(best, rel=1e-4)  # the best weights

    # what validation computes: the forward passes of its batches (torch counts no CPU kernel of attention)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "es", attn_implementation="eager")
    collate = finetune.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for part in (examples[:4], examples[4:]):
            model(**collate([dict(example) for example in part]))
    assert results["compute"]["validation"] == counter.get_total_flops() * len(losses)
    assert results["seconds"].keys() == {"training", "validation", "saving", "evaluation"}
    assert all(value > 0 for value in results["seconds"].values())


def test_early_stopping_without_the_best_weights(config: list[str], tmp_path: Path) -> None:
    options = ["--arm", "es", "--restore_best", "false", "--learning_rate", "3e-2", "--save_steps", "2"]
    results = trained(config, tmp_path / "es", *options)
    last = tmp_path / "es" / f"checkpoint-{results['steps_run']}"
    assert equal(tmp_path / "es", last)


@pytest.mark.parametrize("arm", ["none", "es", "stop", "grades"])
def test_a_killed_run_ends_like_a_whole_one(arm: str, config: list[str], tmp_path: Path) -> None:
    options = ["--arm", arm, "--learning_rate", "1e-2"]
    if arm == "grades":
        options += ["--tau", '{"attention": 1e9, "mlp": 1e-9}', "--alpha", "0.2"]
    whole = trained(config, tmp_path / "whole", *options)
    killed(config, tmp_path / "parts", 7, *options)
    partial = json.loads((tmp_path / "parts" / "results.json").read_text(encoding="utf-8"))
    assert partial.keys() == {"evaluation"}
    parts = trained(config, tmp_path / "parts", *options, "--resume_from_checkpoint", "true")
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
    again = trained(config, tmp_path / "run", *options, "--resume_from_checkpoint", "true")
    assert again["steps_run"] == whole["steps_run"]
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_peer
def test_the_peer_freezes_on_the_scale_of_weight_change(config: list[str], tmp_path: Path) -> None:
    seen = trained(config, tmp_path / "seen", "--observe", "--monitor", "weight_change")
    assert seen["frozen"] == 0
    results = trained(config, tmp_path / "peer", "--arm", "peer", "--peer_tau", "1e9")
    assert (results["components"], results["frozen"], results["steps_run"]) == (35, 35, CUT)
    results = trained(config, tmp_path / "some", "--arm", "peer", "--peer_tau", "1e-12")
    assert (results["frozen"], results["steps_run"]) == (0, STEPS)
    assert not list((tmp_path / "some").glob("checkpoint-*"))
    with pytest.raises(SystemExit, match="arm='peer' cannot be resumed"):
        finetune.main([*config, "--arm", "peer", "--peer_tau", "1", "--resume_from_checkpoint", "true"])


def test_without_its_package_the_peer_is_refused(config: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"arm='peer' needs the package grades: pip install 'grades-hf\[benchmarks\]'"):
        finetune.prepare([*config, "--arm", "peer", "--peer_tau", "1"])


def test_observe_records_and_freezes_nothing(config: list[str], tmp_path: Path) -> None:
    plain = trained(config, tmp_path / "none", "--arm", "none")
    seen = trained(config, tmp_path / "seen", "--observe", "--tau", "1e9")
    assert equal(tmp_path / "none", tmp_path / "seen")
    assert seen["frozen"] == 0
    assert seen["compute"]["used"] == pytest.approx(plain["compute"]["used"])
    history = History.load(tmp_path / "seen")
    assert {len(series) for series in history.values.values()} == {STEPS}
    costs = seen["costs"]
    shares = costs["weight_gradient"]
    assert shares.keys() == history.values.keys()
    sizes = {component["name"]: component["numel"] for component in history.components}
    ratios = [shares[name] / sizes[name] for name in shares]
    assert max(ratios) == pytest.approx(min(ratios))
    blocks = sum(costs["input_gradient"])
    assert sum(shares.values()) == pytest.approx(blocks, rel=0.2)  # a matrix's two gradients cost the same
    assert 0.2 < blocks < 1 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "all"], "arm='all' is unknown; use one of grades, none"),
        (["--arm", "grades", "--no_grades"], "arm='grades' contradicts grades=False"),
        (["--arm", "es", "--holdout_samples", "0"], "arm='es' needs rows to validate on: set holdout_samples"),
        (["--arm", "peer"], "peer_tau is missing"),
        (["--arm", "none", "--observe"], "does not go together with arm='none'"),
        (["--arm", "stop", "--alpha", "0"], "must be a number in (0, 1]: the part of the steps that arm='stop' makes"),
        (["--task", "siqa,siqa"], "must name each benchmark once"),
        (["--task", "siqa,squad"], "task='squad' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str, config: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        finetune.main([*config, *options])
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_mixture_holds_no_row_of_any_evaluation_split(tmp_path: Path) -> None:
    """ARC's two parts share questions: what one evaluates on, the other may not train on."""
    folder = all_tasks_dir(tmp_path)
    easy, challenge = (load_split(find_task(name), "train", str(folder)) for name in ("arc_easy", "arc_challenge"))
    test = load_split(find_task("arc_challenge"), "validation", str(folder))
    test.rows.append({**easy.rows[0], "id": "other"})
    tasks = [find_task("arc_easy"), find_task("arc_challenge")]
    train = Split([*mark(tasks[0], easy.rows), *mark(tasks[1], challenge.rows)], "both")
    rows = training_rows(mixed(tasks), train, Split(mark(tasks[1], test.rows), "test"), None, seed=0)
    assert len(rows) == len(train.rows) - 1
    assert {row["task"] for row in rows} == {"arc_easy", "arc_challenge"}
    assert {"task": "arc_easy", "row": easy.rows[0]} not in rows


def test_arms_have_a_line_each() -> None:
    assert all(f"* `{arm}`" in (arms.__doc__ or "") for arm in ARMS)
