"""A short fine-tune that reports to all trackers at once; `test_trackers` starts it in children, offline."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from grades_hf import GradESCallback, GradESConfig, GradESTrainer
from tests import small
from tests.small import llama

CONFIG = GradESConfig(tau={"q": 1e9, "down": 1e9, ".*": 1e-30}, alpha=0.5)
TRACKERS = ["tensorboard", "wandb", "trackio"]


def run(kind: str, folder: Path) -> None:
    """12 steps with GradESTrainer (`kind` "trainer") or the callback ("callback")."""
    options = {"report_to": TRACKERS, "run_name": "run", "project": "grades", "save_strategy": "steps", "save_steps": 6}
    if kind == "trainer":
        trainer = small.trainer(llama(), folder, [], cls=GradESTrainer, extra={"grades": CONFIG}, **options)
    else:
        trainer = small.trainer(llama(), folder, [GradESCallback(CONFIG)], **options)
    trainer.train()


if __name__ == "__main__":
    os.environ["TENSORBOARD_LOGGING_DIR"] = sys.argv[2] + "/tensorboard"
    run(sys.argv[1], Path(sys.argv[2]))
