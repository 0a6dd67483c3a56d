"""The accelerate loop: the Trainer recipe's result bit for bit, resumed, and in two processes."""

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
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from grades_hf import History
from recipes import finetune, no_trainer
from tests.resumable import record

from .rows import siqa_dir

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "task": "siqa",
    "alpha": 0.3,
    "lora_r": 2,
    "lora_dropout": 0.1,
    "train_samples": 30,
    "seed": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,  # 8 batches an epoch, the last one of 2 rows: 4 steps
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "warmup_steps": 0.2,
    "max_grad_norm": 0.5,
    "logging_steps": 2,
    "save_strategy": "no",
    "evaluate_before": False,
    "evaluate_after": False,
    "report_to": "none",
    "use_cpu": True,
}
TAU = {"attention": 1e9, "mlp": 1e-9, "layers.0.mlp.down_proj": 1e9}
FULL = ["--method", "full", "--dtype", "float32", "--monitor", "gradient_norm", "--learning_rate", "1e-4"]


@pytest.fixture(autouse=True)
def accelerate_state():
    """accelerate's settings outlive an Accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    folders = {"model": str(tiny_model_dir), "data_dir": str(siqa_dir(tmp_path / "data"))}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "tau": TAU, **folders, "output_dir": str(tmp_path / "run")}))
    return ["--config", str(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.compatibility("Custom loops", "recipes/no_trainer.py (accelerate): equal to the Trainer recipe", "works")
@pytest.mark.parametrize("method", [[], FULL], ids=["lora", "full"])
def test_the_same_weights_and_steps_as_with_trainer(method: list[str], config: list[str], tmp_path: Path) -> None:
    for recipe in (finetune, no_trainer):
        recipe.main([*config, *method, "--logging_steps", "1", "--output_dir", str(tmp_path / recipe.__name__)])
        AcceleratorState._reset_state(reset_partial_state=True)
    folders = [tmp_path / recipe.__name__ for recipe in (finetune, no_trainer)]
    histories = [History.load(folder) for folder in folders]
    losses = [[row.pop("loss") for row in history.logs] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert record(histories[1]) == record(histories[0])
    assert {event["step"] for event in histories[0].events} == {4}
    assert 0 < len(histories[0].events) < len(histories[0].values)
    with_trainer, without = map(weights, folders)
    assert with_trainer.keys() == without.keys()
    assert all(torch.equal(with_trainer[name], without[name]) for name in with_trainer)


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_equals_uninterrupted(step: int, config: list[str], tmp_path: Path) -> None:
    options = [*config, "--save_strategy", "steps", "--save_steps", "3"]
    no_trainer.main([*options, "--output_dir", str(tmp_path / "whole")])
    AcceleratorState._reset_state(reset_partial_state=True)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
    no_trainer.main([*options, "--output_dir", str(tmp_path / "parts"), "--resume_from_checkpoint", checkpoint])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert record(History.load(parts)) == record(History.load(whole))
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(parts).items())


def test_training_ends_when_all_is_frozen(config: list[str], tmp_path: Path) -> None:
    no_trainer.main([*config, "--tau", "1e9", "--evaluate_before", "true", "--evaluate_after", "true"])
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert (results["steps_run"], results["steps_planned"]) == (4, 8)
    assert results["evaluation"]["before"]["rows"] == results["evaluation"]["after"]["rows"] == 12


@pytest.mark.slow
@pytest.mark.compatibility("Custom loops", "recipes/no_trainer.py, two processes (DDP)", "works")
def test_two_processes_equal_one(config: list[str], tmp_path: Path) -> None:
    options = [*config, *FULL, "--monitor", "gradient_change", "--train_samples", "32"]
    two = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / "no_trainer.py"), *options, *two],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    no_trainer.main([*options, "--output_dir", str(tmp_path / "one")])
    histories = [History.load(tmp_path / name) for name in ("one", "two")]
    assert histories[0].frozen == histories[1].frozen != {}
    losses = [[row["loss"] for row in history.logs] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, both = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--no_grades"], "grades=False: this loop has the engine built in"),
        (["--optim", "sgd"], "optim=.*no_trainer.py does not know that argument"),
        (["--save_strategy", "epoch"], "save_strategy='epoch'"),
        (["--resume_from_checkpoint", "/nowhere"], "'/nowhere' holds no model.safetensors"),
        (["--tao", "1"], "'--tao' is unknown"),
        (["--dry_run"], "dry_run: no_trainer.py does not know that value"),
        (["--arm", "none"], "grades=False"),
    ],
)
def test_what_the_loop_does_not_know_is_refused(
    options: list[str], message: str, config: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=rf"^no_trainer\.py: error: .*{message}"):
        no_trainer.main([*config, *options])
    assert not (tmp_path / "run").exists()
