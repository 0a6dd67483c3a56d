"""Algorithm 1 of the GradES paper, read line by line into plain PyTorch.

This is the slow twin that the library is held to. It shares no code with it: its own training loop, its own list of
matrices by their names in Llama, a full copy of every previous gradient and weight, one Python float per matrix and
step, sums in float64.

    t_grace <- ceil(alpha * T);  F <- {}
    for t = 1 .. T:
        accumulate the gradient over the micro-batches of step t, clip it
        for every matrix W not in F:
            G_W(t) <- || grad W_t - grad W_{t-1} ||_1                 (Eq. 1; Eq. 3: || grad A ||_1 + || grad B ||_1)
            if t > t_grace and G_W(t) < tau:  F <- F + {W}            (no update of W at step t, nor later)
        update all that is not in F
        if F holds every matrix:  stop

Where the paper leaves a choice open: at step 1 there is no previous gradient and so no value (the paper starts from 0);
`patience` asks for several checks below tau in a row, counted after the grace period; a check is made at steps that
`check_every` divides, of the change over one step all the same; `weight_change` is the size of the last completed
update, |W_{t-1} - W_{t-2}| with W_s the weight after s updates, and no value where that is exactly 0: there was none;
exactly 0 is no value either where there was nothing to learn from: every value of a check is 0, or this matrix has had
another value before, and the gradient itself is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

MATRIX = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<name>model\.layers\.\d+\.(?:self_attn\.[qkvo]|mlp\.(?:gate|up|down))_proj)"
    r"\.(?P<tensor>weight|bias|lora_[AB]\.\w+\.weight)"
)

MicroBatch = dict[str, Tensor]


@dataclass
class Outcome:
    """What a run did.

    Attributes:
        frozen: Matrix name to the step (1-based) that it froze at.
        values: Matrix name to {step: G_W(step)}; a step without a value is absent.
        losses: One loss per step, summed over its micro-batches.
        state: The final state dict, as copies.
        last_step: The last step that was made.
    """

    frozen: dict[str, int]
    values: dict[str, dict[int, float]]
    losses: list[float]
    state: dict[str, Tensor]
    last_step: int


def matrices(model: nn.Module) -> dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]]:
    """Name to (tensors that are measured, tensors that freeze) of every trainable matrix of a Llama-like model."""
    found: dict[str, tuple[list[nn.Parameter], list[nn.Parameter]]] = {}
    for path, parameter in model.named_parameters():
        match = MATRIX.fullmatch(path)
        if match is None or not parameter.requires_grad:
            continue
        measured, freezing = found.setdefault(match["name"], ([], []))
        freezing.append(parameter)
        if match["tensor"] != "bias":
            measured.append(parameter)
    return found


def train(
    model: nn.Module,
    batches: Sequence[Sequence[MicroBatch]],
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    learning_rate: Callable[[int], float],
    *,
    tau: float,
    alpha: float,
    monitor: str,
    reduction: str = "sum",
    patience: int = 1,
    check_every: int = 1,
    max_grad_norm: float | None = 1.0,
    max_frozen_fraction: float = 1.0,
    total_steps: int | None = None,
    on_gradients: Callable[[int, nn.Module], None] | None = None,
) -> Outcome:
    """Train `model` in place.

    Args:
        model: A causal language model whose forward takes `labels` and `num_items_in_batch`.
        batches: For each step the micro-batches that it accumulates; the loss is the mean over all their tokens.
        make_optimizer: Called once, before the first step.
        learning_rate: From a step (1-based) to its learning rate.
        tau, alpha, monitor, reduction, patience, check_every: as above; tau=0 only measures.
        max_grad_norm: None leaves the gradient as it is.
        max_frozen_fraction: Training stops when this part of the matrices is frozen.
        total_steps: The paper's T; default: as many as there are batches.
        on_gradients: Called with (step, model) when the gradient is complete, before it is clipped.
    """
    total_steps = len(batches) if total_steps is None else total_steps
    t_grace = math.ceil(Fraction(str(alpha)) * total_steps)
    tracked = matrices(model)
    optimizer = make_optimizer(model)

    frozen: dict[str, int] = {}
    values: dict[str, dict[int, float]] = {name: {} for name in tracked}
    below: dict[str, int] = dict.fromkeys(tracked, 0)
    previous_gradients: dict[str, list[Tensor | None]] = {}
    previous_weights: dict[str, list[Tensor]] = {}
    losses: list[float] = []
    step = 0

    model.train()
    for step, micro_batches in enumerate(batches, start=1):
        tokens = sum(batch["labels"][..., 1:].ne(-100).sum() for batch in micro_batches)
        loss_of_step = 0.0
        for batch in micro_batches:
            loss = model(**batch, num_items_in_batch=tokens).loss
            loss.backward()
            loss_of_step += loss.item()
        losses.append(loss_of_step)
        if on_gradients is not None:
            on_gradients(step, model)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)

        now_at: dict[str, float | None] = {}
        for name, (measured, _) in tracked.items():
            if name in frozen:
                continue
            gradients = [None if w.grad is None else w.grad.detach().clone() for w in measured]
            weights = [w.detach().clone() for w in measured]
            if monitor == "gradient_norm":
                pairs = [(g, None if g is None else torch.zeros_like(g)) for g in gradients]
            elif monitor == "gradient_change":
                pairs = list(zip(gradients, previous_gradients.get(name, [None] * len(measured)), strict=True))
            elif monitor == "weight_change":
                pairs = list(zip(weights, previous_weights.get(name, [None] * len(measured)), strict=True))
            else:
                raise ValueError(f"monitor={monitor!r}")
            previous_gradients[name] = gradients
            previous_weights[name] = weights

            if step % check_every != 0:
                continue
            now_at[name] = None
            if all(now is not None and before is not None for now, before in pairs):
                value = sum((now.double() - before.double()).abs().sum().item() for now, before in pairs)
                if reduction == "mean":
                    value /= sum(w.numel() for w in measured)
                if value > 0 or monitor != "weight_change":  # exactly 0: there was no update
                    now_at[name] = value

        empty = all(value is None or value == 0 or math.isnan(value) for value in now_at.values())
        for name, value in now_at.items():
            constant = any(w.grad is not None and w.grad.any() for w in tracked[name][0])
            if value == 0 and not constant and (empty or any(values[name].values())):
                value = None
            if value is not None:
                values[name][step] = value
            if step <= t_grace:
                continue
            if value is not None and math.isfinite(value) and value < tau:
                below[name] += 1
            else:
                below[name] = 0
            if below[name] >= patience:
                frozen[name] = step
                for parameter in tracked[name][1]:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if len(frozen) / len(tracked) >= max_frozen_fraction:
            break

    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    return Outcome(frozen, values, losses, state, step)
