"""merge_frozen_adapters: the same function to rounding, weights and adapters to the bit, a base layer's cost."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from grades_hf import GradES, GradESCallback, GradESConfig, GradESTrainer
from grades_hf.assembly import refuse_conflicts
from grades_hf.contracts import Trait
from grades_hf.freezing.merging import MergedLinear, Merger, merge, split
from grades_hf.record.counter import FlopCounter
from tests import small
from tests.architectures import TABLE
from tests.ddp_worker import Case
from tests.small import llama, tokens

SOME = {"q": 1e9, "down": 1e9, ".*": 1e-30}  # all q and down freeze at the first chance, nothing else ever
NAMES = {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")}
IDS = torch.randint(3, 64, (2, 8), generator=torch.Generator().manual_seed(9))


def lora(**options: Any) -> peft.PeftModel:
    """A LoRA on a random Llama whose B is not zero: updates of about a tenth of the weights' norm."""
    return fill(small.lora(**options))


def fill(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                parameter.copy_(0.003 * torch.randn(parameter.shape, generator=generator))
    return model


def start(model: nn.Module, merging: bool = True, tau: Any = None, **options: Any) -> GradES:
    config = GradESConfig(tau=tau or SOME, alpha=0.25, merge_frozen_adapters=merging, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    engine = GradES(model, config, total_steps=8, optimizer=optimizer)
    engine.optimizer = optimizer  # for `train`
    return engine


def train(model: nn.Module, engine: GradES, steps: int = 4, loss: Callable[..., Tensor] | None = None) -> list[float]:
    """`steps` optimizer steps on random tokens; what has to freeze freezes at step 3."""
    losses = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        value = model(input_ids=ids, labels=ids).loss if loss is None else loss(model, ids)
        value.backward()
        engine.step()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        losses.append(value.item())
    return losses


def settled(engine: GradES) -> GradES:
    """All components frozen at once, without a step."""
    for component in engine.components:
        component.frozen_at = 1
    engine._settle()
    return engine


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in bits(model).items() if "lora_" not in name}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


# --- the same function -------------------------------------------------------------------------------------------


def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of all that is live."""
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    gradient = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return out.logits.detach(), gradient


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters, float32 and bfloat16 base weights", "works")
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_differ_by_rounding_only(base: torch.dtype, adapter: torch.dtype) -> None:
    def make(merging: bool) -> nn.Module:
        model = lora()
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(adapter if "lora_" in name else base)
        engine = start(model, merging)
        train(model, engine, 3)
        assert engine.extension("merging") is None if not merging else engine.extension("merging").merged == NAMES
        return model

    unmerged, merged = make(False), make(True)
    exact = copy.deepcopy(unmerged).double()
    for (name, p), q in zip(unmerged.named_parameters(), merged.parameters(), strict=True):
        assert torch.equal(p, q), name  # until now the two runs are one
        assert p.requires_grad == q.requires_grad
        exact.get_parameter(name).requires_grad_(p.requires_grad)
    for one, other, true in zip(outcome(merged), outcome(unmerged), outcome(exact), strict=True):
        assert one.isfinite().all()
        assert distance(one, other) > 0
        if base == adapter == torch.float32:
            assert distance(one, other) < 3e-6
        # as far from the exact result as the function that is not merged, at most half as far again
        assert distance(one, true) < 1.5 * distance(other, true) + 1e-7


def kinds() -> dict[str, Callable[[], nn.Module]]:
    def adapt(model: nn.Module, **options: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fill(get_peft_model(model, LoraConfig(r=4, **options)))

    def biased() -> nn.Module:
        config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(
            LlamaConfig(**config, vocab_size=64, attention_bias=True, bos_token_id=1, eos_token_id=2)
        )

    gpt2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    names = ["q_proj", "up_proj"]
    return {
        "LoRA": lambda: adapt(llama(), target_modules=names),
        "rsLoRA": lambda: adapt(llama(), target_modules=names, use_rslora=True, lora_alpha=3),
        "patterns": lambda: adapt(llama(), target_modules=names, rank_pattern={"q_proj": 3}, alpha_pattern={"up": 5}),
        "a bias in B, none in the base": lambda: adapt(llama(), target_modules=names, lora_bias=True),
        "a bias in B and in the base": lambda: adapt(biased(), target_modules=["q_proj"], lora_bias=True),
        "the base's bias is trained": lambda: adapt(biased(), target_modules=["q_proj"], bias="lora_only"),
        "Conv1D": lambda: adapt(GPT2LMHeadModel(gpt2), target_modules=["c_attn", "c_fc"], lora_bias=True),
    }


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters, rsLoRA, lora_bias, rank_pattern, Conv1D", "works")
@pytest.mark.parametrize("kind", kinds())
def test_each_layer_computes_what_peft_computes(kind: str) -> None:
    model = kinds()[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    before = bits(model)
    engine = start(model, tau=1e9)
    found = [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    inputs = [torch.randn(2, 3, module.in_features) for module in found]
    expected = [module(x) for module, x in zip(found, inputs, strict=True)]
    settled(engine)
    assert len(engine.extension("merging").merged) == len(found) == len(engine.components)
    for module, x, y in zip(found, inputs, expected, strict=True):
        assert type(module) is MergedLinear
        torch.testing.assert_close(module(x), y, rtol=1e-5, atol=2e-6)
        with FlopCounter() as ours:
            module(x)
        with FlopCounter() as theirs:
            module.base_layer(x)
        assert ours.total == theirs.total > 0
    assert equal(bits(model), before)
    engine.close()
    assert equal(bits(model), before)
    assert all(torch.equal(module(x), y) for module, x, y in zip(found, inputs, expected, strict=True))


@pytest.mark.compatibility(
    "Precision and memory", "merge_frozen_adapters with reentrant and non-reentrant checkpointing", "works"
)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_merged_pair_costs_what_a_base_layer_costs(reentrant: bool | None) -> None:
    """Forward and backward FLOPs are those of a model that has no adapter there, and the losses are the run's."""

    def prepare(model: nn.Module) -> nn.Module:
        if reentrant is not None:
            small.enable_checkpointing(model.base_model.model, reentrant)
            model.enable_input_require_grads()
        return model.train()

    def flops(model: nn.Module) -> int:
        with FlopCounter() as counter:
            model(input_ids=IDS, labels=IDS).loss.backward()
        return counter.total

    merged, unmerged = prepare(lora()), prepare(lora())
    engine, plain = start(merged), start(unmerged, False)
    assert train(merged, engine) == pytest.approx(train(unmerged, plain), abs=2e-6)
    assert engine.extension("merging").merged == NAMES
    rest = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    without = prepare(get_peft_model(llama(), LoraConfig(r=2, target_modules=rest)))
    assert flops(merged) == flops(without) < flops(unmerged)


@pytest.mark.slow
@pytest.mark.compatibility("Trainer", "torch_compile with merge_frozen_adapters", "works")
def test_compiled(tmp_path: Path) -> None:
    final = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        callback = GradESCallback(tau=SOME, alpha=0.25, merge_frozen_adapters=True)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = small.trainer(lora(), tmp_path / str(compiled), [callback], max_steps=6, **options)
        seen: list[set[str]] = []
        trainer.add_callback(small.Spy(lambda *_, c=callback, s=seen: s.append(c.engine.extension("merging").merged)))
        trainer.train()
        assert seen == [set()] * 2 + [NAMES] * 4
        final[compiled] = bits(trainer.model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # before and after the freezing
    for name, tensor in final[False].items():
        torch.testing.assert_close(final[True][name], tensor, rtol=1e-4, atol=1e-6)


def test_a_bfloat16_base_that_loses_small_updates_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for factor, told in ((1.0, 0), (0.02, 1)):
        caplog.clear()
        model = lora()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= factor
            elif "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
        engine = settled(start(model))
        assert len(engine.extension("merging").merged) == 14
        layer = layers(model)[0]
        exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        lost = (layer._merged.base.weight - exact).norm() / layer.get_delta_weight("default").norm()
        assert layer._merged.lost.item() == pytest.approx(lost.item(), rel=1e-3)
        assert [r.levelname for r in caplog.records if "rounding the merged weights" in r.getMessage()] == (
            ["WARNING"] * told
        )
        assert (lost > 0.25) == bool(told)


# --- whoever looks sees the truth --------------------------------------------------------------------------------


def merged_run(**options: Any) -> tuple[nn.Module, GradES, dict[str, Tensor]]:
    """A model in the middle of a run, with merged layers; and its base weights before."""
    model = lora(**options)
    before = bases(model)
    engine = start(model)
    train(model, engine, 4)
    assert engine.extension("merging").merged == NAMES
    return model, engine, before


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters, saving in the middle of a run", "works")
def test_what_is_saved_is_the_base_and_the_adapter(tmp_path: Path) -> None:
    model, engine, before = merged_run()
    assert equal(bases(model), before)
    assert equal({n: p.detach() for n, p in model.named_parameters() if "lora_" not in n}, before)
    saved = bits(model)
    model.save_pretrained(tmp_path / "merged")
    twin = copy.deepcopy(model)
    engine.close()
    assert equal(bits(model), saved)
    model.save_pretrained(tmp_path / "after")
    one, other = (tmp_path / folder / "adapter_model.safetensors" for folder in ("merged", "after"))
    assert one.read_bytes() == other.read_bytes()
    assert not any(isinstance(module, MergedLinear) for module in model.modules())
    assert equal(twin.merge_and_unload().state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.compatibility(
    "Client trainers", "merge_frozen_adapters with a reference model by disable_adapter", "works"
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, of the pass without gradients
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_reference_model_is_the_base_model_between_forward_and_backward(reentrant: bool | None) -> None:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        policy = model(input_ids=ids).logits
        with torch.no_grad(), model.disable_adapter():
            reference = model(input_ids=ids).logits
        assert torch.equal(reference, expected(input_ids=ids).logits)
        return (policy.log_softmax(-1) - reference.log_softmax(-1)).square().mean()

    expected = llama()
    losses = {}
    for merging in (False, True):
        model = lora()
        if reentrant is not None:
            small.enable_checkpointing(model.base_model.model, reentrant)
            model.enable_input_require_grads()
        engine = start(model.train(), merging)
        losses[merging] = train(model, engine, 6, loss)
        assert engine.extension("merging") is None or engine.extension("merging").merged == NAMES
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_another_adapter_another_scaling_and_the_base_are_computed_as_peft_does() -> None:
    model, engine, _ = merged_run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    train(model, engine, 1)
    assert engine.extension("merging").merged == NAMES
    plain = copy.deepcopy(model)
    for layer in layers(plain):
        if isinstance(layer, MergedLinear):
            split(layer)

    def same() -> None:
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)

    with model.disable_adapter(), plain.disable_adapter():
        same()
    for m in (model, plain):
        m.set_adapter("second")
    same()
    for m in (model, plain):
        m.base_model.set_adapter(["default", "second"])
    same()
    for m in (model, plain):
        m.set_adapter("default")
        for layer in layers(m):
            layer.scale_layer(0.5)
    same()
    engine.reassert()  # between steps: merged again, with the new factor
    assert engine.extension("merging").merged == NAMES
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    names = ["default", "__base__"]
    model.eval(), plain.eval()
    torch.testing.assert_close(model(IDS, adapter_names=names).logits, plain(IDS, adapter_names=names).logits)


def test_pefts_merge_and_unmerge_in_the_middle_of_a_run() -> None:
    model, engine, _ = merged_run()
    twin, other = lora(), None
    other = start(twin, False)
    train(twin, other, 4)
    twin.load_state_dict(model.state_dict())
    for m in (model, twin):
        m.merge_adapter()
    assert engine.extension("merging").merged == set()
    assert equal(bits(model), bits(twin))
    engine.reassert()
    assert engine.extension("merging").merged == set()  # what the user has merged stays merged
    assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    for m in (model, twin):
        m.unmerge_adapter()
    assert equal(bits(model), bits(twin))
    engine.reassert()
    assert engine.extension("merging").merged == NAMES
    assert equal(bits(model), bits(twin))


@pytest.mark.parametrize("how", ["load_state_dict", "assign", "in place", "load_adapter"])
def test_new_weights_are_seen_at_once(how: str, tmp_path: Path) -> None:
    model, engine, _ = merged_run()
    new = lora()
    new.save_pretrained(tmp_path)
    if how in ("load_state_dict", "assign"):
        model.load_state_dict(new.state_dict(), assign=how == "assign")
    elif how == "load_adapter":
        model.load_adapter(tmp_path, "default", is_trainable=True)
    else:  # as an average of the weights does for an evaluation
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(new.get_parameter(name))
    model.train()
    layer, other = layers(model)[0], layers(new)[0]
    x = torch.randn(3, layer.in_features)
    assert how == "in place" or torch.equal(layer(x), other(x))
    assert torch.equal(model.get_base_model()(input_ids=IDS).logits, new(input_ids=IDS).logits)
    engine.reassert()
    assert engine.extension("merging").merged == NAMES
    torch.testing.assert_close(model(input_ids=IDS).logits, new(input_ids=IDS).logits)


def test_moving_and_casting_the_model() -> None:
    model, engine, _ = merged_run()
    model.double()
    twin = lora().double()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    engine.reassert()
    torch.testing.assert_close(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    assert engine.extension("merging").merged == NAMES


# --- runs --------------------------------------------------------------------------------------------------------


def run(folder: Path, merging: bool = True, resume: bool = False, **options: Any) -> tuple[Trainer, GradESCallback]:
    grades = {k: options.pop(k) for k in ("skip_validation", "keep_frozen", "max_frozen_fraction") if k in options}
    callback = GradESCallback(tau=SOME, alpha=0.25, merge_frozen_adapters=merging, **grades)
    trainer = small.trainer(lora(), folder, [callback], save_strategy="steps", save_steps=5, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5") if resume else None)
    return trainer, callback


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters, checkpoints and resume", "works")
def test_a_resumed_run_ends_bit_for_bit_like_one_that_is_not_interrupted(tmp_path: Path) -> None:
    whole, callback = run(tmp_path)
    resumed, again = run(tmp_path, resume=True)
    plain, _ = run(tmp_path / "plain", merging=False)
    assert callback.engine.frozen == again.engine.frozen == dict.fromkeys(callback.engine.frozen, 4)
    assert set(callback.engine.frozen) == NAMES
    assert equal(bits(whole.model), bits(resumed.model))
    assert equal(bases(whole.model), bases(lora()))
    for name, tensor in bits(plain.model).items():
        other = whole.model.state_dict()[name]
        if any(part in name for part in ("q_proj", "down_proj")):
            assert torch.equal(other, tensor), name  # frozen at the first step that could differ
        torch.testing.assert_close(other, tensor, rtol=0, atol=1e-3)
    assert all(p.requires_grad == ("lora_" in n) for n, p in whole.model.named_parameters())


@pytest.mark.compatibility("Trainer", "load_best_model_at_end with merge_frozen_adapters", "works")
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    extra = {"eval_dataset": tokens(8)}
    options = {"eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True, "skip_validation": False}
    trainer, callback = run(
        tmp_path, extra=extra, max_steps=10, metric_for_best_model="loss", greater_is_better=True, **options
    )
    assert set(callback.engine.frozen) == NAMES
    best = peft.PeftModel.from_pretrained(llama(), trainer.state.best_model_checkpoint)
    assert torch.equal(trainer.model.eval()(input_ids=IDS).logits, best.eval()(input_ids=IDS).logits)
    assert equal(bases(trainer.model), bases(lora()))


def test_a_second_run_and_frozen_pairs_that_stay_frozen(tmp_path: Path) -> None:
    trainer, callback = run(tmp_path, keep_frozen=True, max_steps=6)
    assert not any(isinstance(module, MergedLinear) for module in trainer.model.modules())
    assert equal(bases(trainer.model), bases(lora()))
    frozen = [n for n, p in trainer.model.named_parameters() if "lora_" in n and not p.requires_grad]
    assert len(frozen) == 8
    first = callback.engine
    callback.config.tau = 1e-30
    trainer.train()
    assert callback.engine is not first
    assert len(callback.engine.components) == 10
    assert equal(bases(trainer.model), bases(lora()))


@pytest.mark.compatibility("Faults", "an exception in a run with merge_frozen_adapters", "works")
@pytest.mark.parametrize("cls", [Trainer, GradESTrainer])
def test_after_a_crash_everything_is_as_before(cls: type[Trainer], tmp_path: Path) -> None:
    def crash(model: nn.Module, optimizer: Any) -> None:
        if any(isinstance(module, MergedLinear) for module in model.modules()):
            raise KeyboardInterrupt

    config = GradESConfig(tau=SOME, alpha=0.25, merge_frozen_adapters=True)
    mine = cls is GradESTrainer
    callbacks = [*([] if mine else [GradESCallback(config)]), small.Spy(crash)]
    trainer = small.trainer(lora(), tmp_path, callbacks, cls, {"grades": config} if mine else None)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    model = trainer.model
    assert equal(bases(model), bases(lora()))
    assert not any(isinstance(module, MergedLinear) for module in model.modules())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_resuming_the_end_of_a_finished_run(tmp_path: Path) -> None:
    config = GradESConfig(tau=1e9, alpha=0.5, merge_frozen_adapters=True)
    options = {"save_strategy": "steps", "save_steps": 3}
    first = small.trainer(lora(), tmp_path, [GradESCallback(config)], **options)
    first.train()
    again = small.trainer(lora(), tmp_path, [GradESCallback(config)], **options)
    assert again.train(resume_from_checkpoint=True).global_step == 7
    assert equal(bits(again.model), bits(first.model))


@pytest.mark.slow
@pytest.mark.compatibility("Distributed", "DDP with merge_frozen_adapters", "works")
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    grades = {"tau": SOME, "alpha": 0.25, "merge_frozen_adapters": True}
    cases = [
        Case(f"{find}-{static}-{checkpointing}", "lora", grades, 1, checkpointing, find, static)
        for find, static, checkpointing in ((True, False, False), (False, False, True), (False, True, False))
    ]
    both = [*cases, dataclasses.replace(cases[0], resume=True)]
    (tmp_path / "cases.json").write_text(json.dumps([dataclasses.asdict(case) for case in both]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    command += ["-m", "tests.ddp_worker", str(tmp_path / "cases.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    for case in cases:
        single = case.trainer(tmp_path / "single" / case.name, 4, [GradESCallback(grades)])
        single.train()
        reports = [torch.load(tmp_path / f"{case.name}-{rank}.pt") for rank in range(2)]
        assert set(reports[0]["frozen"]) == NAMES
        assert reports[0]["apart"] == reports[1]["apart"] == [0.0] * 8
        for name, parameter in single.model.named_parameters():
            assert torch.equal(reports[0]["weights"][name], reports[1]["weights"][name])
            torch.testing.assert_close(reports[0]["weights"][name], parameter.detach(), rtol=0, atol=2e-6)
    resumed = torch.load(tmp_path / f"{cases[0].name}-resumed-0.pt")["weights"]
    assert equal(resumed, torch.load(tmp_path / f"{cases[0].name}-0.pt")["weights"])


# --- what cannot be merged ---------------------------------------------------------------------------------------


def share(model: nn.Module) -> None:
    blocks = model.base_model.model.model.layers
    blocks[1].self_attn.q_proj.base_layer.weight = blocks[0].self_attn.q_proj.base_layer.weight


def unfreeze(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_(True)


def two(model: nn.Module) -> None:
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])


def patch(model: nn.Module) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.forward = layer.base_layer.forward


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def subclass(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.__class__ = Scaled


def dropout(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"] = nn.Dropout(0.1)


def tie(model: nn.Module) -> None:
    one, other = (block.self_attn.q_proj for block in model.base_model.model.model.layers)
    other.lora_A["default"].weight = one.lora_A["default"].weight


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters: layers that cannot be merged stay as they are", "works")
@pytest.mark.parametrize(
    ("change", "number", "reason"),
    [
        (share, 2, "on a base weight that several layers share"),
        (unfreeze, 1, "on a base weight that is trained itself"),
        (two, 2, "with 2 active adapters"),
        (patch, 1, "on a layer whose forward was replaced"),
        (subclass, 1, "on a layer of type Scaled"),
        (dropout, 1, "with lora_dropout=0.1"),
        (tie, 2, "with a tensor that several adapters share"),
    ],
)
def test_single_layers_that_cannot_be_merged_are_left_and_told(
    change: Callable[[nn.Module], None], number: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = lora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(model)
    before = bases(model)
    engine = start(model, tau={"q_proj": 1e9, "down": 1e9, ".*": 1e-30})
    (record,) = [r for r in caplog.records if "merge_frozen_adapters applies to" in r.getMessage()]
    total = len(engine.components)
    assert record.levelname == "WARNING"
    assert f"{total - number} of {total} components, not to the others: {number} {reason}" in record.getMessage()
    train(model, engine, 4)
    assert engine.extension("merging").merged == {n for n in engine.frozen if n in engine.extension("merging").layers}
    assert len(engine.extension("merging").merged) == len(engine.frozen) - number
    engine.close()
    if change is not unfreeze:
        assert equal(bases(model), before)


def on_experts() -> nn.Module:
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    return get_peft_model(TABLE["GPT-OSS"].build(), config)


@pytest.mark.compatibility("Adapters", "merge_frozen_adapters with DoRA, dropout, target_parameters only", "refused")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (llama, "14 with full weights"),
        (lambda: lora(use_dora=True), "14 with Dora"),
        (lambda: lora(lora_dropout=0.1), "14 with lora_dropout=0.1"),
        (
            lambda: get_peft_model(llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"])),
            "2 with adapters of another",
        ),
        (on_experts, r"2 of PEFT's type lora.ParamWrapper"),
    ],
)
def test_nothing_to_merge_is_refused_before_anything_changes(make: Callable[[], nn.Module], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    trainable = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=rf"merge_frozen_adapters=True can merge none of .*{reason}.*lora_dropout=0"):
        start(model, tau=1.0)
    assert trainable == [p for p in model.parameters() if p.requires_grad]
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")  # bitsandbytes on a CPU comments on its kernels
@pytest.mark.compatibility("Adapters", "merge_frozen_adapters on quantized base weights", "refused")
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4-bit", "8-bit"])
def test_quantized_base_weights_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model = get_peft_model(quantized, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"can merge none of the 14 components: 14 of PEFT's type lora.Linear[48]bit"):
        start(model)


@pytest.mark.compatibility("Distributed", "merge_frozen_adapters with sharded parameters (FSDP)", "refused")
def test_sharded_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="merge_frozen_adapters=True does not work with sharded parameters"):
        refuse_conflicts([Merger()], frozenset({Trait.SHARDED}))


def test_unsloth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    monkeypatch.setattr(type(model.base_model.model.model.layers[0].mlp).forward, "__module__", "unsloth.models.llama")
    with pytest.raises(ValueError, match="merge_frozen_adapters=True does not work with Unsloth"):
        start(model)


# --- on an accelerator -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.compatibility(
    "Precision and memory", "merge_frozen_adapters on a GPU: base weights move to the host", "works"
)
def test_on_a_gpu_the_base_weights_wait_on_the_host() -> None:
    model = lora().cuda()
    before, ids = bases(model), IDS.cuda()
    engine = start(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            reference = model(input_ids=ids).logits
    used = torch.cuda.memory_allocated()
    settled(engine)
    assert len(engine.extension("merging").merged) == 14
    assert torch.cuda.memory_allocated() <= used + 14 * 512  # the least that is allocated for a tensor
    assert all(layer.base_layer.weight.device.type == "cpu" for layer in layers(model))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, reference)
    assert all(torch.equal(tensor.cuda(), before[name]) for name, tensor in bases(model).items())
    model.merge_adapter()
    model.unmerge_adapter()
    model.load_state_dict(before, strict=False)
    engine.reassert()
    assert len(engine.extension("merging").merged) == 14
    engine.close()
    assert all(tensor.is_cuda and torch.equal(tensor, before[name]) for name, tensor in bases(model).items())


def test_merging_a_single_layer_and_back() -> None:
    layer = layers(lora())[0]
    weight = layer.base_layer.weight
    before, x = weight.detach().clone(), torch.randn(3, layer.in_features)
    expected = layer(x)
    merge(layer, "default")
    assert torch.equal(layer._merged.base.weight, before + layer.get_delta_weight("default"))
    assert layer.base_layer.weight is weight
    torch.testing.assert_close(layer(x), expected)
    split(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(weight, before)
