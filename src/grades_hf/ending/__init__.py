"""The end of a run without a tau: the gradients propose when to look, a look decides, an average is returned."""

from .average import Average
from .ending import Ending
from .rows import HeldOut, Part, RowLosses, Rows

__all__ = ["Average", "Ending", "HeldOut", "Part", "RowLosses", "Rows"]
