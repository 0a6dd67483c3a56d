"""fp16: gradients without the factor of a GradScaler, and the steps that it is going to skip."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class GradientScale:
    """The gradient scaler of a training loop; does nothing where there is none.

    Between the backward pass and the update gradients carry the scaler's factor, unless clipping has taken it out.
    And where one of them has overflowed, the scaler leaves the update out, and clipping turns all other gradients into
    zeros: values of such a step say nothing.

    Args:
        optimizers: The torch optimizers that the scaler steps.
        scaler: The scaler, or None.

    Raises:
        RuntimeError: this version of torch does not tell what the scaler has found.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None) -> None:
        self.optimizers = optimizers
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler is not None and not hasattr(self.scaler, "_found_inf_per_device"):
            raise RuntimeError(
                f"GradES cannot work with the GradScaler of torch {torch.__version__}, which lacks "
                "_found_inf_per_device. Use torch 2.13, or train in bfloat16."
            )

    def remove(self) -> bool:
        """Take the factor out of the gradients, once a step as clipping does; whether the scaler will skip the step."""
        if self.scaler is None:
            return False
        skipped = False
        for optimizer in self.optimizers:
            if not self.scaler._found_inf_per_device(optimizer):
                self.scaler.unscale_(optimizer)
            skipped |= any(found.item() > 0 for found in self.scaler._found_inf_per_device(optimizer).values())
        return skipped


def find_scaler(optimizer: object) -> torch.amp.GradScaler | None:
    """The scaler that accelerate's wrapper of an optimizer holds; None where there is none."""
    while optimizer is not None:
        scaler = getattr(optimizer, "scaler", None)
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler
        optimizer = getattr(optimizer, "optimizer", None)
    return None
