"""What the benchmarks use of grades_hf besides its public names, in one place."""

from __future__ import annotations

from grades_hf.config import grace_steps
from grades_hf.ending.ending import EARLIEST, LATER, MOST
from grades_hf.record.counter import FlopCounter
from grades_hf.record.meter import Meter
from grades_hf.tools.suggest import suggest

ALPHA = 0.5  # the grace ratio of a threshold where none is given
MAX_FROZEN_FRACTION = 1.0

__all__ = [
    "ALPHA",
    "EARLIEST",
    "LATER",
    "MAX_FROZEN_FRACTION",
    "MOST",
    "FlopCounter",
    "Meter",
    "grace_steps",
    "suggest",
]
