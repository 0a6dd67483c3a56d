"""float16: gradients without the factor of a GradScaler, and the steps that it is going to skip."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from ..contracts import Extension, Run, Step, Trait


class Scaler(Extension):
    """Takes the factor of a training loop's gradient scaler out of the gradients.

    Between the backward pass and the update gradients carry the scaler's factor, unless clipping has taken it out.
    Where one of them has overflowed, the scaler leaves the update out, and clipping turns all other gradients into
    zeros: values of such a step say nothing.

    Args:
        scaler: The scaler.

    Raises:
        RuntimeError: this version of torch does not tell what the scaler has found.
    """

    name = "scaler"
    error = RuntimeError
    refuses = {
        Trait.SHARDED: "a gradient scaler (fp16) does not work with sharded parameters (FSDP2): ranks may disagree on "
        "which step is skipped. Train in bfloat16 (bf16=True).",
    }

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def attach(self, run: Run, undo: ExitStack) -> None:
        self._optimizers = run.optimizers
        if not hasattr(self.scaler, "_found_inf_per_device"):
            raise RuntimeError(
                f"GradES cannot work with the GradScaler of torch {torch.__version__}, which lacks "
                "_found_inf_per_device. Use torch 2.13, or train in bfloat16."
            )

    def before_check(self, step: Step) -> None:
        step.skipped = self.unscale()

    def unscale(self) -> bool:
        """Take the factor out of the gradients, once a step as clipping does; whether the scaler will skip the step."""
        skipped = False
        for optimizer in self._optimizers:
            if not self.scaler._found_inf_per_device(optimizer):
                self.scaler.unscale_(optimizer)
            skipped |= any(bool(found > 0) for found in self.scaler._found_inf_per_device(optimizer).values())
        return skipped


def find_scaler(optimizer: object) -> torch.amp.GradScaler | None:
    """The scaler that accelerate's wrapper of an optimizer holds, if it is switched on; None where there is none."""
    while optimizer is not None:
        scaler = getattr(optimizer, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler if scaler.is_enabled() else None
        optimizer = getattr(optimizer, "optimizer", None)
    return None
