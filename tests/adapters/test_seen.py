"""When GradES ends a run, one line says so to whoever has configured no logging."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from tests.adapters import overfit
from tests.small import llama
from grades_hf import GradESCallback
callback = overfit.ending() if sys.argv[2] == "look" else GradESCallback(tau=1e9, alpha=0.1)
overfit.trainer(llama(), Path(sys.argv[1]), [callback], disable_tqdm=False).train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["look", "tau"])
def test_one_line_at_the_default_verbosity(by: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), by]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    lines = [line for line in shown.stderr.splitlines() if "the run ends at step" in line]
    assert len(lines) == 1
    if by == "look":
        assert "held-out rows say that the weights have got worse" in lines[0]
        assert "with the average" in lines[0]
        assert "+-" in lines[0]
        assert "the average is returned" in lines[0]
    else:
        assert "14 of 14 components are frozen" in lines[0]
