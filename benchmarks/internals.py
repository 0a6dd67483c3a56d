"""What the benchmarks use of grades_hf besides its public names, in one place."""

from __future__ import annotations

from grades_hf.components import unwrap
from grades_hf.config import DEFAULTS
from grades_hf.criteria import grace_steps
from grades_hf.flops import ComputeMeter, FlopCounter
from grades_hf.freezer import unwrap_optimizers
from grades_hf.structure import sequential_blocks
from grades_hf.suggest import Costs, suggest

ALPHA = DEFAULTS["threshold"]["alpha"]  # the grace ratio of a threshold where none is given
MAX_FROZEN_FRACTION = DEFAULTS["threshold"]["max_frozen_fraction"]

__all__ = [
    "ALPHA",
    "MAX_FROZEN_FRACTION",
    "ComputeMeter",
    "Costs",
    "FlopCounter",
    "grace_steps",
    "sequential_blocks",
    "suggest",
    "unwrap",
    "unwrap_optimizers",
]
