"""The recipe from its command line to its run directory, and what it refuses before it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from grades_hf import History
from grades_hf.report.runs import load_runs
from recipes import finetune

from .rows import siqa_dir, write_jsonl

ROOT = Path(__file__).parents[2]
PAIRS = [{"prompt": f"Number {i} comes before", "completion": f" {i + 1}."} for i in range(36)]
RUN: dict[str, Any] = {
    "held_out_rows": 4, "tau": 1e-9, "alpha": 0.5, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
    "logging_steps": 2, "num_train_epochs": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "seed": 3,
}  # fmt: skip
LORA = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "all-linear"]


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    """A YAML file for a run of 8 steps on a small model and rows of the test's own."""
    places = {"model": str(tiny_model_dir), "data": str(write_jsonl(tmp_path / "my.jsonl", PAIRS))}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **places, "output_dir": str(tmp_path / "run")}), encoding="utf-8")
    return ["--config", str(file)]


def test_a_run_on_rows_of_ones_own(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = finetune.main([*config, *LORA, "--tau", '{"attention": 100.0, "mlp": 1e-9}'])
    assert (results["steps_run"], results["steps_planned"], results["components"]) == (8, 8, 35)
    assert set(results["frozen"].values()) == {5}
    assert len(results["frozen"]) == 20
    assert results["evaluation"]["after"]["loss"] < results["evaluation"]["before"]["loss"]
    assert 0 < results["compute"]["saved"] < 0.2
    output = tmp_path / "run"
    assert json.loads((output / "results.json").read_text(encoding="utf-8")) == results
    assert History.load(output).frozen == results["frozen"]
    shown = capsys.readouterr().out
    for line in (
        "Training made 8 of 8 planned steps",
        "GradES froze 20 of 35 matrices, the first at step 5 and the last at step 5.",
        "of the compute of all planned steps.",
        f"after training.\nThe model and its records are in {output}.",
    ):
        assert line in shown
    assert load_runs([output])[0].model == results["sources"]["model"]
    base = AutoModelForCausalLM.from_pretrained(finetune.prepare(config).location)
    adapted = PeftModel.from_pretrained(base, output)
    assert any(parameter.any() for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert AutoTokenizer.from_pretrained(output).vocab_size == 512


def test_the_loss_is_on_the_answers(config: list[str]) -> None:
    plan = finetune.prepare(config)
    trainer = finetune.build(plan, plan.grades, Path(str(plan.training.output_dir)))
    row = trainer.train_dataset[0]
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    words = trainer.processing_class.decode(learned, skip_special_tokens=True)
    assert words.strip() == plan.train[0]["completion"].strip()
    with torch.no_grad():
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        by_hand = trainer.model.eval()(input_ids=ids, labels=labels).loss.item()
    held = plan.train.select([0])
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(by_hand, rel=1e-5)


def test_both_runs_side_by_side(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = finetune.main([*config, "--compare", "true", "--tau", "1e9", "--evaluate_before", "false"])
    plain = json.loads((tmp_path / "run" / "without" / "results.json").read_text(encoding="utf-8"))
    assert (results["steps_run"], plain["steps_run"], plain["arm"]) == (5, 8, "none")  # all frozen after the grace
    shown = capsys.readouterr().out
    assert "It ended the run 3 steps early." in shown
    cells = {line[:15].strip(): line[15:].split() for line in shown.splitlines() if line[:15].strip()}
    assert cells["steps"] == ["5", "8"]
    assert cells["compute"] == [f"{1 - results['compute']['saved']:.2f}", "1.00"]
    losses = [run["evaluation"]["after"]["loss"] for run in (results, plain)]
    assert cells["held-out loss"] == [f"{loss:.3f}" for loss in losses]
    assert losses[0] != losses[1]
    assert "frozen" not in plain
    assert not (tmp_path / "run" / "without" / "grades_history.arrow").exists()


def test_without_options_it_trains_and_says_what_came_of_it(
    config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith(("tau", "alp"))))
    results = finetune.main(config)
    assert results["tau"] is None
    assert "so all planned steps were made." in capsys.readouterr().out
    for number in (0, 1):
        with pytest.raises(SystemExit):
            finetune.main([*config, "--held_out_rows", str(number)])
        assert f"held_out_rows={number}, but without a tau GradES looks at the loss" in capsys.readouterr().err


def test_a_benchmark_is_measured_by_its_accuracy(config: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("data")))
    options = ["--task", "siqa", "--data_dir", str(siqa_dir(tmp_path / "data")), "--test_rows", "6"]
    results = finetune.main([*config, *options, "--max_steps", "1", "--grades", "false"])
    assert (results["evaluation"]["task"], results["evaluation"]["rows"]) == ("siqa", 6)
    for when in ("before", "after"):
        assert results["evaluation"][when].keys() == {"loss", "acc", "acc_norm", "acc_stderr", "acc_norm_stderr"}


def test_chat_rows_need_a_chat_template(config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}] * 8)
    with pytest.raises(SystemExit):
        finetune.main([*config, "--data", str(file)])
    assert "has no chat template, which rows with messages need. Pass chat_template_path" in capsys.readouterr().err
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}", encoding="utf-8")
    results = finetune.main([*config, "--data", str(file), "--chat_template_path", str(template), "--max_steps", "1"])
    assert results["steps_run"] == 1


class Fail(TrainerCallback):
    """Fails in the middle of a run."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise ValueError("a fault")


def test_a_fault_during_training_is_no_refusal(config: list[str]) -> None:
    plan = finetune.prepare([*config, "--evaluate_before", "false"])
    trainer = finetune.build(plan, plan.grades, Path(str(plan.training.output_dir)))
    trainer.add_callback(Fail())
    with pytest.raises(RuntimeError, match="training failed after step 3"):
        finetune.run(plan, trainer)


def test_without_a_checkpoint_to_resume_it_says_so(config: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert finetune.main([*config, "--max_steps", "1", "--resume_from_checkpoint", "true"])["steps_run"] == 1
    assert "There is no checkpoint in output_dir=" in caplog.text


@pytest.mark.parametrize("value", ["true", "false"])
def test_yaml_may_say_whether_to_resume(value: str, config: list[str], tmp_path: Path) -> None:
    with (tmp_path / "run.yaml").open("a", encoding="utf-8") as file:
        file.write(f"\nresume_from_checkpoint: {value}\n")
    assert finetune.prepare(config).training.resume_from_checkpoint is None


def test_a_run_goes_on_from_its_newest_checkpoint(
    config: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = [*config, "--save_strategy", "steps", "--save_steps", "3", "--tau", '{"attention": 1e9, "mlp": 1e-9}']
    whole = finetune.main([*options, "--output_dir", str(tmp_path / "whole")])
    (tmp_path / "parts").mkdir()
    os.rename(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    parts = finetune.main([*options, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "true"])
    assert parts["frozen"] == whole["frozen"] != {}
    assert "There is no checkpoint" not in caplog.text
    with pytest.raises(ValueError, match=r"max_steps=2, but .*checkpoint-\d+ has made \d+ steps already"):
        output = ["--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", "true"]
        finetune.prepare([*options, *output, "--max_steps", "2"])
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tao", "1"], "the argument '--tao' is unknown. Did you mean --tau?"),
        (["--tau", "0"], "tau=0 must be a finite number greater than 0"),
        (["--data", "/nowhere"], "data='/nowhere' is no file or directory"),
        (["--model", "/nowhere"], "model='/nowhere' is no directory"),
        (["--model", "/nowhere", "--dry_run"], "model='/nowhere' is no directory"),
        (["--model", "/", "--dry_run"], "model='/' is a directory without config.json"),
        (["--report_to", "wandb,foo"], "report_to='wandb,foo' is unknown. Use all, none, or some of"),
        (["--report_to", "mlflow"], "report_to='mlflow' needs a package that is not installed: pip install mlflow"),
        (["--test_rows", "0"], "test_rows=0 must be 1 or more"),
        (["--max_length", "2"], "max_length=2 leaves no answer in any of the train rows"),
        (["--tau", '{"attention": 1.0}'], "without a threshold"),
        (["--tau", '{"attention": 1.0, "mlp": 1.0, "vision": 1.0}'], "'vision'"),
        (["--freeze_target_modules", "nothing_proj"], "nothing_proj"),
        (["--resume_from_checkpoint", "/nowhere"], "resume_from_checkpoint='/nowhere' holds no complete checkpoint"),
        (["--held_out_rows", "0", "--eval_strategy", "epoch"], "eval_strategy='epoch' needs rows"),
        (["--output_dir", "/proc/run"], "output_dir='/proc/run' cannot be written"),
        (["--output_dir", "/proc/run", "--dry_run", "true"], "output_dir='/proc/run' cannot be written"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    options: list[str], message: str, config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        finetune.main([*config, *options])
    assert refused.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune.py")]
    assert line.startswith("finetune.py: error: ")
    assert message in line


@pytest.mark.slow
def test_under_the_launcher_an_error_is_one_line_without_a_traceback(config: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    script = str(ROOT / "recipes" / "finetune.py")
    done = subprocess.run(
        [*command, script, *config, "--tao", "1"], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == ("finetune.py: error: the argument '--tao' is unknown. Did you mean --tau?")
