"""The same small fine-tune twice: by `transformers.Trainer` and, step for step the same arithmetic, by `reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests import reference, standin

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
STEPS = 12
LENGTH = 32
LAYERS = 2


def load(kind: str, dropout: float = 0.0) -> nn.Module:
    """The first blocks of the small trained model, for `kind` "full" or "lora"; equal weights at every call."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(standin.model_dir())
    model.model.layers = model.model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    if kind == "lora":
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config)
    return model


@dataclass(frozen=True)
class Setting:
    """What both sides of a comparison share."""

    kind: str = "full"
    accumulation: int = 1
    max_grad_norm: float = 0.3
    batch: int = 2
    schedule: str = "cosine"
    shift: int = 0  # rows by which the text is rotated: another order of the batches

    def arguments(self, folder: Path, **options: Any) -> TrainingArguments:
        defaults: dict[str, Any] = {
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_grad_norm": self.max_grad_norm,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "lr_scheduler_type": self.schedule,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        return TrainingArguments(**{**defaults, **options})

    def trainer(self, folder: Path, callbacks: Sequence[Any], **options: Any) -> Trainer:
        """A Trainer over this setting; `model` and `dataset` may be given among the options."""
        model = options.pop("model", None) or load(self.kind)
        dataset = options.pop("dataset", None) or self.dataset()
        trainer_class = options.pop("trainer_class", Trainer)
        return trainer_class(
            model=model, args=self.arguments(folder, **options), train_dataset=dataset, callbacks=list(callbacks)
        )

    def rows(self) -> torch.Tensor:
        return tokens().roll(self.shift, 0)[: STEPS * self.accumulation * self.batch]

    def dataset(self) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": row, "labels": row} for row in self.rows()]

    def batches(self) -> list[list[reference.MicroBatch]]:
        micro = [{"input_ids": part, "labels": part} for part in self.rows().split(self.batch)]
        return [micro[start : start + self.accumulation] for start in range(0, len(micro), self.accumulation)]

    def reference(self, **options: Any) -> reference.Outcome:
        return reference.train(
            load(self.kind),
            self.batches(),
            optimizer,
            cosine if self.schedule == "cosine" else lambda step: LEARNING_RATE,
            max_grad_norm=self.max_grad_norm or None,
            **options,
        )


@lru_cache
def tokens() -> torch.Tensor:
    """Real text as rows of LENGTH tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(standin.model_dir())
    flat: list[int] = []
    needed = STEPS * 4 * 2 * LENGTH
    for paragraph in standin.text():
        flat += tokenizer(paragraph)["input_ids"]
        if len(flat) >= needed:
            break
    return torch.tensor(flat[:needed]).view(-1, LENGTH)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The one that Trainer makes by default: fused AdamW, no weight decay on norms."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for name, p in trainable if "norm" not in name], "weight_decay": WEIGHT_DECAY},
            {"params": [p for name, p in trainable if "norm" in name], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        fused=True,
    )


def cosine(step: int) -> float:
    """The learning rate that Trainer's cosine schedule without warm-up gives to a step (1-based)."""
    return LEARNING_RATE * max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - 1) / STEPS))))


def pick_tau(
    run: Callable[[float], reference.Outcome], values: dict[str, dict[int, float]], first: int, patience: int = 1
) -> tuple[float, reference.Outcome]:
    """A threshold at which some but not all matrices freeze, at different steps, and what then happens.

    Args:
        run: From a threshold to the reference's outcome.
        values: The trajectories of a run in which nothing froze.
        first: The first step at which freezing may happen.
        patience: Checks below the threshold that it takes.

    Returns:
        A tau that no value comes nearer to than 1e-4 of it, so that float32 and float64 sums decide alike.

    Raises:
        LookupError: none of ten promising ones is like that.
    """
    late = [[value for step, value in sorted(series.items()) if step >= first] for series in values.values()]
    # A matrix freezes at the first check at which this running maximum is below tau.
    needed = [[max(series[i - patience + 1 : i + 1]) for i in range(patience - 1, len(series))] for series in late]
    every = sorted(value for series in needed for value in series)

    def expected(tau: float) -> list[int]:
        hits = [next((i for i, value in enumerate(series) if value < tau), None) for series in needed]
        return [hit for hit in hits if hit is not None]

    def rank(tau: float) -> tuple[bool, bool, float]:
        """Freezing goes on beyond the first step, and for about 40 % of the matrices."""
        hits = expected(tau)
        late_hits = sum(hit > 0 for hit in hits)
        return late_hits == 0, len(set(hits)) < 2, abs(len(hits) / len(needed) - 0.4) - 0.2 * late_hits / len(needed)

    candidates = [(low + high) / 2 for low, high in pairwise(every) if high - low > 1e-3 * high]
    for tau in sorted(candidates, key=rank)[:10]:
        outcome = run(tau)
        near = min(abs(v / tau - 1) for series in outcome.values.values() for v in series.values() if math.isfinite(v))
        some = 0 < len(outcome.frozen) < len(outcome.values)
        if some and len(set(outcome.frozen.values())) > 1 and near > 1e-4:
            return tau, outcome
    raise LookupError("no threshold freezes some matrices and not all, at different steps")


def differing(model: nn.Module, outcome: reference.Outcome) -> list[str]:
    """The tensors of `model` that are not bit for bit what the reference ended with."""
    state = model.state_dict()
    assert state.keys() == outcome.state.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, outcome.state[name])]
