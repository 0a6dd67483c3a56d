"""Small random models of many architectures, with what should be tracked of each, written down by hand.

Nothing here is computed by the library: `weights` is a regular expression for the names in `model.named_parameters()`
(a dot in it stands for a dot), `matrices` how many names it matches, `lora` how many of those matrices PEFT adapts
with `target_modules="all-linear"`, `labels` what some components are called: layer, group, projection and tower.
The tests hold the library to it, and benchmarks/coverage.py prints the table in docs/coverage.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

Inputs = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    name: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    matrices: int
    weights: str
    labels: dict[str, str]
    lora: int
    idle: str | None = None  # components that these inputs give no gradient (experts that no token goes to)
    listed: bool = True  # one of those that the project set out to cover
    lora_targets: str | list[str] = field(default="all-linear")


TABLE: dict[str, Architecture] = {}


def small(
    name: str, cls: str, config: dict[str, Any], inputs: Inputs, matrices: int, weights: str, **rest: Any
) -> None:
    """Add a model of transformers, by class and configuration."""

    def build() -> nn.Module:
        model_class = getattr(transformers, cls)
        return model_class(model_class.config_class(**config))

    add(name, build, inputs, matrices, weights, **rest)


def add(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    matrices: int,
    weights: str,
    labels: dict[str, str],
    lora: int | None = None,
    **rest: Any,
) -> None:
    weights = weights.replace(".", r"\.")
    TABLE[name] = Architecture(
        name, build, inputs, matrices, weights, labels, matrices if lora is None else lora, **rest
    )


# --- inputs ------------------------------------------------------------------------------------------------------

VOCABULARY = 99


def text(length: int = 12, **more: Any) -> dict[str, Any]:
    ids = torch.randint(5, 90, (2, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}


def classes(length: int = 12) -> dict[str, Any]:
    return {**text(length), "labels": torch.tensor([0, 1])}


def sequences() -> dict[str, Any]:
    return {"input_ids": torch.randint(5, 90, (2, 12)), "labels": torch.randint(5, 90, (2, 6))}


def image(side: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, side, side), "labels": torch.tensor([0, 1])}


def pairs() -> dict[str, Any]:
    inputs = text()
    return {"input_ids": inputs["input_ids"], "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}


def with_image(tokens: int, token: int = 98, **more: Any) -> Inputs:
    """Text in which `tokens` image tokens stand for one image per row."""

    def make() -> dict[str, Any]:
        inputs = text(12 + tokens)
        inputs["input_ids"][:, 1 : 1 + tokens] = token
        inputs["labels"][:, 1 : 1 + tokens] = -100
        return {**inputs, "pixel_values": torch.randn(2, 3, 16, 16), **{k: v() for k, v in more.items()}}

    return make


def qwen_vl_image() -> dict[str, Any]:
    """One image of 4 x 4 patches (2 x 4 x 4 pixels x 3 channels) per row: 4 tokens after merging 2 x 2."""
    inputs = text(16)
    inputs["input_ids"][:, 1] = 92
    inputs["input_ids"][:, 2:6] = 93
    inputs["labels"][:, 1:6] = -100
    image_mask = (inputs["input_ids"] == 93).long()
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {
        **inputs, "pixel_values": torch.randn(32, 96), "image_grid_thw": grid, "mm_token_type_ids": image_mask
    }  # fmt: skip


def waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 20, (2, 4))}


def speech_to_text() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 400), "labels": torch.randint(5, 20, (2, 6))}


def mel(frames: int = 32) -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, frames), "labels": torch.randint(5, 90, (2, 6))}


# --- configurations ----------------------------------------------------------------------------------------------

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **SPECIAL,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 1, **SPECIAL,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "decoder_start_token_id": 0,
}  # fmt: skip
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SPECIAL}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
WAV = {
    "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
    "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
}  # fmt: skip

# --- what is tracked, and what it is called ----------------------------------------------------------------------

ATTENTION = "self_attn.[qkvo]_proj"
GATED = "mlp.(gate|up|down)_proj"
LLAMA_WEIGHTS = rf"model.layers.\d.({ATTENTION}|{GATED}).weight"
LLAMA_LABELS = {
    "model.layers.0.self_attn.q_proj": "0 attention q",
    "model.layers.1.self_attn.k_proj": "1 attention k",
    "model.layers.1.self_attn.v_proj": "1 attention v",
    "model.layers.0.self_attn.o_proj": "0 attention o",
    "model.layers.0.mlp.gate_proj": "0 mlp gate",
    "model.layers.1.mlp.up_proj": "1 mlp up",
    "model.layers.1.mlp.down_proj": "1 mlp down",
}
MOE_WEIGHTS = rf"model.layers.\d.({ATTENTION}.weight|mlp.experts.(gate_up|down)_proj)"
MOE_LABELS = {
    "model.layers.0.self_attn.o_proj": "0 attention o",
    "model.layers.0.mlp.experts.gate_up_proj": "0 experts gate_up",
    "model.layers.1.mlp.experts.down_proj": "1 experts down",
}
BERT_LAYER = r"encoder.layer.\d.(attention.self.(query|key|value)|(attention.output|intermediate|output).dense).weight"


def bert_labels(prefix: str) -> dict[str, str]:
    return {
        f"{prefix}.encoder.layer.0.attention.self.query": "0 attention q",
        f"{prefix}.encoder.layer.0.attention.self.key": "0 attention k",
        f"{prefix}.encoder.layer.1.attention.self.value": "1 attention v",
        f"{prefix}.encoder.layer.1.attention.output.dense": "1 attention o",
        f"{prefix}.encoder.layer.0.intermediate.dense": "0 mlp up",
        f"{prefix}.encoder.layer.1.output.dense": "1 mlp down",
    }


def tower_labels(path: str, tower: str, *, up: str = "mlp.fc1", down: str = "mlp.fc2") -> dict[str, str]:
    """Of towers whose blocks look like CLIP's."""
    return {
        f"{path}.0.self_attn.q_proj": f"0 attention q {tower}",
        f"{path}.1.self_attn.out_proj": f"1 attention o {tower}",
        f"{path}.0.{up}": f"0 mlp up {tower}",
        f"{path}.1.{down}": f"1 mlp down {tower}",
    }


def llama_labels(path: str, tower: str) -> dict[str, str]:
    return {
        f"{path}.1.self_attn.k_proj": f"1 attention k {tower}",
        f"{path}.0.mlp.gate_proj": f"0 mlp gate {tower}",
        f"{path}.1.mlp.down_proj": f"1 mlp down {tower}",
    }


CLIP_LAYER = r"layers.\d.(self_attn.(q|k|v|out)_proj|mlp.fc[12]).weight"
LLAMA_LAYER = rf"layers.\d.({ATTENTION}|{GATED}).weight"

# --- the architectures of the project's list ---------------------------------------------------------------------

for _name, _class in (
    ("Llama", "LlamaForCausalLM"),
    ("Qwen2", "Qwen2ForCausalLM"),
    ("Qwen3", "Qwen3ForCausalLM"),
    ("Mistral", "MistralForCausalLM"),
    ("Gemma 3", "Gemma3ForCausalLM"),
    ("OLMo 2", "Olmo2ForCausalLM"),
):
    small(_name, _class, LLAMA, text, 14, LLAMA_WEIGHTS, labels=LLAMA_LABELS)
for _name, _class, _lora in (  # PEFT's all-linear adapts the fused experts of some mixtures
    ("Qwen3-MoE", "Qwen3MoeForCausalLM", 12),
    ("Mixtral", "MixtralForCausalLM", 12),
    ("GPT-OSS", "GptOssForCausalLM", 8),
):
    small(_name, _class, LLAMA | EXPERTS, text, 12, MOE_WEIGHTS, labels=MOE_LABELS, lora=_lora)
small(
    "Phi-3", "Phi3ForCausalLM", LLAMA, text, 8,
    r"model.layers.\d.(self_attn.(qkv|o)_proj|mlp.(gate_up|down)_proj).weight",
    labels={
        "model.layers.0.self_attn.qkv_proj": "0 attention qkv",
        "model.layers.1.self_attn.o_proj": "1 attention o",
        "model.layers.0.mlp.gate_up_proj": "0 mlp gate_up",
        "model.layers.1.mlp.down_proj": "1 mlp down",
    },
)  # fmt: skip
small(
    "GPT-2", "GPT2LMHeadModel", GPT2, text, 8, r"transformer.h.\d.(attn.(c_attn|c_proj)|mlp.(c_fc|c_proj)).weight",
    labels={
        "transformer.h.0.attn.c_attn": "0 attention qkv",
        "transformer.h.0.attn.c_proj": "0 attention o",
        "transformer.h.1.mlp.c_fc": "1 mlp up",
        "transformer.h.1.mlp.c_proj": "1 mlp down",
    },
)  # fmt: skip
small(
    "GPT-NeoX", "GPTNeoXForCausalLM", BERT, text, 8,
    r"gpt_neox.layers.\d.(attention.(query_key_value|dense)|mlp.dense_(h_to_4h|4h_to_h)).weight",
    labels={
        "gpt_neox.layers.0.attention.query_key_value": "0 attention qkv",
        "gpt_neox.layers.1.attention.dense": "1 attention o",
        "gpt_neox.layers.0.mlp.dense_h_to_4h": "0 mlp up",
        "gpt_neox.layers.1.mlp.dense_4h_to_h": "1 mlp down",
    },
)  # fmt: skip
small(
    "OPT", "OPTForCausalLM", BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, text, 12,
    r"model.decoder.layers.\d.(self_attn.(q|k|v|out)_proj|fc[12]).weight",
    labels={
        "model.decoder.layers.0.self_attn.q_proj": "0 attention q",
        "model.decoder.layers.1.self_attn.out_proj": "1 attention o",
        "model.decoder.layers.0.fc1": "0 mlp up",
        "model.decoder.layers.1.fc2": "1 mlp down",
    },
)  # fmt: skip
for _name, _class, _config in (
    ("Bloom", "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, **SPECIAL}),
    ("Falcon", "FalconForCausalLM", BERT),
):
    small(
        _name, _class, _config, text, 8,
        r"transformer.h.\d.(self_attention.(query_key_value|dense)|mlp.dense_(h_to_4h|4h_to_h)).weight",
        labels={
            "transformer.h.0.self_attention.query_key_value": "0 attention qkv",
            "transformer.h.1.self_attention.dense": "1 attention o",
            "transformer.h.0.mlp.dense_h_to_4h": "0 mlp up",
            "transformer.h.1.mlp.dense_4h_to_h": "1 mlp down",
        },
    )  # fmt: skip
small(
    "DeepSeek-V3", "DeepseekV3ForCausalLM",
    LLAMA | {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
        "q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
        "n_group": 2, "topk_group": 1, "num_key_value_heads": 4, "head_dim": 4,
    },
    text, 18,
    r"model.layers.\d.(self_attn.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj).weight"
    rf"|{GATED}.weight|mlp.shared_experts.(gate|up|down)_proj.weight|mlp.experts.(gate_up|down)_proj)",
    labels={
        "model.layers.0.self_attn.q_a_proj": "0 attention q_a_proj",
        "model.layers.0.self_attn.kv_b_proj": "0 attention kv_b_proj",
        "model.layers.0.self_attn.o_proj": "0 attention o",
        "model.layers.0.mlp.up_proj": "0 mlp up",
        "model.layers.1.mlp.shared_experts.gate_proj": "1 mlp gate",
        "model.layers.1.mlp.experts.gate_up_proj": "1 experts gate_up",
        "model.layers.1.mlp.experts.down_proj": "1 experts down",
    },
    lora=12,  # PEFT turns gate, up and down into the fused experts and so leaves the others out
)  # fmt: skip
small(
    "ModernBERT", "ModernBertForMaskedLM", BERT | {"cls_token_id": 1, "sep_token_id": 2}, text, 8,
    r"model.layers.\d.(attn.(Wqkv|Wo)|mlp.(Wi|Wo)).weight",
    labels={
        "model.layers.0.attn.Wqkv": "0 attention qkv",
        "model.layers.1.attn.Wo": "1 attention o",
        "model.layers.0.mlp.Wi": "0 mlp gate_up",
        "model.layers.1.mlp.Wo": "1 mlp down",
    },
)  # fmt: skip
small("BERT", "BertForSequenceClassification", BERT, classes, 12, "bert." + BERT_LAYER, labels=bert_labels("bert"))
small("RoBERTa", "RobertaForMaskedLM", BERT, text, 12, "roberta." + BERT_LAYER, labels=bert_labels("roberta"))
small(
    "DeBERTa-v2", "DebertaV2ForSequenceClassification",
    BERT | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "norm_rel_ebd": "layer_norm",
        "share_att_key": False, "conv_kernel_size": 3,
    },
    classes, 16,
    r"deberta.encoder.layer.\d.(attention.self.(query|key|value|pos_key|pos_query)_proj"
    r"|(attention.output|intermediate|output).dense).weight",
    labels={
        "deberta.encoder.layer.0.attention.self.query_proj": "0 attention q",
        "deberta.encoder.layer.0.attention.self.pos_key_proj": "0 attention pos_key_proj",
        "deberta.encoder.layer.1.attention.output.dense": "1 attention o",
        "deberta.encoder.layer.1.intermediate.dense": "1 mlp up",
        "deberta.encoder.layer.0.output.dense": "0 mlp down",
    },
)  # fmt: skip
small(
    "T5", "T5ForConditionalGeneration", T5, sequences, 32,
    r"(en|de)coder.block.\d.layer.\d.((SelfAttention|EncDecAttention).[qkvo]|DenseReluDense.w[io]).weight",
    labels={
        "encoder.block.0.layer.0.SelfAttention.q": "0 attention q encoder",
        "encoder.block.1.layer.1.DenseReluDense.wi": "1 mlp up encoder",
        "decoder.block.1.layer.1.EncDecAttention.o": "1 attention o decoder",
        "decoder.block.0.layer.2.DenseReluDense.wo": "0 mlp down decoder",
    },
)  # fmt: skip
ENCODER_DECODER = r"model.(en|de)coder.layers.\d.((self|encoder)_attn.(q|k|v|out)_proj|fc[12]).weight"
ENCODER_DECODER_LABELS = {
    "model.encoder.layers.0.self_attn.k_proj": "0 attention k encoder",
    "model.encoder.layers.1.fc2": "1 mlp down encoder",
    "model.decoder.layers.1.encoder_attn.out_proj": "1 attention o decoder",
    "model.decoder.layers.0.fc1": "0 mlp up decoder",
}
small("BART", "BartForConditionalGeneration", BART, sequences, 32, ENCODER_DECODER, labels=ENCODER_DECODER_LABELS)
small(
    "Whisper", "WhisperForConditionalGeneration",
    BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}, mel, 32,
    ENCODER_DECODER, labels=ENCODER_DECODER_LABELS,
)  # fmt: skip
for _name, _class, _root in (
    ("ViT", "ViTForImageClassification", "vit"),
    ("DeiT", "DeiTForImageClassification", "deit"),
):
    small(
        _name, _class, VIT, image, 12, _root + r".layers.\d.(attention.[qkvo]_proj|mlp.fc[12]).weight",
        labels={
            f"{_root}.layers.0.attention.q_proj": "0 attention q",
            f"{_root}.layers.1.attention.o_proj": "1 attention o",
            f"{_root}.layers.0.mlp.fc1": "0 mlp up",
            f"{_root}.layers.1.mlp.fc2": "1 mlp down",
        },
        listed=_name == "ViT",
    )  # fmt: skip
for _name, _class, _more in (("CLIP", "CLIPModel", {"projection_dim": 16}), ("SigLIP", "SiglipModel", {})):
    small(
        _name, _class, {"text_config": dict(BERT), "vision_config": dict(VIT), **_more}, pairs, 24,
        r"(text|vision)_model.encoder." + CLIP_LAYER,
        labels=tower_labels("text_model.encoder.layers", "language")
        | tower_labels("vision_model.encoder.layers", "vision"),
    )  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_TOKENS = {"image_token_id": 93, "vision_start_token_id": 92, "vision_end_token_id": 95, "video_token_id": 94}
small(
    "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration",
    {
        "text_config": LLAMA | {"rope_parameters": MROPE},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        **QWEN_TOKENS,
    },
    qwen_vl_image, 24,
    r"model.(visual.blocks.\d.(attn.(qkv|proj)|mlp.(gate|up|down)_proj).weight|language_model." + LLAMA_LAYER + ")",
    labels={
        "model.visual.blocks.0.attn.qkv": "0 attention qkv vision",
        "model.visual.blocks.1.attn.proj": "1 attention o vision",
        "model.visual.blocks.1.mlp.up_proj": "1 mlp up vision",
        **llama_labels("model.language_model.layers", "language"),
    },
)  # fmt: skip
for _name, _class in (("Idefics3", "Idefics3ForConditionalGeneration"), ("SmolVLM", "SmolVLMForConditionalGeneration")):
    small(
        _name, _class,
        {
            "text_config": LLAMA | {"model_type": "llama"},
            # transformers 5.20 wants as many image tokens as a patch is wide
            "vision_config": VIT | {"image_size": 32, "patch_size": 4},
            "image_token_id": 98, "scale_factor": 4, "pad_token_id": 0,
        },
        with_image(4, pixel_values=lambda: torch.randn(2, 1, 3, 32, 32)), 26,
        r"model.(vision_model.encoder." + CLIP_LAYER + "|text_model." + LLAMA_LAYER + ")",
        labels=tower_labels("model.vision_model.encoder.layers", "vision")
        | llama_labels("model.text_model.layers", "language"),
    )  # fmt: skip
small(
    "LLaVA", "LlavaForConditionalGeneration",
    {
        "text_config": LLAMA | {"model_type": "llama"}, "vision_config": VIT | {"model_type": "clip_vision_model"},
        "image_token_index": 98, "vision_feature_layer": -1,
    },
    with_image(4), 26, r"model.(vision_tower.encoder." + CLIP_LAYER + "|language_model." + LLAMA_LAYER + ")",
    labels=tower_labels("model.vision_tower.encoder.layers", "vision")
    | llama_labels("model.language_model.layers", "language"),
)  # fmt: skip

# --- others -------------------------------------------------------------------------------------------------------


def other(*arguments: Any, **options: Any) -> None:
    small(*arguments, **options, listed=False)


other(
    "Swin", "SwinForImageClassification",
    {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    lambda: image(32), 18, r"swin.encoder.layers.\d.blocks.\d.(attention.[qkvo]_proj|mlp.fc[12]).weight",
    labels={
        "swin.encoder.layers.0.blocks.1.attention.q_proj": "1 attention q",
        "swin.encoder.layers.1.blocks.0.attention.o_proj": "2 attention o",
        "swin.encoder.layers.1.blocks.0.mlp.fc2": "2 mlp down",
    },
)  # fmt: skip
other(
    "Hiera", "HieraForImageClassification",
    {
        "embed_dim": 16, "image_size": [32, 32], "depths": [1, 2], "num_heads": [1, 2], "num_query_pool": 1,
        "query_stride": [2, 2], "masked_unit_size": [4, 4], "out_indices": [1],
    },
    lambda: image(32), 13, r"hiera.encoder.stages.\d.layers.\d.(attn.(qkv|proj)|mlp.fc[12]|proj).weight",
    labels={
        "hiera.encoder.stages.0.layers.0.attn.qkv": "0 attention qkv",
        "hiera.encoder.stages.1.layers.1.mlp.fc1": "2 mlp up",
    },
)  # fmt: skip
other(
    "Segformer", "SegformerForImageClassification",
    {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
        "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
    },
    lambda: image(32), 12, r"segformer.stages.\d.blocks.\d.(attention.[qkvo]_proj|mlp.fc[12]).weight",
    labels={
        "segformer.stages.0.blocks.0.attention.v_proj": "0 attention v",
        "segformer.stages.1.blocks.0.mlp.fc1": "1 mlp up",
    },
)  # fmt: skip
other(
    "ConvNeXt", "ConvNextForImageClassification",
    {"hidden_sizes": [16, 24], "depths": [2, 2], "num_stages": 2, "image_size": 32}, lambda: image(32), 8,
    r"convnext.encoder.stages.\d.layers.\d.pwconv[12].weight",
    labels={
        "convnext.encoder.stages.0.layers.1.pwconv1": "1 mlp up",
        "convnext.encoder.stages.1.layers.0.pwconv2": "2 mlp down",
    },
)  # fmt: skip
other(
    "BEiT", "BeitForImageClassification", VIT | {"use_relative_position_bias": True, "out_indices": [1]}, image, 12,
    r"beit.layers.\d.(attention.[qkvo]_proj|mlp.fc[12]).weight",
    labels={"beit.layers.0.attention.k_proj": "0 attention k", "beit.layers.1.mlp.fc1": "1 mlp up"},
)  # fmt: skip
other(
    "DINOv2", "Dinov2ForImageClassification", VIT | {"mlp_ratio": 2, "use_swiglu_ffn": True}, image, 14,
    r"dinov2.encoder.layer.\d.(attention.[qkvo]_proj|mlp.(gate|up|down)_proj).weight",
    labels={
        "dinov2.encoder.layer.0.attention.o_proj": "0 attention o",
        "dinov2.encoder.layer.1.mlp.gate_proj": "1 mlp gate",
    },
)  # fmt: skip
other(
    "XLNet", "XLNetLMHeadModel",
    {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, **SPECIAL}, text, 14,
    r"transformer.layer.\d.(rel_attn.[qkvor]|ff.layer_[12].weight)",
    labels={
        "transformer.layer.0.rel_attn.q": "0 attention q",
        "transformer.layer.1.rel_attn.r": "1 attention r",
        "transformer.layer.1.ff.layer_2": "1 mlp down",
    },
    lora=4,
)  # fmt: skip
other(
    "XLM", "XLMWithLMHeadModel",
    {"vocab_size": VOCABULARY, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}, text, 12,
    r"transformer.(attentions.\d.(q|k|v|out)_lin|ffns.\d.lin[12]).weight",
    labels={
        "transformer.attentions.0.q_lin": "0 attention q",
        "transformer.attentions.1.out_lin": "1 attention o",
        "transformer.ffns.1.lin1": "1 mlp up",
    },
)  # fmt: skip
other(
    "ALBERT", "AlbertForMaskedLM", BERT | {"embedding_size": 16}, text, 6,
    r"albert.encoder.albert_layer_groups.0.albert_layers.0.(attention.(query|key|value|dense)|ffn|ffn_output).weight",
    labels={
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense": "0 attention o",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn": "0 mlp up",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output": "0 mlp down",
    },
)  # fmt: skip
other(
    "Mamba", "MambaForCausalLM",
    {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, **SPECIAL}, text, 8,
    r"backbone.layers.\d.mixer.(in|x|dt|out)_proj.weight",
    labels={"backbone.layers.0.mixer.in_proj": "0 mixer in_proj", "backbone.layers.1.mixer.x_proj": "1 mixer x_proj"},
    lora=4, lora_targets=["in_proj", "x_proj"],  # PEFT refuses out_proj, and dt_proj's adapter is never called
)  # fmt: skip
other(
    "Mamba 2", "Mamba2ForCausalLM",
    {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "num_heads": 8,
        "head_dim": 8, "n_groups": 1, "chunk_size": 8, **SPECIAL,
    },
    text, 4, r"backbone.layers.\d.mixer.(in|out)_proj.weight",
    labels={"backbone.layers.1.mixer.out_proj": "1 mixer out_proj"},
    lora=2, lora_targets=["in_proj"],
)  # fmt: skip
other(
    "RWKV", "RwkvForCausalLM",
    {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
        "context_length": 16, **SPECIAL,
    },
    text, 14, r"rwkv.blocks.\d.(attention.(key|value|receptance|output)|feed_forward.(key|value|receptance)).weight",
    labels={
        "rwkv.blocks.0.attention.key": "0 attention k",
        "rwkv.blocks.1.attention.receptance": "1 attention receptance",
        "rwkv.blocks.1.feed_forward.value": "1 mlp value",
    },
)  # fmt: skip
other(
    "xLSTM", "xLSTMForCausalLM",
    {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4,
        "mode": "train", "chunk_size": 4, **SPECIAL,
    },
    text, 20,
    r"backbone.blocks.\d.(mlstm_layer.(q|k|v|[oif]gate_preact|out_proj)|ffn.proj_(up_gate|up|down)).weight",
    labels={
        "backbone.blocks.0.mlstm_layer.q": "0 mixer q",
        "backbone.blocks.0.ffn.proj_up_gate": "0 mlp gate",
        "backbone.blocks.1.ffn.proj_down": "1 mlp down",
    },
)  # fmt: skip
other(
    "Jamba", "JambaForCausalLM",
    LLAMA | {
        "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16, "use_mamba_kernels": False,
    },
    text, 13,
    r"model.layers.\d.(mamba.(in|x|dt|out)_proj.weight|self_attn.[qkvo]_proj.weight"
    r"|feed_forward.(gate|up|down)_proj.weight|feed_forward.experts.(gate_up|down)_proj)",
    labels={
        "model.layers.0.mamba.in_proj": "0 mixer in_proj",
        "model.layers.0.feed_forward.up_proj": "0 mlp up",
        "model.layers.1.self_attn.q_proj": "1 attention q",
        "model.layers.1.feed_forward.experts.down_proj": "1 experts down",
    },
    lora=11, idle=r".*\.mamba\.dt_proj",  # its adapter is never called
)  # fmt: skip
other(
    "Falcon-H1", "FalconH1ForCausalLM",
    LLAMA | {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    text, 18,
    r"model.layers.\d.(mamba.(in|out)_proj|self_attn.[qkvo]_proj|feed_forward.(gate|up|down)_proj).weight",
    labels={
        "model.layers.0.mamba.in_proj": "0 mixer in_proj",
        "model.layers.0.self_attn.o_proj": "0 attention o",
        "model.layers.1.feed_forward.gate_proj": "1 mlp gate",
    },
    lora=16,  # PEFT refuses out_proj
    lora_targets=["in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)  # fmt: skip
other(
    "Zamba 2", "Zamba2ForCausalLM",
    LLAMA | {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
        "mamba_d_state": 4, "mamba_headdim": 8, "n_mamba_heads": 8, "adapter_rank": 4, "chunk_size": 8,
        "use_mem_rope": False,
    },
    text, 15,
    r"model.layers.\d.(mamba.(in|out)_proj|mamba_decoder.mamba.(in|out)_proj|linear"
    r"|shared_transformer.self_attn.[qkvo]_proj|shared_transformer.feed_forward.(gate_up|down)_proj"
    r"|shared_transformer.feed_forward.gate_up_proj_adapter_list.\d.\d).weight",
    labels={
        "model.layers.0.mamba.in_proj": "0 mixer in_proj",
        "model.layers.1.mamba_decoder.mamba.out_proj": "1 mixer out_proj",
        "model.layers.1.shared_transformer.self_attn.q_proj": "1 attention q",
        "model.layers.1.shared_transformer.feed_forward.gate_up_proj": "1 mlp gate_up",
    },
)  # fmt: skip
other(
    "RecurrentGemma", "RecurrentGemmaForCausalLM", LLAMA | {"lru_width": 32, "num_hidden_layers": 3}, text, 23,
    r"model.layers.\d.(temporal_block.(linear_(x|y|out)|[qkvo]_proj).weight|mlp_block.(gate|up|down)_proj.weight"
    r"|temporal_block.rg_lru.(input|recurrent)_gate_weight)",
    labels={
        "model.layers.0.temporal_block.linear_x": "0 mixer linear_x",
        "model.layers.1.temporal_block.rg_lru.input_gate_weight": "1 mixer input_gate_weight",
        "model.layers.2.temporal_block.q_proj": "2 attention q",
        "model.layers.2.mlp_block.down_proj": "2 mlp down",
    },
    lora=19,
)  # fmt: skip
other(
    "DBRX", "DbrxForCausalLM",
    {
        "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, **SPECIAL,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    text, 10, r"transformer.blocks.\d.(norm_attn_norm.attn.(Wqkv|out_proj).weight|ffn.experts.mlp.(w1|v1|w2))",
    labels={
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv": "0 attention qkv",
        "transformer.blocks.1.ffn.experts.mlp.w1": "1 experts gate",
        "transformer.blocks.1.ffn.experts.mlp.v1": "1 experts up",
        "transformer.blocks.1.ffn.experts.mlp.w2": "1 experts down",
    },
    lora=4,
)  # fmt: skip
other(
    "Llama 4", "Llama4ForCausalLM",
    LLAMA | {"num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}, text, 16,
    r"model.layers.\d.(self_attn.[qkvo]_proj.weight|feed_forward.(shared_expert.)?(gate|up|down)_proj.weight"
    r"|feed_forward.experts.(gate_up|down)_proj)",
    labels={
        "model.layers.0.feed_forward.gate_proj": "0 mlp gate",
        "model.layers.1.feed_forward.experts.gate_up_proj": "1 experts gate_up",
        "model.layers.1.feed_forward.shared_expert.down_proj": "1 mlp down",
    },
    lora=14, lora_targets=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)  # fmt: skip
SHARED_EXPERT = (
    rf"model.layers.\d.({ATTENTION}.weight|mlp.shared_expert.(gate|up|down)_proj.weight"
    r"|mlp.experts.(gate_up|down)_proj)"
)
other(
    "Qwen2-MoE", "Qwen2MoeForCausalLM", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 24}, text, 18,
    SHARED_EXPERT,
    labels=MOE_LABELS | {"model.layers.1.mlp.shared_expert.up_proj": "1 mlp up"}, lora=14,
)  # fmt: skip
other(
    "Qwen3-Next", "Qwen3NextForCausalLM",
    LLAMA | EXPERTS | {  # like the real one with as many experts as the shared expert has features
        "shared_expert_intermediate_size": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    text, 17,
    r"model.layers.\d.(linear_attn.(in_proj_qkvz|in_proj_ba|out_proj).weight|self_attn.[qkvo]_proj.weight"
    r"|mlp.shared_expert.(gate|up|down)_proj.weight|mlp.experts.(gate_up|down)_proj)",
    labels={
        "model.layers.0.linear_attn.in_proj_ba": "0 attention in_proj_ba",
        "model.layers.0.linear_attn.out_proj": "0 attention o",
        "model.layers.1.self_attn.q_proj": "1 attention q",
        "model.layers.0.mlp.shared_expert.gate_proj": "0 mlp gate",
        "model.layers.0.mlp.experts.gate_up_proj": "0 experts gate_up",
    },
    lora=11,
)  # fmt: skip
other(
    "JetMoe", "JetMoeForCausalLM", LLAMA | EXPERTS | {"kv_channels": 8}, text, 10,
    r"model.layers.\d.(mlp.(in|out)put_linear|self_attention.experts.(in|out)put_linear|self_attention.kv_proj).weight",
    labels={
        "model.layers.0.mlp.input_linear": "0 experts gate_up",
        "model.layers.1.self_attention.experts.output_linear": "1 experts down",
        "model.layers.1.self_attention.kv_proj": "1 attention kv_proj",
    },
    lora=2,
)  # fmt: skip
other(
    "GraniteMoE", "GraniteMoeForCausalLM", LLAMA | EXPERTS, text, 12,
    r"model.layers.\d.(self_attn.[qkvo]_proj.weight|block_sparse_moe.experts.(gate_up|down)_proj)",
    labels={
        "model.layers.0.self_attn.v_proj": "0 attention v",
        "model.layers.1.block_sparse_moe.experts.gate_up_proj": "1 experts gate_up",
    },
    lora=8,
)  # fmt: skip
other(
    "Switch", "SwitchTransformersForConditionalGeneration",
    T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}, sequences, 44,
    r"(en|de)coder.block.\d.layer.\d.((SelfAttention|EncDecAttention).[qkvo]|mlp.(experts.expert_\d.)?w[io]).weight",
    labels={
        "encoder.block.0.layer.1.mlp.wi": "0 mlp up encoder",
        "encoder.block.1.layer.1.mlp.experts.expert_3.wo": "1 experts down encoder",
        "decoder.block.1.layer.1.EncDecAttention.k": "1 attention k decoder",
    },
    idle=r".*\.experts\..*",
)  # fmt: skip
other(
    "NLLB-MoE", "NllbMoeForConditionalGeneration",
    BART | {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64}, sequences, 44,
    r"model.(en|de)coder.layers.\d.((self_attn|cross_attention).(q|k|v|out)_proj|ffn.(experts.expert_\d.)?fc[12]).weight",
    labels={
        "model.encoder.layers.0.ffn.fc1": "0 mlp up encoder",
        "model.decoder.layers.1.ffn.experts.expert_0.fc2": "1 experts down decoder",
    },
    idle=r".*\.experts\..*",
)  # fmt: skip
other(
    "MPT", "MptForCausalLM", {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    text, 8, r"transformer.blocks.\d.(attn.(Wqkv|out_proj)|ffn.(up|down)_proj).weight",
    labels={"transformer.blocks.0.attn.Wqkv": "0 attention qkv", "transformer.blocks.1.ffn.down_proj": "1 mlp down"},
)  # fmt: skip
other(
    "GPT-J", "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}, text, 12,
    r"transformer.h.\d.(attn.(q|k|v|out)_proj|mlp.fc_(in|out)).weight",
    labels={"transformer.h.0.attn.out_proj": "0 attention o", "transformer.h.1.mlp.fc_in": "1 mlp up"},
)  # fmt: skip
other(
    "GPTBigCode", "GPTBigCodeForCausalLM", GPT2, text, 8,
    r"transformer.h.\d.(attn.(c_attn|c_proj)|mlp.(c_fc|c_proj)).weight",
    labels={"transformer.h.0.attn.c_attn": "0 attention qkv", "transformer.h.1.mlp.c_proj": "1 mlp down"},
)  # fmt: skip
other("StableLM", "StableLmForCausalLM", LLAMA | {"qk_layernorm": True}, text, 14, LLAMA_WEIGHTS, labels=LLAMA_LABELS)
other("Cohere 2", "Cohere2ForCausalLM", LLAMA, text, 14, LLAMA_WEIGHTS, labels=LLAMA_LABELS)
other(
    "Gemma 3n", "Gemma3nForCausalLM",
    LLAMA | {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "intermediate_size": [48, 48], "altup_num_inputs": 2,
        "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0],
    },
    text, 26,
    rf"model.layers.\d.({ATTENTION}|{GATED}|altup.(correction|prediction)_coefs|laurel.linear_(left|right)"
    r"|per_layer_(input_gate|projection)).weight",
    labels=LLAMA_LABELS | {"model.layers.0.laurel.linear_left": "0 mlp linear_left"},
    idle=r".*\.altup\.correction_coefs",
)  # fmt: skip
other("ELECTRA", "ElectraForSequenceClassification", BERT | {"embedding_size": 16}, classes, 12,
         "electra." + BERT_LAYER, labels=bert_labels("electra"))  # fmt: skip
other(
    "ConvBERT", "ConvBertForSequenceClassification", BERT | {"embedding_size": 16, "head_ratio": 2}, classes, 16,
    r"convbert.encoder.layer.\d.(attention.self.(query|key|value|conv_kernel_layer|conv_out_layer)"
    r"|(attention.output|intermediate|output).dense).weight",
    labels={
        "convbert.encoder.layer.0.attention.self.conv_out_layer": "0 attention conv_out_layer",
        "convbert.encoder.layer.1.intermediate.dense": "1 mlp up",
    },
)  # fmt: skip
other(
    "DistilBERT", "DistilBertForMaskedLM",
    {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, text, 12,
    r"distilbert.transformer.layer.\d.(attention.(q|k|v|out)_lin|ffn.lin[12]).weight",
    labels={
        "distilbert.transformer.layer.0.attention.out_lin": "0 attention o",
        "distilbert.transformer.layer.1.ffn.lin2": "1 mlp down",
    },
)  # fmt: skip
other(
    "Funnel", "FunnelForMaskedLM",
    {
        "vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1],
        "num_decoder_layers": 1,
    },
    text, 21,
    r"funnel.(encoder.blocks.\d|decoder.layers).\d.(attention.(r_kernel|([qkv]_head|post_proj).weight)"
    r"|ffn.linear_[12].weight)",
    labels={
        "funnel.encoder.blocks.1.0.attention.q_head": "1 attention q encoder",
        "funnel.decoder.layers.0.attention.post_proj": "0 attention o decoder",
        "funnel.decoder.layers.0.ffn.linear_1": "0 mlp up decoder",
    },
    lora=18,
)  # fmt: skip
other(
    "MobileBERT", "MobileBertForMaskedLM",
    BERT | {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}, text, 30,
    r"mobilebert.encoder.layer.\d.(attention.self.(query|key|value)|attention.output.dense|(ffn.\d.)?intermediate.dense"
    r"|(ffn.\d.)?output.dense|output.bottleneck.dense|bottleneck.(input|attention).dense).weight",
    labels={
        "mobilebert.encoder.layer.0.attention.self.query": "0 attention q",
        "mobilebert.encoder.layer.1.ffn.2.intermediate.dense": "1 mlp up",
    },
)  # fmt: skip
other(
    "Longformer", "LongformerForMaskedLM", BERT | {"attention_window": 4}, text, 18,
    r"longformer.encoder.layer.\d.(attention.self.(query|key|value)(_global)?"
    r"|(attention.output|intermediate|output).dense).weight",
    labels=bert_labels("longformer")
    | {"longformer.encoder.layer.0.attention.self.query_global": "0 attention query_global"},
    idle=r".*_global",
)  # fmt: skip
other(
    "ProphetNet", "ProphetNetForConditionalGeneration",
    {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64, **SPECIAL,
    },
    sequences, 34,
    r"prophetnet.(en|de)coder.layers.\d.((self|cross)_attn.((query|key|value|out)_proj|relative_pos_embeddings)"
    r"|feed_forward.(intermediate|output)).weight",
    labels={
        "prophetnet.encoder.layers.0.self_attn.query_proj": "0 attention q encoder",
        "prophetnet.decoder.layers.1.cross_attn.out_proj": "1 attention o decoder",
        "prophetnet.decoder.layers.1.feed_forward.output": "1 mlp down decoder",
    },
)  # fmt: skip
for _name, _class, _root in (("Wav2Vec2", "Wav2Vec2ForCTC", "wav2vec2"), ("HuBERT", "HubertForCTC", "hubert")):
    other(
        _name, _class, WAV, waveform, 12,
        _root + r".encoder.layers.\d.(attention.(q|k|v|out)_proj|feed_forward.(intermediate|output)_dense).weight",
        labels={
            f"{_root}.encoder.layers.0.attention.q_proj": "0 attention q",
            f"{_root}.encoder.layers.1.feed_forward.output_dense": "1 mlp down",
        },
    )  # fmt: skip
other(
    "Wav2Vec2-BERT", "Wav2Vec2BertForCTC",
    {
        "vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "feature_projection_input_dim": 8, "position_embeddings_type": "relative", "mask_time_prob": 0.0,
        "layerdrop": 0.0, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
    },
    lambda: {"input_features": torch.randn(2, 12, 8), "labels": torch.randint(1, 20, (2, 3))}, 18,
    r"wav2vec2_bert.encoder.layers.\d.(self_attn.linear_(q|k|v|out|pos)|ffn[12].(intermediate|output)_dense).weight",
    labels={
        "wav2vec2_bert.encoder.layers.0.self_attn.linear_out": "0 attention o",
        "wav2vec2_bert.encoder.layers.1.ffn2.intermediate_dense": "1 mlp up",
    },
)  # fmt: skip
other(
    "SpeechT5", "SpeechT5ForSpeechToText",
    {k: v for k, v in WAV.items() if k not in ("num_hidden_layers", "num_attention_heads", "intermediate_size")} | {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_speech_positions": 64, "max_text_positions": 64,
        "encoder_max_relative_position": 8, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "decoder_start_token_id": 2, "mask_feature_prob": 0.0,
    },
    speech_to_text, 32,
    r"speecht5.(en|de)coder.wrapped_(en|de)coder.layers.\d.((attention|self_attn|encoder_attn).(q|k|v|out)_proj"
    r"|feed_forward.(intermediate|output)_dense).weight",
    labels={
        "speecht5.encoder.wrapped_encoder.layers.0.attention.q_proj": "0 attention q encoder",
        "speecht5.decoder.wrapped_decoder.layers.1.encoder_attn.out_proj": "1 attention o decoder",
    },
)  # fmt: skip
QFORMER_LABELS = {
    "vision_model.encoder.layers.0.self_attn.qkv": "0 attention qkv vision",
    "vision_model.encoder.layers.1.self_attn.projection": "1 attention o vision",
    "qformer.encoder.layer.0.crossattention.attention.key": "0 attention k qformer",
    "qformer.encoder.layer.1.output_query.dense": "1 mlp down qformer",
    "language_model.model.decoder.layers.1.fc1": "1 mlp up language",
}
other(
    "BLIP-2", "Blip2ForConditionalGeneration",
    {
        "vision_config": VIT, "qformer_config": BERT | {"encoder_hidden_size": 32},
        "text_config": BERT | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
        "num_query_tokens": 4, "image_token_index": 98,
    },
    with_image(4), 36,
    r"vision_model.encoder.layers.\d.(self_attn.(qkv|projection)|mlp.fc[12]).weight"
    r"|qformer.encoder.layer.\d.((cross)?attention.(attention.(query|key|value)|output.dense)"
    r"|(intermediate|output)_query.dense).weight"
    r"|language_model.model.decoder.layers.\d.(self_attn.(q|k|v|out)_proj|fc[12]).weight",
    labels=QFORMER_LABELS,
)  # fmt: skip
other(
    "PaliGemma", "PaliGemmaForConditionalGeneration",
    {
        "vision_config": VIT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": LLAMA | {"model_type": "gemma"}, "projection_dim": 32, "image_token_index": 98,
    },
    with_image(4, token_type_ids=lambda: torch.cat([torch.zeros(2, 8), torch.ones(2, 8)], 1).long()), 26,
    r"model.(vision_tower.encoder." + CLIP_LAYER + "|language_model." + LLAMA_LAYER + ")",
    labels=tower_labels("model.vision_tower.encoder.layers", "vision")
    | llama_labels("model.language_model.layers", "language"),
)  # fmt: skip
other(
    "Mllama", "MllamaForConditionalGeneration",
    {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 16, "patch_size": 8, "vision_output_dim": 64,
            "intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]],
        },
        "text_config": LLAMA | {
            "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
        },
        "image_token_index": 98,
    },
    lambda: {
        **text(), "pixel_values": torch.randn(2, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(2, 1).long(),
        "aspect_ratio_mask": torch.ones(2, 1, 1).long(), "cross_attention_mask": torch.ones(2, 12, 1, 1).long(),
    },
    32,
    r"model.vision_model.(global_)?transformer.layers.\d.(self_attn.[qkvo]_proj|mlp.fc[12]).weight"
    r"|model.language_model.layers.\d.((self|cross)_attn.[qkvo]_proj|mlp.(gate|up|down)_proj).weight",
    labels={
        "model.vision_model.global_transformer.layers.0.mlp.fc1": "0 mlp up vision",
        "model.language_model.layers.1.cross_attn.q_proj": "1 attention q language",
    },
    idle=r".*\.cross_attn\..*|model\.vision_model\..*|model\.language_model\.layers\.1\.mlp\..*",  # gates begin at 0
)  # fmt: skip
other(
    "Qwen2-Audio", "Qwen2AudioForConditionalGeneration",
    {
        "audio_config": {
            "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8,
            "max_source_positions": 16,
        },
        "text_config": LLAMA | {"model_type": "qwen2"}, "audio_token_index": 98,
    },
    lambda: {
        **{k: v for k, v in with_image(8)().items() if k != "pixel_values"},
        "input_features": torch.randn(2, 8, 32), "feature_attention_mask": torch.ones(2, 32).long(),
    },
    26,
    r"model.(audio_tower.layers.\d.(self_attn.(q|k|v|out)_proj|fc[12]).weight|language_model." + LLAMA_LAYER + ")",
    labels=tower_labels("model.audio_tower.layers", "audio", up="fc1", down="fc2")
    | llama_labels("model.language_model.layers", "language"),
)  # fmt: skip
other(
    "Qwen3-VL", "Qwen3VLForConditionalGeneration",
    {
        "text_config": LLAMA | {"rope_parameters": MROPE},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "depth": 3, "num_heads": 4, "out_hidden_size": 32,
            "patch_size": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
        },
        **QWEN_TOKENS,
    },
    qwen_vl_image, 26,
    r"model.(visual.blocks.\d.(attn.(qkv|proj)|mlp.linear_fc[12]).weight|language_model." + LLAMA_LAYER + ")",
    labels={
        "model.visual.blocks.0.attn.qkv": "0 attention qkv vision",
        "model.visual.blocks.2.mlp.linear_fc2": "2 mlp down vision",
        **llama_labels("model.language_model.layers", "language"),
    },
)  # fmt: skip
other(
    "DETR", "DetrForObjectDetection",
    {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 4, "use_timm_backbone": False,
        "backbone_config": {
            "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
            "out_features": ["stage2"],
        },
    },
    lambda: {
        "pixel_values": torch.randn(2, 3, 32, 32),
        "labels": [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2,
    },
    32, r"model.(en|de)coder.layers.\d.((self|encoder)_attn.[qkvo]_proj|mlp.fc[12]).weight",
    labels={
        "model.encoder.layers.0.self_attn.q_proj": "0 attention q encoder",
        "model.decoder.layers.1.encoder_attn.o_proj": "1 attention o decoder",
    },
)  # fmt: skip

# --- not from transformers ---------------------------------------------------------------------------------------


class TorchClassifier(nn.Module):
    """torch's own transformer, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 2)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.encoder(inputs).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(attended.transpose(1, 2).reshape(rows, length, width))


class ScaleNorm(nn.Module):
    """A norm that its class does not call one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = ScaleNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.ln_2 = ScaleNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class SmallGPT(nn.Module):
    """A GPT as people write it by hand, with tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, 32),
                "wpe": nn.Embedding(64, 32),
                "h": nn.ModuleList([GPTBlock(32, 4) for _ in range(2)]),
                "ln_f": ScaleNorm(32),
            }
        )
        self.lm_head = nn.Linear(32, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](positions)
        for block in self.transformer["h"]:
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss / math.log(VOCABULARY), "logits": logits}


add(
    "nn.TransformerEncoder", TorchClassifier,
    lambda: {"inputs": torch.randn(2, 6, 32), "labels": torch.tensor([0, 1])}, 8,
    r"encoder.layers.\d.(self_attn.in_proj_weight|self_attn.out_proj.weight|linear[12].weight)",
    labels={
        "encoder.layers.0.self_attn.in_proj_weight": "0 attention qkv",
        "encoder.layers.1.self_attn.out_proj": "1 attention o",
        "encoder.layers.1.linear1": "1 mlp up",
        "encoder.layers.0.linear2": "0 mlp down",
    },
    lora=4, listed=False, lora_targets=["linear1", "linear2"],
)  # fmt: skip
add(
    "a GPT by hand", SmallGPT, text, 8, r"transformer.h.\d.(attn.(c_attn|c_proj)|mlp.[02]).weight",
    labels={
        "transformer.h.0.attn.c_attn": "0 attention qkv",
        "transformer.h.1.attn.c_proj": "1 attention o",
        "transformer.h.1.mlp.0": "1 mlp mlp",
    },
    listed=False,
)  # fmt: skip
