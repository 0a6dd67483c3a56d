"""Training scripts that others wrote, unchanged, with the callback added as their users would: TRL's and Transformers'.

TRL's come with the package. Transformers' examples are in its repository only: `GRADES_HF_EXAMPLES` names the folder
`examples/pytorch` of a checkout that fits the installed version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from grades_hf import History
from tests.clients.checks import FIRST, STEPS

ROOT = Path(__file__).parents[2]
EXAMPLES = os.environ.get("GRADES_HF_EXAMPLES")

# What a user changes in a script whose Trainer is made by a function of it: one argument.
RUNNER = """
import runpy, sys
from transformers import Trainer
from grades_hf import GradESCallback

original = Trainer.__init__
def with_grades(self, *args, callbacks=None, **kwargs):
    grades = GradESCallback(tau={"q": 1e9, "down": 1e9, ".*": 1e-30}, alpha=0.5)
    original(self, *args, callbacks=[*(callbacks or []), grades], **kwargs)
Trainer.__init__ = with_grades
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(script: Path, tmp_path: Path, *arguments: str) -> None:
    """Run the script for six steps and look at what it leaves behind."""
    output = tmp_path / "out"
    options = [
        "--max_steps", str(STEPS), "--per_device_train_batch_size", "2", "--save_strategy", "no", "--report_to", "none",
        "--use_cpu", "--learning_rate", "1e-3", "--output_dir", str(output),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(script), *arguments, *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    history = History.load(output)
    assert history.steps == list(range(1, STEPS + 1))
    assert set(history.frozen.values()) == {FIRST}
    assert 0 < len(history.frozen) < len(history.values)
    assert list(output.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.compatibility("Client trainers", "TRL's own training script (trl/scripts/sft.py)", "works")
def test_trl_sft(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"Once upon a time there was a cat who liked {n} fish."} for n in range(16)]
    (data / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    script = Path(trl.__file__).parent / "scripts" / "sft.py"
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear"]
    run(script, tmp_path, "--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(data), *lora)


@pytest.mark.slow
@pytest.mark.skipif(EXAMPLES is None, reason="GRADES_HF_EXAMPLES names no examples of transformers")
@pytest.mark.parametrize("name", ["run_clm", "run_fim"])
def test_transformers_language_modeling(name: str, tiny_model_dir: Path, real_text: list[str], tmp_path: Path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("\n".join(real_text[:60]), encoding="utf-8")
    script = Path(str(EXAMPLES)) / "language-modeling" / f"{name}.py"
    options = ["--train_file", str(text), "--do_train", "--block_size", "32", "--overwrite_cache"]
    run(script, tmp_path, "--model_name_or_path", str(tiny_model_dir), *options)
