"""Discovery beyond single architectures: wrappers, blocks of unusual shape, selection, thresholds, errors."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import MambaConfig, MambaForCausalLM

from grades_hf import GradES, GradESConfig, find_components
from grades_hf.criteria import assign_thresholds
from grades_hf.find.components import survey
from tests.architectures import TABLE, GPTBlock, SmallGPT
from tests.small import llama, lora


def names(model: nn.Module, **options) -> list[str]:
    return [component.name for component in find_components(model, GradESConfig(tau=1.0, **options))]


def reasons(model: nn.Module) -> dict[str, str]:
    return {site.name: reason for site, reason in survey(model, require=False)[1]}


# --- structure ---------------------------------------------------------------------------------------------------


def test_what_is_left_out_and_why() -> None:
    left_out = reasons(TABLE["Qwen2-MoE"].build())
    assert left_out == {
        "model.embed_tokens": "an embedding",
        "model.layers.0.mlp.gate": "a router",
        "model.layers.1.mlp.gate": "a router",
        "model.layers.0.mlp.shared_expert_gate": "a vector",
        "model.layers.1.mlp.shared_expert_gate": "a vector",
        **{
            name: "a norm"
            for layer in range(2)
            for name in (
                f"model.layers.{layer}.input_layernorm",
                f"model.layers.{layer}.post_attention_layernorm",
            )
        },
        "model.norm": "a norm",
        "lm_head": "the output embedding (LM head)",
    }
    left_out = reasons(TABLE["Mamba"].build())
    assert left_out["backbone.layers.0.mixer.A_log"] == "a bare parameter that multiplies no hidden states"
    assert left_out["backbone.layers.0.mixer.conv1d"] == "a convolution"
    left_out = reasons(TABLE["BERT"].build())
    assert left_out["bert.pooler.dense"] == left_out["classifier"] == "outside the repeated blocks"


def test_the_state_of_a_narrow_mamba_is_no_matrix() -> None:
    config = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=16)
    assert not [name for name in names(MambaForCausalLM(config)) if name.endswith("A_log")]


def test_a_linear_layer_with_as_many_rows_as_experts_is_no_router() -> None:
    """Qwen3-Next-80B has 512 experts, shared experts of 512 features and keys of 512 features."""
    found = names(TABLE["Qwen3-Next"].build())
    assert "model.layers.0.mlp.shared_expert.gate_proj" in found
    assert "model.layers.0.mlp.gate" not in found


def test_experts_in_a_list_with_an_unnamed_router() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Linear(16, 24), nn.Linear(24, 16)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2)
            self.norm = nn.LayerNorm(16)
            self.moe = nn.ModuleDict({"choose": nn.Linear(16, 3), "parts": nn.ModuleList([Expert() for _ in range(3)])})

    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])})
    components = {component.name: component for component in find_components(model)}
    assert "blocks.0.moe.choose" not in components
    assert components["blocks.1.moe.parts.2.w1"].group == "experts"
    assert components["blocks.1.attn.in_proj_weight"].parameters[1] is model["blocks"][1].attn.in_proj_bias


@pytest.mark.parametrize("container", ["sequential", "modules in a dict", "the model itself", "with other modules"])
def test_where_blocks_are_kept(container: str) -> None:
    blocks = [GPTBlock(16, 2) for _ in range(3)]
    if container == "sequential":
        model: nn.Module = nn.ModuleDict({"wte": nn.Embedding(9, 16), "trunk": nn.Sequential(*blocks)})
    elif container == "modules in a dict":
        model = nn.ModuleDict({"trunk": nn.ModuleDict({f"layer{i}": block for i, block in enumerate(blocks)})})
    elif container == "the model itself":
        model = nn.Sequential(*blocks)
    else:
        model = nn.Sequential(nn.Embedding(9, 16), *blocks, nn.Linear(16, 9))
    components = find_components(model)
    assert len(components) == 12
    assert [component.layer for component in components] == [0] * 4 + [1] * 4 + [2] * 4


def test_parametrized_linear_layers_keep_their_tensors_together() -> None:
    model = SmallGPT()
    weight_norm(model.transformer["h"][0].attn.c_attn)
    component = next(c for c in find_components(model) if c.name == "transformer.h.0.attn.c_attn")
    assert [tuple(p.shape) for p in component.measured] == [(96, 1), (96, 32)]
    assert len(component.parameters) == 3


def test_names_are_those_of_the_model_inside_wrappers() -> None:
    model = llama()
    expected = names(model)
    assert names(torch.compile(model, backend="eager")) == expected
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert names(model) == expected
    assert names(torch.nn.DataParallel(llama())) == expected


def test_tied_layers_are_one_component() -> None:
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = find_components(model)
    assert len(found) == 11
    assert {c.layer for c in found if c.group == "mlp"} == {0}
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    found = find_components(model)
    assert len(found) == 13
    assert reasons(model)["model.layers.1.mlp.up_proj"] == "shares its tensors with another layer"


def test_only_what_is_trainable_is_found() -> None:
    model = llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    assert names(model) == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]


# --- selection ---------------------------------------------------------------------------------------------------


def test_target_and_exclude_modules() -> None:
    model = llama()
    assert names(model, target_modules=["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert names(model, target_modules=["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert names(model, target_modules=r".*layers\.0\.mlp.*") == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert names(model, target_modules=["lm_head"]) == ["lm_head"]
    assert names(model, target_modules=["input_layernorm"]) == [f"model.layers.{i}.input_layernorm" for i in range(2)]
    assert names(model, exclude_modules=r".*\.mlp\..*", target_modules=["up_proj", "o_proj"]) == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    assert len(names(model, exclude_modules=["down_proj"])) == 12


def test_all_linear_takes_linear_layers_outside_the_blocks_and_routers_but_no_lm_head() -> None:
    found = names(TABLE["BERT"].build(), target_modules="all-linear")
    assert {"bert.pooler.dense", "classifier"} < set(found)
    found = names(TABLE["Switch"].build(), target_modules="all-linear")
    assert "encoder.block.1.layer.1.mlp.router.classifier" in found
    assert "lm_head" not in found


def test_names_that_match_nothing_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="grades_hf"):
        names(llama(), target_modules=["q_proj", "query"], exclude_modules=["lm_haed"])
    assert "target_modules names 'query'" in caplog.text
    assert "exclude_modules names 'lm_haed'" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query"]}, r"target_modules=\['query'\] matches no trainable module.*embed_tokens"),
        ({"target_modules": "(q_proj"}, r"target_modules='\(q_proj' is no valid regular expression"),
        ({"exclude_modules": "*mlp"}, r"exclude_modules='\*mlp' is no valid regular expression"),
        ({"exclude_modules": ".*"}, "found no trainable attention or feed-forward matrix"),
    ],
)
def test_selections_that_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        names(llama(), **options)


def test_a_model_without_repeated_blocks_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"no repeated blocks.*target_modules.*Trainable here: 0, 2"):
        find_components(model)
    assert names(model, target_modules=["0", "2"]) == ["0", "2"]


def test_a_model_with_nothing_trainable() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        find_components(llama().requires_grad_(False))


def test_trainable_norms_alone_are_nothing_to_track() -> None:
    model = llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"no trainable attention or feed-forward matrix.*Trainable here: model\.norm"):
        find_components(model)


# --- thresholds --------------------------------------------------------------------------------------------------


def taus(architecture: str, tau: dict[str, float]) -> dict[str, float]:
    components = find_components(TABLE[architecture].build())
    assign_thresholds(components, tau)
    return {component.name: component.tau for component in components}


def test_a_threshold_for_each_tower() -> None:
    found = taus("Qwen2.5-VL", {"vision": 3.3, "language": 33.0})
    assert {tau for name, tau in found.items() if name.startswith("model.visual.")} == {3.3}
    assert {tau for name, tau in found.items() if name.startswith("model.language_model.")} == {33.0}


def test_a_threshold_for_each_group_and_projection() -> None:
    found = taus("Llama", {"attention": 1.0, "mlp": 2.0, "up": 3.0})
    assert found["model.layers.0.self_attn.q_proj"] == 1.0
    assert found["model.layers.0.mlp.gate_proj"] == 2.0
    assert found["model.layers.1.mlp.up_proj"] == 3.0


def test_the_most_specific_key_wins_whatever_the_order() -> None:
    tau = {
        r".*\.layers\.1\..*": 6.0,
        "model.language_model.layers.1.mlp.down_proj": 7.0,
        "vision.attention": 5.0,
        "mlp": 2.0,
        "language": 1.0,
        "vision": 1.5,
        "o": 4.0,
        "attention": 3.0,
        "k_proj": 8.0,
    }
    expected = {
        "model.language_model.layers.0.self_attn.q_proj": 3.0,  # a group outweighs a tower
        "model.language_model.layers.0.mlp.up_proj": 2.0,
        "model.language_model.layers.0.self_attn.o_proj": 4.0,  # a projection outweighs a group
        "model.visual.blocks.0.attn.proj": 4.0,
        "model.visual.blocks.0.attn.qkv": 5.0,  # two labels outweigh one of them
        "model.visual.blocks.0.mlp.up_proj": 2.0,
        "model.language_model.layers.1.self_attn.o_proj": 6.0,  # a pattern outweighs labels
        "model.language_model.layers.1.self_attn.k_proj": 6.0,  # of two patterns the first
        "model.language_model.layers.0.self_attn.k_proj": 8.0,  # an ending outweighs labels
        "model.language_model.layers.1.mlp.down_proj": 7.0,  # the full name outweighs all
    }
    for mapping in (tau, dict(sorted(tau.items(), key=lambda item: item[0].startswith("k_proj")))):
        found = taus("Qwen2.5-VL", mapping)
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("key", ["attention", "q", "q_proj", r".*q_proj", "model.layers.0.self_attn.q_proj"])
def test_a_dot_and_star_stand_for_all_that_no_other_key_matches(key: str) -> None:
    for mapping in ({".*": 1.0, key: 2.0}, {key: 2.0, ".*": 1.0}):
        found = taus("Llama", mapping)
        assert found["model.layers.0.self_attn.q_proj"] == 2.0
        assert found["model.layers.0.mlp.up_proj"] == 1.0


def test_mlp_stands_for_experts_that_nothing_else_names() -> None:
    assert set(taus("Mixtral", {"attention": 1.0, "mlp": 2.0}).values()) == {1.0, 2.0}
    found = taus("Mixtral", {"attention": 1.0, "mlp": 2.0, "experts": 3.0})
    assert found["model.layers.0.mlp.experts.down_proj"] == 3.0


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        ({"attention": 1.0}, r"leaves 6 of 14 components without a threshold \(model\.layers\.0\.mlp\.gate_proj"),
        ({".*": 1.0, "atention": 2.0}, r"'atention', which matches no component.*Use a label \(attention, down"),
        ({".*": 1.0, "vision": 2.0}, "'vision', which matches no component"),
        ({".*": 1.0, "attention.up": 2.0}, r"'attention\.up', which matches no component"),
        ({".*": 1.0, r"model\.norm": 2.0}, "which matches no component"),
        ({".*": 1.0, "(q": 2.0}, r"'\(q', which is no valid regular expression"),
    ],
)
def test_mappings_that_cannot_work(tau: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taus("Llama", tau)


def test_the_engine_refuses_a_bad_mapping_before_it_changes_anything() -> None:
    model = lora()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="matches no component"):
        GradES(model, GradESConfig(tau={".*": 1.0, "nothing": 1.0}), total_steps=4)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
