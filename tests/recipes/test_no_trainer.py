"""The accelerate loop: the result of the recipe with Trainer, resumed, and in two processes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer
from trl import SFTTrainer

from grades_hf import History
from recipes import finetune, no_trainer
from tests.resumable import record

from .rows import write_jsonl

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "alpha": 0.3, "lora_r": 2, "lora_dropout": 0.1, "lora_target_modules": "all-linear", "use_peft": True,
    "train_rows": 30, "held_out_rows": 4, "seed": 3, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,  # 8 batches an epoch, the last one of 2 rows: 4 steps
    "num_train_epochs": 2, "learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 0.2, "max_grad_norm": 0.5,
    "logging_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
PAIRS = [{"prompt": f"Number {i} comes before", "completion": f" {i + 1} and {i + 2}."} for i in range(40)]
TAU = {"attention": 1e9, "mlp": 1e-9, "layers.0.mlp.down_proj": 1e9}
FULL = ["--use_peft", "false", "--monitor", "gradient_norm"]


@pytest.fixture(autouse=True)
def accelerate_state():
    """accelerate's settings outlive an Accelerator."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def config(tmp_path: Path, tiny_model_dir: Path) -> list[str]:
    folders = {"model": str(tiny_model_dir), "data": str(write_jsonl(tmp_path / "my.jsonl", PAIRS))}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "tau": TAU, **folders, "output_dir": str(tmp_path / "run")}))
    return ["--config", str(file)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.compatibility("Custom loops", "recipes/no_trainer.py (accelerate): equal to the Trainer recipe", "works")
@pytest.mark.parametrize("method", [["--lora_dropout", "0"], FULL], ids=["lora", "full"])
def test_the_same_steps_and_weights_as_with_trainer(method: list[str], config: list[str], tmp_path: Path) -> None:
    """TRL computes the loss in another way, so the weights agree to rounding."""
    for recipe in (finetune, no_trainer):
        recipe.main([*config, *method, "--logging_steps", "1", "--output_dir", str(tmp_path / recipe.__name__)])
        AcceleratorState._reset_state(reset_partial_state=True)
    folders = [tmp_path / recipe.__name__ for recipe in (finetune, no_trainer)]
    histories = [History.load(folder) for folder in folders]
    losses = [[row["loss"] for row in history.logs] for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert histories[1].frozen == histories[0].frozen
    assert {event["step"] for event in histories[0].events} == {4}
    assert 0 < len(histories[0].events) < len(histories[0].values)
    with_trainer, without = map(weights, folders)
    assert with_trainer.keys() == without.keys()
    for name, tensor in with_trainer.items():
        torch.testing.assert_close(without[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


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
    engine = no_trainer.main([*config, "--tau", "1e9"])
    assert (engine.t, engine.total_steps, engine.done) == (4, 8, True)
    assert History.load(tmp_path / "run").frozen == engine.frozen


def test_rows_are_learned_as_trl_learns_them(config: list[str], tiny_model_dir: Path) -> None:
    """Text, prompt and answer, and a conversation, also where they are too long."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The cat."}
    plan = finetune.prepare(config)
    args = copy.copy(plan.training)
    args.max_length = 20
    for row in (PAIRS[3], {"text": "The cat sat. " * 9}, {"prompt": [asked], "completion": [answer]}):
        trainer = SFTTrainer(
            str(tiny_model_dir), args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer
        )
        expected = trainer.train_dataset[0]
        found = no_trainer.encode(row, tokenizer, 20)
        assert found == {name: expected[name] for name in found}


@pytest.mark.slow
@pytest.mark.compatibility("Custom loops", "recipes/no_trainer.py, two processes (DDP)", "works")
def test_two_processes_equal_one(config: list[str], tmp_path: Path) -> None:
    options = [*config, *FULL, "--monitor", "gradient_change", "--train_rows", "32"]
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
        (["--grades", "false"], "tau is missing"),
        (["--optim", "sgd"], "optim=.*no_trainer.py does not know that argument"),
        (["--resume_from_checkpoint", "/nowhere"], "'/nowhere' holds no complete checkpoint"),
        (["--tao", "1"], "'--tao' is unknown"),
    ],
)
def test_what_the_loop_does_not_know_is_refused(
    options: list[str], message: str, config: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        no_trainer.main([*config, *options])
    assert re.search(rf"^no_trainer\.py: error: .*{message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "run").exists()
