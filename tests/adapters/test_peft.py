"""PEFT methods: the trainable tensors of one adapted layer are one component, whatever the method calls them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

from grades_hf import GradES, GradESCallback, GradESConfig, find_components
from tests.architectures import TABLE
from tests.small import Spy, arguments, llama, lora, tokens

ADAPTED = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]

# Method -> its options, and what of it all layers share (so that it freezes with none of them).
METHODS: dict[str, tuple[type[PeftConfig], dict[str, Any], tuple[str, ...]]] = {
    "LoRA": (LoraConfig, {"r": 2}, ()),
    "rsLoRA": (LoraConfig, {"r": 2, "use_rslora": True}, ()),
    "DoRA": (LoraConfig, {"r": 2, "use_dora": True}, ()),
    "LoRA with biases": (LoraConfig, {"r": 2, "lora_bias": True}, ()),
    "LoRA, rank pattern": (LoraConfig, {"r": 2, "rank_pattern": {r".*\.1\.mlp\.up_proj": 5}}, ()),
    "AdaMSS": (peft.AdamssConfig, {"r": 2}, ()),
    "BEFT": (peft.BeftConfig, {}, ()),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4}, ()),
    "C3A": (peft.C3AConfig, {"block_size": 8}, ()),
    "DeLoRA": (peft.DeloraConfig, {"r": 2}, ()),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 10}, ()),
    "GLoRA": (peft.GloraConfig, {"r": 2}, ()),
    "GraLoRA": (peft.GraloraConfig, {"r": 2, "gralora_k": 2}, ()),
    "HiRA": (peft.HiraConfig, {"r": 2}, ()),
    "HRA": (peft.HRAConfig, {"r": 2}, ()),
    "IA3": (peft.IA3Config, {"feedforward_modules": ["up_proj"]}, ()),
    "Lily": (peft.LilyConfig, {"r": 2}, ("lily_B",)),
    "LoHa": (peft.LoHaConfig, {"r": 2}, ()),
    "LoKr": (peft.LoKrConfig, {"r": 2}, ()),
    "MiSS": (peft.MissConfig, {"r": 2}, ()),
    "OFT": (peft.OFTConfig, {"oft_block_size": 4}, ()),
    "OSF": (peft.OSFConfig, {}, ()),
    "PSOFT": (peft.PsoftConfig, {"r": 2}, ()),
    "PVeRA": (peft.PveraConfig, {"r": 2}, ()),
    "RandLoRA": (peft.RandLoraConfig, {"r": 2}, ()),
    "RoAd": (peft.RoadConfig, {"group_size": 8}, ()),
    "SHiRA": (peft.ShiraConfig, {"r": 2}, ()),
    "VB-LoRA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 4}, ("vblora_vector_bank",)),
    "VeRA": (peft.VeraConfig, {"r": 2}, ()),
    "WaveFT": (peft.WaveFTConfig, {"n_frequency": 10}, ()),
}


def adapt(model: nn.Module, config: PeftConfig, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice about single methods
        return get_peft_model(model, config, **options)


def names(model: nn.Module, **options: Any) -> list[str]:
    return [component.name for component in find_components(model, GradESConfig(tau=1.0, **options))]


def train(model: nn.Module, tau: dict[str, float], steps: int = 4, base_lr: float = 1e-2) -> GradES:
    """A plain loop; tau far above or below every value freezes a component at the first chance or never."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=base_lr, weight_decay=0.1)
    engine = GradES(model, GradESConfig(tau=tau, alpha=0.25), total_steps=steps, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(3, 64, (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        before = {p: p.detach().clone() for p in model.parameters()}
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        for component in engine.components:
            if component.frozen_at is not None:
                assert all(torch.equal(p, before[p]) for p in component.parameters), component.name
            else:
                assert any(not torch.equal(p, before[p]) for p in component.parameters), component.name
    return engine


@pytest.mark.compatibility("Adapters", "LoRA, rsLoRA, DoRA and 27 other methods of PEFT", "works")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # SHiRA
@pytest.mark.parametrize("method", METHODS)
def test_one_component_for_each_adapted_layer(method: str) -> None:
    cls, options, shared = METHODS[method]
    model = adapt(llama(), cls(target_modules=["q_proj", "up_proj"], **options))
    trainable = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in shared)
    }
    components = find_components(model)
    assert [component.name for component in components] == ADAPTED
    for component in components:
        own = {parameter for name, parameter in trainable.items() if name.startswith(component.name + ".")}
        assert set(component.parameters) == own
        assert component.adapter
    assert {p for component in components for p in component.parameters} == set(trainable.values())

    engine = train(model, {name: 1e9 if name.endswith("q_proj") else 1e-30 for name in ADAPTED})
    assert {component.monitor for component in engine.components} == {"gradient_norm"}
    assert engine.frozen == {name: 2 for name in ADAPTED if name.endswith("q_proj")}
    engine.close()


def test_a_bank_that_layers_share_trains_on_when_they_freeze() -> None:
    cls, options, _ = METHODS["VB-LoRA"]
    model = adapt(llama(), cls(target_modules=["q_proj", "up_proj"], **options))
    engine = train(model, dict.fromkeys(ADAPTED[:3], 1e9) | {ADAPTED[3]: 1e-30})
    bank = next(parameter for name, parameter in model.named_parameters() if "vector_bank" in name)
    assert len(engine.frozen) == 3
    assert bank.requires_grad


def test_the_magnitude_vector_of_dora_freezes_with_its_pair() -> None:
    component = find_components(lora(use_dora=True))[0]
    shapes = [tuple(p.shape) for p in component.measured]
    assert shapes == [(2, 16), (16, 2), (16,)]


# --- adapters by name, several of them ---------------------------------------------------------------------------


@pytest.mark.compatibility("Adapters", "any adapter name", "works")
def test_any_adapter_name() -> None:
    assert names(lora(adapter="stage_2")) == names(llama())


def test_only_the_active_adapter_is_tracked() -> None:
    model = lora()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    assert len(find_components(model)) == 14
    model.set_adapter("second")
    found = find_components(model)
    assert [component.name for component in found] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    assert [tuple(p.shape) for p in found[0].measured] == [(3, 16), (8, 3)]


@pytest.mark.compatibility("Adapters", "several adapters, one or more of them active", "works")
def test_adapters_that_are_active_together_freeze_together() -> None:
    model = lora()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    model.base_model.set_adapter(["default", "second"])
    found = {component.name: component for component in find_components(model)}
    assert len(found) == 14
    assert len(found["model.layers.0.self_attn.v_proj"].measured) == 4
    assert len(found["model.layers.0.self_attn.q_proj"].measured) == 2


@pytest.mark.compatibility("Adapters", "set_adapter and disable_adapter during training", "works")
def test_switching_adapters_does_not_unfreeze(tmp_path: Path) -> None:
    model = lora()
    callback = GradESCallback(tau={"q_proj": 1e9, ".*": 1e-30}, alpha=0.25)

    def switch(model: nn.Module, optimizer: Any) -> None:
        model.set_adapter("default")
        with model.disable_adapter():
            pass

    spy = Spy(look=switch)
    Trainer(
        model=model, args=arguments(tmp_path, max_steps=6), train_dataset=tokens(), callbacks=[callback, spy]
    ).train()
    frozen = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    assert callback.engine.frozen == {f"model.layers.{i}.self_attn.q_proj": 3 for i in range(2)}
    assert torch.equal(spy.weights[3][frozen], dict(model.named_parameters())[frozen])


@pytest.mark.compatibility("Adapters", "model.add_adapter of Transformers", "works")
def test_adapters_added_by_transformers_itself() -> None:
    model = llama()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), adapter_name="own")
    assert names(model) == ADAPTED
    assert set(train(model, {"up_proj": 1e9, "q_proj": 1e-30}).frozen) == {n for n in ADAPTED if "up" in n}


# --- beside the adapters -----------------------------------------------------------------------------------------


@pytest.mark.compatibility("Adapters", 'LoRA with bias="all" or "lora_only"', "works")
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_bias_that_trains_beside_its_adapter_follows_it(bias: str) -> None:
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, attention_bias=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = adapt(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    (component,) = find_components(model)
    assert [tuple(p.shape) for p in component.parameters] == [(2, 16), (16, 2), (16,)]
    assert len(component.measured) == 2  # the bias is not measured


@pytest.mark.compatibility("Adapters", "modules_to_save", "works")
def test_modules_to_save_are_tracked_only_if_named() -> None:
    model = adapt(
        TABLE["BERT"].build(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier", "dense"])
    )
    queries = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert names(model) == queries
    assert names(model, target_modules=["query", "classifier"]) == [*queries, "classifier"]
    assert "bert.encoder.layer.1.output.dense" in names(model, target_modules=["query", "dense"])


def test_trainable_tokens_and_tuned_norms_are_no_components() -> None:
    assert len(find_components(lora(trainable_token_indices=[1, 2]))) == 14
    with pytest.raises(ValueError, match="no trainable attention or feed-forward matrix"):
        find_components(adapt(llama(), peft.LNTuningConfig(target_modules=["input_layernorm"])))
    assert len(names(adapt(llama(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])))) == 2


@pytest.mark.compatibility("Adapters", "LoRA on fused experts (target_parameters)", "works")
def test_adapters_on_fused_experts() -> None:
    model = adapt(
        TABLE["GPT-OSS"].build(),
        LoraConfig(
            r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    )
    found = {component.name: component for component in find_components(model)}
    assert set(found) == {
        f"model.layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    }
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert (down.group, down.projection, down.layer) == ("experts", "down", 1)
    assert {tuple(p.shape) for p in down.measured} == {(8, 48), (32, 8)}
    gate_up = found["model.layers.1.mlp.experts.gate_up_proj"]
    assert not set(gate_up.measured) & set(down.measured)
    engine = train(model, {"q": 1e-30, "down": 1e-30, "gate_up": 1e9})
    assert set(engine.frozen) == {f"model.layers.{i}.mlp.experts.gate_up_proj" for i in range(2)}


# --- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.compatibility("Adapters", "AdaLoRA", "refused")
def test_adalora_is_refused_with_the_reason() -> None:
    model = adapt(llama(), peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10))
    with pytest.raises(ValueError, match=r"AdaLoRA: its rank allocator needs the gradient of every adapter"):
        find_components(model)


@pytest.mark.compatibility("Adapters", "prompt, prefix and adaption-prompt tuning", "refused")
@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    ],
)
def test_prompt_methods_have_nothing_to_track(config: Callable[[], PeftConfig]) -> None:
    with pytest.raises(ValueError, match="prompt tuning has none"):
        find_components(adapt(llama(), config()))


# --- quantized bases ---------------------------------------------------------------------------------------------


@pytest.mark.compatibility("Adapters", "LoRA on a 4-bit (nf4) or 8-bit base", "works")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")  # bitsandbytes on a CPU comments on its kernels
@pytest.mark.parametrize(
    "quantization",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "int8"],
)
def test_a_quantized_base_is_never_touched(quantization: dict[str, Any], tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**quantization), device_map={"": "cpu"}
    )
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    model.train()
    quantized = {p: p.detach().clone() for p in model.parameters() if not p.is_floating_point()}
    assert len(quantized) == 14

    components = find_components(model)
    assert len(components) == 14
    assert not {p for component in components for p in component.parameters} & quantized.keys()
    engine = train(model, {"attention": 1e9, "mlp": 1e-30})
    assert len(engine.frozen) == 8
    engine.close()
    for parameter, before in quantized.items():
        assert not parameter.requires_grad
        assert torch.equal(parameter.data, before.data)


@pytest.mark.compatibility("Adapters", "a quantized model without adapters", "refused")
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_quantized_model_without_adapters_has_nothing_to_track(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match="no trainable attention or feed-forward matrix"):
        find_components(model)
