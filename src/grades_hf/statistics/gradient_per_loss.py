"""gradient_per_loss: how large the gradient is in proportion to the loss that is left."""

from __future__ import annotations

from .gradient_norm import GradientNorm


class GradientPerLoss(GradientNorm):
    r"""$G_W(t) = \frac{1}{L_t} \sum_{ij} |(\nabla W_t)_{ij}|$, the L1 norm of the gradient of $\log L$.

    A model that memorizes its rows lowers their loss further than their gradients: the quotient rises, also where the
    gradient itself falls. It rises as well where a model leaves a plateau or solves its task, so a rise alone says
    nothing (see `grades_hf.ending`). A constant factor of the loss changes nothing but the scale.

    $L_t$ is the trained loss of the step (`grades_hf.inputs.loss`), and `Loss` divides by it. There is no value where
    it is infinite or not greater than 0.
    """

    name = "gradient_per_loss"
    needs_loss = True
