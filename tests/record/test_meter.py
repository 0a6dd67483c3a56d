"""Savings: equal to torch's own counter run over every step, whatever the batches' lengths; and cheap."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import random
import re
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grades_hf import GradES, GradESConfig, find_components
from grades_hf.record.meter import Meter
from tests import small
from tests.small import lora

STEPS = 30
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
EAGER = {"attn_implementation": "eager"}  # torch has no formula for the other one's CPU kernel


@pytest.fixture(autouse=True)
def no_mode_is_left() -> Iterator[None]:
    yield
    assert _get_current_dispatch_mode_stack() == []
    assert not torch.nn.modules.module._global_forward_hooks


# --- models and their batches ----------------------------------------------------------------------------------------


def llama(layers: int = 2) -> nn.Module:
    model = small.llama(layers)
    model.set_attn_implementation("eager")
    return model


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    small.enable_checkpointing(model, reentrant)
    return model


class Experts(nn.Module):
    """Two of four experts for each token, each a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up_proj": nn.Linear(16, 24), "down_proj": nn.Linear(24, 16)}) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 16)
        weights, chosen = self.gate(rows).softmax(-1).topk(2, -1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                values = expert["down_proj"](expert["up_proj"](rows[row]).relu())
                out = out.index_add(0, row, values * weights[row, place, None])
        return out.view_as(x)


def experts() -> nn.Module:
    model = llama()
    for block in model.model.layers:
        block.mlp = Experts()
    return model


def llava() -> nn.Module:
    vision = CLIPVisionConfig(**SIZES, image_size=32, patch_size=8)
    text = LlamaConfig(**SIZES, vocab_size=64, num_key_value_heads=1)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config)
    model.set_attn_implementation("eager")
    return model


T5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
MIXTRAL = MixtralConfig(
    **SIZES, **EAGER, vocab_size=64, num_key_value_heads=1, num_local_experts=4, experts_implementation="eager"
)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama, lora": lambda: lora(llama()),
    "llama, checkpointing": lambda: checkpointed(llama(), False),
    "llama, reentrant checkpointing": lambda: checkpointed(llama(), True),
    "lora, reentrant checkpointing": lambda: checkpointed(lora(llama()), True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, **EAGER)),
    "bert": lambda: BertForSequenceClassification(BertConfig(vocab_size=64, **SIZES, **EAGER)),
    "t5": lambda: T5ForConditionalGeneration(T5),
    "mixtral": lambda: MixtralForCausalLM(MIXTRAL),
    "experts": experts,
    "llava": llava,
}


def make_batch(kind: str, chance: random.Random) -> dict[str, Tensor]:
    """1 to 4 rows of 20 to 90 tokens."""
    rows, generator = chance.randint(1, 4), torch.Generator().manual_seed(chance.randint(0, 2**31))
    ids = torch.randint(3, 64, (rows, chance.randint(20, 90)), generator=generator)
    labels = ids
    if kind == "bert":
        labels = torch.zeros(rows, dtype=torch.long)
    elif kind == "t5":
        labels = torch.randint(3, 64, (rows, chance.randint(5, 40)), generator=generator)
    elif kind == "llava":
        images = chance.randint(1, rows)
        ids[:images, :16] = 1
        return {"input_ids": ids, "labels": ids, "pixel_values": torch.rand(images, 3, 32, 32, generator=generator)}
    return {"input_ids": ids, "labels": labels}


def flops(model: nn.Module, parts: list[dict[str, Tensor]]) -> int:
    with FlopCounterMode(display=False) as counter:
        for part in parts:
            (model(**part).loss / len(parts)).backward()
    return counter.get_total_flops()


# --- a run, against torch's counter at every step --------------------------------------------------------------------


def make_engine(model: nn.Module, **options: Any) -> GradES:
    """Every second matrix freezes at step 4, unless `options` say otherwise."""
    if "tau" not in options:
        names = [component.name for component in find_components(model)]
        options["tau"] = {**dict.fromkeys(map(re.escape, names[::2]), 1e9), ".*": 1e-30}
    config = GradESConfig(**{"alpha": 0.1, "monitor": "gradient_norm", **options})
    return GradES(model, config, total_steps=STEPS)


def run(
    model: nn.Module, engine: GradES, kind: str = "llama", accumulation: int = 1, steps: int = STEPS
) -> tuple[float, float]:
    """A plain loop; returns what torch's counter says of all its steps, and of the same with nothing frozen."""
    chance, used, seen = random.Random(1), 0, []
    model.train()
    for _ in range(steps):
        seen.append([make_batch(kind, chance) for _ in range(accumulation)])
        used += flops(model, seen[-1])
        assert _get_current_dispatch_mode_stack() == []
        engine.step()
        model.zero_grad()
    engine.close()
    full = sum(flops(model, parts) for parts in seen)
    model.zero_grad()
    return used, full


def check(engine: GradES, used: float, full: float, within: float = 1e-9) -> None:
    savings = engine.savings()
    assert savings.full == pytest.approx(full, rel=within)
    assert savings.used == pytest.approx(used, abs=within * full)
    assert savings.saved == pytest.approx(savings.full - savings.used, abs=1e-9 * full)
    assert savings.planned == savings.full * STEPS / savings.steps


@pytest.mark.parametrize(("name", "accumulation"), list(zip(MODELS, itertools.cycle([1, 2]), strict=False)))
def test_lengths_that_vary(name: str, accumulation: int) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    engine = make_engine(model)
    used, full = run(model, engine, name, accumulation)
    assert 0 < len(engine.frozen) < len(engine.components)
    assert engine.meter._tally.counted == 2
    check(engine, used, full)
    savings = engine.savings()
    assert savings.adapter == 0
    if "lora" not in name:  # nothing but weight gradients can be saved where embeddings are trained
        assert savings.input_gradient == 0 or name == "experts"
        assert abs(savings.input_gradient) < 0.01 * full
        assert savings.weight_gradient == pytest.approx(full - used, abs=0.01 * full)
    assert sum(engine.meter.shares().values()) < 1 / 3


def test_a_run_with_nothing_frozen_saves_nothing() -> None:
    model = lora(llama())
    engine = make_engine(model, tau=1e-30)
    _, full = run(model, engine)
    savings = engine.savings()
    assert savings.full == savings.used == savings.planned == pytest.approx(full)
    assert savings.fraction == savings.saved == savings.fraction_of_planned == 0


CUT = {"tau": {r".*layers\.[01]\..*": 1e9, ".*": 1e-30}}
MERGED = {"freeze_prefix": True, "merge_frozen_adapters": True}


# 12 steps: before a second step is counted.
@pytest.mark.parametrize(
    ("options", "checkpointing", "steps"),
    [
        *itertools.product([{"freeze_prefix": True}, MERGED], [None, False, True], [STEPS]),
        ({"freeze_prefix": True}, False, 12),
        (MERGED, True, 12),
    ],
)
def test_the_cut_below_the_lowest_live_block(options: dict[str, bool], checkpointing: bool | None, steps: int) -> None:
    model = lora(llama(4)) if len(options) > 1 else llama(4)
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    engine = make_engine(model, **CUT, **options)
    used, full = run(model, engine, steps=steps)
    check(engine, used, full, 1e-9 if steps == STEPS else 0.01)
    savings = engine.savings()
    assert savings.input_gradient > savings.weight_gradient > 0
    if len(options) > 1:
        assert savings.adapter == pytest.approx(2 * savings.weight_gradient)


def test_blocks_that_freeze_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(6)
    engine = make_engine(model, tau=1.0, alpha=0.0, freeze_prefix=True)
    layers = torch.tensor([component.layer for component in engine.components])
    monkeypatch.setattr(engine.criterion, "update", lambda places, step, values: layers[places] < step // 5 - 1)
    used, full = run(model, engine, steps=STEPS)
    assert 0 < len(engine.frozen) < len(engine.components)
    check(engine, used, full, 0.01)


def test_shares_of_a_step() -> None:
    model = llama()
    engine = make_engine(model, tau=1e-30)
    assert engine.meter.shares() == {}
    _, full = run(model, engine)
    chance = random.Random(1)
    tokens = sum(make_batch("llama", chance)["input_ids"].numel() for _ in range(STEPS))
    shares = engine.meter.shares()
    for component in engine.components:
        assert shares[component.name] * full == pytest.approx(2 * tokens * component.numel)


def test_counted_steps_are_few() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(100)))
    engine = make_engine(model, tau=1e-30, target_modules="all-linear")
    for step in range(300):
        model(torch.randn(2, 4)).sum().backward()
        engine.step()
        if step < 90:
            model[step].requires_grad_(False)  # something changes at every step
    # the first, one in 25 while something is new, then one in 100
    assert engine.meter._tally.counted == 1 + 4 + 1


# --- gradients of a cache: the model runs inside of a backward pass --------------------------------------------------


def test_a_model_that_runs_again_inside_of_a_backward_pass_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    engine = make_engine(model, tau=1e-30, target_modules="all-linear")
    expected = 0
    for rows in (3, 5, 2):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            embedded = model(x)
        cached = embedded.requires_grad_(True)

        def again(gradient: Tensor, x: Tensor = x) -> None:
            with torch.enable_grad():
                (model(x) * gradient).sum().backward()

        loss = (cached * 1.0).sum()
        cached.register_hook(again)
        loss.backward()
        engine.step()
        expected += 5 * 2 * rows * 16
    assert engine.savings().full == engine.savings().used == expected


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3, 5, 27])
def test_interrupted_equals_uninterrupted(stop: int) -> None:
    engines = []
    for stops in ((), (stop,)):
        model, chance = lora(llama()), random.Random(1)
        engine = make_engine(model)
        for step in range(1, STEPS + 1):
            flops(model.train(), [make_batch("llama", chance)])
            engine.step()
            model.zero_grad()
            if step in stops:
                state = json.loads(json.dumps(engine.state_dict(tensors=False)))
                engine.close()
                engine = make_engine(model)
                engine.load_state_dict(state)
        engines.append(engine)
    assert engines[0].frozen == engines[1].frozen
    assert engines[0].savings() == engines[1].savings()
    assert engines[0].meter.state_dict() == engines[1].meter.state_dict()


def test_counts_that_are_lost() -> None:
    old = Meter()
    old.load(old.check({"format": 1, "steps": 3, "reason": None}))
    with pytest.raises(RuntimeError, match="counts of the session before are lost: an earlier version"):
        old.savings(5)
    assert old.state_dict()["reason"] is not None

    model = llama()
    engine = make_engine(model)
    run(model, engine, steps=5)
    state = engine.state_dict()
    del state["extensions"]["meter"]
    engine = make_engine(model)
    engine.load_state_dict(state)
    run(model, engine, steps=2)
    with pytest.raises(RuntimeError, match="counts of the session before are lost: the checkpoint holds none"):
        engine.savings()


@pytest.mark.parametrize(
    "wrong", [{"steps": "x"}, {"sizes": 3}, {"weights": float("nan")}, {"base": {"a": None}}, {"state": 1}]
)
def test_malformed_states_are_refused(wrong: dict[str, Any]) -> None:
    state = Meter().state_dict()
    Meter().check(state)
    for bad in ({**state, **wrong}, {key: value for key, value in state.items() if key not in wrong}):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            Meter().check(bad)


# --- nothing else changes --------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.fail: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        if self.fail == "backward":
            x.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("in backward")))
        elif self.fail is not None:
            raise self.fail
        return self.layers[1](x)


def net_engine(model: nn.Module) -> GradES:
    return make_engine(model, tau=1e-30, target_modules="all-linear")


def test_errors_leave_no_mode_behind() -> None:
    model = Net()
    engine = net_engine(model)
    x = torch.randn(3, 4)
    for fail, words in ((RuntimeError("in forward"), "in forward"), ("backward", "in backward")):
        model.fail = fail
        with pytest.raises(RuntimeError, match=words):
            model(x).sum().backward()
        assert _get_current_dispatch_mode_stack() == []
    model.fail = None
    model(x).sum().backward()
    engine.step()
    assert engine.meter.measured


@pytest.mark.parametrize("then", ["forward", "step", "close", "another engine"])
def test_an_interrupted_forward_pass_is_cleaned_up(then: str) -> None:
    """torch calls no hook after a KeyboardInterrupt."""
    model = Net()
    engine = net_engine(model)
    model.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 4))
    model.fail = None
    if then == "forward":
        model(torch.randn(3, 4)).sum().backward()
        engine.step()
        assert engine.savings().full == 5 * 96
    elif then == "step":
        engine.step()
    elif then == "close":
        engine.close()
    else:
        net_engine(model).close()


def test_passes_without_gradients_do_not_count_and_a_mode_of_the_user_stays_the_users() -> None:
    model = Net()
    engine = net_engine(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    with FlopCounterMode(display=False) as counter:
        output = model.train()(x)
    output.sum().backward()
    assert counter.get_total_flops() == 2 * 96
    assert engine.meter.take() == 5 * 96  # no gradient of the input is computed
    engine.step()
    model(torch.cat([x, x])).sum().backward()
    assert engine.meter.take() == 10 * 96
    engine.step()
    assert engine.savings().full == 15 * 96


def test_what_cannot_be_told_is_an_error() -> None:
    model = Net()
    engine = net_engine(model)
    with pytest.raises(RuntimeError, match="no optimizer step"):
        engine.savings()
    engine.step()
    with pytest.raises(RuntimeError, match="at step 1 the model was not seen to run"):
        engine.savings()
    engine = net_engine(model)
    model(torch.randn(3, 4))
    engine.step()
    with pytest.raises(RuntimeError, match="no backward pass of the model's outputs was seen"):
        engine.savings()


def test_copies_carry_no_hook_and_a_closed_run_keeps_nothing() -> None:
    model = llama()
    engine = make_engine(model)
    run_steps = [make_batch("llama", random.Random(1))]
    flops(model.train(), run_steps)
    engine.step()
    copied = copy.deepcopy(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in copied.modules())
    engine.close()
    meter = engine.meter
    del engine, copied
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None
    assert meter.savings(STEPS).full > 0
    assert meter.shares()
