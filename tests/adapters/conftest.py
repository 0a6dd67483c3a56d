"""Runs of a dozen steps: without a tau a look is due at every step, and the second one may end a run."""

from __future__ import annotations

import pytest


@pytest.fixture
def looks_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST_STEP": 2, "EARLIEST": 0.0, "LATER": 1.0, "APART": 1.0, "MOST": 100}.items():
        monkeypatch.setattr(f"grades_hf.ending.ending.{name}", value)
