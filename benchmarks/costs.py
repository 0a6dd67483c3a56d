"""What parts of a training step cost, for `grades-hf suggest`: shares of the FLOPs of a step with nothing frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.internals import ComputeMeter, sequential_blocks, unwrap


def costs(meter: ComputeMeter, model: nn.Module) -> dict[str, Any]:
    """Shares of a step that freezing can save, out of the counts of a run in which nothing froze.

    Returns:
        `weight_gradient`: of each component by name, counted. `input_gradient`: of each block from the lowest up, an
        estimate: as much as its forward pass, of which it has the same share as of the model's linear layers' weights.
        Empty where the model has several sequences of blocks. All empty where nothing was counted.
    """
    if not meter.measured:
        return {}
    counts = meter.state_dict()
    total, forward, elements = counts["last"]
    each = total / elements * counts["base"]  # FLOPs of a step as large as the one in which components were counted
    towers = sequential_blocks(unwrap(model))
    everything = _linear(model)
    blocks = [_linear(block) for block in towers[0][1]] if len(towers) == 1 else []
    return {
        "weight_gradient": {name: flops / each for name, flops in counts["components"].items()},
        "input_gradient": [forward / total * block / everything for block in blocks],
    }


def _linear(module: nn.Module) -> int:
    """Elements of the weights of all linear layers (their sizes, whatever type they are held in)."""
    return sum(part.in_features * part.out_features for part in module.modules() if isinstance(part, nn.Linear))
