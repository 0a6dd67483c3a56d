"""What freezing has saved, in FLOPs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Savings:
    """What the optimizer steps so far have cost, against the same steps with nothing frozen. All figures are FLOPs.

    Counted are the multiplications and additions (2 per multiply-accumulate) of matrix products, convolutions and
    attention, as `torch.utils.flop_counter` counts them, in the model's own forward passes in training mode, in their
    backward passes (recomputation under gradient checkpointing included), and in looks, on this process. Left out:
    element-wise work (norms, activations, softmax, the optimizer), work outside of the model (a loss that the trainer
    computes), other passes without gradients (evaluation, generation, a reference model), kernels that torch has no
    formula for (`torch.utils.flop_counter.register_flop_formula` adds one), and the rest of GradES.

    Attributes:
        steps: The optimizer steps that the figures are about.
        full: What they would have cost with nothing frozen.
        used: What they have cost, the looks included.
        weight_gradient: Saved: gradients of frozen components' matrices. A matrix's gradient costs as much as its
            product in the forward pass.
        input_gradient: Saved: the rest of backward, which ends where nothing below is trained (and then recomputes
            less under checkpointing), and the weight gradients of what freezes besides components.
        adapter: Saved: merged adapters' own products in the forward pass, and as much for their input gradients.
        planned: What all planned steps would have cost with nothing frozen, at the mean of those so far.
        looks: What the looks at held-out rows have cost (without a tau).
    """

    steps: int
    full: float
    used: float
    weight_gradient: float
    input_gradient: float
    adapter: float
    planned: float
    looks: float = 0.0

    @property
    def saved(self) -> float:
        """`full` minus `used`: the sum of the three parts less the looks, so below 0 while only looks were paid for."""
        return self.weight_gradient + self.input_gradient + self.adapter - self.looks

    @property
    def fraction(self) -> float:
        """The part of `full` that is saved."""
        return self.saved / self.full

    @property
    def fraction_of_planned(self) -> float:
        """The part of `planned` that is not used: for a run that has ended, early or not, what it saved in all."""
        return 1 - self.used / self.planned
