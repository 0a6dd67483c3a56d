"""What is trained changes during a run: what opens is tracked, what never takes part does not count."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from grades_hf import GradES, GradESConfig
from tests import small, toy
from tests.small import lora

STEPS = 10


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("grades_hf") and r.levelno >= logging.WARNING]


def steps(engine: GradES, model: nn.Module, optimizer: torch.optim.Optimizer, **inputs: Any) -> Iterator[int]:
    """A plain loop, to its planned end or that of the engine; gives each step's number before it."""
    for t in range(1, engine.total_steps + 1):
        yield t
        model(**inputs).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        if engine.done:
            return


def ids(rows: int = 4) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(small.tokens(rows)["input_ids"])
    return {"input_ids": tokens, "labels": tokens}


def toy_batch(use: int = 99) -> dict[str, Any]:
    return {**toy.batches(0)[0][0], "use": use}


# --- matrices that never take part -------------------------------------------------------------------------------


def gemma3() -> nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "sliding_window": 8,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    return Gemma3ForConditionalGeneration(config)


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=63))


def qwen2_5_vl() -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    options = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **options))


def led() -> nn.Module:
    from transformers import LEDConfig, LEDForConditionalGeneration

    return LEDForConditionalGeneration(
        LEDConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=64, attention_window=4,
            max_encoder_position_embeddings=32, max_decoder_position_embeddings=32, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, decoder_start_token_id=2,
        )
    )  # fmt: skip


def two_adapters() -> nn.Module:
    """The second adapter is trainable, but not active."""
    model = toy.build("lora")
    model.base_model.model.head.requires_grad_(False)
    model.add_adapter("other", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(".other." in name)
        elif "lora_" in name:
            parameter.requires_grad_(".default." in name)
    return model.double()


IDLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "Gemma 3 on text": (lambda: lora(gemma3()), ids(), "vision"),
    "LLaVA on text": (lambda: lora(llava()), ids(), "vision"),
    "Qwen2.5-VL on text": (lambda: lora(qwen2_5_vl()), ids(), "vision"),
    "LED without global attention": (lambda: lora(led()), ids(), "global"),
    "idle blocks": (lambda: toy.build("lora"), toy_batch(1), "layers.1."),
    "an adapter that is not active": (two_adapters, toy_batch(), "layers.1."),
}


@pytest.mark.compatibility("Faults", "towers, experts or adapters that no batch involves (a VLM on text)", "works")
@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointing", "reentrant"])
def test_the_run_ends_when_all_that_takes_part_is_frozen(checkpointing, name, caplog):
    make, inputs, idle = IDLE[name]
    model = make().train()
    if checkpointing is not None:
        if not hasattr(model, "enable_input_require_grads") or isinstance(inputs.get("use"), int):
            pytest.skip("a toy has no checkpointing")
        small.enable_checkpointing(model, checkpointing)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" not in parameter_name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine = GradES(model, GradESConfig(tau=1e9, alpha=0.3), total_steps=STEPS, optimizer=optimizer)
    for _ in steps(engine, model, optimizer, **inputs):
        pass
    assert engine.done
    assert engine.t == 4
    never = [c for c in engine.components if c.name not in engine.frozen]
    assert never
    assert all(idle in f"{c.tower} {c.name}" for c in never)
    assert engine.frozen_fraction == 1
    (line, end, _) = messages(caplog)
    assert f"{len(never)} of {len(engine.components)} components have had no gradient in 3 steps" in line
    assert f"({len(never)} have never had a gradient)" in end
    engine.close()


def test_without_a_tau_only_what_takes_part_votes():
    model = toy.build("lora")
    optimizer = toy.optimize("sgd", model)

    def losses(model: nn.Module) -> torch.Tensor:
        return torch.tensor([1.0, 2.0])

    engine = GradES(model, GradESConfig(rise=1e-9), total_steps=60, optimizer=optimizer, held_out=losses)
    for t in steps(engine, model, optimizer, **toy_batch(1)):
        if t == 20:
            engine.ending.looks.clear()
            engine.ending.consider(2)
            (look,) = engine.ending.looks
    assert (look["components"], look["votes"]) == (4, 2)
    engine.close()


def test_batches_of_what_is_frozen_are_no_error(caplog):
    """Two adapters trained in turn: when one is frozen, its batches teach nothing, and the run goes on."""
    model = toy.Toy()
    model.requires_grad_(False)
    for block in model.model.layers:
        block.mlp.requires_grad_(True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    tau = {".*layers\\.0\\..*": 1e9, ".*": 1e-30}
    engine = GradES(model, GradESConfig(tau=tau, alpha=0.3), total_steps=STEPS, optimizer=optimizer)
    batch = toy.batches(0)[0][0]
    for t in range(1, STEPS + 1):
        model(**{**batch, "use": 1 if t % 2 else 2}).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert len(engine.frozen) == 2
    assert not engine.done
    engine.close()
    assert not model(**batch).loss.is_leaf


# --- what opens later --------------------------------------------------------------------------------------------


def closed(model: nn.Module, layer: int = 1) -> list[nn.Parameter]:
    """Close a block; its parameters."""
    parameters = [p for name, p in model.named_parameters() if f"layers.{layer}." in name]
    for parameter in parameters:
        parameter.requires_grad_(False)
    return parameters


def values(engine: GradES, part: str) -> list[list[bool]]:
    return [[v == v for v in series] for name, series in engine.history.values.items() if part in name]


@pytest.mark.compatibility("Faults", "blocks that are opened in the course of a run", "works")
@pytest.mark.parametrize("grouped", [True, False], ids=["all in the optimizer", "groups added later"])
@pytest.mark.parametrize("options", [{}, {"sample_size": 4}, {"monitor": "gradient_norm"}, {"delay_transfer": True}])
def test_what_opens_is_tracked_from_then_on(options, grouped):
    model = toy.build("full")
    everything = list(model.parameters())
    late = closed(model)
    optimizer = torch.optim.AdamW(everything if grouped else [p for p in everything if p.requires_grad], lr=1e-3)
    config = GradESConfig(tau={"attention": 1e9, "mlp": 1e-30}, alpha=0.5, **options)
    engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
    assert len(engine.components) == 4
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t == 4:
            for parameter in late:
                parameter.requires_grad_(True)
            if not grouped:
                optimizer.add_param_group({"params": late})
    assert len(engine.components) == 8
    assert engine.took_part.all()
    delayed = bool(options.get("delay_transfer"))
    assert engine.frozen == dict.fromkeys((c.name for c in engine.components if c.group == "attention"), 6 + delayed)
    assert {c.tau for c in engine.components if "layers.1" in c.name} == {1e9, 1e-30}
    first = 3 if options.get("monitor") == "gradient_norm" else 4  # the check at step 4 has nothing to compare with
    engine.flush()
    assert all(not any(series[:first]) and all(series[first:]) for series in values(engine, "layers.1.mlp"))
    fresh = [p for c in engine.components if "layers.1" in c.name for p in c.parameters]
    assert all(p.grad is None and not p.requires_grad for p in fresh if p in engine.freezer)
    engine.close()
    assert all(p.requires_grad for p in everything)


def test_what_opens_before_the_end_keeps_the_run_from_ending():
    model = toy.build("full")
    late = closed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = GradES(model, GradESConfig(tau={".*layers\\.0\\..*": 1e9, ".*": 1e-30}, alpha=0.5, monitor="gradient_norm",
                                        target_modules=[f"layers.{i}.{m}" for i in (0, 1) for m in toy.MATRICES]),
                    total_steps=STEPS, optimizer=optimizer)  # fmt: skip
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t == 2:
            for parameter in late:
                parameter.requires_grad_(True)
    assert engine.t == STEPS
    assert len(engine.frozen) == 4


def test_lisa_trains_blocks_in_turn(caplog):
    """One block is open at a time; frozen ones stay frozen when their turn comes again."""
    model = toy.build("full", layers=4)
    blocks = model.model.layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for block in blocks[1:]:
        block.requires_grad_(False)
    engine = GradES(model, GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.5), total_steps=16, optimizer=optimizer)
    before = {}
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t % 2:
            for index, block in enumerate(blocks):
                block.requires_grad_(index == t // 2 % 4)
        for name in engine.frozen:
            weight = model.get_parameter(f"{name}.weight")
            assert torch.equal(before.setdefault(name, weight.detach().clone()), weight)
    assert len(engine.components) == 16
    assert len(engine.frozen) == 4
    assert not engine.done
    assert messages(caplog) == []


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_adapter_is_added(frozen, caplog):
    """It becomes a part of its layer's component; where that is frozen already, a line says that it is not tracked."""
    model = toy.build("lora")
    optimizer = toy.optimize("adamw", model)
    config = GradESConfig(tau=1e9 if frozen else 1e-30, alpha=0.2)
    engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
    with caplog.at_level(logging.WARNING):
        for t in range(1, 8):
            if t == 5:
                model.add_adapter("other", model.peft_config["default"])
                model.double()
                model.base_model.set_adapter(["default", "other"])
                optimizer.add_param_group({"params": [p for n, p in model.named_parameters() if ".other." in n]})
            model(**toy_batch()).loss.backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
    assert len(engine.components) == 8
    told = any("are not tracked, since their components are frozen already" in line for line in messages(caplog))
    assert told == frozen
    assert all(len(c.measured) == (2 if frozen else 4) for c in engine.components)
    engine.close()


def test_what_has_no_threshold_is_told(caplog):
    model = toy.build("full")
    late = closed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = GradES(model, GradESConfig(tau={".*layers\\.0\\..*": 1e-30}), total_steps=STEPS, optimizer=optimizer)
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t == 2:
            for parameter in late:
                parameter.requires_grad_(True)
    assert len(engine.components) == 4
    (line,) = messages(caplog)
    assert "4 matrices that are trained from now on" in line
    assert "tau has no key for them" in line


def test_a_run_without_a_tau_averages_what_opens():
    model = toy.build("full")
    late = closed(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = GradES(model, GradESConfig(), total_steps=40, optimizer=optimizer, held_out=lambda model: torch.ones(2))
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t == 12:
            for parameter in late:
                parameter.requires_grad_(True)
    average = engine.extension("average").tensors()
    assert average.keys() == set(model.parameters())
    assert all(not torch.equal(average[p], p) for p in late)
    assert engine.learned.all()
    engine.close()


@pytest.mark.parametrize("opened", [False, True], ids=["opened again later", "opened before"])
def test_a_resumed_run_knows_what_has_joined(opened, caplog):
    config = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.3)

    def run(first: int, last: int, state: Any = None) -> tuple[GradES, nn.Module]:
        model = toy.build("full")
        late = closed(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        if state is not None:
            model.load_state_dict(state["model"])
            for parameter in late if opened else ():
                parameter.requires_grad_(True)
        engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
        if state is not None:
            engine.load_state_dict(state["engine"])
        for t in range(first, last + 1):
            if t in (2, 6):
                for parameter in late:
                    parameter.requires_grad_(True)
            model(**toy_batch()).loss.backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        return engine, model

    whole, reference = run(1, STEPS)
    half, model = run(1, 5)
    assert len(half.frozen) == 2
    state = {"model": model.state_dict(), "engine": half.state_dict()}
    resumed, model = run(6, STEPS, state)
    assert resumed.frozen == whole.frozen
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert {c.name: c.frozen_at for c in resumed.components} == {c.name: c.frozen_at for c in whole.components}


# --- parameters that are replaced ----------------------------------------------------------------------------------


@pytest.mark.compatibility("Faults", "tracked parameters that are replaced by new objects during a run", "refused")
@pytest.mark.parametrize("how", ["new parameter", "conversion", "module taken out"])
def test_replaced_parameters_are_refused(how, monkeypatch):
    monkeypatch.setattr("grades_hf.find.changes.LOOK_EVERY", 3)
    model = toy.build("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = GradES(model, GradESConfig(tau=1e-30), total_steps=STEPS, optimizer=optimizer)
    for t in range(1, 4):
        if t == 3 and how == "new parameter":
            projection = model.model.layers[0].mlp.up_proj
            projection.weight = nn.Parameter(projection.weight.detach().clone())
        elif t == 3 and how == "conversion":
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                model.float()
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(False)
            break
        elif t == 3:
            model.model.layers = model.model.layers[:1]
        model(**toy_batch()).loss.backward()
        if t < 3:
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="are not the model's any more"):
        engine.step()
    engine.close()


def test_parameters_that_only_move_stay_tracked():
    """A parametrization (weight norm, spectral norm, LoRA by hand) keeps the parameter in another place."""

    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = toy.build("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    engine = GradES(model, GradESConfig(tau=1e-30), total_steps=STEPS, optimizer=optimizer)
    for t in steps(engine, model, optimizer, **toy_batch()):
        if t == 3:
            torch.nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", Twice())
    assert engine.t == STEPS
    assert all(all(series[1:]) for series in values(engine, "layers"))


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.float])
@pytest.mark.parametrize("monitor", ["gradient_change", "gradient_norm", "weight_change"])
def test_a_conversion_in_place(convert, monitor):
    model = toy.build("full")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = GradESConfig(tau={"q": 1e9, ".*": 1e-30}, alpha=0.3, monitor=monitor)
    engine = GradES(model, config, total_steps=STEPS, optimizer=optimizer)
    batch = toy_batch()
    for t in range(1, STEPS + 1):
        if t == 6:
            convert(model)
            dtype = next(model.parameters()).dtype
            batch = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        model(**batch).loss.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
    assert set(engine.frozen.values()) == {4}
    assert len(engine.frozen) == 2
    engine.close()
